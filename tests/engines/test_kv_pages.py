"""KV in 8 bits and in f16: what pages hold is what OpenVINO writes and reads, in numpy and in torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blockzoo.engines import kv_pages
from blockzoo.engines.base import EngineError, EngineMaker
from blockzoo.engines.choose import make_engines
from blockzoo.engines.kv_pages import pack_u8, page_bytes, page_width, unpack_u8
from blockzoo.engines.openvino import OpenVINOEngines
from blockzoo.engines.probe import ProbeChain
from blockzoo.engines.reference import ReferenceEngines
from blockzoo.engines.reference import pages as torch_pages
from blockzoo.zoo.blocks import Block
from blockzoo.zoo.model_config import ModelConfig
from blockzoo.zoo.store import Zoo

RNG = np.random.default_rng(0)
IDS = RNG.integers(2, 2048, 90).tolist()


def test_values_come_back_to_half_a_step() -> None:
    values = (RNG.standard_normal((40, 3, 64)) * 10.0 ** RNG.integers(-3, 4, (40, 3, 1))).astype(np.float32)
    values[7] = 2.5  # all equal
    values[8] = 0
    values[9] += 1000  # far from zero
    packed = pack_u8(values)
    assert (packed.dtype, packed.shape) == (np.uint8, (40, 3, 72))
    step = (values.max(-1) - values.min(-1)) / 255
    bound = 0.5001 * step + 1e-6 * np.abs(values).max(-1)
    assert (np.abs(unpack_u8(packed) - values).max(-1) <= bound).all()
    np.testing.assert_allclose(unpack_u8(packed)[7:9], values[7:9], rtol=1e-6)
    np.testing.assert_array_equal(unpack_u8(np.zeros((2, 72), np.uint8)), 0)  # pages never written to


def test_torch_packs_the_same_bytes() -> None:
    values = RNG.standard_normal((50, 2, 32)).astype(np.float32)
    values[3] = 1
    packed = torch_pages.pack_u8(torch.from_numpy(values)).numpy()
    expected = pack_u8(values)
    np.testing.assert_array_equal(packed[..., :8], expected[..., :8])
    steps = np.abs(packed[..., 8:].astype(int) - expected[..., 8:])  # one product more or less is fused
    assert steps.max() <= 1
    assert (steps > 0).mean() < 1e-3
    np.testing.assert_array_equal(
        torch_pages.unpack_u8(torch.from_numpy(expected)).numpy(), unpack_u8(expected)
    )


@pytest.mark.parametrize(("head_dim", "share"), [(64, 0.5625), (128, 0.53125)])
def test_bytes_of_a_token(head_dim: int, share: float) -> None:
    assert page_bytes(4, head_dim, "u8") / page_bytes(4, head_dim, "bf16") == share
    assert page_bytes(4, head_dim, "f32") == 2 * page_bytes(4, head_dim, "bf16") == 8 * 32 * 4 * head_dim
    assert page_bytes(4, head_dim, "f16") == page_bytes(4, head_dim, "bf16")


@pytest.fixture(scope="module")
def model(demo_zoo: Path) -> tuple[list[Block], ModelConfig]:
    zoo = Zoo.open(demo_zoo)
    record = zoo.manifest.models["base"]
    return [zoo.read_block(i) for i in record.chain], record.config


def run(engines: EngineMaker, model: tuple[list[Block], ModelConfig]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits of IDS in pieces, and the pages that they leave: K and V, [pages, heads, 32, width]."""
    blocks, config = model
    probe = ProbeChain(engines, blocks, config, 96)
    pieces = [probe.forward(IDS[a:b], a) for a, b in ((0, 33), (33, 34), (34, 90))]
    return np.concatenate(pieces), [engines.arrays.to_host(kv) for kv in probe.pages]


def test_pages_hold_what_the_operator_writes(model: tuple[list[Block], ModelConfig]) -> None:
    """Of the first layer, whose K and V depend on no other."""
    _, exact = run(OpenVINOEngines("f32", 1), model)
    _, packed = run(OpenVINOEngines("f32", 1, kv_precision="u8"), model)
    for values, found in zip(exact, packed, strict=True):
        expected = pack_u8(values[:2])  # full pages
        np.testing.assert_allclose(unpack_u8(found[:2]), unpack_u8(expected), atol=1e-5)
        step = np.abs(found[:2, ..., 8:].astype(int) - expected[..., 8:])
        assert (step > 0).mean() < 1e-3


