"""SmolLM2-135M-Instruct as the family has it: the GGUF file's values rounded to bf16 once, as HF tensors.

Fine-tunes that are full checkpoints hold these very bytes wherever they were not trained.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from blockzoo.build.gguf_checkpoint import open_gguf
from blockzoo.zoo.tensors import f32_to_bf16

TEXT_FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    "chat_template.jinja",
)


@dataclass(frozen=True, slots=True)
class Base:
    """What the base's folder holds."""

    files: dict[str, bytes]  # by name: what is text in the folder
    tensors: dict[str, np.ndarray]  # by HF name, uint16 (bf16)

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return int(json.loads(self.files["config.json"])["num_hidden_layers"])


def read_base(gguf: Path) -> Base:
    """The base from its GGUF file. Raises CheckpointError, also where the package gguf is missing."""
    checkpoint = open_gguf(gguf)
    config = {**checkpoint.raw_config, "model_type": "llama", "hidden_act": "silu", "dtype": "bfloat16"}
    generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
    files = dict(checkpoint.tokenizer_files)
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        files[name] = (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
    tensors = {}
    for name in sorted(checkpoint.files):
        tensors[name] = f32_to_bf16(checkpoint.files[name].tensor(name).to_f32())
    return Base({name: files[name] for name in TEXT_FILES}, tensors)
