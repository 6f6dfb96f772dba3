"""Resident memory under prompts of random lengths, with every shape of a step a new one."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from blockzoo.runtime import EngineConfig, LLMEngine, SamplingParams


@pytest.mark.slow
def test_prompts_of_random_lengths_do_not_fill_memory(demo_zoo: Path) -> None:
    config = EngineConfig(precision="f32", kv_cache_bytes=64 << 20, prefix_caching=False)
    engine, rng = LLMEngine(demo_zoo, config), np.random.default_rng(0)
    resident = []
    for number in range(600):
        length = int(rng.integers(5, 400))
        model = engine.models[number % len(engine.models)]
        params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
        engine.add_request(str(number), model, rng.integers(2, 2048, length), params)
        if rng.random() < 0.5:
            while engine.has_unfinished():
                engine.step()
            engine.rest()
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    assert resident[-1] - resident[299] < 40 << 20  # with all kernels kept: 300 MiB
