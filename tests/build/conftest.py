"""Small random checkpoints of every architecture, and ways to lay the same weights out differently."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))  # for readings and tokenizer_folders

VOCAB = 288
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
# name -> (transformers model class, settings): every operator variant of the four architectures
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama-bias": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    "mistral": ("MistralForCausalLM", {"sliding_window": 24}),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2-sliding": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32, "attention_bias": True}),
}


def _model(variant: str, seed: int, **settings: Any) -> Any:
    import torch
    import transformers

    class_name, extra = VARIANTS[variant]
    model_class = getattr(transformers, class_name)
    config = model_class.config_class(**{**SHAPE, **extra, **settings})
    config._attn_implementation = "eager"
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            centre = 1.0 if "norm" in name else 0.0
            values = centre + 0.1 * torch.randn(weight.shape, generator=generator)
            weight.data = values.to(torch.bfloat16)  # not model.to(): that rounds the RoPE frequencies too
    model.tie_weights()
    model.generation_config.eos_token_id = [257, 258]
    return model


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """(variant, seed, **config settings) -> a random transformers model in bf16."""
    return _model


@pytest.fixture(scope="session")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer: every byte is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "<s>", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def save(tokenizer_json: Path) -> Callable[..., Path]:
    """(model, folder, **save_pretrained settings): write an HF folder with a tokenizer."""

    def write(model: Any, folder: Path, **settings: Any) -> Path:
        model.save_pretrained(folder, **settings)
        shutil.copyfile(tokenizer_json, folder / "tokenizer.json")
        return folder

    return write


@pytest.fixture(scope="session")
def checkpoints(
    tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Any], save: Callable[..., Path]
) -> dict[str, Path]:
    """A random bf16 checkpoint of every variant. Do not change them: copy first."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {variant: save(make_model(variant, seed), root / variant) for seed, variant in enumerate(VARIANTS)}


@pytest.fixture
def checkpoint(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the tied llama checkpoint, to be damaged."""
    return Path(shutil.copytree(checkpoints["llama"], tmp_path / "llama"))


@pytest.fixture(scope="session")
def make_adapter(make_model: Callable[..., Any]) -> Callable[..., Any]:
    """(base folder, folder or None, **LoraConfig settings) -> a random PEFT model; saved where asked."""

    def make(base: Path, folder: Path | None, seed: int = 0, **settings: Any) -> Any:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, attn_implementation="eager")
        torch.manual_seed(seed)  # of PEFT's own initialization
        defaults = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
        peft_model = get_peft_model(model, LoraConfig(**{**defaults, **settings})).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in peft_model.named_parameters():
                if "lora_" in name or "modules_to_save" in name:
                    noise = torch.randn(weight.shape, generator=generator)
                    weight.add_((0.1 * noise).to(weight.dtype))
        if folder is not None:
            peft_model.save_pretrained(folder)
        return peft_model

    return make


@pytest.fixture(scope="session")
def tree() -> Callable[[Path], dict[str, str]]:
    """Path -> checksum of every file below it: two equal trees are byte-identical."""

    def read(root: Path) -> dict[str, str]:
        return {
            str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(root.rglob("*"))
            if path.is_file()
        }

    return read


@pytest.fixture(scope="session")
def tuned_llama(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint "llama" with another feed-forward block in its last layer."""
    from blockzoo.zoo.tensors import TensorFile, from_f32, write_tensor_file

    tuned = Path(shutil.copytree(checkpoints["llama"], tmp_path_factory.mktemp("tuned") / "tuned"))
    file = TensorFile(tuned / "model.safetensors")
    tensors = {name: file.tensor(name) for name in file.names}
    name = "model.layers.2.mlp.up_proj.weight"
    tensors[name] = from_f32(tensors[name].to_f32() * 2, "bf16")
    (tuned / "model.safetensors").unlink()
    write_tensor_file(tuned / "model.safetensors", tensors, {})
    return tuned
