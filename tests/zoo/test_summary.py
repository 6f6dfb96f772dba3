"""What a manifest says about its models: a part of it."""

from __future__ import annotations

from pathlib import Path

from blockzoo.zoo.sharing import sharing_map
from blockzoo.zoo.store import Zoo
from blockzoo.zoo.summary import model_bytes, part_of, sharing_bytes


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


def test_a_part_of_nothing_is_empty(demo_zoo: Path) -> None:
    part = part_of(Zoo.open(demo_zoo).manifest, ())
    assert (part.models, part.blocks, part.adapters) == ({}, {}, {})
    assert sharing_map(part).models == ()
