"""llama.cpp as a side of the benchmarks: each model in a process of its own, in an environment of its own.

    python -m benchmarks.peers.llama FOLDER

makes the environment (a compiler is needed: the package index has sources only; minutes of all cores); the
benchmarks take it by `--llama FOLDER`. Files are written by `gguf`: BF16, or in 8 bits Q8_0, or in 4 bits
Q4_0 with embedding and head in Q8_0, which are as many bits as ours.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np

from benchmarks.families import Family, Shape, made_once
from benchmarks.sides import MAX_STEPS, Settings
from blockzoo.build.quantized_models import Weights
from blockzoo.zoo.checkpoint import open_checkpoint

PACKAGES = ("llama-cpp-python", "numpy<2")
_WORKER = Path(__file__).with_name("llama_worker.py")
_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def missing(environment: Path) -> str | None:
    """Why the sides of llama.cpp cannot run here, or None."""
    if not (environment / "bin/python").exists():
        return f"{environment} is no environment (python -m benchmarks.peers.llama {environment})"
    command = [str(environment / "bin/python"), "-c", "import llama_cpp"]
    done = subprocess.run(command, capture_output=True, text=True)
    return None if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def make_environment(folder: Path) -> None:
    """With llama.cpp in it, built here."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    subprocess.run([str(folder / "bin/python"), "-m", "pip", "install", *PACKAGES], check=True)


def gguf_file(family: Family, tenant: str, weights: Weights | None) -> Path:
    """A tenant's model as llama.cpp reads it, written on first use."""
    folder = family.path / f"gguf{f'-{weights}' if weights else ''}" / tenant

    def write(unfinished: Path) -> None:
        write_gguf(family.shape, family.checkpoint(tenant), unfinished / "model.gguf", weights)

    return made_once(folder, write) / "model.gguf"


def write_gguf(shape: Shape, checkpoint: Path, path: Path, weights: Weights | None) -> None:
    """A checkpoint as a GGUF file without a vocabulary; matrices rounded as llama.cpp rounds them."""
    kinds = {None: "BF16", "int8": "Q8_0", "int4": "Q4_0"}
    arch = "qwen2" if shape.qkv_bias else "llama"
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(shape.config()["max_position_embeddings"])
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    opened = open_checkpoint(checkpoint)
    for name in opened.files:
        values = opened.tensor(name).to_f32()
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            values = _in_pairs(values, shape.head_dim)
        kind = "F32" if values.ndim == 1 else kinds[weights]
        if name == "model.embed_tokens.weight" and weights:
            kind = "Q8_0"
        kind_id = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(_gguf_name(name), gguf.quants.quantize(values, kind_id), raw_dtype=kind_id)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    ends = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in ends:
        return ends[name]
    _, _, layer, rest = name.split(".", 3)
    module, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{_NAMES[module]}.{kind}"


def _in_pairs(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows in the order in which llama.cpp rotates them: neighbours, not halves."""
    halves = weight.reshape(-1, 2, head_dim // 2, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


class LlamaSide:
    """One model in a process of its own; its KV is in f16, llama.cpp's default.

    Args:
        environment: in which llama.cpp is installed.
        model: GGUF file.
        settings: of the run; the precision is llama.cpp's own choice.
    """

    def __init__(self, environment: Path, model: Path, settings: Settings) -> None:
        threads = settings.num_threads or len(os.sched_getaffinity(0))
        longest = max(settings.longest_prompt, settings.context + MAX_STEPS + 2)
        numbers = (threads, settings.max_seqs, -(-longest // 256) * 256, settings.context)
        command = [environment / "bin/python", _WORKER, model, *numbers, settings.max_tokens]
        self._process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._wait("ready")

    def prefill(self, num_tokens: int) -> None:
        """See Side."""
        self._tell(f"prefill {num_tokens}")
        self._wait()

    def start(self, batch: int) -> None:
        """See Side."""
        self._tell(f"start {batch}")
        self._wait()

    def step(self) -> None:
        """See Side."""
        self._tell("step")
        self._wait()

    def generate(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """Greedy tokens behind a prompt of at most the settings' max_tokens."""
        self._tell(f"generate {num_tokens} {' '.join(map(str, prompt))}")
        return [int(token) for token in self._said().split()]

    def close(self) -> None:
        """See Side."""
        self._process.communicate(timeout=60)

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        print(line, file=self._process.stdin, flush=True)

    def _wait(self, expected: str = "done") -> None:
        if (said := self._said()) != expected:
            raise RuntimeError(f"llama.cpp's process says {said!r} where {expected!r} is expected")

    def _said(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def decode_at_once(sides: Sequence[LlamaSide], num_tokens: int) -> None:
    """`num_tokens` tokens of each side's first sequence, all processes at the same time."""
    for side in sides:
        side._tell(f"decode {num_tokens}")
    for side in sides:
        side._wait()


if __name__ == "__main__":
    make_environment(Path(sys.argv[1]))
