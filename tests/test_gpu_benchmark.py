"""The GPU benchmark runs dry on the CPU; the TensorRT-LLM peer refuses where it cannot run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("torch")

from benchmarks import gpu

ROOT = Path(__file__).parents[1]
_GPU_ONLY = ("plans", "plans_adapters", "attention", "tensorrt_rtx", "tensorrt_llm")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


def test_every_part_runs_dry(tmp_path: Path) -> None:
    done = run(
        *("benchmarks.gpu", "--shapes", "tiny", "--device", "cpu", "--repeats", "1", "--out", str(tmp_path))
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "gpu-cpu.json").read_text())
    parts = report["tiny"]
    assert not [name for name, facts in parts.items() if "error" in facts], parts
    assert parts["scattered"]["15% of rows"]["ms"] > 0
    assert parts["adapters"]["batch 8"]["share_of_base_rate"] > 0
    assert parts["quantized"]["8 rows, us"].keys() >= {"given", "4 bits", "8 bits, unpacked"}
    assert all("skipped" in parts[name] for name in _GPU_ONLY)
    assert parts["decode"]["batch 1 without graphs"]["tokens_per_s"] > 0
    assert report["ceilings"].keys() == {"copy_bytes_per_s", "read_bytes_per_s", "matrix_flops_per_s"}


@pytest.mark.slow
def test_parts_in_processes_of_their_own_tell_what_they_find(tmp_path: Path) -> None:
    what = (
        "--shapes",
        "tiny",
        "--parts",
        "tensorrt_llm,prefill",
        "--device",
        "cpu",
        "--repeats",
        "1",
        "--apart",
    )
    done = run("benchmarks.gpu", *what, "--tensorrt-llm", sys.executable, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "gpu-cpu.json").read_text())
    assert report["tiny"]["prefill"]["48 tokens"]["ms"] > 0
    if find_spec("tensorrt_llm") is None:
        assert "pip install tensorrt-llm" in report["tiny"]["tensorrt_llm"]["error"]  # the next part ran


def test_parts_that_take_too_long_are_ended_and_told() -> None:
    args = gpu.arguments(["--shapes", "tiny", "--device", "cpu"])
    facts: dict[str, object] = {}
    gpu.run_part_apart(args, gpu.Bench("cpu", 1), "tiny", "decode", 0.01, facts.__setitem__)
    assert facts == {"error": "ended after 0 s"}


def test_nothing_begins_after_the_last_minute(tmp_path: Path) -> None:
    what = ["--shapes", "tiny", "--parts", "decode", "--device", "cpu", "--minutes", "0"]
    assert gpu.main([*what, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "gpu-cpu.json").read_text())
    assert report["tiny"]["decode"] == {"skipped": "the 0 minutes were over"}
    with pytest.raises(SystemExit):
        gpu.main(["--parts", "decode,unknown"])


def test_a_part_that_fails_keeps_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def part(bench: gpu.Bench, shape: str, facts: gpu.Facts) -> None:
        facts |= {"first": 1}
        raise ValueError("then this")

    monkeypatch.setitem(gpu.PARTS, "part", part)
    facts: dict[str, object] = {}
    gpu.run_part(gpu.Bench("cpu", 1), "tiny", "part", facts.__setitem__)
    assert facts == {"first": 1, "error": "ValueError: then this"}


def test_eight_tenants_share_28_of_32_layers(tmp_path: Path) -> None:
    what = ("--shapes", "deep", "--parts", "tenants", "--device", "cpu", "--repeats", "1")
    done = run("benchmarks.gpu", *what, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    tenants = json.loads((tmp_path / "gpu-cpu.json").read_text())["deep"]["tenants"]
    assert (tenants["shared_layers"], tenants["layers"]) == (28, 32)
    assert tenants["weight_bytes"] < tenants["weight_bytes_apart"] / 4
    assert tenants["engine_calls"] == 10  # what is shared, eight times the rest, the head


def test_it_starts_on_a_machine_with_little_installed() -> None:
    missing = ("onnx", "onnxruntime", "transformers", "openvino", "tritonclient", "tensorrt_rtx", "rich")
    block = f"import sys; sys.modules.update(dict.fromkeys({missing!r})); import benchmarks.gpu"
    done = subprocess.run([sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_tests_for_a_gpu_need_no_plugin_of_pytest() -> None:
    line = next(line for line in (ROOT / "Makefile").read_text().splitlines() if "tests/gpu" in line)
    bare = ("-p", "no:timeout", "-p", "no:hypothesispytest", "--collect-only", "-q")
    done = run("pytest", *re.findall(r"-m pytest (.*?) \|\|", line)[0].split(), *bare)
    assert done.returncode == 0, done.stdout
    assert re.search(r"\d\d tests collected", done.stdout)


def test_the_tensorrt_llm_peer_says_how_to_install() -> None:
    if find_spec("tensorrt_llm") is not None:
        pytest.skip("TensorRT-LLM is installed here")
    done = run("benchmarks.peers.tensorrt_llm", "--model", "nowhere")
    assert done.returncode == 2
    assert "pip install" in done.stderr
    assert "docs/tensorrt.md" in done.stderr
