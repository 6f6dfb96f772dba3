"""The sides of the benchmarks: ways to run prompts and decode steps, behind one interface.

A step gives one token to every sequence. Every `start` puts the sequences back to the same context, so
that a decode step costs the same whenever it is timed: the prompts are cached after the first time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from benchmarks.common import timed
from blockzoo.build.quantized_models import Weights
from blockzoo.engines.base import PAGE_TOKENS, Precision
from blockzoo.engines.kv_pages import (
    GRID_BYTES,
    KVPrecision,
    by_default,
    kv_dtype,
    pack_u8,
    page_bytes,
    page_width,
)
from blockzoo.engines.openvino import OpenVINOEngine, OpenVINOEngines
from blockzoo.engines.openvino.engine import prefers_int8
from blockzoo.runtime import LLMEngine, SamplingParams
from blockzoo.runtime.api.request import KVReuse
from blockzoo.runtime.exec.executor import Executor, Rows
from blockzoo.runtime.serve.config import EngineConfig
from blockzoo.runtime.serve.loading import load_zoo, making
from blockzoo.zoo.model_config import ModelConfig
from blockzoo.zoo.store import Zoo
from blockzoo.zoo.tensors import f32_to_bf16

MAX_STEPS = 60
"""Steps that a side can take after `start`."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What all sides of a run agree on.

    Attributes:
        precision: of weights in use, activations and, without `kv_precision`, KV (see `OpenVINOEngines`).
        num_threads: compute threads; None leaves OpenVINO's choice.
        max_seqs: sequences in a batch.
        context: tokens of a prompt before its last one, a multiple of 32: the part that stays cached. Decode
            steps start after the prompt and its first token.
        max_tokens: new tokens in one step.
        longest_prompt: tokens, of `prefill`.
        int8_activations: see `EngineConfig`; only in f32.
        kv_precision: of KV; see `OpenVINOEngines`.
    """

    precision: Precision
    num_threads: int | None
    max_seqs: int
    context: int
    max_tokens: int
    longest_prompt: int
    int8_activations: bool = False
    kv_precision: KVPrecision | None = None

    @property
    def held(self) -> KVPrecision:
        """What pages hold."""
        return self.kv_precision or by_default(self.precision, self.int8_activations)

    @property
    def pages_per_seq(self) -> int:
        """Pages of one layer of a sequence that decodes."""
        return -(-(self.context + MAX_STEPS + 2) // PAGE_TOKENS)

    @property
    def pool_pages(self) -> int:
        """Pages of one layer of all sequences and a prompt."""
        return self.max_seqs * self.pages_per_seq + -(-(self.longest_prompt + 1) // PAGE_TOKENS)

    def pool_bytes(self, config: ModelConfig) -> int:
        """Bytes of `pool_pages` in all layers."""
        page = page_bytes(config.num_kv_heads, config.head_dim, self.held)
        return self.pool_pages * config.num_layers * page

    def maker(self) -> OpenVINOEngines:
        """An engine maker of these settings."""
        return OpenVINOEngines(
            self.precision,
            self.num_threads,
            int8_activations=self.int8_activations,
            kv_precision=self.kv_precision,
        )

    def engine_config(self, config: ModelConfig, max_span_layers: int | None = None) -> EngineConfig:
        """For our sides."""
        return EngineConfig(
            precision=self.precision,
            int8_activations=self.int8_activations,
            kv_precision=self.kv_precision,
            num_threads=self.num_threads,
            kv_cache_bytes=self.pool_bytes(config),
            max_num_seqs=self.max_seqs,
            max_num_batched_tokens=self.max_tokens,
            max_span_layers=max_span_layers,
        )


def served_in(settings: Settings, weights: Weights | None, int8_activations: bool = False) -> Settings:
    """As a zoo with these weights is served by default on this machine, or on one like it without AMX."""
    if weights is None or not (int8_activations or prefers_int8()):
        return settings
    return replace(settings, precision="f32", int8_activations=True)


class Side(Protocol):
    """One way to serve."""

    def prefill(self, num_tokens: int) -> None:
        """Run a new prompt of random tokens up to its first token."""

    def start(self, batch: int) -> None:
        """Have the first `batch` sequences at the settings' context, whatever ran before."""

    def step(self) -> None:
        """One more token for each sequence; at most MAX_STEPS times after `start`."""

    def close(self) -> None:
        """Free the memory."""


