"""Random-weight checkpoints of every supported architecture, with transformers as their maker."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from over_workers import SETTINGS, over_two
from patience import PATIENCE_S

from blockzoo.runtime import EngineConfig, LLMEngine
from blockzoo.runtime.draft.balance import Balances
from blockzoo.runtime.draft.row_choice import Hopes, Option, RowChoice
from blockzoo.runtime.serve import search_apart
from blockzoo.runtime.workers import group

sys.path.insert(0, str(Path(__file__).parent))  # for onnx_device

SMALL: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,  # sharp enough that rounding decides no token
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gqa-untied": ("Llama", {"tie_word_embeddings": False}),
    "llama-tied-bias": ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-rope-llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-rope-linear": ("Llama", {"rope_parameters": LINEAR}),
    "mistral-window": ("Mistral", {"sliding_window": 24, "num_key_value_heads": 1}),
    "qwen2-bias-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-rope-yarn": ("Qwen2", {"rope_parameters": YARN}),
    "qwen2-some-windows": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    ),
    "qwen3-qk-norm": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
}


def make_checkpoint(name: str, folder: Path, tokenizer_from: Path) -> Path:
    """Save a random model of ARCHITECTURES with a tokenizer."""
    import torch
    import transformers

    prefix, changes = ARCHITECTURES[name]
    config = getattr(transformers, f"{prefix}Config")(**(SMALL | changes))
    torch.manual_seed(7)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            if key.endswith("bias") or "norm" in key:  # else zeros and ones, which prove nothing
                tensor.add_(torch.randn_like(tensor) * 0.1)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_from / file, folder / file)
    return folder


@pytest.fixture(scope="session")
def architectures(tmp_path_factory: pytest.TempPathFactory, demo_family: dict[str, Path]) -> dict[str, Path]:
    """One random checkpoint folder per name of ARCHITECTURES."""
    root = tmp_path_factory.mktemp("architectures")
    return {name: make_checkpoint(name, root / name, demo_family["base"]) for name in ARCHITECTURES}


@pytest.fixture(scope="session")
def architecture_zoo(tmp_path_factory: pytest.TempPathFactory, architectures: dict[str, Path]) -> Path:
    """All of them in one zoo: several KV geometries and rotary embeddings side by side."""
    from blockzoo.build.pipeline import CompileOptions, compile_models

    zoo = tmp_path_factory.mktemp("zoo") / "architectures"
    compile_models(architectures, zoo, CompileOptions(verify=False, profile=False))
    return zoo


@pytest.fixture(scope="module", autouse=True)
def _steady(steady_pace: None) -> None:
    """In all tests here."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that takes `architecture` once for each."""
    if "architecture" in metafunc.fixturenames:
        metafunc.parametrize("architecture", ARCHITECTURES)


@pytest.fixture(scope="session")
def make_lora() -> Callable[[Path, Path, int, dict[str, Any]], None]:
    """(base folder, folder, seed, LoraConfig settings): write a random PEFT folder whose base is "base"."""

    def make(base: Path, folder: Path, seed: int, settings: dict[str, Any]) -> None:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings))
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight.add_(0.1 * torch.randn_like(weight))
        model.save_pretrained(folder)
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "base"}))

    return make


@pytest.fixture
def dice(monkeypatch: pytest.MonkeyPatch) -> random.Random:
    """As many runs of surrogates as a die says, whatever they cost."""
    rng = random.Random(5)

    def choose(_: RowChoice, kind: Any, sequences: list[Hopes], spare: int, *_more: float) -> Option:
        drafting = sum(each.may_draft for each in sequences)
        runs = rng.choice([0, 1, 3, 7])
        return Option(drafting * runs, runs) if drafting * runs <= spare else Option(0)

    monkeypatch.setattr(RowChoice, "choose", choose)
    monkeypatch.setattr(Balances, "at_stake", lambda *_: 1.0)
    return rng


@pytest.fixture
def eager_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Placements are searched for as eagerly as this machine's other work is done."""
    monkeypatch.setattr(search_apart, "NICENESS", 0)


@pytest.fixture(scope="module")
def local(demo_zoo: Path) -> LLMEngine:
    """An engine in this process, as `over_two` makes them."""
    return LLMEngine(demo_zoo, EngineConfig(**SETTINGS))


@pytest.fixture(scope="module")
def spread(demo_zoo: Path) -> Iterator[LLMEngine]:
    """The same over two workers, who are not given up as this machine stands still for a while."""
    with pytest.MonkeyPatch.context() as patch, over_two(demo_zoo) as engine:
        patch.setattr(group, "SILENT_S", PATIENCE_S)
        yield engine
