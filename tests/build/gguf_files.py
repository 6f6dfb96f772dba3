"""GGUF files of random models, written as llama.cpp's converter writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

PLAIN = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")  # what the package quantizes
K_KINDS = {"Q4_K": (144, (0, 2)), "Q5_K": (176, (0, 2)), "Q6_K": (210, (208,))}  # bytes, places of f16 scales


def packed(values: np.ndarray, kind: str) -> np.ndarray:
    """The values in blocks of a kind; of a K kind any values in blocks."""
    if kind in PLAIN:
        return gguf.quants.quantize(np.ascontiguousarray(values, np.float32), Kind[kind])
    size, scales = K_KINDS[kind]
    rng = np.random.default_rng(values.size)
    rows, columns = values.shape
    blocks = rng.integers(0, 256, (rows, columns // 256, size)).astype(np.uint8)
    for place in scales:
        given = rng.uniform(2e-5, 8e-5, blocks.shape[:2]).astype(np.float16)
        blocks[..., place : place + 2] = given[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)


def _names(model: Any, arch: str) -> dict[str, tuple[str, np.ndarray]]:
    """GGUF name -> (HF name, values in the order of GGUF)."""
    config = model.config
    table = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    found = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module, _, suffix = name.rpartition(".")
        values = tensor.float().numpy()
        count = heads.get(module.rpartition(".")[2])
        if arch == "llama" and count:
            values = values.reshape(count, 2, len(values) // count // 2, *values.shape[1:])
            values = values.swapaxes(1, 2).reshape(tensor.shape)
        found[f"{table.get_name(module)}.{suffix}"] = (name, values)
    return found


def llama3_factors(rope: dict[str, Any], head_dim: int) -> np.ndarray:
    """What the converter writes as rope_freqs.weight."""
    frequencies = 1.0 / rope["rope_theta"] ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    trained, low, high = (
        rope[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    factors = []
    for wavelength in 2 * np.pi / frequencies:
        if wavelength < trained / high:
            factors.append(1.0)
        elif wavelength > trained / low:
            factors.append(rope["factor"])
        else:
            smooth = (trained / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


def byte_vocabulary() -> dict[str, Any]:
    """Every byte, some merges, tokens of all types: 300 tokens, as tokenizer metadata."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["t h", "th e", "Ġ the", "i n", "Ġ Ġ"]
    tokens = [*letters, *(merge.replace(" ", "") for merge in merges), "<s>", "</s>", "<|eot|>", "<think>"]
    types = [1] * (len(tokens) - 4) + [3, 3, 3, 4]
    filled = 300 - len(tokens)
    return {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens + [f"[PAD{i}]" for i in range(filled)],
        "token_type": types + [5] * filled,
        "merges": merges,
        "bos_token_id": tokens.index("<s>"),
        "eos_token_id": tokens.index("</s>"),
    }


def write_gguf(
    path: Path,
    model: Any,
    arch: str,
    kind: str = "F32",
    vocabulary: dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
    kinds: dict[str, str] | None = None,
) -> Path:
    """Write a transformers model; matrices become `kind`, or what `kinds` has for the HF name.

    `vocabulary`: by keys of tokenizer.ggml; `extra`: metadata by full key that is added or replaced (None
    takes a key out).
    """
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    metadata: dict[str, Any] = {
        "general.name": "random",
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.key_length": head_dim,
        f"{arch}.attention.value_length": head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{arch}.vocab_size": config.vocab_size,
    }
    if arch == "llama":
        metadata[f"{arch}.rope.dimension_count"] = head_dim
    rope = dict(config.rope_parameters)
    metadata[f"{arch}.rope.freq_base"] = float(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        metadata[f"{arch}.rope.scaling.type"] = rope["rope_type"]
        metadata[f"{arch}.rope.scaling.factor"] = float(rope["factor"])
    if rope["rope_type"] == "yarn":
        trained = rope["original_max_position_embeddings"]
        metadata[f"{arch}.rope.scaling.original_context_length"] = trained
    for key, value in (vocabulary or byte_vocabulary()).items():
        metadata[f"tokenizer.ggml.{key}"] = value
    metadata |= extra or {}
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        if value is not None:
            add_metadata(writer, key, value)
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(rope, head_dim))
    for name, (hf, values) in _names(model, arch).items():
        used = (kinds or {}).get(hf, kind if values.ndim > 1 else "F32")
        writer.add_tensor(name, packed(values, used), raw_dtype=Kind[used])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_metadata(writer: Any, key: str, value: Any) -> None:
    """Add a key with the type of its value."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
