"""A GGUF file as the HF checkpoint of which it was made: configuration, tensor names, order of rows."""

import re
from pathlib import Path

import numpy as np

from blockzoo.build.gguf_config import ROPE_FACTORS, Metadata, hf_config
from blockzoo.build.gguf_tokenizer import tokenizer_files
from blockzoo.zoo.checkpoint import Checkpoint
from blockzoo.zoo.errors import CheckpointError, UnsupportedModelError
from blockzoo.zoo.gguf_file import GgufFile
from blockzoo.zoo.model_config import ModelConfig
from blockzoo.zoo.tensors import BlockTensor

_ENDS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_output": "self_attn.o_proj",
}
_LAYER |= {f"attn_{name}": f"self_attn.{name}_proj" for name in "qkv"}
_LAYER |= {f"attn_{name}_norm": f"self_attn.{name}_norm" for name in "qk"}
_LAYER |= {f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")}
_SPLIT = re.compile(r"-\d{5}-of-(\d{5})\.gguf", re.IGNORECASE)


class GgufTensors:
    """The tensors of a file by their HF names. Quantized ones are made anew with each reading, never kept."""

    def __init__(self, file: GgufFile, config: ModelConfig) -> None:
        self.path, self._file = file.path, file
        self._names = {hf_name(name): name for name in file.names if name != ROPE_FACTORS}
        # llama's q and k: GGUF turns neighbouring rows of a head together, HF those half a head apart
        permuted = config.architecture == "LlamaForCausalLM"
        self._heads = {"q": config.num_heads, "k": config.num_kv_heads} if permuted else {}

    @property
    def names(self) -> tuple[str, ...]:
        """HF names; a tensor that HF does not have keeps its own."""
        return tuple(self._names)

    def tensor(self, name: str) -> BlockTensor:
        """The tensor as the HF checkpoint has it."""
        given = self._names[name]
        heads = self._heads.get(
            name.removeprefix("model.layers.").partition(".self_attn.")[2].partition("_proj")[0]
        )
        rows = self._file.shape(given)[0]
        if heads is None or rows % (2 * heads):  # rows of another number: told where shapes are checked
            return self._file.tensor(given)
        order = np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)
        return self._file.tensor(given, order)


def hf_name(name: str) -> str:
    """The HF name of a GGUF tensor; its own where HF has no such tensor."""
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if found and found[2] in _LAYER:
        return f"model.layers.{found[1]}.{_LAYER[found[2]]}.{found[3]}"
    return _ENDS.get(name, name)


def is_gguf(path: Path) -> bool:
    """Whether a path is meant as a GGUF file: folders are checkpoints and adapters."""
    return path.is_file() or (path.suffix.lower() == ".gguf" and not path.is_dir())


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file. Raises CheckpointError, UnsupportedModelError; both name it."""
    if not path.is_file():
        raise CheckpointError(
            f"{path}: expected a GGUF file, seen {'no file' if path.exists() else 'nothing'}"
        )
    split = _SPLIT.search(path.name)
    if split and int(split[1]) > 1:
        raise UnsupportedModelError(
            f"{path} is a part of a split model, which is not supported: merge the parts with "
            "llama-gguf-split --merge"
        )
    file = GgufFile(path)
    raw_config = hf_config(file)
    try:
        config = ModelConfig.from_hf(raw_config)
    except CheckpointError as error:
        raise type(error)(f"{path}, its metadata as config.json: {error}") from None
    tensors = GgufTensors(file, config)
    files = dict.fromkeys(tensors.names, tensors)
    tokenizer = tokenizer_files(Metadata(path, file.metadata))
    return Checkpoint(path, config, raw_config, file.common_dtype, tokenizer, files)