def test_a_sequence_in_pieces_leaves_the_pages_of_the_whole(model: tuple[list[Block], ModelConfig]) -> None:
    engines = OpenVINOEngines("f32", 1, kv_precision="u8")
    logits, pages = run(engines, model)
    probe = ProbeChain(engines, *model, 96)
    np.testing.assert_allclose(probe.forward(IDS, 0), logits, atol=2e-2)
    for kv, pieces in zip(probe.pages, pages, strict=True):
        np.testing.assert_allclose(unpack_u8(kv), unpack_u8(pieces), atol=0.05)
        assert (kv[..., 8:] != pieces[..., 8:]).mean() < 0.01  # sums in another order


def test_torch_computes_what_openvino_computes(model: tuple[list[Block], ModelConfig]) -> None:
    exact, _ = run(OpenVINOEngines("f32", 1), model)
    packed, pages = run(OpenVINOEngines("f32", 1, kv_precision="u8"), model)
    found, torch_kv = run(ReferenceEngines("f32", "cpu", 1, kv_precision="u8"), model)
    rounding = np.linalg.norm(packed - exact)
    assert rounding / np.linalg.norm(exact) < 0.02
    assert np.linalg.norm(found - packed) < 0.3 * rounding
    for ours, theirs in zip(torch_kv, pages, strict=True):
        assert ours.shape == theirs.shape
        assert (np.abs(ours[:2, ..., 8:].astype(int) - theirs[:2, ..., 8:]) > 1).mean() < 1e-3


def test_bf16_beside_8_bits_in_torch(model: tuple[list[Block], ModelConfig]) -> None:
    plain, _ = run(ReferenceEngines("bf16", "cpu", 1), model)
    found, pages = run(ReferenceEngines("bf16", "cpu", 1, kv_precision="u8"), model)
    assert pages[0].dtype == np.uint8
    assert 0 < np.linalg.norm(found - plain) / np.linalg.norm(plain) < 0.03


def test_f16_beside_f32(model: tuple[list[Block], ModelConfig]) -> None:
    exact, values = run(OpenVINOEngines("f32", 1), model)
    found, pages = run(OpenVINOEngines("f32", 1, kv_precision="f16"), model)
    torch_found, torch_pages = run(ReferenceEngines("f32", "cpu", 1, kv_precision="f16"), model)
    for given, ours, theirs in zip(values, pages, torch_pages, strict=True):  # of the first layer
        np.testing.assert_array_equal(ours[:2], given[:2].astype(np.float16))
        assert ours.dtype == theirs.dtype
        seen, other = (np.asarray(each[:2], np.float32) for each in (ours, theirs))
        np.testing.assert_allclose(seen, other, rtol=2e-3, atol=1e-5)  # a step of f16, and of what is near 0
    rounding = np.linalg.norm(found - exact)
    assert 0 < rounding < 2e-3 * np.linalg.norm(exact)
    assert np.linalg.norm(found - torch_found) < 0.5 * rounding


@pytest.mark.parametrize(
    ("engines", "precision", "kv", "fit"),
    [
        (OpenVINOEngines, "f32", "bf16", "f32 and f16 and u8"),
        (ReferenceEngines, "f32", "bf16", "f32 or f16 or u8"),
        (ReferenceEngines, "bf16", "f16", "bf16 or u8"),
    ],
)
def test_what_does_not_go_together_is_refused(engines: Any, precision: Any, kv: Any, fit: str) -> None:
    with pytest.raises(
        EngineError, match=f"KV in {kv} was asked for.*beside activations in {precision}.*{fit}"
    ):
        engines(precision, kv_precision=kv)


def test_another_layout_of_pages_is_refused(
    model: tuple[list[Block], ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_pages, "GRID_BYTES", 4)
    assert page_width(64, "u8") == 68
    with pytest.raises(EngineError, match=r"key_cache in u8 as pages of 32 x 72, expected 32 x 68"):
        OpenVINOEngines("f32", 1, kv_precision="u8").span(model[0][1:2])


def test_backends_without_it_say_so(demo_zoo: Path) -> None:
    with pytest.raises(
        EngineError, match="KV in u8 was asked for; the tensorrt backend keeps it in the precision"
    ):
        make_engines("tensorrt", zoo=Zoo.open(demo_zoo), kv_precision="u8")