def decode_turn(side: Side, batch: int, steps: int) -> list[float]:
    """Seconds of each of `steps` decode steps of `batch` sequences, after an untimed one."""
    side.start(batch)
    return timed(side.step, steps, untimed=1)


class ExecutorSide:
    """Our executor alone: no scheduler, no sampling.

    Args:
        zoo: what to load.
        models: sequence i is one of models[i % len(models)].
        settings: of the run.
        max_span_layers: None fuses what no model splits, 1 makes an engine per layer.
    """

    def __init__(
        self, zoo: Zoo, models: Sequence[str], settings: Settings, max_span_layers: int | None = None
    ) -> None:
        self._settings = settings
        config = zoo.manifest.models[models[0]].config
        make = making(zoo, settings.engine_config(config, max_span_layers), settings.maker())
        self._zoo = load_zoo(zoo, make)
        (self._executor,) = self._zoo.local_executors.values()
        loaded = [self._zoo.models[model] for model in models]
        self._chains = [loaded[i % len(loaded)].chain_index for i in range(settings.max_seqs)]
        pages = np.arange(settings.pool_pages * config.num_layers, dtype=np.int32)
        decoding, prompt = np.split(pages, [settings.max_seqs * settings.pages_per_seq * config.num_layers])
        self._tables = decoding.reshape(settings.max_seqs, config.num_layers, settings.pages_per_seq)
        self._prompt_table = prompt.reshape(config.num_layers, -1)
        self._vocab = config.vocab_size
        self._rng = np.random.default_rng(0)
        self._batch, self._past = 0, 0
        _fill_pool(self._executor, settings.held)

    def prefill(self, num_tokens: int) -> None:
        """In chunks of the settings' max_tokens."""
        for begin in range(0, num_tokens, self._settings.max_tokens):
            end = min(num_tokens, begin + self._settings.max_tokens)
            ids = self._token_ids(end - begin)
            self._executor.run([Rows(self._chains[0], ids, begin, self._prompt_table, end == num_tokens)])

    def start(self, batch: int) -> None:
        """The pages hold random K and V: what a step costs does not depend on their values."""
        self._batch, self._past = batch, self._settings.context + 1

    def step(self) -> None:
        """See Side; the tokens are random."""
        ids = self._token_ids(self._batch)
        self._executor.run(
            [
                Rows(self._chains[i], ids[i : i + 1], self._past, self._tables[i], True)
                for i in range(self._batch)
            ]
        )
        self._past += 1

    def close(self) -> None:
        """See Side."""
        del self._executor, self._zoo

    def _token_ids(self, count: int) -> np.ndarray:
        return self._rng.integers(2, self._vocab, count, dtype=np.int32)


def _fill_pool(executor: Executor, precision: KVPrecision) -> None:
    """Random K and V in all pages. Pages that were never written all share the kernel's one page of
    zeros, which no serving process reads its context from."""
    for pages in executor._pool.values():
        pages[...] = _random_pages(pages.shape, precision)


def _random_pages(shape: tuple[int, ...], precision: KVPrecision) -> np.ndarray:
    """Of `shape` as a pool has it."""
    if precision != "u8":
        return _random(shape, precision)
    return np.resize(pack_u8(_random((1024, shape[-1] - GRID_BYTES), "f32")), shape)


def _random(shape: tuple[int, ...], precision: KVPrecision) -> np.ndarray:
    """Normal values in the activation type; they repeat, which is quick to make."""
    values = np.random.default_rng(0).standard_normal(1 << 16, dtype=np.float32)
    held = f32_to_bf16(values) if precision == "bf16" else values.astype(kv_dtype(precision))
    return np.resize(held, shape)


