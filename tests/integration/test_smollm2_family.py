"""Real fine-tunes of a real model, from the weights kept here to right answers, against transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.smollm2 import NotAvailableError
from benchmarks.smollm2_family import samples
from benchmarks.smollm2_family.assemble import assemble
from benchmarks.smollm2_family.recipes import RECIPES
from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.runtime import LLM, SamplingParams
from blockzoo.runtime.llm import Completion
from blockzoo.zoo.checkpoint import open_checkpoint
from blockzoo.zoo.store import Zoo

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # peft reads it
    pytest.mark.filterwarnings("ignore::UserWarning"),  # and warns of adapters it loads
]
TRADES = ("extract", "label")
NUM_SAMPLES = 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    try:
        return assemble(tmp_path_factory.mktemp("models"), ("base", *TRADES))
    except NotAvailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def zoo(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("smollm2") / "zoo"
    compile_models(folders, path, CompileOptions(verify=False, profile=False))
    return path


@pytest.fixture(scope="module")
def asked() -> dict[str, list[samples.Sample]]:
    return {name: samples.held_out(RECIPES[name].trade, NUM_SAMPLES) for name in TRADES}


@pytest.fixture(scope="module")
def answers(zoo: Path, asked: dict[str, list[samples.Sample]]) -> dict[tuple[str, str], list[Completion]]:
    """By model and trade, in f32, greedy, all tenants in one batch."""
    jobs = [(model, name) for name in TRADES for model in ("base", name)]
    llm = LLM(zoo, precision="f32", kv_cache_bytes=128 << 20)
    completions = llm.chat(
        [model for model, name in jobs for _ in asked[name]],
        [sample.messages for _, name in jobs for sample in asked[name]],
        [
            SamplingParams(max_tokens=RECIPES[name].trade.MAX_NEW_TOKENS, temperature=0.0)
            for _, name in jobs
            for _ in asked[name]
        ],
        progress=False,
    )
    return {job: completions[i * NUM_SAMPLES : (i + 1) * NUM_SAMPLES] for i, job in enumerate(jobs)}


def test_what_was_not_trained_is_the_base_bit_by_bit(folders: dict[str, Path], zoo: Path) -> None:
    base, label = (open_checkpoint(folders[name]) for name in ("base", "label"))
    assert base.files.keys() == label.files.keys()
    changed = {
        name for name in base.files if not np.array_equal(base.tensor(name).data, label.tensor(name).data)
    }
    num_layers = base.config.num_layers
    assert {name.split(".")[2] for name in changed} == {str(num_layers - 2), str(num_layers - 1)}
    models = Zoo.open(zoo).manifest.models
    shared = [one == two for one, two in zip(models["base"].chain, models["label"].chain, strict=True)]
    assert shared.count(False) == 4  # attention and feed-forward of two layers
    assert models["extract"].chain == models["base"].chain


@pytest.mark.parametrize("name", TRADES)
def test_fine_tunes_answer_right_what_the_base_does_not(
    name: str, asked: dict[str, list[samples.Sample]], answers: dict[tuple[str, str], list[Completion]]
) -> None:
    right = RECIPES[name].trade.right
    tuned, base = (
        [right(sample, found.text) for sample, found in zip(asked[name], answers[model, name], strict=True)]
        for model in (name, "base")
    )
    assert all(tuned), [found.text for found in answers[name, name]]
    assert not any(base)
    assert all(found.finish_reason == "stop" for found in answers[name, name])


def test_answers_are_those_of_transformers_and_peft(
    folders: dict[str, Path], answers: dict[tuple[str, str], list[Completion]]
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def loaded(name: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32).eval()

    tokenizer = AutoTokenizer.from_pretrained(folders["base"])
    base = loaded("base")
    check(base, tokenizer, [found for name in TRADES for found in answers["base", name]])
    check(
        PeftModel.from_pretrained(base, folders["extract"]).eval(), tokenizer, answers["extract", "extract"]
    )
    check(loaded("label"), tokenizer, answers["label", "label"])


def check(model: Any, tokenizer: Any, completions: Sequence[Completion]) -> None:
    """Each token found is the one of the greatest logit, given those before it."""
    import torch

    for completion in completions:
        assert isinstance(completion.prompt, str)
        prompt, found = tokenizer(completion.prompt).input_ids, completion.token_ids
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *found[:-1]]])).logits[0, len(prompt) - 1 :]
        assert tuple(logits.argmax(-1).tolist()) == found, completion.text


def test_prompts_are_those_of_the_tokenizers_template(
    folders: dict[str, Path],
    asked: dict[str, list[samples.Sample]],
    answers: dict[tuple[str, str], list[Completion]],
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders["label"])
    for sample, found in zip(asked["label"], answers["label", "label"], strict=True):
        expected = tokenizer.apply_chat_template(sample.messages, add_generation_prompt=True, tokenize=False)
        assert found.prompt == expected
    assert json.loads((folders["label"] / "config.json").read_text())["dtype"] == "bfloat16"
