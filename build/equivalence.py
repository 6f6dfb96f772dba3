"""Equivalent blocks (BlockLLM, arXiv 2404.18322): another model's block in the place of a model's own, where
that hardly changes what the model says.

What counts is the whole model: its distributions over the vocabulary, position by position over a probe text,
with the blocks replaced against those without. Blocks of other models in the same place are ranked by their
distance to the model's own, the nearest first, and taken over in groups: a group that keeps the assembled
chain above the threshold stays, one that does not is halved. So errors that add up are seen, and the number
of chains that are run grows with the number of candidates.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from blockzoo.engines.base import EngineMaker
from blockzoo.engines.probe import ProbeChain
from blockzoo.zoo.blocks import Adapter, Block
from blockzoo.zoo.errors import ZooError
from blockzoo.zoo.model_config import ModelConfig

MAX_TOKENS = 2048
_SEQUENCE = 256


@dataclass(frozen=True, slots=True)
class Likeness:
    """How near one model's distributions are to another's, over the positions of a probe text."""

    cosine: float
    """Mean cosine of the vocabulary probabilities."""
    kl: float
    """Mean Kullback-Leibler divergence, in nats."""
    top1: float
    """Share of positions with the same likeliest token."""

    def reaches(self, threshold: float) -> bool:
        """Whether the distributions, and the likeliest tokens, agree that far."""
        return self.cosine >= threshold and self.top1 >= threshold


class Probe:
    """A model's own distributions over a text, to hold other chains against.

    Args:
        maker: of f32 engines.
        config, adapters: of the model.
        sequences: token ids; see `probe_sequences`.
        blocks: the model's own chain.
    """

    def __init__(
        self,
        maker: EngineMaker,
        config: ModelConfig,
        adapters: Mapping[int, Adapter],
        sequences: Sequence[Sequence[int]],
        blocks: Sequence[Block],
    ) -> None:
        self._maker, self._config, self._adapters, self._sequences = maker, config, adapters, sequences
        self._own = self._log_probabilities(blocks)

    @property
    def num_tokens(self) -> int:
        """Positions compared."""
        return sum(map(len, self._sequences))

    def likeness(self, blocks: Sequence[Block]) -> Likeness:
        """Run another chain over the text."""
        cosines, divergences, agreements = [], [], []
        for ours, theirs in zip(self._own, self._log_probabilities(blocks), strict=True):
            p, q = np.exp(ours), np.exp(theirs)
            norms = np.linalg.norm(p, axis=1) * np.linalg.norm(q, axis=1)
            cosines.append(np.einsum("ij,ij->i", p, q) / norms)
            divergences.append(np.einsum("ij,ij->i", p, ours - theirs))
            agreements.append(ours.argmax(axis=1) == theirs.argmax(axis=1))
        means = [float(np.concatenate(parts).mean()) for parts in (cosines, divergences, agreements)]
        return Likeness(*means)

    def _log_probabilities(self, blocks: Sequence[Block]) -> list[np.ndarray]:
        """Of every sequence, float32 [tokens, vocab]."""
        longest = max(map(len, self._sequences))
        chain = ProbeChain(self._maker, blocks, self._config, longest, self._adapters)
        found = []
        for tokens in self._sequences:
            logits = chain.forward(tokens, 0).copy()
            logits -= logits.max(axis=1, keepdims=True)
            found.append(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
        return found


def compose(candidates: Sequence[int], passes: Callable[[Sequence[int]], bool]) -> list[int]:
    """The candidates to take, the best ranked first; `passes` judges a set of them as a whole."""
    taken: list[int] = []

    def add(group: Sequence[int]) -> None:
        if passes([*taken, *group]):
            taken.extend(group)
        elif len(group) > 1:
            half = (len(group) + 1) // 2
            add(group[:half])
            add(group[half:])

    if candidates:
        add(candidates)
    return taken


def probe_text(path: str | Path | None, built_in: Sequence[str]) -> list[str]:
    """The paragraphs of a UTF-8 file, or the built-in texts. Raises ZooError for an unfit file."""
    if path is None:
        return list(built_in)
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ZooError(f"--probe {path}: not readable as UTF-8 text ({error})") from error
    paragraphs = [part for part in text.split("\n\n") if part.strip()]
    if not paragraphs:
        raise ZooError(f"--probe {path}: the file holds no text; give text that the models are used for")
    return paragraphs


def probe_sequences(encoded: Sequence[Sequence[int]], max_positions: int) -> list[list[int]]:
    """Token ids of texts, cut to what a model takes, up to MAX_TOKENS in all."""
    length, left = min(_SEQUENCE, max_positions), MAX_TOKENS
    sequences = []
    for tokens in encoded:
        cut = list(tokens[: min(length, left)])
        if cut:
            sequences.append(cut)
            left -= len(cut)
    return sequences
