"""Applications, and requests to them: sessions of some turns, each of which repeats what was said before.

Arrivals do not depend on the system: what an answer says and when the next turn comes is drawn beforehand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

KINDS = ("lora", "top", "full")


@dataclass(frozen=True, slots=True)
class App:
    """A fine-tune.

    Attributes:
        base: the shape's name.
        kind: "lora": all layers are the base's; "top": the last quarter and the head are its own; "full":
            everything is.
        share: of all requests.
    """

    name: str
    base: str
    kind: str
    share: float


@dataclass(frozen=True, slots=True)
class Mix:
    """What applications there are, and what they are asked.

    Attributes:
        bases: shares of applications by shape.
        kinds: shares of applications by kind.
        skew: popularity of the k-th application falls as 1 / k ** skew.
        prompt, answer: median tokens of a turn; their logarithms are normal with `sigma`.
        turns: mean number of turns of a session (geometric).
        think_s: mean seconds from one turn of a session to the next, beside its answer.
        system: tokens that begin every prompt of an application.
    """

    bases: Mapping[str, float] = field(default_factory=lambda: {"7B": 0.6, "13B": 0.4})
    kinds: Mapping[str, float] = field(default_factory=lambda: {"lora": 0.5, "top": 0.3, "full": 0.2})
    skew: float = 0.9
    prompt: float = 200.0
    answer: float = 120.0
    sigma: float = 0.7
    turns: float = 2.0
    think_s: float = 20.0
    system: int = 64


@dataclass(eq=False, slots=True)
class Request:
    """A turn.

    Attributes:
        tokens: int32 [n], the prompt, all that was said before included.
        answer: int32 [m], what is generated.
    """

    number: int
    app: str
    session: int
    arrival: float
    tokens: np.ndarray
    answer: np.ndarray
    first_token: float | None = None
    end: float | None = None


def make_apps(count: int, mix: Mix, seed: int) -> list[App]:
    """So many applications; bases and kinds are dealt in proportion, popularity at random."""
    rng = np.random.default_rng([seed, 1])
    bases = _dealt(mix.bases, count, rng)
    kinds = _dealt(mix.kinds, count, rng)
    shares = np.arange(1, count + 1) ** -mix.skew
    shares = rng.permutation(shares / shares.sum())
    return [App(f"app{i}", bases[i], kinds[i], float(shares[i])) for i in range(count)]


def _dealt(shares: Mapping[str, float], count: int, rng: np.random.Generator) -> list[str]:
    names = list(shares)
    weights = np.array([shares[name] for name in names], float)
    ends = np.round(np.cumsum(weights) / weights.sum() * count).astype(int)
    counts = np.diff(ends, prepend=0)
    dealt = [name for name, number in zip(names, counts, strict=True) for _ in range(number)]
    return [dealt[i] for i in rng.permutation(count)]


def make_requests(
    apps: Sequence[App], mix: Mix, rate: float, seconds: float, seed: int, vocab: int = 32_000
) -> list[Request]:
    """Requests of so many seconds, `rate` a second of them with all turns, by arrival."""
    rng = np.random.default_rng([seed, 2])
    shares = np.array([app.share for app in apps])
    system = {app.name: rng.integers(2, vocab, mix.system, np.int32) for app in apps}
    found: list[Request] = []
    now, session = 0.0, 0
    while (now := now + rng.exponential(mix.turns / rate)) < seconds:
        app = apps[rng.choice(len(apps), p=shares / shares.sum())]
        history, arrival = system[app.name], now
        session += 1
        for _ in range(rng.geometric(1 / mix.turns)):
            if arrival >= seconds:
                break
            said = rng.integers(2, vocab, _length(mix.prompt, mix.sigma, rng), np.int32)
            answer = rng.integers(2, vocab, _length(mix.answer, mix.sigma, rng), np.int32)
            tokens = np.concatenate([history, said])
            found.append(Request(0, app.name, session, arrival, tokens, answer))
            history = np.concatenate([tokens, answer])
            arrival += rng.exponential(mix.think_s) + 0.03 * len(answer)
    found.sort(key=lambda request: request.arrival)
    for number, request in enumerate(found):
        request.number = number
    return found


def _length(median: float, sigma: float, rng: np.random.Generator) -> int:
    return int(np.clip(median * np.exp(sigma * rng.standard_normal()), 4, 8 * median))
