"""Equivalent blocks (BlockLLM, arXiv 2404.18322): another model's block in the place of a model's own, where
that hardly changes what the model says.

What counts is the whole model: its distributions over the vocabulary, position by position over a probe text,
with the blocks replaced against those without. For each block the one of another model that is nearest in its
weights is a candidate, unless the two are unrelated; candidates are ranked by how far their output strays
from the block's own on the model's own hidden states, and taken over in groups, the nearest first: a group
that keeps the assembled chain above the threshold stays, one that does not is halved. So errors that add up
are seen, and the number of chains that are run grows with the number of candidates.

Chains are run block by block, with one block in memory at a time.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from blockzoo.build.recover import NEAR, distance, nearest_block
from blockzoo.engines.base import EngineMaker
from blockzoo.engines.probe import ProbeBlock
from blockzoo.zoo.blocks import PROJECTIONS, Block
from blockzoo.zoo.errors import ZooError
from blockzoo.zoo.manifest import EquivalenceRecord, ModelRecord
from blockzoo.zoo.store import Zoo

MAX_TOKENS = 2048
MIN_TOKENS = 64
"""Of a probe file: fewer say little about a model."""
_SEQUENCE = 256
_MAX_LOGITS = 1 << 26  # values that the model's own distributions may take


@dataclass(frozen=True, slots=True)
class Likeness:
    """How near one model's distributions are to another's, over the positions of a probe text."""

    cosine: float
    """Mean cosine of the vocabulary probabilities."""
    kl: float
    """Mean Kullback-Leibler divergence, in nats."""
    top1: float
    """Share of positions with the same likeliest token."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """Blocks of another model that may stand for the model's own: one, or the tied embedding and head."""

    blocks: Mapping[int, str]
    """Position in the chain -> block id."""


class Probe:
    """A model of a zoo over a text, to hold chains with other blocks against.

    Args:
        zoo: that holds the blocks.
        record: the model with its own blocks.
        maker: of f32 engines.
        sequences: token ids; see `probe_sequences`.
        candidates: whose outputs are compared with those of the model's own blocks.
    """

    def __init__(
        self,
        zoo: Zoo,
        record: ModelRecord,
        maker: EngineMaker,
        sequences: Sequence[Sequence[int]],
        candidates: Sequence[Candidate] = (),
    ) -> None:
        self._zoo, self._record, self._maker, self._sequences = zoo, record, maker, sequences
        self._others = {at: key for candidate in candidates for at, key in candidate.blocks.items()}
        self._strayed: dict[int, float] = {}
        self._own = self._log_probabilities(record.chain, measure=True)

    @property
    def num_tokens(self) -> int:
        """Positions compared."""
        return sum(map(len, self._sequences))

    def strays(self, candidate: Candidate) -> float:
        """Relative distance of a candidate's output to that of the blocks it would replace."""
        return sum(self._strayed[at] for at in candidate.blocks)

    def likeness(self, candidates: Sequence[Candidate]) -> Likeness:
        """Of the model with the candidates in it to the model without."""
        taken = {at: key for candidate in candidates for at, key in candidate.blocks.items()}
        chain = [taken.get(at, key) for at, key in enumerate(self._record.chain)]
        cosines, divergences, agreements = [], [], []
        for ours, theirs in zip(self._own, self._log_probabilities(chain), strict=True):
            p, q = np.exp(ours), np.exp(theirs)
            norms = np.linalg.norm(p, axis=1) * np.linalg.norm(q, axis=1)
            cosines.append(np.einsum("ij,ij->i", p, q) / norms)
            divergences.append(np.einsum("ij,ij->i", p, ours - theirs))
            agreements.append(ours.argmax(axis=1) == theirs.argmax(axis=1))
        means = [float(np.concatenate(parts).mean()) for parts in (cosines, divergences, agreements)]
        return Likeness(*means)

    def _log_probabilities(self, chain: Sequence[str], measure: bool = False) -> list[np.ndarray]:
        """Of every sequence, float32 [tokens, vocab]; `measure`: note how far the candidates stray too."""
        hidden: list[np.ndarray] | None = None
        for position, block_id in enumerate(chain):
            found = self._outputs(position, block_id, hidden)
            if measure and position in self._others:
                theirs = self._outputs(position, self._others[position], hidden)
                before = hidden if hidden is not None and position < len(chain) - 1 else None
                self._strayed[position] = _relative_distance(theirs, found, before)
            hidden = found
        assert hidden is not None, "a chain has blocks"
        for logits in hidden:
            logits -= logits.max(axis=1, keepdims=True)
            logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return hidden

    def _outputs(self, position: int, block_id: str, hidden: list[np.ndarray] | None) -> list[np.ndarray]:
        """What a block makes of the sequences' hidden states [tokens, hidden]; the embedding, of tokens."""
        block = self._zoo.read_block(block_id)
        if hidden is None:
            found = self._embedded(block)
        else:
            key = self._record.adapters.get(position)
            adapter = self._zoo.read_adapter(key) if key is not None else None
            longest = max(map(len, self._sequences))
            runner = ProbeBlock(self._maker, block, self._record.config, longest, adapter)
            found = [runner.forward(rows) for rows in hidden]
        block.drop_pages()
        return found

    def _embedded(self, block: Block) -> list[np.ndarray]:
        table, arrays = self._maker.embedding(block), self._maker.arrays
        found = []
        for tokens in self._sequences:
            out = arrays.zeros((len(tokens), block.spec.hidden_size), "activation")
            table.lookup(arrays.mirror(np.asarray(tokens, np.int32)), out)
            found.append(out)
        return found


