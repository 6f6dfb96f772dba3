"""The whole runtime on torch engines gives the tokens of the OpenVINO ones, in f32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from blockzoo.runtime import LLM, SamplingParams

pytest.importorskip("torch")


def generate(zoo: Path, backend: str) -> list[tuple[int, ...]]:
    """Greedy and drawn requests to every model at once, prompts in chunks."""
    rng = np.random.default_rng(0)
    llm = LLM(
        zoo,
        backend=backend,
        device="cpu",
        precision="f32",
        kv_cache_bytes=16 << 20,
        max_num_batched_tokens=96,
    )
    models = [llm.models[i % len(llm.models)] for i in range(max(8, len(llm.models)))]
    prompts = [rng.integers(2, 2048, int(rng.integers(1, 120))).tolist() for _ in models]
    params = [
        SamplingParams(max_tokens=10, temperature=0.8 * (i % 2), seed=i, ignore_eos=True)
        for i in range(len(models))
    ]
    assert llm.engine.engine_facts["backend"] == backend
    return [completion.token_ids for completion in llm.generate(models, prompts, params, progress=False)]


def test_demo_family(demo_zoo: Path) -> None:
    assert generate(demo_zoo, "reference") == generate(demo_zoo, "openvino")


def test_all_architectures(architecture_zoo: Path) -> None:
    assert generate(architecture_zoo, "reference") == generate(architecture_zoo, "openvino")
