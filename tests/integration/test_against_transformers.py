"""Served tokens and logits against transformers, the oracle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from blockzoo.engines.openvino import OpenVINOEngines
from blockzoo.engines.probe import ProbeChain
from blockzoo.runtime import LLM, SamplingParams
from blockzoo.zoo.store import Zoo

NEW_TOKENS = 32
GREEDY = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)


def prompts(vocab: int, lengths: tuple[int, ...] = (1, 5, 17, 31, 32, 33, 64, 90)) -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(2, vocab, length).tolist() for length in lengths]


def assert_greedy(model: torch.nn.Module, prompt: list[int], found: tuple[int, ...]) -> None:
    """Check that each token found is the oracle's likeliest after all tokens before it."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *found[:-1]]])).logits[0]
    assert len(found) == NEW_TOKENS
    assert tuple(logits[len(prompt) - 1 :].argmax(-1).tolist()) == found


def hf_model(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval()


@pytest.fixture(scope="module")
def architecture_llm(architecture_zoo: Path) -> LLM:
    return LLM(architecture_zoo, precision="f32", kv_cache_bytes=64 << 20)


def test_greedy_tokens_of_every_architecture(
    architecture_llm: LLM, architectures: dict[str, Path], architecture: str
) -> None:
    asked = prompts(2048)
    model = hf_model(architectures[architecture])
    for completion in architecture_llm.generate(architecture, asked, GREEDY, progress=False):
        assert_greedy(model, list(completion.prompt), completion.token_ids)


@pytest.fixture(scope="module")
def demo_llm(demo_zoo: Path) -> LLM:
    return LLM(demo_zoo, precision="f32", kv_cache_bytes=64 << 20)


@pytest.mark.parametrize("name", ["base", "base-sharded", "notes-merged", "solver"])
def test_greedy_tokens_of_trained_checkpoints(demo_llm: LLM, demo_family: dict[str, Path], name: str) -> None:
    asked = prompts(2048)
    model = hf_model(demo_family[name])
    for completion in demo_llm.generate(name, asked, GREEDY, progress=False):
        assert_greedy(model, list(completion.prompt), completion.token_ids)


def test_greedy_tokens_of_a_lora_folder(demo_llm: LLM, demo_family: dict[str, Path]) -> None:
    from peft import PeftModel

    asked = prompts(2048)
    # the zoo stores the merged weights in the base's bf16: that rounding is the only difference
    model = PeftModel.from_pretrained(hf_model(demo_family["base"]), demo_family["notes"]).merge_and_unload()
    model = model.to(torch.bfloat16).to(torch.float32)
    for completion in demo_llm.generate("notes", asked, GREEDY, progress=False):
        assert_greedy(model, list(completion.prompt), completion.token_ids)


@pytest.mark.parametrize("name", ["base", "solver"])
def test_bf16_is_as_close_as_torch_in_bf16(demo_zoo: Path, demo_family: dict[str, Path], name: str) -> None:
    if OpenVINOEngines().precision != "bf16":
        pytest.skip("this CPU does not compute bf16 in hardware")
    zoo = Zoo.open(demo_zoo)
    record = zoo.manifest.models[name]
    blocks = [zoo.read_block(block_id) for block_id in record.chain]
    ids = prompts(2048, (200,))[0]
    ours = ProbeChain(OpenVINOEngines("bf16"), blocks, record.config, len(ids)).forward(ids, 0)
    with torch.no_grad():
        exact = hf_model(demo_family[name])(torch.tensor([ids])).logits[0].numpy()
        torch_bf16 = (
            hf_model(demo_family[name], torch.bfloat16)(torch.tensor([ids])).logits[0].float().numpy()
        )
    error, torch_error = (np.linalg.norm(x - exact) / np.linalg.norm(exact) for x in (ours, torch_bf16))
    assert error < 1.25 * torch_error
