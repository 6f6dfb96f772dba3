"""Runs of an engine along given answers: what it would have said at each token, and when the first came."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from blockzoo.runtime import LLMEngine, SamplingParams
from blockzoo.runtime.api.request import KVReuse
from blockzoo.runtime.approx.config import ReuseConfig
from blockzoo.runtime.sampling.sampler import SampledToken, Sampler, SamplerState, SamplingError
from blockzoo.runtime.serve.request_builder import Request


@dataclass(slots=True)
class Run:
    """One request: what is asked, and what came.

    Attributes:
        prompt: a text.
        config: of approximate reuse, where `how` is "approx".
        answer: token ids to follow; None: its own.
        tokens: the answer.
        logits: float32 [tokens, vocab].
        recomputed: share of the prompt's tokens that were computed; 1 where nothing was taken over.
        reuses: whether KV was taken over approximately.
        first_s: seconds to the first token, where it ran alone.
    """

    prompt: str
    how: KVReuse = "off"
    config: ReuseConfig | None = None
    answer: Sequence[int] | None = None
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logits: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    recomputed: float = 1.0
    reuses: bool = False
    first_s: float = 0.0


class _FollowingSampler(Sampler):
    """Takes the likeliest token, or the one it is told, and keeps the logits on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.told: dict[int, tuple[Sequence[int] | None, list[np.ndarray]]] = {}  # by id of the state

    def follow(
        self, logits: np.ndarray, state: SamplerState, drafted: Sequence[int] = ()
    ) -> Iterator[SampledToken | SamplingError]:
        assert not drafted, "the engine does not speculate"
        answer, kept = self.told[id(state)]
        kept.append(np.array(logits[0], np.float32))
        token = int(logits[0].argmax()) if answer is None else answer[len(kept) - 1]
        yield SampledToken(token, None, ())


class Follower:
    """An engine that answers as it is told.

    Args:
        engine: allows approximate reuse; belongs to this from now on.
        clock: tells seconds; `time.process_time` where others keep the machine busy.
    """

    def __init__(self, engine: LLMEngine, clock: Callable[[], float] = time.perf_counter) -> None:
        self.engine, self._clock = engine, clock
        self._sampler = engine._sampler = _FollowingSampler()

    def render(self, model: str, prompt: str | Sequence[Mapping[str, Any]]) -> str:
        """A text as it is; messages by the model's chat template, going on with an assistant's last one."""
        if isinstance(prompt, str):
            return prompt
        begun = prompt[-1]["role"] == "assistant"
        template = self.engine.tokenizer(model).chat_template_of(model)
        return template.render(prompt, add_generation_prompt=not begun, continue_final_message=begun)

    def run(self, model: str, runs: Sequence[Run], max_tokens: int, scope: str) -> None:
        """All of them at once. Raises RuntimeError where one fails."""
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        asked: dict[str, tuple[Run, Request, list[np.ndarray]]] = {}
        start = self._clock()
        for number, run in enumerate(runs):
            request = self.engine.prepare(str(number), model, run.prompt, params, scope, run.how)
            request.seq.approximate = run.config
            asked[str(number)] = run, request, []
            self._sampler.told[id(request.sampler)] = run.answer, asked[str(number)][2]
            self.engine.enqueue(request)
        while self.engine.has_unfinished():
            before = {name: request.seq.approx for name, (_, request, _) in asked.items()}
            for output in self.engine.step():
                if output.error is not None:
                    raise RuntimeError(output.error)
                run, request, _ = asked[output.request_id]
                if output.token_ids and not run.tokens:
                    run.first_s = self._clock() - start
                    # some take theirs over in this very step, some end with it
                    _note_reuse(run, request, request.seq.approx or before[output.request_id])
                run.text += output.text
                run.tokens += output.token_ids
        for run, _, kept in asked.values():
            run.logits = np.stack(kept)
        self._sampler.told.clear()


def _note_reuse(run: Run, request: Request, approx: Any) -> None:
    seq = request.seq
    spared = seq.num_cached
    if approx is not None:
        spared += int(approx.reused.sum())
        run.reuses = True
    run.recomputed = 1 - spared / seq.prompt_len


def agreement(expected: Run, seen: Run) -> np.ndarray:
    """bool [tokens], whether the likeliest is the same."""
    same: np.ndarray = seen.logits.argmax(1) == expected.logits.argmax(1)
    return same


def divergence(expected: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Kullback-Leibler divergence of logits `seen` [tokens, vocab] from those expected, nats [tokens]."""
    p, q = (x - np.logaddexp.reduce(x, axis=1, keepdims=True) for x in (expected, seen))
    found: np.ndarray = (np.exp(p) * (p - q)).sum(1)
    return found