class WholeGraphSide:
    """The whole model as one OpenVINO graph, called on tensors that are bound already."""

    def __init__(self, zoo: Zoo, model: str, settings: Settings) -> None:
        record = zoo.manifest.models[model]
        self._config, self._settings = record.config, settings
        self._blocks = [zoo.read_block(block_id) for block_id in record.chain]
        self._engine = settings.maker().span(self._blocks[1:], drops_rows=True)
        config = record.config
        pages = settings.pool_pages * config.num_layers
        for name in ("key_cache", "value_cache"):
            width = page_width(config.head_dim, settings.held)
            shape = (pages, config.num_kv_heads, PAGE_TOKENS, width)
            self._engine.bind(name, _random_pages(shape, settings.held))
        rows = max(settings.max_tokens, settings.max_seqs)
        self._hidden = _random((rows, config.hidden_size), settings.precision)
        longest = max(settings.longest_prompt, settings.context + MAX_STEPS) + 1
        self._rotary = config.rope.tables(config.head_dim, longest)
        self._past, self._longest = np.zeros(0, np.int32), np.zeros((), np.int32)
        self._bind(1, 0, 1)  # engines pack their weights at the first run
        self._engine.run()
        for block in self._blocks:
            block.drop_pages()

    def prefill(self, num_tokens: int) -> None:
        """In chunks of the settings' max_tokens."""
        for begin in range(0, num_tokens, self._settings.max_tokens):
            self._bind(1, begin, min(num_tokens, begin + self._settings.max_tokens) - begin)
            self._engine.run()

    def start(self, batch: int) -> None:
        """See ExecutorSide."""
        self._bind(batch, self._settings.context + 1, 1)

    def step(self) -> None:
        """See Side; the hidden states that enter are random and the same in every step."""
        self._engine.run()
        self._past += 1
        self._longest += 1

    def close(self) -> None:
        """See Side."""
        del self._engine, self._blocks

    def _bind(self, batch: int, past: int, num_tokens: int) -> None:
        """`num_tokens` new tokens for each of `batch` sequences with `past` tokens."""
        config, bind = self._config, self._engine.bind
        pages = self._settings.pool_pages // batch
        rows = batch * num_tokens
        bind("hidden", self._hidden[:rows])
        bind("rows", np.arange(num_tokens - 1, rows, num_tokens, dtype=np.int32))
        for name, table in zip(("cos", "sin"), self._rotary, strict=True):
            positions = np.tile(table[past : past + num_tokens], (batch, 1))
            bind(name, positions[:, None, None])
        self._past = np.full(batch, past, np.int32)
        self._longest = np.array(past + num_tokens, np.int32)
        bind("past_lens", self._past)
        bind("max_context_len", self._longest)
        bind("subsequence_begins", np.arange(0, rows + 1, num_tokens, dtype=np.int32))
        bind("block_indices_begins", np.arange(0, batch * pages + 1, pages, dtype=np.int32))
        for layer in range(config.num_layers):
            first = layer * self._settings.pool_pages
            bind(f"block_indices.{layer}", np.arange(first, first + batch * pages, dtype=np.int32))
        bind("logits", np.empty((batch, config.vocab_size), np.float32))


