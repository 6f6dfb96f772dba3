"""The GPU benchmark runs dry on the CPU; the TensorRT-LLM peer refuses where it cannot run."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("torch")
ROOT = Path(__file__).parents[1]


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
    assert parts["tenants"]["weight_bytes"] < parts["tenants"]["weight_bytes_apart"]
    assert parts["decode"]["batch 1 without graphs"]["tokens_per_s"] > 0
    assert report["ceilings"].keys() == {"copy_bytes_per_s", "read_bytes_per_s", "matrix_flops_per_s"}


def test_the_tensorrt_llm_peer_says_how_to_install() -> None:
    if find_spec("tensorrt_llm") is not None:
        pytest.skip("TensorRT-LLM is installed here")
    done = run("benchmarks.peers.tensorrt_llm", "--model", "nowhere")
    assert done.returncode == 2
    assert "pip install" in done.stderr
    assert "docs/tensorrt.md" in done.stderr
