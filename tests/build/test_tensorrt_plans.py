"""zoo-compile --backend tensorrt: plans shared by shape class, kept, reused, collected, matched at load."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("onnx")
pytest.importorskip("tensorrt_rtx")

from blockzoo.build import calibration
from blockzoo.build.cli import main
from blockzoo.build.inspect import main as inspect
from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.build.tensorrt_plans import TensorRTOptions
from blockzoo.engines.base import EngineError
from blockzoo.engines.tensorrt.plans import Machine, choose_plan, plan_requests
from blockzoo.zoo.errors import StoreError
from blockzoo.zoo.manifest import OptimizationProfileRecord
from blockzoo.zoo.store import Zoo

FAST = ["--no-verify", "--no-profile"]
PARTS = {"attn_pre", "attn_post", "ffn", "head"}
Tree = Callable[[Path], dict[str, str]]


@pytest.fixture(scope="module")
def zoo(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One llama with plans for sm89."""
    path = tmp_path_factory.mktemp("plans") / "zoo"
    command = [f"base={checkpoints['llama']}", "-o", str(path), *FAST]
    assert main([*command, "--backend", "tensorrt", "--target", "sm89"]) == 0
    return path


def test_one_plan_per_part_of_a_shape_class(zoo: Path) -> None:
    manifest = Zoo.open(zoo).manifest
    assert {plan.part for plan in manifest.tensorrt_plans.values()} == PARTS
    assert len(manifest.tensorrt_plans) == 4  # three layers share theirs
    for key, plan in manifest.tensorrt_plans.items():
        assert (zoo / "plans" / "tensorrt" / key).stat().st_size == plan.num_bytes
        assert (plan.target, plan.library, plan.precision) == ("sm89", "tensorrt_rtx", "bf16")
        assert plan.baked_block is None
        assert Zoo.open(zoo).read_tensorrt_plan(key)


def test_plans_are_reused_across_models_and_runs_and_targets_are_added(
    zoo: Path, checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str], tree: Tree
) -> None:
    before = tree(zoo)
    again = ["-o", str(zoo), *FAST, "--backend", "tensorrt", "--target", "sm89"]
    assert main(again) == 0
    assert "TensorRT plans: 0 built, 4 reused" in capsys.readouterr().out
    assert tree(zoo) == before
    # the sliding window is the attention kernel's affair: mistral's networks are llama's, but for the head
    assert main([f"other={checkpoints['mistral']}", *again]) == 0
    said = capsys.readouterr().out
    assert "1 built, 4 reused" in said or "0 built, 4 reused" in said
    assert main([*again[:-1], "sm120", "--dry-run"]) == 0
    assert "to build, 0 reused" in capsys.readouterr().out
    assert main([*again[:-1], "sm120"]) == 0
    targets = {plan.target for plan in Zoo.open(zoo).manifest.tensorrt_plans.values()}
    assert targets == {"sm89", "sm120"}
    assert inspect([str(zoo)]) == 0
    table = capsys.readouterr().out
    assert re.search(r"decode 1 8 64: [\d.]+ [kM]B, prefill 64 512 4096: [\d.]+ [kM]B", table)  # scratch
    assert "sm120" in table


def test_the_build_phases_are_told(zoo: Path) -> None:
    told: list[tuple[str, int, int, str]] = []

    def progress(what: str, done: int, total: int, detail: str = "") -> None:
        told.append((what, done, total, detail))

    plans = TensorRTOptions(targets=("sm86",), workspace_bytes=64 << 20)
    compile_models({}, zoo, CompileOptions(verify=False, profile=False, tensorrt=plans), progress=progress)
    built = [step for step in told if step[0] == "building plans for sm86"]
    assert [done for _, done, _, _ in built] == sorted(done for _, done, _, _ in built)
    assert built[-1] == ("building plans for sm86", 4, 4, "")
    assert {detail.split(":")[0] for *_, detail in built[:-1]} == PARTS
    assert "ffn: Building engine" in {detail for *_, detail in built}
    records = [p for p in Zoo.open(zoo).manifest.tensorrt_plans.values() if p.target == "sm86"]
    assert {record.workspace_bytes for record in records} == {64 << 20}
    assert [f.name for f in (zoo / "plans" / "tensorrt").iterdir() if "sm86" in f.name]  # timings


