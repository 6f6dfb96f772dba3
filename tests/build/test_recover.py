"""Merged LoRAs taken apart: the rank is found exactly, full fine-tunes are refused, whatever the dtype."""

from __future__ import annotations

import numpy as np
import pytest

from blockzoo.build.recover import NotLowRankError, Recovered, distance, recover
from blockzoo.zoo.blocks import AttnSpec, BlockSpec, FfnSpec, tensor_shapes
from blockzoo.zoo.rope import RopeConfig
from blockzoo.zoo.tensors import BlockTensor, Dtype, from_f32

ATTN = AttnSpec(256, 4, 2, 64, 1e-5, RopeConfig("default", 10000.0), 0, False, False, False)
FFN = FfnSpec(256, 704, 1e-5, False)
Tensors = dict[str, BlockTensor]


def block(spec: BlockSpec, dtype: Dtype = "bf16", seed: int = 0) -> Tensors:
    rng = np.random.default_rng(seed)
    return {
        name: from_f32(rng.standard_normal(shape, dtype=np.float32) * np.float32(0.05), dtype)
        for name, shape in tensor_shapes(spec).items()
    }


def delta(shape: tuple[int, ...], rank: int, size: float, seed: int) -> np.ndarray:
    """A product of rank `rank` with elements of about `size` times those of the weights."""
    rng = np.random.default_rng(seed)
    b = rng.standard_normal((shape[0], rank), dtype=np.float32)
    a = rng.standard_normal((rank, shape[1]), dtype=np.float32)
    return b @ a * np.float32(size * 0.05 / np.sqrt(rank))


def merged(base: Tensors, names: tuple[str, ...], rank: int, size: float) -> tuple[Tensors, dict]:
    deltas = {name: delta(base[name].shape, rank, size, i) for i, name in enumerate(names)}
    changed = {n: from_f32(base[n].to_f32() + d, base[n].dtype) for n, d in deltas.items()}
    return {**base, **changed}, deltas


def product(found: Recovered, name: str) -> np.ndarray:
    a, b = (found.adapter.tensors[f"{name}.{which}"].to_f32() for which in "ab")
    return b @ a


@pytest.mark.parametrize("rank", [4, 8, 16, 32, 64])
@pytest.mark.parametrize("spec", [ATTN, FFN], ids=["attn", "ffn"])
def test_the_rank_and_the_lora_are_found(spec: BlockSpec, rank: int) -> None:
    names = ("q", "k", "v", "o") if spec is ATTN else ("gate", "up", "down")
    base = block(spec)
    changed, deltas = merged(base, names, rank, 0.1)
    found = recover(spec, changed, base)
    assert [(lora.projection, lora.rank) for lora in found.adapter.spec.loras] == [(n, rank) for n in names]
    assert 0.2 < found.rounding < 1.1
    for name in names:
        error = np.linalg.norm(product(found, name) - deltas[name]) / np.linalg.norm(deltas[name])
        assert error < 0.02
        again = from_f32(base[name].to_f32() + product(found, name), "bf16")
        assert np.mean(again.data == changed[name].data) > 0.7  # the merge itself, but for its rounding


@pytest.mark.parametrize("size", [0.3, 0.02, 0.004])
def test_small_and_large_loras(size: float) -> None:
    base = block(ATTN)
    changed, _ = merged(base, ("q",), 4, size)  # at 0.004 most elements do not reach the next bf16
    found = recover(ATTN, changed, base)
    assert [(lora.projection, lora.rank) for lora in found.adapter.spec.loras] == [("q", 4)]


@pytest.mark.parametrize("dtype", ["f16", "f32"])
def test_other_dtypes(dtype: Dtype) -> None:
    base = block(ATTN, dtype)
    changed, deltas = merged(base, ("q", "v"), 8, 0.1)
    found = recover(ATTN, changed, base)
    assert {lora.rank for lora in found.adapter.spec.loras} == {8}
    assert np.abs(product(found, "q") - deltas["q"]).max() < 1e-3 * np.abs(deltas["q"]).max() + 1e-5


