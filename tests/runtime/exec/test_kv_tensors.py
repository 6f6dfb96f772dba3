"""K and V that are taken over arrive where they should, whole pages or token by token."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from blockzoo.engines.arrays import Arrays, HostArrays
from blockzoo.engines.reference.arrays import TorchArrays
from blockzoo.runtime.approx.state import Borrowed
from blockzoo.runtime.exec.kv_tensors import KVTensors, rotation_by, whole_pages

ANGLES = np.arange(200)[:, None] / 10000 ** (np.arange(8) / 8)
COS, SIN = (np.tile(f(ANGLES), 2).astype(np.float32) for f in (np.cos, np.sin))
LAYERS, PAGES, OWN = 2, 24, 5  # the first of the pool are donors'; the last are the sequence's, in each layer


def drawn(rng: random.Random) -> Borrowed:
    """Runs of donors, some in place, some moved, some beside another donor's within a page."""
    positions, pages, slots, shift = [], [], [], []
    end = 0
    while end < 32 * OWN:
        start, moved = end + rng.choice([0, 0, 3, 20]), rng.choice([0, 0, 0, -32, 5])
        end = min(32 * OWN, start + rng.choice([16, 40, 64, 90]))
        table = rng.sample(range(14), 8)
        for position in range(start, end):
            place = position - moved + 64
            positions.append(position)
            pages.append([(table[place // 32 - 1] + layer) % 14 for layer in range(LAYERS)])
            slots.append(place % 32)
            shift.append(moved)
    return Borrowed(np.array(positions), np.array(pages).T, np.array(slots), np.array(shift))


@pytest.mark.parametrize("kind", ["host", "torch"])
def test_what_is_taken_over_is_what_lay_there(kind: str) -> None:
    arrays: Arrays = HostArrays("f32") if kind == "host" else TorchArrays(torch.device("cpu"), "f32")
    pool = {name: arrays.pages(PAGES, 2, 16) for name in ("key_cache", "value_cache")}
    kv = KVTensors(pool, PAGES, {0: (COS, SIN)}, arrays)
    before = np.random.default_rng(0).normal(size=(2, PAGES, 2, 32, 16)).astype(np.float32)
    own = np.array([[14, 16, 18, 20, 22], [15, 17, 19, 21, 23]], np.int32)
    num_whole = 0
    for seed in range(30):
        kv.write(np.arange(PAGES), *before)
        borrowed = drawn(random.Random(seed))
        kv.borrow(0, borrowed, own)
        expected = before.copy()
        for index, position in enumerate(borrowed.positions):
            turn = rotation_by(borrowed.shift[index : index + 1], COS, SIN)
            for layer in range(LAYERS):
                source = before[:, borrowed.pages[layer, index], :, borrowed.slots[index]]
                turned = arrays.to_host(arrays.rotated(arrays.activations(source[:1]), *turn))
                to = own[layer, position // 32], slice(None), position % 32
                expected[0][to], expected[1][to] = turned[0], source[1]
        keys, values = kv.read(np.arange(PAGES))
        np.testing.assert_allclose(keys, expected[0], atol=1e-6)
        np.testing.assert_array_equal(values, expected[1])
        num_whole += len(whole_pages(borrowed)[0])
    assert num_whole >= 15
