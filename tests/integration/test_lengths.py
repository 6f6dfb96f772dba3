"""Models whose RoPE was stretched: how long they are, and their tokens beyond the length they began with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.runtime import LLM, SamplingParams
from blockzoo.runtime.api.errors import PromptTooLongError

ROPES = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.fixture(scope="module")
def stretched(architectures: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders that give 64 positions and stretch them fourfold."""
    root = tmp_path_factory.mktemp("stretched")
    for name, rope in ROPES.items():
        shutil.copytree(architectures["llama-gqa-untied"], root / name)
        config = json.loads((root / name / "config.json").read_text())
        changed = config | {"max_position_embeddings": 64, "rope_parameters": rope}
        (root / name / "config.json").write_text(json.dumps(changed))
    return {name: root / name for name in ROPES}


@pytest.fixture(scope="module")
def zoo(stretched: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("zoo") / "stretched"
    compile_models(stretched, path, CompileOptions(verify=False, profile=False))
    return path


@pytest.mark.parametrize("name", ROPES)
def test_tokens_beyond_the_length_before_stretching(name: str, zoo: Path, stretched: dict[str, Path]) -> None:
    llm = LLM(zoo, precision="f32", kv_cache_bytes=64 << 20)
    rng = np.random.default_rng(1)
    asked = [rng.integers(2, 2048, length).tolist() for length in (60, 130, 216)]
    greedy = SamplingParams(max_tokens=1000, temperature=0.0, ignore_eos=True)
    model = AutoModelForCausalLM.from_pretrained(stretched[name], dtype=torch.float32).eval()
    for completion in llm.generate(name, asked, greedy, progress=False):
        tokens = [*completion.prompt, *completion.token_ids]
        assert len(tokens) == 256
        with torch.no_grad():
            logits = model(torch.tensor([tokens[:-1]])).logits[0]
        begin = len(completion.prompt) - 1
        assert logits[begin:].argmax(-1).tolist() == list(completion.token_ids)
    with pytest.raises(PromptTooLongError, match="takes at most 255"):
        llm.generate(name, [[5] * 256], greedy, progress=False)


def test_max_model_len_is_a_bound_on_the_stretched_length(zoo: Path) -> None:
    llm = LLM(zoo, precision="f32", kv_cache_bytes=64 << 20, max_model_len=100)
    greedy = SamplingParams(max_tokens=1000, temperature=0.0, ignore_eos=True)
    (completion,) = llm.generate("yarn", [[5] * 90], greedy, progress=False)
    assert len(completion.token_ids) == 10
