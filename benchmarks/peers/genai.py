"""OpenVINO GenAI's continuous batching as a side of the benchmarks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from openvino_genai import (
    Adapter,
    AdapterConfig,
    ContinuousBatchingPipeline,
    GenerationConfig,
    SchedulerConfig,
)

from benchmarks.families import Family, made_once
from benchmarks.sides import MAX_STEPS, Settings
from blockzoo.build.quantized_models import Weights


def ir_folder(family: Family, tenant: str, weights: Weights | None = None) -> Path:
    """A tenant's model as GenAI reads it, written on first use."""
    folder = family.path / f"genai{f'-{weights}' if weights else ''}"
    return write_once(family.checkpoint(tenant), folder / tenant, weights)


def write_once(checkpoint: Path, path: Path, weights: Weights | None = None) -> Path:
    """A checkpoint as GenAI reads it, in `path`, written on first use (by a process that imports torch)."""

    def write(folder: Path) -> None:
        command = [sys.executable, "-m", "benchmarks.peers.ir", str(checkpoint), str(folder)]
        command += [weights] if weights else []
        subprocess.run(command, check=True, env={**os.environ, "CI": "true"})  # "CI": no telemetry

    return made_once(path, write)


class GenAISide:
    """One pipeline: its step schedules, runs the model and samples (greedy); it makes no text.

    Args:
        folder: of the model.
        settings: of the run; the precision holds for KV too, whose default would be u8.
        adapters: LoRA files (safetensors); `decode` picks one of them, the other methods use none.
    """

    def __init__(self, folder: Path, settings: Settings, adapters: Sequence[Path] = ()) -> None:
        scheduler = SchedulerConfig()
        scheduler.max_num_batched_tokens = settings.max_tokens
        scheduler.max_num_seqs = settings.max_seqs
        scheduler.num_kv_blocks = settings.pool_pages
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = True
        properties: dict[str, object] = {
            "INFERENCE_PRECISION_HINT": settings.precision,
            "KV_CACHE_PRECISION": settings.held,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
        }
        if settings.num_threads is not None:
            properties["INFERENCE_NUM_THREADS"] = settings.num_threads
        self._adapters = [Adapter(str(file)) for file in adapters]
        if self._adapters:
            properties["adapters"] = AdapterConfig(self._adapters)
        self._pipeline = ContinuousBatchingPipeline(str(folder), scheduler, "CPU", properties)
        self._vocab: int = json.loads((folder / "config.json").read_text())["vocab_size"]
        self._rng = np.random.default_rng(0)
        self._prompts = [self._prompt(settings.context + 1) for _ in range(settings.max_seqs)]
        self._running: list[Any] = []
        self._num_cached = self._count = 0

    def prefill(self, num_tokens: int) -> None:
        """See Side."""
        self._run(self._prompt(num_tokens), 1)

    def start(self, batch: int) -> None:
        """Sends the prompts, each of which runs alone when it is new, and makes the first step."""
        for prompt in self._prompts[self._num_cached : batch]:
            self._run(prompt, 1)
        self._num_cached = max(batch, self._num_cached)
        self._stop()
        self._running = [self._add(prompt, MAX_STEPS + 2) for prompt in self._prompts[:batch]]
        self.step()
        if not all(handle.can_read() for handle in self._running):
            raise RuntimeError(f"GenAI did not take up {batch} cached prompts in one step")

    def step(self) -> None:
        """See Side."""
        self._pipeline.step()

    def decode(self, num_tokens: int, prompt: int = 0, adapter: int | None = None) -> None:
        """`num_tokens` tokens for a sequence in one call, without Python's lock."""
        self._stop()
        self._pipeline.generate(
            [_tensor(self._prompts[prompt])], [self._with_adapter(_greedy(num_tokens), adapter)]
        )

    def decode_batch(
        self, num_tokens: int, prompts: Sequence[Sequence[int]], adapters: Sequence[int]
    ) -> list[list[int]]:
        """Tokens behind prompts (token ids) in one batch, each with the adapter given for it.

        Raises RuntimeError where the pipeline does not take them.
        """
        self._stop()
        asked = [_tensor(np.asarray(prompt)) for prompt in prompts]
        configs = [self._with_adapter(_greedy(num_tokens), adapter) for adapter in adapters]
        return [list(found.m_generation_ids[0]) for found in self._pipeline.generate(asked, configs)]

    def _with_adapter(self, config: GenerationConfig, adapter: int | None) -> GenerationConfig:
        if self._adapters:
            config.adapters = AdapterConfig([] if adapter is None else [self._adapters[adapter]])
        return config

    def generate(self, prompt: np.ndarray, max_tokens: int) -> tuple[list[int], list[float]]:
        """Greedy tokens after a prompt (int [n]) and their log-probabilities."""
        output = self._run(prompt, max_tokens, logprobs=1)
        return output.generated_ids, output.generated_log_probs

    def close(self) -> None:
        """See Side."""
        self._stop()
        del self._pipeline

    def _stop(self) -> None:
        if self._running:
            for handle in self._running:
                handle.cancel()
            self._pipeline.step()  # lets go of them
            self._running = []

    def _prompt(self, num_tokens: int) -> np.ndarray:
        return self._rng.integers(2, self._vocab, num_tokens)

    def _run(self, prompt: np.ndarray, max_tokens: int, logprobs: int = 0) -> Any:
        self._stop()
        handle = self._add(prompt, max_tokens, logprobs)
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        (output,) = handle.read_all()
        return output

    def _add(self, prompt: np.ndarray, max_tokens: int, logprobs: int = 0) -> Any:
        """The handle of a new request; dropping it drops the request."""
        self._count += 1
        return self._pipeline.add_request(self._count, _tensor(prompt), _greedy(max_tokens, logprobs))


def decode_in_threads(sides: Sequence[GenAISide], num_tokens: int) -> None:
    """`num_tokens` tokens of each side's first sequence, each side in a thread of its own."""
    with ThreadPoolExecutor(len(sides)) as threads:
        for _ in threads.map(lambda side: side.decode(num_tokens), sides):
            pass


def _tensor(prompt: np.ndarray) -> ov.Tensor:
    return ov.Tensor(prompt.astype(np.int64)[None])


def _greedy(max_tokens: int, logprobs: int = 0) -> GenerationConfig:
    config = GenerationConfig()
    config.max_new_tokens = max_tokens
    config.ignore_eos = True
    config.do_sample = False
    config.logprobs = logprobs
    return config
