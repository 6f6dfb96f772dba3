"""What speculation is worth, whatever steps cost: quotes, chats, and answers that are both in turn."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.runtime.serve.replayed import Asked, Replay, Seconds

COSTS: dict[str, tuple[Seconds, float]] = {  # and of another shape
    "tiles": (lambda seqs, rows: 0.02 + 0.008 * -(-rows // 16), 0.012),  # AMX
    "attention": (lambda seqs, rows: 0.028 + (0.0006 if seqs > 1 else 0.0001) * rows, 0.02),
    "rising": (lambda seqs, rows: 0.012 + 0.00075 * rows, 0.01),
    "linear": (lambda seqs, rows: 0.004 + 0.008 * rows, 0.008),
    "flat": (lambda seqs, rows: 0.02 * max(1.0, rows / 32), 0.01),
}
LENGTH = 110
Make = Callable[[np.random.Generator], Asked]


def quote(rng: np.random.Generator, share: float = 0.9) -> Asked:
    """So many of the answer's tokens stand in the prompt, in its order."""
    prompt = rng.integers(0, 3000, 160).astype(np.int32)
    answer = prompt[:LENGTH].copy()
    wrong = rng.random(LENGTH) > share
    answer[wrong] = rng.integers(3000, 4000, int(wrong.sum()))
    return prompt, answer


def chat(rng: np.random.Generator) -> Asked:
    """A text in which each token is followed by one of five: what is looked up is right in a fifth."""
    follows = rng.integers(0, 60, (60, 5))
    tokens = [0]
    for _ in range(100 + LENGTH):
        tokens.append(int(follows[tokens[-1], rng.integers(5)]))
    text = np.array(tokens, np.int32)
    return text[:100], text[100:]


def switching(rng: np.random.Generator) -> Asked:
    """A chat in which a passage is quoted."""
    (passage, quoted), (prompt, answer) = quote(rng), chat(rng)
    return np.append(passage, prompt + 5000), np.concatenate(
        [answer[:50] + 5000, quoted[:50], answer[50:] + 5000]
    )


def speedup(monkeypatch: pytest.MonkeyPatch, cost: str, make: Make, count: int) -> float:
    """Of some rounds of an engine that is new."""
    seconds, new_shape = COSTS[cost]
    replay, rng = Replay(monkeypatch, seconds, new_shape), np.random.default_rng(1)
    return float(np.mean([replay.speedup([make(rng) for _ in range(count)]) for _ in range(3)]))


@pytest.mark.parametrize(
    ("cost", "of_one", "of_eight"),
    [
        ("tiles", 4.0, 2.0),
        ("attention", 4.0, 1.8),
        ("rising", 2.3, 1.4),
        ("linear", 0.97, 0.97),
        ("flat", 4.0, 2.2),
    ],
)
def test_quotes_gain_and_nothing_is_slowed_down(
    monkeypatch: pytest.MonkeyPatch, cost: str, of_one: float, of_eight: float
) -> None:
    assert speedup(monkeypatch, cost, quote, 1) > of_one
    assert speedup(monkeypatch, cost, quote, 8) > of_eight
    for make in (chat, switching):
        for count in (1, 8):
            assert speedup(monkeypatch, cost, make, count) > 0.97, (make, count)
