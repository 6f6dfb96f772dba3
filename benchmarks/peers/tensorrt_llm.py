"""TensorRT-LLM serving a whole model: the peer of a chain, in an environment of its own.

    python -m benchmarks.peers.tensorrt_llm --model HF_FOLDER [--batches 1,8,64] [--out FOLDER]

TensorRT-LLM 1.2.1 pins torch, numpy and triton to versions that blockzoo does not use: install it in a
separate environment on a machine with an NVIDIA GPU (docs/tensorrt.md) and run this file's module there; it
imports nothing of blockzoo. It prints one JSON object that `benchmarks.gpu`'s report can be laid beside.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_INSTALL = """\
TensorRT-LLM is not installed in this environment. On a machine with an NVIDIA GPU, in a fresh one:
    python3.12 -m venv trtllm && . trtllm/bin/activate
    pip install tensorrt-llm==1.2.1 --extra-index-url https://pypi.nvidia.com
(the packages of that name on PyPI alone only point there). See docs/tensorrt.md."""


def measure(
    model: str, batches: list[int], prompt_tokens: int, new_tokens: int, random_weights: bool
) -> dict[str, Any]:
    """Tokens per second and time per decode step at each batch size, greedy, prompts of random ids.

    With random weights the folder needs a config.json only.
    """
    import numpy as np
    import tensorrt_llm
    from tensorrt_llm import LLM, SamplingParams

    weights = {"load_format": "dummy"} if random_weights else {}
    llm = LLM(model=model, dtype="bfloat16", skip_tokenizer_init=True, **weights)
    rng = np.random.default_rng(0)
    facts: dict[str, Any] = {"tensorrt_llm": tensorrt_llm.__version__, "prompt_tokens": prompt_tokens}

    def seconds(size: int, count: int) -> float:
        prompts = [rng.integers(10, 10_000, prompt_tokens).tolist() for _ in range(size)]
        start = time.perf_counter()
        greedy = SamplingParams(
            max_tokens=count, ignore_eos=True, temperature=0.0, end_id=-1, detokenize=False
        )
        llm.generate(prompts, greedy)
        return time.perf_counter() - start

    for size in batches:
        seconds(size, 8)
        short, long = seconds(size, 8), seconds(size, 8 + new_tokens)
        step = (long - short) / new_tokens
        facts[f"batch {size}"] = {"step_ms": step * 1e3, "tokens_per_s": size / step}
    return facts


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="HF checkpoint folder")
    parser.add_argument("--batches", default="1,8,64")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--random-weights", action="store_true", help="whatever the folder holds")
    parser.add_argument("--out", type=Path, help="folder for the report")
    args = parser.parse_args(argv)
    if find_spec("tensorrt_llm") is None:
        print(_INSTALL, file=sys.stderr)
        return 2
    batches = [int(size) for size in args.batches.split(",")]
    facts = measure(args.model, batches, args.prompt_tokens, args.new_tokens, args.random_weights)
    text = json.dumps(facts, indent=1)
    print(text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "tensorrt_llm.json").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
