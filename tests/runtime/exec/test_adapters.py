"""Adapters in use: what is loaded, dropped and put side by side."""

from __future__ import annotations

import numpy as np
import pytest

from blockzoo.engines.arrays import HostArrays
from blockzoo.runtime.exec.adapters import AdapterCache, AdapterInputs, AdapterUnavailableError
from blockzoo.runtime.exec.batch import Call
from blockzoo.runtime.exec.topology import ChainPlan, Family, Span
from blockzoo.runtime.kv.sequence import Segment
from blockzoo.zoo.blocks import Adapter, AdapterSpec, BlockSpec, FfnSpec, LoraSpec
from blockzoo.zoo.errors import StoreError
from blockzoo.zoo.tensors import from_f32

FFN = FfnSpec(4, 8, 1e-5, False)
ARRAYS = HostArrays("f32")


def adapter(name: str) -> Adapter:
    """ "a2": LoRA of rank 2 on `up`, of ones times the position of the letter; scale 3."""
    rank, value = int(name[1:]), float(ord(name[0]) - ord("a") + 1)
    spec = AdapterSpec((LoraSpec("up", rank, 4, 8, 3.0),))
    a, b = np.full((rank, 4), value, np.float32), np.full((8, rank), value, np.float32)
    return Adapter(name, spec, {"up.a": from_f32(a, "f32"), "up.b": from_f32(b, "f32")})


class Reader:
    def __init__(self) -> None:
        self.read: list[str] = []

    def __call__(self, name: str) -> Adapter:
        self.read.append(name)
        return adapter(name)


def chain(*adapters: tuple[int, str]) -> ChainPlan:
    return ChainPlan(Family(4, 1, 2), "e", (), 1, (Segment(0, 1, "k"),), 8, adapters)


def inputs(reader: Reader, budget: int = 1 << 20) -> AdapterInputs:
    spec: BlockSpec = FFN
    chains = [chain(), chain((2, "a1")), chain((2, "b2")), chain((9, "c3")), chain((2, "d4"))]
    span = Span(("f1",), 0, False, ((0, ("gate", "up")),))
    bare = Span(("f2",), 0, False)
    return AdapterInputs(AdapterCache(reader, ARRAYS, budget), chains, [span, bare], [[spec], [spec]])


def call(*parts: tuple[int, int], span: int = 0) -> Call:
    return Call(span, 0, sum(count for _, count in parts), {}, 2, parts)


def test_rows_see_their_own_adapter_only() -> None:
    found = inputs(Reader()).of(call((0, 2), (1, 1), (2, 3), (3, 1)))
    mask, a, b = found["lora_mask"], found["lora_a.0.up"], found["lora_b.0.up"]
    assert mask.tolist() == [[0, 0, 0]] * 2 + [[1, 0, 0]] + [[0, 1, 1]] * 3 + [[0, 0, 0]]
    x = np.random.default_rng(0).standard_normal((7, 4)).astype(np.float32)
    delta = ((x @ a.T) * mask) @ b
    total = x.sum(axis=1)
    expected = np.array([0, 0, 3 * total[2], *(24 * total[3:6]), 0])  # scale * rank * value^2
    np.testing.assert_allclose(delta, np.repeat(expected[:, None], 8, axis=1), rtol=1e-5, atol=1e-5)
    assert not found["lora_a.0.gate"].any()
    assert found["lora_b.0.gate"].shape == (3, 8)


def test_a_call_without_adapters_has_empty_inputs() -> None:
    reader = Reader()
    made = inputs(reader)
    found = made.of(call((0, 2), (3, 1)))
    assert found["lora_mask"].shape == (3, 0)
    assert found["lora_a.0.up"].shape == (0, 4)
    assert made.of(call((1, 2), span=1)) == {}
    assert reader.read == []


def test_a_bank_is_put_together_again_only_when_it_must() -> None:
    made = inputs(Reader())
    both = made.of(call((1, 1), (2, 1)))
    one = made.of(call((2, 2)))
    assert one["lora_a.0.up"] is both["lora_a.0.up"]  # rank 2 of 3 in use
    assert one["lora_mask"].tolist() == [[0, 1, 1]] * 2
    alone = made.of(call((1, 1)))
    assert alone["lora_a.0.up"].shape == (1, 4)  # 1 of 3: the idle ones go
    assert made.of(call((1, 1), (4, 1)))["lora_mask"].tolist() == [[1, 0, 0, 0, 0], [0, 1, 1, 1, 1]]


def many(reader: Reader, budget: int, records: bool = False) -> tuple[AdapterInputs, dict[int, str]]:
    """Twenty chains with adapters of ranks 1 to 9, and one without; the adapter by chain."""
    names = {i: f"{chr(ord('a') + i)}{1 + i * 5 % 9}" for i in range(20)}
    chains = [*(chain((2, name)) for name in names.values()), chain()]
    arrays = HostArrays("f32")
    arrays.records = records
    spec: BlockSpec = FFN
    span = Span(("f1",), 0, False, ((0, ("gate", "up")),))
    return AdapterInputs(AdapterCache(reader, arrays, budget), chains, [span], [[spec]]), names


