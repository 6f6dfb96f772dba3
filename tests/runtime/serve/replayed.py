"""Answers that are known, run through `Speculation` by a clock of its own: steps take what is said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from blockzoo.runtime.api.request import SamplingParams
from blockzoo.runtime.draft.guesses import Context, Guess
from blockzoo.runtime.draft.lookup import PromptLookup
from blockzoo.runtime.serve import speculation
from blockzoo.runtime.serve.speculation import Speculation

SPARE = 256  # rows
_LOOKUP = 5e-5  # seconds

Asked = tuple[np.ndarray, np.ndarray]
"""A prompt and its answer, int32."""
Seconds = Callable[[int, int], float]
"""Of a step of so many sequences and rows, in the shape of the one before."""
_MODEL = SimpleNamespace(name="m", surrogate=None, chain=SimpleNamespace(vocab_size=1 << 20), max_len=1 << 20)


class _Clock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    monotonic = perf_counter


class _Lookup(PromptLookup):
    """Takes its time."""

    def __init__(self, clock: _Clock) -> None:
        self._clock = clock

    def propose(self, context: Context, limit: int) -> list[Guess]:
        self._clock.now += _LOOKUP
        return super().propose(context, limit)


def _request(number: int, asked: Asked, place: int) -> Any:
    prompt, answer = asked
    seq = SimpleNamespace(
        request_id=str(number),
        tenant=f"tenant {place}",
        scope=f"scope {number}",
        reuse="exact",
        token_ids=np.append(prompt, answer[:1]),
        num_tokens=prompt.size + 1,
        prompt_len=prompt.size,
        num_uncomputed=1,
        lacks_prompt_logits=False,
        chain_index=0,
        approx=None,
        drafted=(),
    )
    return SimpleNamespace(
        seq=seq,
        answer=answer,
        model=_MODEL,
        params=SamplingParams(),
        sampler=SimpleNamespace(guide=None),
        max_tokens=answer.size,
        num_generated=1,
        acceptance=None,
        guesses=(),
        untried=(),
    )


class _Scheduler:
    spare_rows = 0

    def draft(self, seq: Any, token_ids: Sequence[int]) -> None:
        seq.drafted = tuple(token_ids)


class Replay:
    """One engine.

    Args:
        seconds: of steps.
        new_shape: what a step adds whose shape is not that of the one before, in seconds.
        noise: of steps, in logarithms.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, seconds: Seconds, new_shape: float, noise: float = 0.08
    ) -> None:
        self._clock = _Clock()
        monkeypatch.setattr(speculation, "time", self._clock)
        self._speculation = Speculation(lambda *_: None, drafters=[_Lookup(self._clock)])
        self._seconds, self._new_shape = seconds, new_shape
        self._noise, self._rng = noise, np.random.default_rng(0)
        self._number, self._last = 0, (0, 0)
        self._speculation.learn_costs("f", lambda counts: self._step(len(counts), sum(counts)), 8, SPARE)

    def speedup(self, group: Sequence[Asked]) -> float:
        """Of requests that are asked at once: of the mean of the times in which they have their answers."""
        return self._run(group, speculates=False) / self._run(group, speculates=True)

    def _run(self, group: Sequence[Asked], speculates: bool) -> float:
        self._number += len(group)
        running = [_request(self._number + i, asked, i) for i, asked in enumerate(group)]
        waited = 0.0
        if speculates:
            self._speculation.observe("f", [], 1.0)  # prompts ran
        self._last = 0, 0
        while running:
            start = self._clock.now
            items = [SimpleNamespace(seq=request.seq, num_tokens=1) for request in running]
            if speculates:
                self._plan(items, running)
            rows = sum(1 + len(item.seq.drafted) for item in items)
            seconds = self._step(len(items), rows)
            waited += len(running) * (self._clock.now - start)
            if speculates:
                self._speculation.observe("f", items, seconds)
            running = [request for request in running if self._goes_on(request, speculates)]
        return waited

    def _step(self, seqs: int, rows: int) -> float:
        noise = np.exp(self._noise * self._rng.standard_normal())
        seconds = self._seconds(seqs, rows) * noise + self._new_shape * ((seqs, rows) != self._last)
        self._clock.now, self._last = self._clock.now + seconds, (seqs, rows)
        return float(seconds)

    def _plan(self, items: Any, running: Sequence[Any]) -> None:
        scheduler: Any = _Scheduler()
        scheduler.spare_rows = SPARE - len(items)
        by_id = {request.seq.request_id: request for request in running}
        family: Any = "f"
        executor: Any = None
        self._speculation.plan(family, items, by_id, scheduler, executor)

    def _goes_on(self, request: Any, speculates: bool) -> bool:
        """Take the tokens of a step."""
        coming = request.answer[request.num_generated :].tolist()
        drafted = (*request.seq.drafted, None)
        right = next(i for i, token in enumerate(drafted) if i >= len(coming) or token != coming[i])
        new = coming[: right + 1]
        request.num_generated += len(new)
        request.seq.token_ids = np.append(request.seq.token_ids, np.array(new, np.int32))
        if speculates:
            self._speculation.judge(request, new)
        request.seq.drafted = ()
        return bool(request.num_generated < request.answer.size)
