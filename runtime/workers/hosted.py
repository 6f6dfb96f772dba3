"""What a worker has of a zoo: engines of its spans, tables where chains begin here, and its pool's pages."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np

from blockzoo.engines.base import Embedding, Engine, EngineMaker, activation_dtype
from blockzoo.engines.choose import make_engines
from blockzoo.engines.probe import first_run
from blockzoo.runtime.exec.adapters import AdapterCache, AdapterInputs
from blockzoo.runtime.exec.rows import Rows
from blockzoo.runtime.exec.span_engine import span_engine
from blockzoo.runtime.exec.topology import ChainPlan, Copy, Span, Topology, with_copies
from blockzoo.runtime.workers.head_line import Held
from blockzoo.runtime.workers.part import Logits, PartExecutor
from blockzoo.runtime.workers.settings import EngineKind, WorkerSettings
from blockzoo.runtime.workers.wire import unpack_rows, with_hidden
from blockzoo.zoo.blocks import Block, BlockSpec
from blockzoo.zoo.errors import ZooError
from blockzoo.zoo.rope import RopeConfig
from blockzoo.zoo.store import Zoo


class SpanError(Exception):
    """Spans of this worker cannot be had; why, by index."""

    def __init__(self, problems: dict[int, str]) -> None:
        super().__init__(str(problems))
        self.problems = problems


class Hosted:
    """What a worker has of a zoo.

    Args:
        before: what it had for another head; its engines stay where they fit.

    Raises:
        SpanError: spans cannot be had.
    """

    def __init__(self, settings: WorkerSettings, before: Hosted | None = None) -> None:
        plan = settings.plan
        self._settings, self._plan = settings, plan
        zoo = Zoo(plan.kind.zoo, plan.manifest)
        if before is not None and before._plan.kind != plan.kind:
            before = None
        self._maker: EngineMaker = _maker(plan.kind) if before is None else before._maker
        self._zoo = zoo
        self._blocks: dict[str, Block] = {} if before is None else before._blocks
        mine = self._spans_here()
        self._maker.expect(len(mine))
        known = {} if before is None else before._by_span()
        self._engines = self._compile({index: index for index in mine}, known)
        self._embeddings = self._embed(mine)
        self._coming: dict[int, Engine] = {}
        self._inputs = self._adapter_inputs(zoo)
        self._ropes = {key: key[0].tables(key[2], key[1]) for key in {self._rope_key(i) for i in plan.ropes}}
        memory = settings.logits.open()
        self._logits = np.empty(plan.num_logits, np.float32) if memory is None else memory
        self._is_far = memory is None
        self._places: dict[tuple[int, int], PartExecutor] = {}  # by family's number, micro-batch

    def forget_pages(self) -> Held:
        """The head is gone, and what it had in pages with it; what is left."""
        for (number, micro), executor in self._places.items():
            if micro == 0:  # it has the pool, whose memory engines stay bound to
                count = self._plan.num_pages[self._plan.families[number]]
                executor.discard(np.arange(count, dtype=np.int32))
        self._places.clear()
        self._coming = {}
        return Held(self._settings.index, self._plan.kind, frozenset(self._by_span()))

    def _by_span(self) -> dict[Span, Engine]:
        spans = self._plan.topology.spans
        return {spans[index]: engine for index, engine in self._engines.items()}

    @property
    def _chains(self) -> Sequence[ChainPlan]:
        return self._plan.topology.chains

    def _rope_key(self, chain: int) -> tuple[RopeConfig, int, int]:
        """Of tables that chains share: settings, positions, width."""
        return *self._plan.ropes[chain], self._chains[chain].family.head_dim

    def _spans_here(self) -> set[int]:
        return {index for index, home in enumerate(self._plan.homes) if home == self._settings.index}

    def _block(self, block_id: str) -> Block:
        if block_id not in self._blocks:
            self._blocks[block_id] = self._zoo.read_block(block_id)
        return self._blocks[block_id]

    def _compile(self, spans: Mapping[int, int], known: Mapping[Span, Engine] = {}) -> dict[int, Engine]:
        """Engines by index, of the spans that these are or are copies of; `known`: those that are there.

        Raises SpanError.
        """
        engines: dict[int, Engine] = {}
        problems: dict[int, str] = {}
        for index, original in sorted(spans.items()):
            span = self._plan.topology.spans[original]
            try:
                engines[index] = known.get(span) or span_engine(self._maker, span, self._block)
            except (RuntimeError, ZooError, KeyError) as error:  # an EngineError; KeyError: no such block
                problems[index] = str(error)
        if problems:
            raise SpanError(problems)
        return engines

    def _embed(self, spans: Collection[int]) -> dict[str, Embedding]:
        """Tables of the chains that begin with one of some spans."""
        mine = {chain.embed_id for chain in self._chains if chain.uses[0].span in spans}
        return {key: self._maker.embedding(self._block(key)) for key in sorted(mine)}

    def load(self, spans: Mapping[int, int]) -> dict[int, str]:
        """Have spans ready for `take`, beside the steps that other threads run; those that cannot be had, and
        why. What was ready before is dropped. `spans`: by index, which of now it is or will be a copy of."""
        self._coming = {}
        try:
            engines = self._compile({i: span for i, span in spans.items() if i not in self._engines})
            for engine in engines.values():
                first_run(engine, self._maker.arrays)  # it packs its weights now, and not under a request
            self._embed(spans.values())  # their blocks are at hand then
            self._coming = engines
        except SpanError as error:
            return error.problems
        for original in spans.values():
            for block_id in self._plan.topology.spans[original].block_ids:
                self._block(block_id).drop_pages()
        return {}

    def take(self, homes: Sequence[int], copies: Sequence[tuple[int, Sequence[int]]]) -> None:
        """Between two steps, go over to other homes and copies: with what is ready (`load`), without what is
        elsewhere.

        Raises SpanError: spans that were not ready cannot be had.
        """
        wanted = tuple(Copy(span, tuple(chains)) for span, chains in copies)
        topology = self._plan.topology
        if wanted != topology.copies:
            topology = with_copies(topology, wanted, self._plan.manifest.blocks)
            self._inputs.follow(topology.chains, topology.spans, self._specs(topology))
        self._plan = replace(self._plan, homes=tuple(homes), topology=topology)
        mine = self._spans_here()
        ready, self._coming = self._coming, {}
        self._engines = {i: e for i, e in {**ready, **self._engines}.items() if i in mine}
        self._engines |= self._compile({index: index for index in mine - self._engines.keys()})
        self._embeddings = self._embed(mine)
        used = {i for index in mine for i in self._plan.topology.spans[index].block_ids}
        used |= self._embeddings.keys()
        self._blocks = {key: block for key, block in list(self._blocks.items()) if key in used}
        self._inputs.forget_others(mine)
        for (number, _), executor in self._places.items():
            engines = self._engines_of(number)
            executor.host(topology.chains, topology.spans, engines, self._embeddings, self._plan.homes)

    def _engines_of(self, number: int) -> dict[int, Engine]:
        """Those here that a family's chains use."""
        family = self._plan.families[number]
        used = {use.span for chain in self._chains if chain.family == family for use in chain.uses}
        return {index: engine for index, engine in self._engines.items() if index in used}

    def _adapter_inputs(self, zoo: Zoo) -> AdapterInputs:
        topology = self._plan.topology
        cache = AdapterCache(zoo.read_adapter, self._maker.arrays, self._plan.adapter_bytes)
        return AdapterInputs(cache, topology.chains, topology.spans, self._specs(topology))

    def _specs(self, topology: Topology) -> list[list[BlockSpec]]:
        blocks = self._plan.manifest.blocks
        return [[blocks[block_id].spec for block_id in span.block_ids] for span in topology.spans]

    def executor(self, number: int, micro: int) -> PartExecutor:
        """Of a family, by its number, and the place of a micro-batch; the first place has the pool of all."""
        for place in (0, micro):
            if (number, place) not in self._places:
                self._places[number, place] = self._make(number, place)
        return self._places[number, micro]

    def _make(self, number: int, micro: int) -> PartExecutor:
        plan = self._plan
        family = plan.families[number]
        size = plan.logits_size(family)
        begin = plan.logits_begin(family) + micro * size
        return PartExecutor(
            family,
            self._chains,
            plan.topology.spans,
            self._engines_of(number),
            self._embeddings,
            {index: self._ropes[self._rope_key(index)] for index in plan.ropes},
            self._maker.arrays,
            plan.num_pages[family],
            plan.max_tokens,
            plan.max_seqs,
            max_more_logits=plan.max_more_logits,
            homes=plan.homes,
            me=self._settings.index,
            inputs=self._inputs,
            shared=self._logits,
            logits=self._logits[begin : begin + size],
            before=self._places.get((number, 0)),
        )

    def rows_of(self, data: bytes, hidden: Sequence[bytes]) -> list[Rows]:
        """The rows of a step, as they were sent."""
        return with_hidden(unpack_rows(data), hidden, activation_dtype(self._plan.kind.precision))

    def far_logits(self, logits: Callable[[], Sequence[Logits]]) -> list[memoryview]:
        """Logits that are to be sent, as the head does not see this worker's; none where it does."""
        if not self._is_far:
            return []
        return [self._logits[each.begin : each.end].data for each in logits()]

    def release_memory(self) -> None:
        """Give back scratch, and what engines have their own copy of."""
        for executor in self._places.values():
            executor.release_memory()
        for block in list(self._blocks.values()):  # one may come meanwhile
            block.drop_pages()


def _maker(kind: EngineKind) -> EngineMaker:
    return make_engines(
        "openvino",
        kind.precision,
        num_threads=kind.num_threads,
        int8_activations=kind.int8_activations,
        kv_precision=kind.kv_precision,
    )