def test_a_base_that_was_rounded_after_the_merge() -> None:
    exact = {n: np.random.default_rng(1).standard_normal(t.shape) * 0.05 for n, t in block(ATTN).items()}
    base = {name: from_f32(values, "bf16") for name, values in exact.items()}
    changed = base | {"q": from_f32(exact["q"] + delta(base["q"].shape, 8, 0.1, 0), "bf16")}
    found = recover(ATTN, changed, base)
    assert found.adapter.spec.loras[0].rank == 8
    assert 1.5 < found.rounding < 2.2


def test_full_fine_tunes_are_refused() -> None:
    base = block(ATTN)
    for size, said in ((0.1, "more than 128"), (0.01, "more than 128"), (0.003, "what rounding explains")):
        noise = np.random.default_rng(5).standard_normal(base["q"].shape) * size * 0.05
        tuned = base | {"q": from_f32(base["q"].to_f32() + noise, "bf16")}
        with pytest.raises(NotLowRankError, match=said):
            recover(ATTN, tuned, base)
        both = from_f32(tuned["q"].to_f32() + delta(base["q"].shape, 8, 0.2, 0), "bf16")
        with pytest.raises(NotLowRankError, match=r"what rounding explains|more than 128"):
            recover(ATTN, base | {"q": both}, base)


def test_changes_below_rounding_are_no_lora() -> None:
    base = block(ATTN)
    noise = np.random.default_rng(5).standard_normal(base["q"].shape) * 5e-5
    with pytest.raises(NotLowRankError, match="less than its rounding"):
        recover(ATTN, base | {"q": from_f32(base["q"].to_f32() + noise, "bf16")}, base)


def test_what_no_lora_changes_is_refused() -> None:
    base = block(ATTN)
    norm = from_f32(base["norm"].to_f32() * 1.1, "bf16")
    with pytest.raises(NotLowRankError, match="norm differs"):
        recover(ATTN, base | {"norm": norm}, base)


def test_unrelated_blocks_are_told_apart_at_once() -> None:
    base = block(ATTN)
    other = block(ATTN, seed=1) | {"norm": base["norm"]}
    assert 1.3 < distance(other, base) < 1.5
    with pytest.raises(NotLowRankError, match="unrelated"):
        recover(ATTN, other, base)
    changed, _ = merged(base, ("q",), 4, 0.1)
    assert 0 < distance(changed, base) < 0.2


def test_an_adapter_as_large_as_its_block_is_not_worth_it() -> None:
    base = block(ATTN, "f32")
    changed, _ = merged(base, ("q", "k", "v", "o"), 64, 0.1)
    changed = {name: from_f32(t.to_f32(), "f32") for name, t in changed.items()}
    assert recover(ATTN, changed, base).adapter.num_bytes < 0.75 * sum(t.data.nbytes for t in base.values())
    small = AttnSpec(64, 4, 2, 16, 1e-5, RopeConfig("default", 10000.0), 0, False, False, False)
    base = block(small)
    changed, _ = merged(base, ("q", "k", "v", "o"), 16, 0.3)
    changed["q"] = from_f32(base["q"].to_f32() + delta((64, 64), 32, 0.3, 9), "bf16")
    changed["o"] = from_f32(base["o"].to_f32() + delta((64, 64), 32, 0.3, 8), "bf16")
    with pytest.raises(NotLowRankError, match="of the block"):
        recover(small, changed, base)


def test_large_matrices_by_random_projection() -> None:
    wide = FfnSpec(128, 3000, 1e-5, False)
    base = block(wide)
    changed, deltas = merged(base, ("up",), 8, 0.1)
    found = recover(wide, changed, base)
    assert [(lora.projection, lora.rank) for lora in found.adapter.spec.loras] == [("up", 8)]
    assert np.linalg.norm(product(found, "up") - deltas["up"]) < 0.02 * np.linalg.norm(deltas["up"])
