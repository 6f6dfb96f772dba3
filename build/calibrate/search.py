"""The settings that are tried, and which of them a model gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np

from blockzoo.build.calibrate.follower import Follower, Run, agreement, divergence
from blockzoo.build.calibrate.prompts import BUILT_IN, Case, built_in, read_prompts
from blockzoo.build.calibrate.yardstick import Bf16
from blockzoo.runtime import EngineConfig, LLMEngine
from blockzoo.runtime.approx.config import ReuseConfig
from blockzoo.runtime.approx.state import margin
from blockzoo.zoo.errors import ZooError
from blockzoo.zoo.manifest import ReusePoint, ReuseRecord, ReuseSettings
from blockzoo.zoo.store import Zoo
from blockzoo.zoo.writer import ZooWriter

ANSWER_TOKENS = 16
CHARACTERS = 4  # of a token, about
Progress = Callable[[str, int, int], None]
"""(what, done, of)."""

_QUERY = ReuseSettings("query", "line", 0.2, 0.05, pointed=0.07, head=16, edit=32, refresh=0)
CANDIDATES = (
    replace(_QUERY, recompute=0.07, edit_recompute=0.03, head=8),
    replace(_QUERY, selector="head-of-run", unit="token", recompute=0.15),
    _QUERY,
    replace(_QUERY, selector="head-of-run", unit="token", recompute=0.3, edit_recompute=0.1),
    replace(_QUERY, recompute=0.4, edit_recompute=0.2, pointed=0.15, head=32, edit=64),
    # edits alone; the last, since what it computes in full stays in the cache
    replace(_QUERY, recompute=1.0, edit_recompute=0.03),
)


class NothingKnownError(ZooError):
    """No prompt has words that others have."""


@dataclass(slots=True)
class Tried:
    """What all prompts gave of one candidate, a value each.

    Attributes:
        agrees, kl: of each token of the answer.
        computed: share of the prompt's tokens.
        costs: time to the first token, a full prefill's being 1; None where nothing was taken over.
        margins: what a guard would go by (`margin`); None where nothing was taken over.
    """

    agrees: list[np.ndarray] = field(default_factory=list)
    kl: list[np.ndarray] = field(default_factory=list)
    computed: list[float] = field(default_factory=list)
    costs: list[float | None] = field(default_factory=list)
    margins: list[float | None] = field(default_factory=list)

    def add(self, full: Run, run: Run) -> None:
        """What one prompt gave."""
        self.agrees.append(agreement(full, run))
        self.kl.append(divergence(full.logits, run.logits))
        self.computed.append(run.recomputed)
        self.costs.append(run.first_s / full.first_s if run.reuses else None)
        self.margins.append(margin(run.logits[0]) if run.reuses else None)

    def point(self, settings: ReuseSettings) -> ReusePoint:
        """All of it, as these settings gave it."""
        costs = [cost for cost in self.costs if cost is not None]
        return self._point(settings, 1 / np.median(costs) if costs else 1.0)

    def guarded(self, settings: ReuseSettings, least: float) -> ReusePoint | None:
        """With the guard that holds back the fewest of every other prompt and has these agree so much: what
        it gives and costs on the others. None: there is none.

        What is held back is computed in full after all, so the mean of the times counts.
        """
        fit, rest = self._every_other(0), self._every_other(1)
        for guard in sorted({lead for lead in fit.margins if lead is not None}):
            if np.concatenate(fit._held_back(guard).agrees).mean() >= least:
                guarded = rest._held_back(guard)
                costs = [cost for cost in guarded.costs if cost is not None]
                settings = replace(settings, guard=guard)
                return guarded._point(settings, 1 / np.mean(costs)) if costs else None
        return None

    def _point(self, settings: ReuseSettings, speedup: float | np.floating) -> ReusePoint:
        return ReusePoint(
            settings,
            computed=_rounded(np.mean(self.computed)),
            speedup=_rounded(speedup),
            agreement=_rounded(np.concatenate(self.agrees).mean()),
            kl=_rounded(max(0.0, float(np.concatenate(self.kl).mean()))),
        )

    def _every_other(self, first: int) -> Tried:
        return Tried(*(getattr(self, each.name)[first::2] for each in fields(self)))

    def _held_back(self, guard: float) -> Tried:
        """As if a guard had looked: what it holds back agrees, and is computed once more, in full."""
        found = Tried()
        for agrees, kl, computed, cost, lead in zip(
            self.agrees, self.kl, self.computed, self.costs, self.margins, strict=True
        ):
            back = lead is not None and lead < guard
            found.agrees.append(agrees | back)
            found.kl.append(kl * (not back))
            found.computed.append(computed + back)
            found.costs.append(None if cost is None else cost + back)
            found.margins.append(lead)
        return found


def calibrate(
    zoo_path: Path | str,
    models: Sequence[str] = (),
    prompts: Path | str | None = None,
    *,
    agreement: float = 0.99,
    speedup: float = 1.5,
    count: int = 12,
    length: int = 600,
    num_threads: int | None = None,
    write: bool = True,
    progress: Progress = lambda what, done, of: None,
) -> dict[str, ReuseRecord]:
    """Find for each model the fastest way to reuse KV approximately that keeps it near enough to itself.

    Args:
        zoo_path: a zoo.
        models: names; none: all with a plain rotary embedding, without which there is no such reuse.
        prompts: a file of prompts (`read_prompts`); None: built-in ones.
        agreement: the least share of equal likeliest tokens along a full prefill's answers, in f32, as a
            share of what a full prefill rounded to bf16 keeps of them.
        speedup: how many times as fast the first token must come, at least.
        count, length: of built-in prompts, and their tokens, about.
        num_threads: compute threads; None leaves the backend's choice.
        write: the findings go into the zoo's manifest, which `kv_reuse="approx"` goes by.
        progress: hears how far it is.

    Raises:
        PromptsError, NothingKnownError, StoreError, ManifestError.
        RequestError: a model cannot take a prompt.
        ValueError: a setting is out of range, or a model is not in the zoo.
    """
    if not 0 < agreement <= 1:
        raise ValueError(f"agreement is {agreement}; expected above 0, at most 1")
    if not speedup >= 1 or count < 1 or length < 64:
        raise ValueError(f"speedup is {speedup}, count {count}, length {length}; expected 1, 1, 64 or more")
    zoo = Zoo.open(zoo_path)
    able = (n for n, m in zoo.manifest.models.items() if m.config.rope.rope_type == "default")
    names = list(models) or sorted(able)
    for name in names:
        if name not in zoo.manifest.models:
            raise ValueError(
                f"there is no model {name!r} in {zoo.path}: {', '.join(sorted(zoo.manifest.models))}"
            )
    config = EngineConfig(
        precision="f32",
        num_threads=num_threads,
        approximate=ReuseConfig(),
        calibrated=False,
        max_step_seconds=None,
    )
    follower, bf16 = Follower(LLMEngine(zoo.path, config)), Bf16(zoo)
    known = None if prompts is None else read_prompts(Path(prompts))
    source = BUILT_IN if prompts is None else Path(prompts).name
    found = {}
    for name in names:
        cases = known
        if cases is None:
            chats = follower.engine.tokenizer(name).chat_template is not None
            cases = built_in(count, CHARACTERS * length, chats)
        search = _Search(follower, bf16, name, progress)
        found[name] = search.record(cases, agreement, speedup, source)
    if write:
        _write(zoo, found)
    return found


class _Search:
    """Of one model."""

    def __init__(self, follower: Follower, bf16: Bf16, model: str, progress: Progress) -> None:
        self._follower, self._bf16, self._model, self._progress = follower, bf16, model, progress

    def record(self, cases: Sequence[Case], asked: float, speedup: float, source: str) -> ReuseRecord:
        """What all candidates give, and the fastest that is near enough."""
        tried = [Tried() for _ in CANDIDATES]
        bf16 = Tried()
        for number, case in enumerate(cases):
            self._progress(self._model, number, len(cases))
            self._try(case, number, tried, bf16)
        self._progress(self._model, len(cases), len(cases))
        if not bf16.agrees:
            raise NothingKnownError(
                f"{self._model}: none of {len(cases)} prompts has long runs of words that are known from "
                "others, so there is nothing to reuse: give prompts that come together in your traffic"
            )
        yardstick = float(np.concatenate(bf16.agrees).mean())
        curve = [t.point(s) for t, s in zip(tried, CANDIDATES, strict=True)]
        for taken, point in zip(tried, tuple(curve), strict=True):
            if point.agreement < asked * yardstick:
                guarded = taken.guarded(point.settings, asked * yardstick)
                curve += [] if guarded is None else [guarded]
        return ReuseRecord(
            settings=choose(curve, asked * yardstick, speedup),
            asked=asked,
            least_speedup=speedup,
            bf16_agreement=_rounded(yardstick),
            bf16_kl=_rounded(max(0.0, float(np.concatenate(bf16.kl).mean()))),
            curve=tuple(curve),
            num_prompts=len(bf16.agrees),
            num_tokens=int(np.concatenate(bf16.agrees).size),
            prompts=source,
        )

    def _try(self, case: Case, number: int, tried: Sequence[Tried], bf16: Tried) -> None:
        """One prompt, by all candidates in turn: each after a full prefill would be, alone."""
        scope = "in turn" if case.known is None else str(number)
        for known in case.known or ():
            self._run(Run(self._text(known), "exact"), 1, scope)
        prompt = self._text(case.prompt)
        full = self._run(Run(prompt), ANSWER_TOKENS, scope)
        runs = []
        for settings in CANDIDATES:
            config = ReuseConfig(**asdict(settings))
            run = Run(prompt, "approx", config, full.tokens)
            runs.append(self._run(run, len(full.tokens), scope))
        if case.known is None:
            self._run(Run(prompt, "exact"), 1, scope)
        if not any(run.reuses for run in runs):
            return  # nothing is known: it tells nothing
        for taken, run in zip(tried, runs, strict=True):
            taken.add(full, run)
        ids = [*self._follower.engine.tokenizer(self._model).encode(prompt), *full.tokens[:-1]]
        rounded = self._bf16.logits(self._model, ids, len(full.tokens))
        bf16.agrees.append(rounded.argmax(1) == full.logits.argmax(1))
        bf16.kl.append(divergence(full.logits, rounded))

    def _text(self, prompt: object) -> str:
        return self._follower.render(self._model, prompt)  # type: ignore[arg-type]

    def _run(self, run: Run, max_tokens: int, scope: str) -> Run:
        self._follower.run(self._model, [run], max_tokens, scope)
        return run


def choose(curve: Sequence[ReusePoint], least: float, speedup: float) -> ReuseSettings | None:
    """Those that compute the least, of settings that agree at least so much, and are at least so fast where
    they take anything over; None: there are none."""
    fit = [point for point in curve if point.agreement >= least and point.speedup >= speedup]
    return min(fit, key=lambda point: point.computed).settings if fit else None


def _write(zoo: Zoo, found: dict[str, ReuseRecord]) -> None:
    """Note the findings of models that are what they were when this began."""
    with ZooWriter(zoo.path) as writer:
        models = dict(writer.manifest.models)
        for name, record in found.items():
            now, then = models.get(name), zoo.manifest.models[name]
            if now is not None and (now.chain, now.adapters) == (then.chain, then.adapters):
                models[name] = replace(now, reuse=record)
        writer.commit(replace(writer.manifest, models=models))


def _rounded(value: float | np.floating) -> float:
    return float(f"{float(value):.4g}")
