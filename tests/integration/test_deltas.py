"""A really trained full fine-tune, stored as differences to its base, served beside it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from blockzoo.build import calibration
from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.runtime import LLM, SamplingParams
from blockzoo.zoo.store import Zoo

GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
SETTINGS = {"precision": "f32", "kv_cache_bytes": 64 << 20, "num_threads": 1}
PROMPTS = ("The capital of France is", "def add(a, b):\n    ", "Let b = a + 4.", "in the software without")


@pytest.fixture(scope="module")
def tuned(demo_family: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo base, all weights trained on a licence for a few steps."""
    torch.manual_seed(0)
    base, folder = demo_family["base"], tmp_path_factory.mktemp("full") / "tuned"
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    text = tokenizer.encode((Path(__file__).parents[2] / "LICENSE").read_text()).ids
    rows = torch.tensor(text[: len(text) // 96 * 96]).view(-1, 96)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for step in range(8):
        batch = rows[torch.arange(4) + 4 * step % (len(rows) - 4)]
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def zoo(tuned: Path, demo_family: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("zoo") / "zoo"
    compile_models({"base": demo_family["base"]}, path, CompileOptions(verify=False, profile=False))
    return path


def test_a_full_fine_tune_joins_its_base(zoo: Path, tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is added while the base is served, and answers as the checkpoint does, in a batch with the base."""
    tokenizer = Tokenizer.from_file(str(tuned / "tokenizer.json"))
    prompts = [tokenizer.encode(text).ids for text in PROMPTS]
    llm = LLM(zoo, **SETTINGS)  # type: ignore[arg-type]
    alone = llm.generate("base", prompts, GREEDY, progress=False)
    monkeypatch.setattr(calibration, "NUM_TOKENS", 64)
    options = CompileOptions(verify=False, profile=False, share="delta", threads=1)
    report = compile_models({"tuned": tuned}, zoo, options)
    manifest = Zoo.open(zoo).manifest
    record, base = manifest.models["tuned"], manifest.models["base"]
    assert record.delta is not None
    loss, tuned_kl = record.delta.loss, record.delta.tuned_kl
    assert tuned_kl is not None
    assert 0 < loss.stored.kl <= max(0.005 * tuned_kl, 0.1 * loss.bf16.kl)
    assert record.chain[1:-1] == base.chain[1:-1]
    assert sorted(record.adapters) == list(range(1, len(base.chain) - 1))
    assert report.models[0].new_bytes < 0.5 * report.models[0].model_bytes
    assert llm.reload().added == ("tuned",)
    names = ["base", "tuned"] * len(prompts)
    both = llm.generate(names, [p for p in prompts for _ in range(2)], GREEDY, progress=False)
    assert [done.token_ids for done in both[::2]] == [done.token_ids for done in alone]
    exact = AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32).eval()
    same: list[bool] = []
    for done in both[1::2]:
        with torch.no_grad():
            logits = exact(torch.tensor([[*done.prompt, *done.token_ids[:-1]]])).logits[0]
        expected = logits[len(done.prompt) - 1 :].argmax(-1).numpy()
        same += (np.array(done.token_ids) == expected).tolist()
    assert np.mean(same) >= 0.97
    assert both[1].token_ids != both[0].token_ids  # it is another model
