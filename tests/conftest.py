"""Fixtures that several areas share: the demo family, and a zoo compiled from it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # there are as many as cores, for which threads of theirs would wait
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))  # for patience, quiet and triton_tensors
sys.path.append(str(Path(__file__).parents[1]))  # for benchmarks; last: it has a folder "build"

if not Path("/dev/nvidiactl").exists():
    # without a GPU Triton's kernels run in its interpreter, which must be chosen before triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")  # a machine that has other work slows examples down

DEMO_MODELS = ("base", "base-sharded", "notes", "notes-merged", "solver")


@pytest.fixture(scope="session")
def demo_family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the demo family's checkpoints, by model name."""
    from blockzoo.zoo.demo.assemble import assemble

    return assemble(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="session")
def demo_zoo(demo_family: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zoo of the whole demo family, compiled without verification and profiles (tested elsewhere)."""
    from blockzoo.build.pipeline import CompileOptions, compile_models

    zoo = tmp_path_factory.mktemp("zoo") / "demo"
    compile_models(demo_family, zoo, CompileOptions(verify=False, profile=False))
    return zoo


@pytest.fixture(scope="module")
def steady_pace() -> Iterator[None]:
    """Prompts of engines in this process are cut alike, however long steps take: so the same is in each step
    every time, and the same dice are thrown."""
    from blockzoo.runtime.serve.step_pace import StepPace

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepPace, "tokens_within", lambda *_: 1 << 30)
        yield
