"""Families of random checkpoints: N tenants of one shape that differ in their last layers.

Written once into a folder and kept: the weights depend on nothing but the shape and the tenant's number.
The layers that all tenants share lie in one shard, linked into each tenant's folder.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.build.quantized_models import Weights
from blockzoo.zoo.store import Zoo
from blockzoo.zoo.tensors import BlockTensor, from_f32, write_tensor_file

MAX_POSITIONS = 4096
_SPECIAL = ("<s>", "</s>")


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's shape; weights are bf16 and the embedding is tied to the head."""

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int
    rope_theta: float
    rms_norm_eps: float

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_heads

    @property
    def qkv_bias(self) -> bool:
        """Whether the projections to Q, K and V have biases."""
        return self.architecture == "Qwen2ForCausalLM"

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V of one token in all layers, in bf16."""
        return 2 * 2 * self.num_layers * self.num_kv_heads * self.head_dim

    def config(self) -> dict[str, Any]:
        """The shape as a `config.json`."""
        return {
            "architectures": [self.architecture],
            "model_type": {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}[self.architecture],
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "intermediate_size": self.intermediate_size,
            "vocab_size": self.vocab_size,
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "rms_norm_eps": self.rms_norm_eps,
            "hidden_act": "silu",
            "max_position_embeddings": MAX_POSITIONS,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "dtype": "bfloat16",
        }


SHAPES = {
    "tiny": Shape("LlamaForCausalLM", 128, 4, 4, 2, 256, 512, 1e4, 1e-5),
    "tiny-qwen2": Shape("Qwen2ForCausalLM", 128, 4, 4, 2, 256, 512, 1e6, 1e-6),
    "110m": Shape("LlamaForCausalLM", 768, 12, 12, 4, 2048, 32_000, 1e4, 1e-5),
    "0.5b": Shape("Qwen2ForCausalLM", 896, 24, 14, 2, 4864, 151_936, 1e6, 1e-6),  # as Qwen2.5-0.5B
    "1.1b": Shape("LlamaForCausalLM", 2048, 22, 32, 4, 5632, 32_000, 1e4, 1e-5),  # as TinyLlama-1.1B
}


@dataclass(frozen=True, slots=True)
class Family:
    """Checkpoints of one shape on disk: the tenants share all but their last `own_layers` layers."""

    shape: Shape
    path: Path
    num_tenants: int

    @property
    def tenants(self) -> list[str]:
        """Model names."""
        return [f"tenant-{i}" for i in range(self.num_tenants)]

    def checkpoint(self, tenant: str) -> Path:
        """A tenant's HF folder."""
        return self.path / tenant

    def zoo(self, weights: Weights | None = None, group_size: int | None = None) -> Zoo:
        """A zoo of all tenants, compiled on first use; `weights` are rounded to nearest: they are random.
        `group_size`: of `CompileOptions`."""

        def compile_all(folder: Path) -> None:
            options = CompileOptions(
                profile=False, verify=False, weights=weights, calibration_texts=0, group_size=group_size
            )
            compile_models({name: self.checkpoint(name) for name in self.tenants}, folder, options)

        name = f"zoo-{self.num_tenants}{f'-{weights}' if weights else ''}"
        name += "" if group_size is None else f"-{group_size}"
        return Zoo.open(made_once(self.path / name, compile_all))


def make_family(workdir: Path, shape_name: str, num_tenants: int, own_layers: int = 2) -> Family:
    """Write the checkpoints that `workdir` does not hold yet."""
    shape = SHAPES[shape_name]
    path = workdir / f"{shape_name}-own{own_layers}"
    path.mkdir(parents=True, exist_ok=True)
    family = Family(shape, path, num_tenants)

    def write_base(folder: Path) -> None:
        _write_json(folder / "tokenizer.json", _tokenizer(shape.vocab_size))
        tensors = {n: t() for n, t in _tensors(shape, "base") if _layer_of(n) < shape.num_layers - own_layers}
        write_tensor_file(folder / "shared.safetensors", tensors, {"format": "pt"})

    base = made_once(path / "base", write_base)
    for tenant in family.tenants:
        made_once(family.checkpoint(tenant), partial(_write_tenant, base, shape, tenant))
    return family


