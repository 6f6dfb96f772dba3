"""Sequences through one chain: for verification and profiles (serving is runtime's)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from blockzoo.engines.adapters import lora_matrices, lora_targets, padded
from blockzoo.engines.arrays import Array, Arrays
from blockzoo.engines.base import PAGE_TOKENS, Engine, EngineMaker
from blockzoo.zoo.blocks import Adapter, AttnSpec, Block, tensor_shapes
from blockzoo.zoo.model_config import ModelConfig, RopeConfig


class ProbeChain:
    """Runs a sequence, or several of equal length, through a whole chain, with the logits of every token.

    Args:
        engines: the maker that compiles the chain as one span.
        blocks: the chain, from embed to head.
        config: the model's configuration.
        max_tokens: longest sequence that will be run.
        adapters: by position in the chain.
        num_sequences: that go along together.
    """

    def __init__(
        self,
        engines: EngineMaker,
        blocks: Sequence[Block],
        config: ModelConfig,
        max_tokens: int,
        adapters: Mapping[int, Adapter] = {},
        num_sequences: int = 1,
    ) -> None:
        self._arrays = engines.arrays
        self._embedding = engines.embedding(blocks[0])
        targets = lora_targets({index - 1: [adapter.spec] for index, adapter in adapters.items()})
        self._engine = engines.span(blocks[1:], lora=targets)
        self._rank = max((adapter.spec.rank for adapter in adapters.values()), default=0)
        for position, adapter in adapters.items():
            _bind_adapter(self._engine, position - 1, blocks[position], adapter, self._rank, engines)
        self._vocab = config.vocab_size
        self._hidden = config.hidden_size
        self._attention = _ProbeAttention(self._engine, config.rope, max_tokens, engines, num_sequences)
        for block in blocks:
            block.drop_pages()

    @property
    def pages(self) -> tuple[Array, Array]:
        """Of K and of V: those of the first layer first, see `Arrays.pages`."""
        return self._attention.pages

    def forward(self, token_ids: Sequence[int], past: int) -> np.ndarray:
        """Append n tokens at position `past`: their logits, float32 [n, vocab].

        Of several sequences: as many tokens of each, one sequence after the other.
        """
        count = len(token_ids)
        hidden = self._arrays.zeros((count, self._hidden), "activation")
        self._embedding.lookup(self._arrays.mirror(np.asarray(token_ids, np.int32)), hidden)
        logits = self._arrays.zeros((count, self._vocab), "f32")
        self._engine.bind("hidden", hidden)
        self._engine.bind("logits", logits)
        if self._rank:
            mask = self._arrays.activations(np.ones((count, self._rank), np.float32))
            self._engine.bind("lora_mask", mask)
        self._attention.bind(past, count)
        self._engine.run()
        return self._arrays.to_host(logits)


class ProbeBlock:
    """Runs a sequence, or several of equal length, through one block, in the precision of the maker.

    Args:
        engines: the maker that compiles the block.
        block: attn, ffn or head.
        config: of its model.
        max_tokens: longest sequence that will be run.
        adapter: on the block.
        num_sequences: that go along together.
        like: the block of a model in whose place this one drafts; of attention, whose K and V it reads and
            writes.
    """

    def __init__(
        self,
        engines: EngineMaker,
        block: Block,
        config: ModelConfig,
        max_tokens: int,
        adapter: Adapter | None = None,
        num_sequences: int = 1,
        like: ProbeBlock | None = None,
    ) -> None:
        self._arrays = engines.arrays
        lora = lora_targets({0: [adapter.spec]} if adapter else {})
        self._engine = engines.span([block], lora=lora, drafts=like is not None)
        self._rank = adapter.spec.rank if adapter is not None else 0
        if adapter is not None:
            _bind_adapter(self._engine, 0, block, adapter, self._rank, engines)
        self._attention = None
        if isinstance(block.spec, AttnSpec):
            self._attention = _ProbeAttention(
                self._engine,
                config.rope,
                max_tokens,
                engines,
                num_sequences,
                None if like is None else like.pages,
            )
        self._vocab = config.vocab_size

    @property
    def pages(self) -> tuple[Array, Array] | None:
        """Of K and of V, see `Arrays.pages`; None without attention."""
        return None if self._attention is None else self._attention.pages

    def forward(self, hidden: Array, past: int = 0) -> Array:
        """The block's output for activations [n, hidden] of tokens from `past` on, of one sequence after the
        other: as many, or float32 [n, vocab]."""
        count = len(hidden)
        self._engine.bind("hidden", hidden)
        if self._engine.spec.head:
            out = self._arrays.zeros((count, self._vocab), "f32")
            self._engine.bind("logits", out)
        else:
            out = self._arrays.rows_like(hidden, count)
            self._engine.bind("hidden_out", out)
        if self._rank:
            self._engine.bind("lora_mask", self._arrays.activations(np.ones((count, self._rank), np.float32)))
        if self._attention is not None:
            self._attention.bind(past, count)
        self._engine.run()
        self._arrays.wait()
        return out


def _bind_adapter(
    engine: Engine, index: int, block: Block, adapter: Adapter, rank: int, engines: EngineMaker
) -> None:
    """Bind an adapter's matrices, filled up to `rank`, to the engine's block number `index`."""
    shapes = tensor_shapes(block.spec)
    for name, (a, b) in lora_matrices(adapter).items():
        out_features, in_features = shapes[name]
        for which, matrix, features in (("a", a, in_features), ("b", b, out_features)):
            values = engines.arrays.activations(padded(matrix, rank, features))
            engine.bind(f"lora_{which}.{index}.{name}", values)
    engine.bind("lora_versions", np.zeros(rank, np.int64))


class _ProbeAttention:
    """A private pool, page tables and rotary tables for sequences of equal length."""

    def __init__(
        self,
        engine: Engine,
        rope: RopeConfig,
        max_tokens: int,
        engines: EngineMaker,
        num_sequences: int = 1,
        pages: tuple[Array, Array] | None = None,
    ) -> None:
        layers = engine.spec.layers
        self._engine, self._max_tokens, self._mirror = engine, max_tokens, engines.arrays.mirror
        self._sequences = num_sequences
        each = -(-max_tokens // PAGE_TOKENS)
        count = each * num_sequences  # of a layer
        self._cos, self._sin = rope.tables(layers[0].head_dim, max_tokens)
        shape = (count * len(layers), layers[0].num_kv_heads, layers[0].head_dim)
        self.pages = pages or (engines.arrays.pages(*shape), engines.arrays.pages(*shape))
        for name, kv in zip(("key_cache", "value_cache"), self.pages, strict=True):
            engine.bind(name, kv)
        for layer in range(len(layers)):
            ids = np.arange(count, dtype=np.int32) + layer * count
            engine.bind(f"block_indices.{layer}", self._mirror(ids))
        begins = np.arange(num_sequences + 1, dtype=np.int32) * np.int32(each)
        engine.bind("block_indices_begins", self._mirror(begins))

    def bind(self, past: int, num_tokens: int) -> None:
        count = num_tokens // self._sequences
        if past + count > self._max_tokens:
            raise ValueError(f"{past} + {count} tokens exceed the {self._max_tokens} this probe was made for")
        positions = slice(past, past + count)
        inputs = {
            "cos": np.tile(self._cos[positions, None, None], (self._sequences, 1, 1, 1)),
            "sin": np.tile(self._sin[positions, None, None], (self._sequences, 1, 1, 1)),
            "past_lens": np.full(self._sequences, past, np.int32),
            "subsequence_begins": np.arange(self._sequences + 1, dtype=np.int32) * np.int32(count),
            "max_context_len": np.array(past + count, np.int32),
        }
        for name, array in inputs.items():
            self._engine.bind(name, self._mirror(array))


def first_run(engine: Engine, arrays: Arrays) -> None:
    """Run an engine on a few tokens of nothing, in pages of its own, so that it packs its weights.

    What it is bound to afterwards is of no use: it is bound anew before it serves.
    """
    spec = engine.spec
    for count in (1, PAGE_TOKENS):  # as in a decode step, and in a prefill
        engine.bind("hidden", arrays.zeros((count, spec.hidden_size), "activation"))
        if spec.drops_rows:
            engine.bind("rows", arrays.mirror(np.arange(count, dtype=np.int32)))
        if spec.head:
            engine.bind("logits", arrays.zeros((count, spec.head.vocab_size), "f32"))
        else:
            engine.bind("hidden_out", arrays.zeros((count, spec.hidden_size), "activation"))
        if spec.layers:
            _bind_pages(engine, arrays, count)
        for index, names in spec.lora:
            for name in names:
                for which, size in zip("ba", tensor_shapes(spec.specs[index])[name], strict=True):
                    engine.bind(f"lora_{which}.{index}.{name}", arrays.zeros((0, size), "activation"))
        if spec.lora:
            engine.bind("lora_versions", np.zeros(0, np.int64))
            engine.bind("lora_mask", arrays.zeros((count, 0), "activation"))
        engine.run()
    arrays.wait()


def _bind_pages(engine: Engine, arrays: Arrays, count: int) -> None:
    """Bind `count` new tokens of one sequence, at most a page, in pages of its own."""
    layers = engine.spec.layers
    for name in ("key_cache", "value_cache"):
        engine.bind(name, arrays.pages(len(layers), layers[0].num_kv_heads, layers[0].head_dim))
    for name in ("cos", "sin"):
        engine.bind(name, arrays.zeros((count, 1, 1, layers[0].head_dim), "f32"))
    ints = {
        "past_lens": [0],
        "subsequence_begins": [0, count],
        "block_indices_begins": [0, 1],
        **{f"block_indices.{layer}": [layer] for layer in range(len(layers))},
    }
    if engine.spec.scores:
        ints["score_windows"] = [0]
    for name, values in ints.items():
        engine.bind(name, arrays.mirror(np.array(values, np.int32)))
    engine.bind("max_context_len", arrays.mirror(np.array(count, np.int32)))


def time_block(
    engines: EngineMaker, block: Block, num_tokens: int, repeats: int = 5, drafts: bool = False
) -> float:
    """Median time of one block alone on `num_tokens` new tokens of one sequence, in microseconds.

    `drafts`: see `EngineMaker.span`.
    """
    rng = np.random.default_rng(0)
    spec, arrays = block.spec, engines.arrays
    if spec.kind == "embed":
        table = engines.embedding(block)
        out = arrays.zeros((num_tokens, spec.hidden_size), "activation")
        ids = arrays.mirror(rng.integers(0, table.vocab_size, num_tokens, dtype=np.int32))
        return _median_us(lambda: table.lookup(ids, out), arrays.wait, repeats)
    engine = engines.span([block], drafts=drafts)
    values = rng.standard_normal((num_tokens, spec.hidden_size), dtype=np.float32)
    engine.bind("hidden", arrays.activations(values))
    if engine.spec.head:
        engine.bind("logits", arrays.zeros((num_tokens, engine.spec.head.vocab_size), "f32"))
    else:
        engine.bind("hidden_out", arrays.zeros(values.shape, "activation"))
    if isinstance(spec, AttnSpec):
        _ProbeAttention(engine, spec.rope, num_tokens, engines).bind(0, num_tokens)
    return _median_us(engine.run, arrays.wait, repeats)


def _median_us(run: Callable[[], None], wait: Callable[[], None], repeats: int) -> float:
    times = []
    run()
    wait()
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return float(np.median(times)) * 1e6
