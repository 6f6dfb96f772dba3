"""What is kept of a fine-tune: its change, and of a full one the LoRA nearest to it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from benchmarks.smollm2_family.assemble import WEIGHTS, changed, write_adapter
from benchmarks.smollm2_family.base import Base
from benchmarks.smollm2_family.packing import load_packed, save_packed
from benchmarks.smollm2_family.recipes import RECIPES
from benchmarks.smollm2_family.ship import differences, extracted, ship
from blockzoo.zoo.adapter import open_adapter
from blockzoo.zoo.checkpoint import open_checkpoint
from blockzoo.zoo.demo.assemble import WEIGHTS as DEMO_WEIGHTS
from blockzoo.zoo.demo.tensors import read_tensors
from blockzoo.zoo.tensors import bf16_to_f32

Q = "model.layers.0.self_attn.q_proj"
MEGABYTE = 10**6


def test_the_committed_weights_are_small_and_all_there() -> None:
    files = {path.stem: path.stat().st_size for path in WEIGHTS.iterdir()}
    assert files.keys() == RECIPES.keys()
    demo = sum(path.stat().st_size for path in DEMO_WEIGHTS.rglob("*") if path.is_file())
    assert sum(files.values()) < 7 * MEGABYTE
    assert sum(files.values()) + demo < 15.7 * MEGABYTE


def test_a_change_of_low_rank_is_extracted_whole_and_the_nearest_of_another() -> None:
    rng = np.random.default_rng(0)
    low = (rng.standard_normal((48, 3)) @ rng.standard_normal((3, 32))).astype(np.float32)
    full = rng.standard_normal((48, 32)).astype(np.float32)
    changes = {f"{Q}.weight": low, "model.layers.1.mlp.up_proj.weight": full}
    changes |= {"model.embed_tokens.weight": full, "model.norm.weight": full[0]}
    pairs = extracted(changes, 3)
    stems = {name.split(".lora_")[0] for name in pairs}
    assert stems == {f"base_model.model.{Q}", "base_model.model.model.layers.1.mlp.up_proj"}
    for name, change in list(changes.items())[:2]:
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = pairs[f"{stem}.lora_A.weight"], pairs[f"{stem}.lora_B.weight"]
        assert (a.shape, b.shape) == ((3, 32), (48, 3))
        singular = np.linalg.svd(change, compute_uv=False)
        np.testing.assert_allclose(np.linalg.norm(change - b @ a), np.linalg.norm(singular[3:]), atol=1e-3)


def test_differences_are_those_of_the_tensors_that_changed(demo_family: dict[str, Path]) -> None:
    base, solver = (open_checkpoint(demo_family[name]) for name in ("base", "solver"))
    found = differences(base, solver)
    assert {name.split(".")[2] for name in found} == {"4", "5"}
    for name, change in found.items():
        tuned = solver.tensor(name).to_f32()
        np.testing.assert_allclose(base.tensor(name).to_f32() + change, tuned, atol=1e-7, err_msg=name)


def test_a_packed_lora_becomes_a_folder_that_the_zoo_reads(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    stem = f"base_model.model.{Q}"
    pair = {f"{stem}.lora_A.weight": rng.standard_normal((8, 64)).astype(np.float32)}
    pair[f"{stem}.lora_B.weight"] = rng.standard_normal((32, 8)).astype(np.float32)
    packed, folder = tmp_path / "x.planes", tmp_path / "x"
    save_packed(packed, pair, {"lora": json.dumps({"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]})})
    folder.mkdir()
    write_adapter(folder, packed)
    adapter = open_adapter(folder)
    assert (adapter.base_name, adapter.pairs.keys()) == ("base", {f"{Q}.weight"})
    found = adapter.pairs[f"{Q}.weight"]
    kept, _ = load_packed(packed)
    assert found.scale == 2
    assert np.array_equal(found.a.to_f32(), kept[f"{stem}.lora_A.weight"])
    assert np.array_equal(found.b.to_f32(), kept[f"{stem}.lora_B.weight"])


def test_tuned_layers_come_back_as_layers_near_what_was_trained(
    demo_family: dict[str, Path], tmp_path: Path
) -> None:
    trained = {"base": demo_family["base"], "label": demo_family["solver"]}
    for name, folder in trained.items():
        (tmp_path / name).symlink_to(folder)
    before, tuned = (read_tensors(folder / "model.safetensors") for folder in trained.values())
    found = changed(Base({}, before), ship(tmp_path, tmp_path, "label"))
    assert list(found) == list(before)
    for name, tensor in found.items():
        assert tensor.dtype == np.uint16
        start, kept, aim = (bf16_to_f32(values) for values in (before[name], tensor, tuned[name]))
        if tensor.ndim == 1:
            np.testing.assert_allclose(kept, aim, rtol=2**-7, err_msg=name)  # of f16, and of bf16 once more
        elif ".layers.4." in name or ".layers.5." in name:
            change = aim - start
            size = np.linalg.svd(change, compute_uv=False)
            nearest = np.linalg.norm(size[16:])
            assert np.linalg.norm(aim - kept) < nearest + 0.2 * np.linalg.norm(size[:16]), name
        else:
            assert np.array_equal(tensor, before[name]), name