def deltas(found: dict[str, np.ndarray]) -> np.ndarray:
    """What a row of ones gets: all numbers are small integers, so there is nothing to round."""
    x = np.ones((len(found["lora_mask"]), 4), np.float32)
    return ((x @ found["lora_a.0.up"].T) * found["lora_mask"]) @ found["lora_b.0.up"]


@pytest.mark.parametrize("records", [False, True])
@pytest.mark.parametrize("budget", [1, 1 << 20])
def test_adapters_that_come_and_go_compute_what_a_new_bank_does(budget: int, records: bool) -> None:
    rng = np.random.default_rng(1)
    reader = Reader()
    made, names = many(reader, budget, records)
    running: set[int] = set()
    most = 0  # ranks in use
    kept: list[tuple[Call, tuple[int, ...], dict[str, np.ndarray], np.ndarray]] = []
    for _ in range(300):
        for index in rng.integers(0, 20, int(rng.integers(0, 4))).tolist():
            running ^= {index}
        if rng.random() < 0.05:  # a wave leaves
            running = set(sorted(running)[:1])
        step = call(*((index, int(rng.integers(1, 3))) for index in (*sorted(running), 20)))
        before, loads = {i: made.stamp(call((i, 1))) for i in running}, len(reader.read)
        found = made.of(step)
        new, _ = many(Reader(), 1 << 20, records)
        np.testing.assert_array_equal(deltas(found), deltas(new.of(step)))
        in_use = sum(int(names[i][1:]) for i in running)
        width = found["lora_mask"].shape[1]
        most = max(most, in_use)
        assert width <= 2 * in_use
        if records:  # plans have room for what is in use at most
            assert width <= 1 << max(0, most - 1).bit_length()
            assert width & (width - 1) == 0
        joined = sum(stamp in ((), (-1,)) for stamp in before.values())
        assert len(reader.read) - loads <= joined  # those that run are never read again
        kept.append((step, made.stamp(step), found, deltas(found)))
        for old, stamp, given, expected in kept[-8:]:
            if made.stamp(old) == stamp:  # what was bound then still holds
                np.testing.assert_array_equal(deltas(given), expected)


def test_one_that_joins_leaves_the_others_in_place() -> None:
    made, _ = many(Reader(), 1)
    made.of(call(*((i, 1) for i in range(10))))
    stamps = [made.stamp(call((i, 1))) for i in range(10)]
    for i in range(10, 20):
        made.of(call(*((j, 1) for j in range(i + 1))))
        assert [made.stamp(call((j, 1))) for j in range(10)] == stamps


def test_a_call_that_fails_changes_nothing() -> None:
    reader = Reader()
    made, _ = many(reader, 1)
    both = made.of(call((0, 1), (1, 1)))
    stamp, expected = made.stamp(call((0, 1), (1, 1))), deltas(both)

    def broken(name: str) -> Adapter:
        raise StoreError(f"{name} is damaged")

    made._cache.read = broken
    with pytest.raises(AdapterUnavailableError, match="d7 is damaged") as failed:
        made.of(call((0, 1), (3, 1)))
    assert failed.value.chain == 3
    assert made.stamp(call((0, 1), (1, 1))) == stamp
    np.testing.assert_array_equal(deltas(both), expected)


def test_loads_of_what_was_dropped_are_told() -> None:
    cache = AdapterCache(Reader(), ARRAYS, 3 * 4 * (4 + 8))
    for name in ("a1", "b1", "c1", "a1"):
        cache.get(name)
    assert (cache.num_loads, cache.num_reloads) == (3, 0)
    for name in ("d1", "b1", "c1", "b1"):  # d1 drops b1, that drops c1, that drops a1
        cache.get(name)
    assert (cache.num_loads, cache.num_reloads) == (6, 2)


def test_the_least_recently_used_are_dropped_beyond_the_budget() -> None:
    reader = Reader()
    size = 4 * (4 + 8)  # bytes a rank
    cache = AdapterCache(reader, ARRAYS, 3 * size)
    cache.get("a1")
    cache.get("b1")
    cache.get("a1")
    cache.get("c2")  # b1 has to go
    assert (cache.num_bytes, cache.num_loads, cache.num_evictions) == (3 * size, 3, 1)
    cache.get("a1")
    assert reader.read == ["a1", "b1", "c2"]
    cache.get("b1")
    assert reader.read[-1] == "b1"
    assert cache.num_bytes <= 3 * size
    assert cache.get("d4")["up"][0].shape == (4, 4)  # larger than the budget: used, not kept
    assert cache.num_bytes == 0


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_matrices_have_the_type_of_activations(precision: str) -> None:
    arrays = HostArrays(precision)  # type: ignore[arg-type]
    a, b = AdapterCache(Reader(), arrays, 1 << 20).get("a2")["up"]
    assert a.dtype == b.dtype == arrays.zeros((1,), "activation").dtype