class EngineSide:
    """Our LLMEngine: the whole step, with scheduler, sampling (greedy) and text.

    Sequence i is one of models[i % len(models)].
    """

    def __init__(
        self, zoo: Zoo, models: Sequence[str], settings: Settings, workers: int | None = None
    ) -> None:
        config = zoo.manifest.models[models[0]].config
        self._engine = LLMEngine(zoo.path, replace(settings.engine_config(config), workers=workers))
        self._models, self._vocab = models, config.vocab_size
        self._rng = np.random.default_rng(0)
        self._prompts = [self._prompt(settings.context + 1) for _ in range(settings.max_seqs)]
        self._running: list[str] = []
        self._num_cached = self._count = 0

    def prefill(self, num_tokens: int) -> None:
        """See Side."""
        self._run(0, self._prompt(num_tokens))

    def start(self, batch: int) -> None:
        """Sends the prompts, each of which runs alone when it is new, and steps until each has a token: one
        step, or a few where those are too small for all tenants."""
        for i in range(self._num_cached, batch):
            self._run(i, self._prompts[i])
        self._num_cached = max(batch, self._num_cached)
        self._stop()
        self._running = [self._add(i, self._prompts[i], MAX_STEPS + batch + 1) for i in range(batch)]
        without = set(self._running)
        for _ in range(batch):
            without -= {output.request_id for output in self._engine.step()}
            if not without:
                return
        raise RuntimeError(f"{len(without)} of {batch} sequences got no token in {batch} steps")

    def step(self) -> None:
        """See Side. Raises RuntimeError when a sequence got no token."""
        outputs = self._engine.step()
        if len(outputs) != len(self._running) or any(output.finished for output in outputs):
            raise RuntimeError(f"{len(self._running)} tokens expected of a step, seen {outputs}")

    def close(self) -> None:
        """See Side."""
        self._engine.close()
        del self._engine

    def generate_each(self, num_tokens: int) -> None:
        """A request of every sequence, one after the other: its prompt and `num_tokens` more tokens."""
        for i, prompt in enumerate(self._prompts):
            self._run(i, prompt, num_tokens)

    def pages_in_use(self) -> int:
        """Bytes of pages that hold K and V."""
        pool_bytes = self._engine.config.resolved_kv_bytes()
        metrics = self._engine.metrics()
        return pool_bytes * (metrics.pages_total - metrics.pages_free) // metrics.pages_total

    def release_memory(self) -> None:
        """Have all engines give back their scratch."""
        for executor in self._engine._zoo.local_executors.values():
            for engine in executor._engines.values():
                if isinstance(engine, OpenVINOEngine):
                    engine.release_memory()

    def _stop(self) -> None:
        for request_id in self._running:
            self._engine.abort(request_id)
        self._running = []

    def _prompt(self, num_tokens: int) -> list[int]:
        return self._rng.integers(2, self._vocab, num_tokens).tolist()

    def _run(self, seq: int, prompt: list[int], num_tokens: int = 1) -> None:
        self._stop()
        self._add(seq, prompt, num_tokens)
        while self._engine.has_unfinished():
            self._engine.step()

    def _add(self, seq: int, prompt: list[int], max_tokens: int) -> str:
        self._count += 1
        params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        self._engine.add_request(str(self._count), self._models[seq % len(self._models)], prompt, params)
        return str(self._count)


class InTurn:
    """Sides with one sequence each, stepped one after the other."""

    def __init__(self, sides: Sequence[Side]) -> None:
        self._sides = sides

    def prefill(self, num_tokens: int) -> None:
        """A prompt for each."""
        for side in self._sides:
            side.prefill(num_tokens)

    def start(self, batch: int) -> None:
        """`batch` is the number of sides."""
        for side, _ in zip(self._sides, range(batch), strict=True):
            side.start(1)

    def step(self) -> None:
        """See Side."""
        for side in self._sides:
            side.step()

    def close(self) -> None:
        """See Side."""
        for side in self._sides:
            side.close()


def first_token(
    engine: LLMEngine, model: str, prompt: list[int], params: SamplingParams, kv_reuse: KVReuse = "exact"
) -> tuple[float, tuple[int, ...]]:
    """Run one request alone: seconds to its first token, and all tokens of the answer."""
    start = time.perf_counter()
    engine.add_request("request", model, prompt, params, kv_reuse=kv_reuse)
    first = 0.0
    found: list[int] = []
    while engine.has_unfinished():
        for output in engine.step():
            if output.error is not None:
                raise SystemExit(output.error)
            if output.token_ids and not found:
                first = time.perf_counter() - start
            found += output.token_ids
    return first, tuple(found)