def test_plans_go_with_the_last_block_of_their_shape(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "zoo"
    tensorrt = ["--backend", "tensorrt", "--target", "sm89", "-o", str(path), *FAST]
    assert main([f"a={checkpoints['llama']}", f"b={checkpoints['qwen3']}", *tensorrt, "--bake-weights"]) == 0
    manifest = Zoo.open(path).manifest
    assert len(manifest.tensorrt_plans) == 2 * (3 * 3 + 1)
    assert {plan.baked_block for plan in manifest.tensorrt_plans.values()} <= manifest.blocks.keys()
    assert main(["-o", str(path), "--remove", "b"]) == 0
    files = {file.name for file in (path / "plans" / "tensorrt").iterdir()}
    assert len(Zoo.open(path).manifest.tensorrt_plans) == 10
    assert Zoo.open(path).manifest.tensorrt_plans.keys() == {f for f in files if not f.startswith("timing")}


def test_quantized_blocks_have_none(
    checkpoints: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calibration, "NUM_TOKENS", 16)
    command = [f"m={checkpoints['llama']}", "-o", str(tmp_path / "z"), *FAST, "--weights", "int8"]
    assert main([*command, "--backend", "tensorrt", "--target", "sm89"]) == 0
    manifest = Zoo.open(tmp_path / "z").manifest
    said = f"TensorRT plans: 0 built, 0 reused; 0 B ({len(manifest.blocks)} quantized blocks have none)"
    assert said in capsys.readouterr().out
    assert not manifest.tensorrt_plans


def test_a_damaged_plan_is_found(zoo: Path, tmp_path: Path) -> None:
    opened = Zoo.open(zoo)
    key = next(iter(opened.manifest.tensorrt_plans))
    copy = Zoo(tmp_path, opened.manifest)
    with pytest.raises(StoreError, match="missing; run zoo-compile --backend tensorrt"):
        copy.read_tensorrt_plan(key)
    (tmp_path / "plans" / "tensorrt").mkdir(parents=True)
    (tmp_path / "plans" / "tensorrt" / key).write_bytes(b"junk")
    with pytest.raises(StoreError, match="corrupt"):
        copy.read_tensorrt_plan(key)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--backend", "tensorrt", "--target", "sm90"], "with such a GPU only; this machine has"),
        (["--backend", "tensorrt", "--target", "ampere"], "expected native or one of sm75"),
        (["--backend", "tensorrt", "--target", "sm75"], "sm75 does not compute in bf16"),
    ],
)
def test_targets_that_cannot_be_built_change_nothing(
    zoo: Path, tree: Tree, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    before = tree(zoo)
    assert main(["-o", str(zoo), *FAST, *arguments]) == 2
    assert said in capsys.readouterr().err
    assert tree(zoo) == before


def test_settings_of_tensorrt_need_it(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["-o", str(zoo), "--target", "sm89"])
    assert "--target is a setting of --backend tensorrt" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["-o", str(zoo), "--backend", "tensorrt", "--workspace", "much"])
    assert "expected bytes, or 512K" in capsys.readouterr().err


def test_the_key_names_all_that_decides_the_plan(zoo: Path) -> None:
    spec = next(b.spec for b in Zoo.open(zoo).manifest.blocks.values() if b.spec.kind == "ffn")
    (request,) = plan_requests(spec, "bf16", "sm89", "tensorrt_rtx", "1.7.1")
    changes = [
        {"target": "sm120"},
        {"library": "tensorrt"},
        {"library_version": "1.6.1"},
        {"precision": "f32"},
        {"workspace_bytes": 1 << 20},
        {"baked_block": "ab"},
        {"revision": 0},
        {"profiles": (OptimizationProfileRecord("decode", 1, 16, 64),)},
        {"spec": replace(spec, intermediate_size=32)},
    ]
    keys = [request.key(), *(replace(request, **change).key() for change in changes)]
    assert len(set(keys)) == len(keys)


def test_a_machine_that_the_plans_do_not_fit_is_told(zoo: Path) -> None:
    manifest = Zoo.open(zoo).manifest
    plans = {key: plan for key, plan in manifest.tensorrt_plans.items() if plan.target == "sm89"}
    version = next(iter(plans.values())).library_version
    block_id, block = next((i, b) for i, b in manifest.blocks.items() if b.spec.kind == "ffn")

    def choose(machine: Machine, precision: str = "bf16") -> str:
        return choose_plan(plans, block_id, block.spec, "ffn", precision, machine)

    key = choose(Machine("sm89", "tensorrt_rtx", version))
    assert plans[key].part == "ffn"
    minor = ".".join(version.split(".")[:2])
    with pytest.raises(
        EngineError,
        match=rf"plan is for sm89 / TensorRT-RTX {minor}, this machine has sm90 and TensorRT 10.14",
    ):
        choose(Machine("sm90", "tensorrt", "10.14.1"))
    with pytest.raises(EngineError, match="this machine has sm89 and TensorRT-RTX 0"):
        choose(Machine("sm89", "tensorrt_rtx", "0.9.0"))
    with pytest.raises(EngineError, match="no TensorRT plan for ffn"):
        choose(Machine("sm89", "tensorrt_rtx", version), "f32")
