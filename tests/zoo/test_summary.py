"""What a manifest says about its models: a part of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from blockzoo.zoo.manifest import VerificationFigures, VerificationRecord
from blockzoo.zoo.sharing import sharing_map
from blockzoo.zoo.sharing_page import sharing_data
from blockzoo.zoo.store import Zoo
from blockzoo.zoo.summary import model_bytes, part_of, saved_text, sharing_bytes


def test_what_sharing_saves_or_costs() -> None:
    found = [saved_text(*each) for each in ((25, 100), (100, 100), (111, 100), (0, 0))]
    assert found == ["75% saved", "0% saved", "11% more", "0% saved"]


def test_a_part_has_what_its_models_use_and_no_more(demo_zoo: Path) -> None:
    whole = Zoo.open(demo_zoo).manifest
    assert part_of(whole, whole.models.keys()) == whole
    part = part_of(whole, ("notes", "solver", "unknown"))
    notes, solver = whole.models["notes"], whole.models["solver"]
    assert part.models == {"notes": notes, "solver": solver}
    assert part.blocks.keys() == {*notes.chain, *solver.chain}
    assert part.adapters.keys() == set(notes.adapters.values())
    part.check("part")
    own = sharing_map(part).own_bytes
    both = {*notes.chain} & {*solver.chain}
    shared = sum(whole.blocks[block_id].num_bytes for block_id in both)
    assert own == {name: model_bytes(whole, whole.models[name]) - shared for name in ("notes", "solver")}
    assert sharing_bytes(part)[1] == shared + sum(own.values())


def test_a_part_names_no_other_model(demo_zoo: Path) -> None:
    whole = Zoo.open(demo_zoo).manifest
    checked = VerificationRecord("oracle", 1, 1, 0.1, {"f32": VerificationFigures(1.0, 0.0)}, None, "base")
    twin = replace(whole.models["base-sharded"], verification=checked)
    whole = replace(whole, models={**whole.models, "base-sharded": twin})
    assert part_of(whole, ("base", "base-sharded")).models["base-sharded"] == twin
    alone = part_of(whole, ("base-sharded",))
    assert alone.models["base-sharded"].verification == replace(checked, same_as=None)
    assert "same chain as" in json.dumps(sharing_data(whole))
    assert "same chain as" not in json.dumps(sharing_data(alone))


def test_a_part_of_nothing_is_empty(demo_zoo: Path) -> None:
    part = part_of(Zoo.open(demo_zoo).manifest, ())
    assert (part.models, part.blocks, part.adapters) == ({}, {}, {})
    assert sharing_map(part).models == ()
