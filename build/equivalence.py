"""Equivalent blocks (BlockLLM, arXiv 2404.18322): another model's block in the place of a model's own, where
that hardly changes what the model says.

What counts is the whole model: its distributions over the vocabulary, position by position over a probe text,
with the blocks replaced against those without. Blocks of other models in the same place are ranked by their
distance to the model's own, the nearest first, and taken over in groups: a group that keeps the assembled
chain above the threshold stays, one that does not is halved. So errors that add up are seen, and the number
of chains that are run grows with the number of candidates.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from blockzoo.build.recover import distance, nearest_block
from blockzoo.engines.base import EngineMaker
from blockzoo.engines.probe import ProbeChain
from blockzoo.zoo.blocks import PROJECTIONS, Adapter, Block, BlockTensor
from blockzoo.zoo.errors import ZooError
from blockzoo.zoo.manifest import EquivalenceRecord, ModelRecord
from blockzoo.zoo.model_config import ModelConfig
from blockzoo.zoo.store import Zoo

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


def substitute(
    name: str,
    zoo: Zoo,
    encoded: Sequence[Sequence[int]],
    maker: EngineMaker,
    threshold: float,
    probe_name: str,
    progress: Callable[[str, int, int], None],
) -> ModelRecord:
    """The record of a model of the zoo with other models' blocks in it; without, where none is alike.

    `encoded`: the probe text as token ids; `maker`: of f32 engines.
    """
    record = zoo.manifest.models[name]
    nearest, ranked = _candidates(name, zoo)
    if not ranked:
        return record
    own = [zoo.read_block(block_id) for block_id in record.chain]
    adapters = {i: zoo.read_adapter(key) for i, key in record.adapters.items()}
    sequences = probe_sequences(encoded, record.config.max_position_embeddings)
    probe = Probe(maker, record.config, adapters, sequences, own)
    scores: dict[tuple[int, ...], Likeness] = {}

    def passes(positions: Sequence[int]) -> bool:
        progress(f"comparing {name}", len(scores), 2 * len(ranked))
        chain = [zoo.read_block(nearest[i]) if i in positions else block for i, block in enumerate(own)]
        found = scores[tuple(positions)] = probe.likeness(chain)
        return found.reaches(threshold)

    taken = compose(ranked, passes)
    progress(f"comparing {name}", 1, 1)
    if not taken:
        return record
    likeness = scores[tuple(taken)]
    return replace(
        record,
        chain=tuple(nearest[i] if i in taken else block_id for i, block_id in enumerate(record.chain)),
        equivalence=EquivalenceRecord(
            own_blocks={i: record.chain[i] for i in sorted(taken)},
            threshold=threshold,
            cosine=likeness.cosine,
            kl=likeness.kl,
            top1=likeness.top1,
            num_tokens=probe.num_tokens,
            probe=probe_name,
        ),
    )


def _candidates(name: str, zoo: Zoo) -> tuple[dict[int, str], list[int]]:
    """Per position of a block that only this model has, the nearest other; the positions, nearest first."""
    record = zoo.manifest.models[name]
    others = {key for other, model in zoo.manifest.models.items() if other != name for key in model.chain}
    nearest: dict[int, str] = {}
    distances: dict[int, float] = {}

    def read(block_id: str) -> dict[str, BlockTensor]:
        return zoo.read_block(block_id).tensors

    for position, block_id in enumerate(record.chain):
        spec = zoo.manifest.blocks[block_id].spec
        if block_id in others or spec.kind not in PROJECTIONS or position in record.adapters:
            continue
        tensors = read(block_id)
        found = nearest_block(zoo.manifest, read, spec, tensors, position, name)
        if found is not None:
            nearest[position], distances[position] = found, distance(tensors, read(found))
    return nearest, sorted(distances, key=lambda position: distances[position])