def _relative_distance(
    theirs: Sequence[np.ndarray], ours: Sequence[np.ndarray], before: Sequence[np.ndarray] | None
) -> float:
    """Of two outputs, relative to what the block adds to the hidden states that it is given."""
    added = ours if before is None else [out - x for out, x in zip(ours, before, strict=True)]
    apart = sum(float(np.square(a - b).sum()) for a, b in zip(theirs, ours, strict=True))
    return float(np.sqrt(apart / max(sum(float(np.square(rows).sum()) for rows in added), 1e-30)))


def compose(
    candidates: Sequence[Candidate], passes: Callable[[Sequence[Candidate]], bool]
) -> list[Candidate]:
    """The candidates to take, the best ranked first; `passes` judges a set of them as a whole."""
    taken: list[Candidate] = []

    def add(group: Sequence[Candidate]) -> None:
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


def probe_sequences(encoded: Sequence[Sequence[int]], max_positions: int, vocab_size: int) -> list[list[int]]:
    """Token ids of texts, cut to what a model takes, MAX_TOKENS in all (fewer of a large vocabulary)."""
    length, left = min(_SEQUENCE, max_positions), min(MAX_TOKENS, max(MIN_TOKENS, _MAX_LOGITS // vocab_size))
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
    besides: Collection[str] = (),
) -> ModelRecord:
    """The record of a model of the zoo with other models' blocks in it; without, where none is alike.

    Args:
        encoded: the probe text as token ids.
        maker: of f32 engines.
        threshold: least mean cosine of the vocabulary probabilities.
        besides: models whose blocks are not taken.
    """
    record = zoo.manifest.models[name]
    candidates = _candidates(name, zoo, {name, *besides})
    if not candidates:
        return record
    config = record.config
    sequences = probe_sequences(encoded, config.max_length, config.vocab_size)
    progress(f"comparing {name}", 0, 2 * len(candidates))
    probe = Probe(zoo, record, maker, sequences, candidates)
    scores: dict[tuple[int, ...], Likeness] = {}

    def passes(chosen: Sequence[Candidate]) -> bool:
        progress(f"comparing {name}", 1 + len(scores), 1 + 2 * len(candidates))
        found = scores[_positions(chosen)] = probe.likeness(chosen)
        return found.cosine >= threshold

    taken = compose(sorted(candidates, key=probe.strays), passes)
    progress(f"comparing {name}", 1, 1)
    if not taken:
        return record
    likeness = scores[_positions(taken)]
    replaced = {at: key for candidate in taken for at, key in candidate.blocks.items()}
    return replace(
        record,
        chain=tuple(replaced.get(at, block_id) for at, block_id in enumerate(record.chain)),
        equivalence=EquivalenceRecord(
            own_blocks={at: record.chain[at] for at in sorted(replaced)},
            threshold=threshold,
            cosine=likeness.cosine,
            kl=likeness.kl,
            top1=likeness.top1,
            num_tokens=probe.num_tokens,
            probe=probe_name,
        ),
    )


def _positions(candidates: Sequence[Candidate]) -> tuple[int, ...]:
    return tuple(sorted(at for candidate in candidates for at in candidate.blocks))


def _candidates(name: str, zoo: Zoo, besides: Collection[str]) -> list[Candidate]:
    """For each block that only this model has, the nearest of another model, unless that is unrelated."""
    record, blocks = zoo.manifest.models[name], zoo.manifest.blocks
    models = zoo.manifest.models.items()
    shared = {key for other, model in models if other != name for key in model.chain}
    found: list[Candidate] = []
    for position, block_id in enumerate(record.chain):
        spec = blocks[block_id].spec
        if spec.kind in PROJECTIONS and block_id not in shared and position not in record.adapters:
            tensors = zoo.read_block(block_id).tensors
            nearest = nearest_block(
                zoo.manifest, lambda key: zoo.read_block(key).tensors, spec, tensors, position, besides
            )
            if nearest is not None and distance(tensors, zoo.read_block(nearest).tensors) <= NEAR:
                found.append(Candidate({position: nearest}))
    # token ids must mean the same
    alike = [m for other, m in models if other not in besides and m.tokenizer == record.tokenizer]
    return found + _ends(record, zoo, alike, shared)


def _ends(
    record: ModelRecord, zoo: Zoo, others: Sequence[ModelRecord], shared: Collection[str]
) -> list[Candidate]:
    """Candidates for the embedding and for the head: both together where they are tied."""
    blocks, last = zoo.manifest.blocks, len(record.chain) - 1
    tied = blocks[record.chain[last]].tied_to is not None
    found = []
    for places in [(0, last)] if tied else [(0,), (last,)]:
        own = [record.chain[at] for at in places]
        if all(key in shared for key in own):
            continue
        offered = {tuple(m.chain[at if at == 0 else -1] for at in places) for m in others}
        fit = sorted(o for o in offered if [blocks[k].spec for k in o] == [blocks[k].spec for k in own])

        def apart(keys: Sequence[str], own: Sequence[str] = own) -> float:
            pairs = zip(keys, own, strict=True)
            return max(distance(zoo.read_block(b).tensors, zoo.read_block(a).tensors) for a, b in pairs)

        nearest = min(fit, key=apart, default=None)
        if nearest is not None and apart(nearest) <= NEAR:
            changes = zip(places, nearest, own, strict=True)
            found.append(Candidate({at: key for at, key, old in changes if key != old}))
    return found
