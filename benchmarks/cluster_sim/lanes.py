"""A lane: the real scheduler and KV bookkeeping, whose steps run in simulated time.

It does what `LLMEngine` does around a step: requests in, a schedule, tokens of what came to its end, pages
given back. What a step takes is somebody else's (`RunStep`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from benchmarks.cluster_sim.events import Clock
from benchmarks.cluster_sim.traffic import Request
from blockzoo.engines.base import PAGE_TOKENS
from blockzoo.runtime.draft.row_choice import MOST_DRAFTED, Hopes, RowChoice
from blockzoo.runtime.draft.step_cost import StepKind
from blockzoo.runtime.kv.prefix_cache import KVCache
from blockzoo.runtime.kv.sequence import Segment, TokenSequence
from blockzoo.runtime.serve.config import SchedulerConfig
from blockzoo.runtime.serve.scheduler import Scheduled, Scheduler
from blockzoo.runtime.serve.step_pace import StepPace

RunStep = Callable[["Lane", list[Scheduled], Callable[[], None]], None]
"""Runs a step of a lane, and something at its end."""


@dataclass(frozen=True, slots=True)
class Work:
    """What sequences ask of the layers: see `devices.Piece.seconds`."""

    rows: int
    logit_rows: int
    attended: float
    context: float

    def __add__(self, other: Work) -> Work:
        return Work(
            self.rows + other.rows,
            self.logit_rows + other.logit_rows,
            self.attended + other.attended,
            self.context + other.context,
        )


def work_of(item: Scheduled) -> Work:
    """Of a scheduled sequence, before it has run."""
    seq, rows = item.seq, item.num_tokens + len(item.seq.drafted)
    past = seq.num_computed
    ends = past + item.num_tokens == seq.num_tokens
    logits = 1 + len(seq.drafted) if ends else 0
    return Work(rows, logits, rows * past + rows * (rows + 1) / 2, past + rows)


class Lane:
    """One scheduler with its KV.

    Args:
        clock: of the simulation.
        run_step: what its steps take.
        num_pages: of `layers` each that a page of tokens takes.
        config: of the scheduler.
        layers: of the bookkeeping. 1: a page id stands for all layers.
        pace: as of an engine; None: steps are bounded in tokens alone.
        chances: by application, how often a guess of the next token is right; None: nothing is guessed.
        seed: of which guesses are.
    """

    def __init__(
        self,
        clock: Clock,
        run_step: RunStep,
        num_pages: int,
        config: SchedulerConfig,
        layers: int = 1,
        pace: StepPace | None = None,
        chances: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> None:
        self.clock, self._run_step, self._layers = clock, run_step, layers
        self.cache = KVCache(num_pages)
        self.scheduler = Scheduler(config, clock.time, pace)
        self.requests: dict[str, Request] = {}
        self.num_failed = 0
        self.num_steps = 0
        self.on_finished: Callable[[Request], None] = lambda _: None
        self._pace, self._chances = pace, chances
        self._choice = RowChoice()
        self._rng = np.random.default_rng([seed, 3])
        self._busy = False

    @property
    def num_requests(self) -> int:
        """Under way."""
        return len(self.requests)

    def sequence(self, request: Request) -> TokenSequence:
        """A request as its scheduler sees it."""
        segments = (Segment(0, self._layers, request.app),)
        return TokenSequence(
            str(request.number),
            request.app,
            self.cache,
            segments,
            request.app,
            request.tokens,
            self.clock.now,
        )

    def submit(self, request: Request) -> None:
        """Queue a request."""
        seq = self.sequence(request)
        self.requests[seq.request_id] = request
        self.scheduler.add(seq)
        if not self._busy:
            self.step()

    def take_in(self, request: Request, num_tokens: int) -> None:
        """Enter KV of the first tokens of a request that came from elsewhere, as far as there is room."""
        tokens = num_tokens - num_tokens % PAGE_TOKENS
        if tokens <= 0:
            return
        seq = self.sequence(request)
        if self.cache.can_begin(seq):
            self.cache.begin(seq)
            if seq.num_computed < tokens and self.cache.reserve(seq, tokens):
                seq.num_computed = tokens
                self.cache.commit(seq)
            self.cache.release(seq)

    def step(self) -> None:
        """Begin the next step where there is something to do."""
        items = self.scheduler.schedule()
        for failed in self.scheduler.take_failed():
            self.num_failed += 1
            self.on_finished(self.requests.pop(failed.seq.request_id))
        self._busy = bool(items)
        if not items:
            return
        self.num_steps += 1
        kind = self._draft(items)
        begin = self.clock.now

        def done() -> None:
            self._end(items, kind, self.clock.now - begin)
            self.step()

        self._run_step(self, items, done)

    def _end(self, items: list[Scheduled], kind: StepKind | None, seconds: float) -> None:
        if self._pace is not None:
            prefill: dict[str, int] = {}
            for seq, count in items:
                if count > 1:
                    prefill[seq.model] = prefill.get(seq.model, 0) + count
            self._pace.observe(prefill, seconds)
        if self._chances is not None:
            if kind is None:
                self._choice.skip()
            else:
                self._choice.observe(kind, sum(len(seq.drafted) for seq, _ in items), seconds)
        self.scheduler.advance(items)
        for seq, _ in items:
            if seq.num_uncomputed == 0:
                self._take_tokens(seq, self.requests[seq.request_id])

    def _take_tokens(self, seq: TokenSequence, request: Request) -> None:
        for place in range(1 + len(seq.drafted)):
            if place:
                if self._rng.random() >= self._chance(seq):
                    break
                self.scheduler.keep_drafted(seq)
            generated = seq.num_tokens - seq.prompt_len
            seq.append_token(int(request.answer[generated]))
            if request.first_token is None:
                request.first_token = self.clock.now
            if generated + 1 == len(request.answer):
                request.end = self.clock.now
                self.scheduler.finish(seq)
                del self.requests[seq.request_id]
                self.on_finished(request)
                return
        self.scheduler.end_draft(seq)

    # ---- speculation

    def _chance(self, seq: TokenSequence) -> float:
        return self._chances[seq.model] if self._chances is not None else 0.0

    def _draft(self, items: list[Scheduled]) -> StepKind | None:
        """Add guessed rows as `Speculation` does, by the same choice of how many; what kind of step it is."""
        if self._chances is None or any(count > 1 for _, count in items):
            return None
        kind = StepKind(len(items), len({seq.model for seq, _ in items}))
        hopes = []
        for seq, _ in items:
            left = len(self.requests[seq.request_id].answer) - (seq.num_tokens - seq.prompt_len) - 1
            chances = [self._chance(seq) ** (i + 1) for i in range(min(MOST_DRAFTED, left))]
            hopes.append(Hopes(chances, left > 0))
        rows = self._choice.choose(kind, hopes, self.scheduler.spare_rows).rows
        likeliest = sorted(
            ((chance, index) for index, hope in enumerate(hopes) for chance in hope.chances), reverse=True
        )[:rows]
        for index, item in enumerate(items):
            count = sum(owner == index for _, owner in likeliest)
            if count:
                self.scheduler.draft(item.seq, [0] * count)
        return kind
