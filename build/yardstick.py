"""What a stored model loses, held against what serving the checkpoint in bf16 loses anyway.

Weights that were taken apart lack the rounding of their merge, and other models' blocks stand for a model's
own: neither gives the checkpoint's logits exactly, and neither do engines in bf16. The yardstick is the
oracle's forward with what such engines hold in bf16 rounded to it (weights, what matrices take and give,
hidden states), against the same forward in f32, on the same text. It is the same on every machine.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from blockzoo.build.oracle import Oracle
from blockzoo.zoo.manifest import LossFigures, LossRecord
from blockzoo.zoo.tensors import bf16_to_f32, f32_to_bf16


class Bf16Oracle(Oracle):
    """An oracle that rounds to bf16 where engines of that precision do; sums and softmax stay in f32."""

    __slots__ = ()

    def _need(self, name: str) -> np.ndarray:
        weight = Oracle._need(self, name)
        return weight if self.dtype(name) == "bf16" else _bf16(weight)

    def _rms(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return _bf16(Oracle._rms(self, x, weight))

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return _bf16(Oracle._linear(self, _bf16(x), name))

    def _layer(self, layer: int, hidden: list[np.ndarray]) -> list[np.ndarray]:
        return [_bf16(states) for states in Oracle._layer(self, layer, hidden)]


def _bf16(values: np.ndarray) -> np.ndarray:
    return bf16_to_f32(f32_to_bf16(values))


@dataclass(frozen=True, slots=True, eq=False)
class Yardstick:
    """What bf16 loses of a model over a text, and where the model's choices are ties."""

    bf16: LossFigures
    ties: tuple[np.ndarray, ...]
    """bool [tokens] of every sequence: bf16 moves a logit there by as much as lies between the two best."""

    @classmethod
    def of(
        cls,
        oracle: Oracle,
        sequences: Sequence[Sequence[int]],
        exact: Sequence[np.ndarray] | None = None,
        on_layer: Callable[[int], None] = lambda layer: None,
        last: int | None = None,
    ) -> "Yardstick":
        """Of a model over token sequences, or over the `last` tokens of each; `exact`: its f32 logits there,
        [tokens, vocab], where they are known."""
        last = last or max(map(len, sequences))
        if exact is None:
            exact = oracle.logits(sequences, last)
        rounds = Bf16Oracle(oracle.config, oracle.weight, oracle.dtype)
        rounded = rounds.logits(sequences, last, on_layer)
        ties = []
        for ours, theirs in zip(rounded, exact, strict=True):
            second, best = np.partition(theirs, -2, axis=1)[:, -2:].T
            ties.append(best - second <= np.abs(ours - theirs).max(axis=1))
        return cls(_figures(rounded, exact), tuple(ties))

    def judge(self, seen: Sequence[np.ndarray], exact: Sequence[np.ndarray]) -> LossRecord:
        """What f32 logits [tokens, vocab] of every sequence lose against the exact ones."""
        clear = ~np.concatenate(self.ties)
        pairs = zip(seen, exact, strict=True)
        same = np.concatenate([a.argmax(axis=1) == b.argmax(axis=1) for a, b in pairs])
        return LossRecord(
            stored=_figures(seen, exact),
            bf16=self.bf16,
            clear_top1=float(same[clear].mean()) if clear.any() else 1.0,
            ties=1 - float(clear.mean()),
            num_tokens=len(same),
        )


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Of every row."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return np.asarray(shifted)


def _figures(seen: Sequence[np.ndarray], exact: Sequence[np.ndarray]) -> LossFigures:
    """NaN anywhere makes KL and error infinite, which fails every bound."""
    divergences, agreements, worst = [], [], 0.0
    for ours, theirs in zip(seen, exact, strict=True):
        p = log_softmax(theirs)
        divergences.append(np.einsum("ij,ij->i", np.exp(p), p - log_softmax(ours)))
        agreements.append(ours.argmax(axis=1) == theirs.argmax(axis=1))
        scale = np.maximum(np.abs(theirs).max(axis=1), 1e-30)
        error = float((np.abs(ours - theirs).max(axis=1) / scale).max())
        worst = max(worst, error) if np.isfinite(error) else np.inf
    kl = float(np.concatenate(divergences).mean(dtype=np.float64)) if np.isfinite(worst) else np.inf
    return LossFigures(max(kl, 0.0), worst, float(np.concatenate(agreements).mean()))