def only(zoo: Zoo, model: str) -> Zoo:
    """The same zoo as if it held one model."""
    return Zoo(zoo.path, replace(zoo.manifest, models={model: zoo.manifest.models[model]}))


def made_once(path: Path, make: Callable[[Path], None]) -> Path:
    """`path`, made by `make(folder)` unless it is there; interrupted attempts leave nothing behind."""
    if not path.exists():
        unfinished = path.with_name(path.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        make(unfinished)
        unfinished.rename(path)
    return path


def _write_tenant(base: Path, shape: Shape, tenant: str, folder: Path) -> None:
    own_name, shared_name = "own.safetensors", "shared.safetensors"
    shared = (base / shared_name).stat()
    os.link(base / shared_name, folder / shared_name)
    os.link(base / "tokenizer.json", folder / "tokenizer.json")
    names = {name for name, _ in _tensors(shape, tenant)}
    with open(base / shared_name, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    own = {name: make() for name, make in _tensors(shape, tenant) if name not in header}
    write_tensor_file(folder / own_name, own, {"format": "pt"})
    weight_map = {name: own_name if name in own else shared_name for name in sorted(names)}
    total = shared.st_size + (folder / own_name).stat().st_size
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)
    _write_json(folder / "config.json", shape.config())
    _write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1})
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": _SPECIAL[0], "eos_token": _SPECIAL[1]},
    )


def _layer_of(name: str) -> int:
    """The layer a tensor belongs to; -1 for the embedding and the last norm, which all tenants share."""
    return int(name.split(".")[2]) if name.startswith("model.layers.") else -1


def _tensors(shape: Shape, owner: str) -> Iterator[tuple[str, Callable[[], BlockTensor]]]:
    """HF names and makers of all tensors; values depend on shape, owner and name only."""

    def normal(name: str, size: tuple[int, ...], mean: float, std: float) -> Callable[[], BlockTensor]:
        def make() -> BlockTensor:
            rng = np.random.default_rng(zlib.crc32(f"{owner}/{name}".encode()))
            return from_f32(mean + std * rng.standard_normal(size, dtype=np.float32), "bf16")

        return make

    hidden, ffn = shape.hidden_size, shape.intermediate_size
    q_rows, kv_rows = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    yield "model.embed_tokens.weight", normal("embed", (shape.vocab_size, hidden), 0.0, 0.02)
    yield "model.norm.weight", normal("norm", (hidden,), 1.0, 0.06)
    matrices = {
        "self_attn.q_proj": (q_rows, hidden),
        "self_attn.k_proj": (kv_rows, hidden),
        "self_attn.v_proj": (kv_rows, hidden),
        "self_attn.o_proj": (hidden, q_rows),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            name = f"{prefix}{norm}.weight"
            yield name, normal(name, (hidden,), 1.0, 0.06)
        for matrix, size in matrices.items():
            name = f"{prefix}{matrix}.weight"
            yield name, normal(name, size, 0.0, size[1] ** -0.5)
            if shape.qkv_bias and matrix in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
                name = f"{prefix}{matrix}.bias"
                yield name, normal(name, size[:1], 0.0, 0.06)


def _tokenizer(vocab_size: int) -> dict[str, Any]:
    """A byte-level BPE `tokenizer.json`: all bytes, then pairs and triples of ASCII characters, in order."""
    alphabet = _byte_alphabet()
    letters = alphabet[32:127]
    heads = list(letters)
    merges: list[str] = []
    count = vocab_size - len(_SPECIAL) - len(alphabet)
    while len(merges) < count:
        head = heads[len(merges) // len(letters)]
        heads += [head + tail for tail in letters]
        merges += [f"{head} {tail}" for tail in letters]
    tokens = [*_SPECIAL, *alphabet, *heads[len(letters) :]][:vocab_size]
    del merges[count:]
    special = [
        {"id": i, "content": token, "special": True, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for i, token in enumerate(_SPECIAL)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
        },
    }


def _byte_alphabet() -> list[str]:
    """The 256 characters that stand for bytes in byte-level tokenizers, in the order of the bytes."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    moved = iter(range(256, 512))
    return [chr(byte if byte in printable else next(moved)) for byte in range(256)]


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
