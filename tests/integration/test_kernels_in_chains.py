"""The kernels under the executor, in Triton's interpreter: what runs on a GPU without its plans."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from benchmarks.random_chains import RandomZoo, run_steps
from blockzoo.engines.reference import ReferenceEngines
from blockzoo.engines.tensorrt.attention import PagedAttention
from blockzoo.engines.tensorrt.operators import FusedOperators

SIZES: dict[str, Any] = {"max_tokens": 128, "max_seqs": 8, "context": 96}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU is here: tests/gpu has the same")
def test_kernels_in_a_chain_give_what_torch_gives() -> None:
    """Three models that part after two layers, two with adapters; decode steps padded as for CUDA graphs."""
    kernels = ReferenceEngines("f32", "cpu")
    kernels.operators, kernels._attention = FusedOperators(), PagedAttention(16)
    kernels.arrays.records = True
    kernels.arrays.recorded = lambda run: run  # type: ignore[method-assign]
    sides = [
        run_steps(RandomZoo("tiny", engines, 3, 2, lora_rank=4, **SIZES), prompt=5, steps=2)
        for engines in (kernels, ReferenceEngines("f32", "cpu"))
    ]
    for ours, expected in zip(*sides, strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=1e-4)
