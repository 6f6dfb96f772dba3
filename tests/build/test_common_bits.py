"""Bits that several models choose together: what is chosen where divergences are set, and of real LoRAs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from blockzoo.build import calibration
from blockzoo.build.common_bits import choose, families
from blockzoo.build.draft import Draft
from blockzoo.build.likeness import Strayed
from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.build.progress import no_progress
from blockzoo.build.quantize import Calibration, Quantizer
from blockzoo.build.quantized_models import Asked, GivenModel
from blockzoo.zoo.manifest import Manifest, ModelRecord, QuantizationRecord
from blockzoo.zoo.packing import GROUP, QuantizedDtype
from blockzoo.zoo.store import Zoo

INNER = range(1, 13)
Costs = Mapping[tuple[int, QuantizedDtype], float]  # (position, dtype) -> nats


class FakeTrial:
    """Of a model whose divergence is the sum of what its blocks cost; the others cost nothing."""

    def __init__(self, draft: Draft, costs: Costs) -> None:
        self._draft, self._costs = draft, costs

    def strays(self, replaced: Mapping[int, str], num_texts: int | None = None) -> Strayed:
        quantized = {at: self._draft.manifest.blocks[key].quantized for at, key in replaced.items()}
        nats = sum(self._costs.get((at, made.dtype), 0.0) for at, made in quantized.items() if made)
        return Strayed(nats, 1 - nats / 100)


class FakeModel(GivenModel):
    """One that may lose `bound` nats, and `1 - min_top1` of its likeliest tokens: one in a hundred a nat."""

    def __init__(
        self,
        draft: Draft,
        name: str,
        record: ModelRecord,
        bound: float,
        costs: Costs,
        min_top1: float = 0.0,
    ) -> None:
        self.name, self.record, self.bound, self._costs = name, record, bound, costs
        self._asked = Asked("auto", bound, "", (), False, None, 0, min_top1=min_top1)
        self._fake_draft = draft
        self.quantizer = Quantizer(draft, name, record, Calibration(_none, _none), no_progress)

    def group(self) -> int:
        return GROUP

    def trial(self) -> Any:
        return FakeTrial(self._fake_draft, self._costs)

    def num_weighed(self) -> int:
        return 1


def _none() -> Any:
    raise AssertionError("not asked for in a dry run")


@pytest.fixture
def draft(demo_zoo: Path) -> Draft:
    """The demo family as it was given."""
    return Draft(demo_zoo, Manifest.load(demo_zoo / "manifest.json"), None)


def model(draft: Draft, name: str, bound: float, costs: Costs, of: str = "base") -> FakeModel:
    return FakeModel(draft, name, draft.manifest.models[of], bound, costs)


def take(draft: Draft, models: Sequence[FakeModel]) -> dict[str, list[str]]:
    """Choose and enter what was chosen; the dtypes of each model, by position."""
    chosen = choose(draft, models, no_progress)
    empty = QuantizationRecord("auto", 1.0, 0.0, {}, 0, "built-in")
    for each in models:
        chain = each.made(chosen[each.name])
        draft.manifest.models[each.name] = replace(each.record, chain=chain, quantization=empty)
    return {
        each.name: [draft.manifest.blocks[key].dtype for key in draft.manifest.models[each.name].chain]
        for each in models
    }


def four(*positions: int, cost: float = 0.1) -> dict[tuple[int, QuantizedDtype], float]:
    """What these cost in 4 bits."""
    return {(at, "i4"): cost for at in positions}


def in_four(dtypes: Sequence[str]) -> set[int]:
    return {at for at, dtype in enumerate(dtypes) if dtype == "i4"}


def test_models_have_one_version_of_each_block_that_all_of_them_bear(draft: Draft) -> None:
    strict = model(draft, "strict", 0.25, four(2, 4, 6) | four(1, cost=0.3))
    loose = model(draft, "loose", 10.0, four(*INNER))
    found = take(draft, [loose, strict])
    assert found["strict"] == found["loose"]
    assert not {1} & in_four(found["strict"])
    assert len({2, 4, 6} & in_four(found["strict"])) == 2  # as many as the strict one bears
    assert in_four(found["strict"]) >= {3, 5, 7, 8, 9, 10, 11, 12}
    alone = draft.manifest.models["loose"].chain
    assert alone == draft.manifest.models["strict"].chain


def test_what_one_bears_of_its_own_is_its_own(draft: Draft) -> None:
    """`solver` has its last two layers for itself."""
    shared, own = range(1, 9), range(9, 13)
    strict = model(draft, "base", 0.1, four(*INNER, cost=1.0))
    loose = model(draft, "solver", 1.0, four(*INNER, cost=0.01), of="solver")
    found = take(draft, [strict, loose])
    assert not in_four(found["base"])
    assert in_four(found["solver"]) == {*own}
    chains = [draft.manifest.models[name].chain for name in ("base", "solver")]
    assert [chains[0][at] for at in shared] == [chains[1][at] for at in shared]


def test_likeliest_tokens_bound_what_a_model_bears_too(draft: Draft) -> None:
    costs, record = four(*INNER, cost=1.0), draft.manifest.models["base"]
    strict = FakeModel(draft, "strict", record, 100.0, costs, min_top1=0.955)
    assert len(in_four(take(draft, [strict])["strict"])) == 4
    broken = FakeModel(draft, "broken", record, 100.0, {(1, "i8"): 5.0}, min_top1=0.955)
    assert take(draft, [broken])["broken"][1] == "bf16"


def test_a_model_that_comes_later_changes_as_few_bytes_as_it_can(draft: Draft) -> None:
    first = take(draft, [model(draft, "first", 1.0, four(*range(1, 5), cost=2.0))])["first"]
    assert in_four(first) == {*range(5, 13)}
    stays = take(draft, [model(draft, "stays", 1.0, {})])["stays"]
    assert stays == first  # also where it would bear more: what others have in 8 bits is no cheaper in 4
    costs = four(7, 9, cost=0.7) | four(5, 6, 8, 10, 11, 12, cost=0.01)
    later = take(draft, [model(draft, "later", 1.0, costs)])["later"]
    (moved,) = in_four(first) - in_four(later)
    assert moved in (7, 9)
    chains = {name: draft.manifest.models[name].chain for name in ("first", "later")}
    assert [at for at in range(14) if chains["first"][at] != chains["later"][at]] == [moved]
    costs = four(5, moved, cost=0.8)  # 5 would have to be made anew, the other one is there in both
    last = take(draft, [model(draft, "last", 1.0, costs)])["last"]
    assert last == later


def test_where_8_bits_are_too_far_for_one_none_of_its_blocks_go_to_4(draft: Draft) -> None:
    """As given are those that it does not bear in 8; a tied head goes with its embedding."""
    fragile = model(draft, "fragile", 0.1, {(3, "i8"): 1.0, (0, "i8"): 0.06, (13, "i8"): 0.06})
    found = take(draft, [model(draft, "other", 0.1, {}), fragile])
    assert found["fragile"] == found["other"]
    assert [at for at, dtype in enumerate(found["fragile"]) if dtype == "bf16"] == [0, 3, 13]
    assert set(found["fragile"]) == {"i8", "bf16"}


def test_who_has_no_block_in_common_chooses_alone(draft: Draft) -> None:
    records = draft.manifest.models
    base, solver = model(draft, "base", 1.0, {}), model(draft, "solver", 1.0, {}, of="solver")
    apart = FakeModel(draft, "apart", replace(records["base"], chain=("x",)), 1.0, {})
    between = FakeModel(
        draft, "between", replace(records["base"], chain=("x", records["solver"].chain[9])), 1.0, {}
    )
    assert families([base, apart, solver]) == [[apart], [base, solver]]
    assert families([base, apart, solver, between]) == [[apart, base, solver, between]]


@pytest.fixture
def loras(
    make_model: Callable[..., Any],
    save: Callable[..., Path],
    make_adapter: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> dict[str, str]:
    """A base that bears 4 bits almost everywhere, and a LoRA on all of its matrices, which does not."""
    monkeypatch.setattr(calibration, "NUM_TOKENS", 32)
    base = save(make_model("llama", 3), tmp_path / "base")
    every = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    make_adapter(base, tmp_path / "wide", seed=1, target_modules=every)
    return {"base": str(base), "wide": f"{tmp_path / 'wide'}@base"}


def test_a_lora_that_bears_less_than_its_base_shares_all_of_it(loras: dict[str, str], tmp_path: Path) -> None:
    options = CompileOptions(weights="auto", max_kl=3e-3, profile=False)
    unjudged = replace(options, verify=False)
    compile_models(loras, tmp_path / "together", options)
    compile_models({"base": loras["base"]}, tmp_path / "alone", unjudged)
    compile_models(loras, tmp_path / "alone", unjudged)
    together, alone = (Zoo.open(tmp_path / name).manifest for name in ("together", "alone"))
    assert together.models["wide"].chain == together.models["base"].chain
    assert {block.dtype for block in together.blocks.values()} == {"i8", "i4", "bf16"}
    for record in together.models.values():
        assert record.quantization is not None
        assert 0 < record.quantization.figures["f32"].kl <= 3e-3
    base, wide = alone.models["base"].chain, alone.models["wide"].chain
    moved = [at for at in range(len(base)) if base[at] != wide[at]]
    assert moved  # so it does not bear what the base has alone
    assert all(alone.blocks[base[at]].dtype == "i4" and alone.blocks[wide[at]].dtype == "i8" for at in moved)
    sizes = [sum(block.num_bytes for block in manifest.blocks.values()) for manifest in (together, alone)]
    assert sizes[0] < 0.8 * sizes[1]
