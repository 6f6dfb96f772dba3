"""The training's own arithmetic, on a tiny model."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.smollm2_family import minutes
from benchmarks.smollm2_family.recipes import Recipe
from benchmarks.smollm2_family.train import answer_loss, batches, encode, padded, trainable

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
END = 2


class Bytes:
    """A tokenizer of bytes, with a template."""

    eos_token_id = END

    def __call__(self, text: str) -> Any:
        return SimpleNamespace(input_ids=[byte % 60 + 3 for byte in text.encode()])

    def apply_chat_template(self, messages: list[dict[str, str]], **_: object) -> str:
        return "".join(f"<{message['content']}>" for message in messages)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_the_loss_is_that_of_transformers_over_the_answers(tiny: Path) -> None:
    rows = [([5, 6, 7, 8, 9, END], 4), ([10, 11, 12, END], 2), ([13, 14, 15, 16, 17, 18, 19, END], 5)]
    batch = padded(rows, END)
    assert batch.ids.shape == (3, 8)
    assert batch.is_answer.sum(1).tolist() == [2, 2, 3]
    model = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    labels = batch.ids.masked_fill(~batch.is_answer, -100)
    attended = torch.tensor([[1] * len(ids) + [0] * (8 - len(ids)) for ids, _ in rows])
    expected = model(input_ids=batch.ids, attention_mask=attended, labels=labels).loss
    assert answer_loss(model, batch).item() == pytest.approx(expected.item(), rel=0.02)  # bf16 products


def test_batches_hold_every_sample_of_the_seed_once() -> None:
    recipe = Recipe(minutes, rate=1.0, steps=5, rows=6)
    found = list(batches(Bytes(), recipe, seed=3, steps=5))
    assert len(found) == 5
    rows = {tuple(row.tolist()) for batch in found for row in batch.ids}
    assert len(rows) == 30
    again = list(batches(Bytes(), recipe, seed=3, steps=5))
    assert all(torch.equal(one.ids, two.ids) for one, two in zip(found, again, strict=True))


def test_a_row_is_the_prompt_and_the_answer_with_its_end() -> None:
    sample = minutes.sample(random.Random(0), held_out=False)
    ids, prompt = encode(Bytes(), sample)
    assert ids[prompt:] == [*Bytes()(sample.answer).input_ids, END]
    assert prompt == len(f"<{sample.system}><{sample.user}>")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"rank": 4, "targets": ("q_proj", "v_proj")}, {"lora"}),
        ({"last_layers": 1}, {"layers.2"}),
        ({}, {"layers.0", "layers.1", "layers.2", "embed_tokens", "norm"}),
    ],
)
def test_what_the_recipe_says_is_trained_and_nothing_else(
    tiny: Path, settings: dict[str, Any], expected: set[str]
) -> None:
    model = trainable(tiny, Recipe(minutes, rate=1.0, steps=1, rows=1, **settings))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(
        parameter.dtype == torch.float32 for parameter in model.parameters() if parameter.requires_grad
    )
    assert all(any(part in name for part in expected) for name in trained)
    assert all(any(part in name for name in trained) for part in expected)
    answer_loss(model, padded([([5, 6, 7, END], 2)], END)).backward()
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert moved == set(trained)
