"""Fine-tunes of a real model: a merged LoRA stays an adapter, a noisy copy is compared in bounded work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.smollm2 import NotAvailableError, smollm2
from blockzoo.build import equivalence
from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.build.trials import MAX_FORWARDS
from blockzoo.runtime import LLM, SamplingParams
from blockzoo.zoo.store import Zoo

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Dear Sir or Madam,\n\nI am writing to",
    "The three laws of thermodynamics are",
    "SELECT name FROM users WHERE",
    "What is 17 times 3?",
)
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load(folder: Path, dtype: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model in bf16; with a LoRA of rank 16 on everything, merged by PEFT in bf16; and with noise."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    try:
        file = smollm2()
    except NotAvailableError as error:
        pytest.skip(str(error))
    root = tmp_path_factory.mktemp("smollm2-finetunes")
    made = {name: root / name for name in ("base", "merged", "noisy")}
    given: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    read = AutoModelForCausalLM.from_pretrained(**given, dtype=torch.float32)
    del read.config.quantization_config  # save_pretrained refuses what says that it is quantized
    base = LlamaForCausalLM(read.config).to(torch.bfloat16)
    base.load_state_dict(read.state_dict())
    base.save_pretrained(made["base"])
    torch.manual_seed(0)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=PROJECTIONS)
    tuned = get_peft_model(load(made["base"], "bfloat16"), lora)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.01 * torch.randn(weight.shape))
    tuned.merge_and_unload().save_pretrained(made["merged"])
    with torch.no_grad():
        for name, weight in base.named_parameters():
            if name.endswith("proj.weight"):
                weight += 0.1 * weight.float().std() * torch.randn(weight.shape)
    base.save_pretrained(made["noisy"])
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for folder in made.values():
        tokenizer.save_pretrained(folder)
    return made


def test_a_merged_lora_is_kept_as_an_adapter(folders: dict[str, Path], tmp_path: Path) -> None:
    import torch
    from transformers import AutoTokenizer

    models: dict[str, str | Path] = {name: folders[name] for name in ("base", "merged")}
    report = compile_models(models, tmp_path / "zoo", CompileOptions(profile=False)).models[1]
    assert (report.num_reused, report.num_recovered, report.rank) == (62, 60, 16)
    record = Zoo.open(tmp_path / "zoo").manifest.models["merged"]
    assert record.recovery is not None
    assert record.recovery.given_back == ()
    assert record.verification is not None
    assert record.verification.loss is not None
    assert record.verification.loss.excess < 0.5
    llm = LLM(tmp_path / "zoo", precision="f32", kv_cache_bytes=256 << 20)
    greedy = SamplingParams(max_tokens=48, temperature=0.0, ignore_eos=True)
    tokenizer = AutoTokenizer.from_pretrained(folders["merged"])
    answers = llm.generate("merged", [tokenizer(p).input_ids for p in PROMPTS], greedy, progress=False)
    exact, rounded = (load(folders["merged"], dtype) for dtype in ("float32", "bfloat16"))
    same, bf16_same = [], []
    for answer in answers:
        tokens, start = torch.tensor([[*answer.prompt, *answer.token_ids[:-1]]]), len(answer.prompt) - 1
        with torch.no_grad():
            expected = exact(tokens).logits[0, start:].argmax(-1).numpy()
            bf16_same += (rounded(tokens).logits[0, start:].argmax(-1).numpy() == expected).tolist()
        same += (np.array(answer.token_ids) == expected).tolist()
    assert np.mean(same) >= np.mean(bf16_same) - 0.005  # of 288


def test_equivalent_blocks_are_found_in_bounded_work(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[equivalence.Search] = []
    substitute: Callable[..., equivalence.Search] = equivalence.substitute

    def kept(*arguments: Any) -> equivalence.Search:
        found.append(substitute(*arguments))
        return found[-1]

    monkeypatch.setattr(equivalence, "substitute", kept)
    models: dict[str, str | Path] = {name: folders[name] for name in ("base", "noisy")}
    options = CompileOptions(profile=False, verify=False, share="equivalent")
    compile_models(models, tmp_path / "zoo", options)
    record = Zoo.open(tmp_path / "zoo").manifest.models["noisy"].equivalence
    assert record is not None
    assert record.cosine >= 0.98
    assert len(record.own_blocks) >= 8
    assert found[0].num_candidates == 60
    assert not found[0].cut_short
    assert found[0].num_forwards < MAX_FORWARDS  # halves: up to 120
