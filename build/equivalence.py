"""Equivalent blocks (BlockLLM, arXiv 2404.18322): another model's block in the place of a model's own, where
that hardly changes what the model says.

For each block the one of another model that is nearest in its weights is a candidate, unless the two are
unrelated. Which of them are taken is found by trials of the whole chain (`build.trials`): a set is taken that
keeps the vocabulary probabilities above the threshold, or that loses no more than bf16 alone does.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from blockzoo.build.oracle import Oracle
from blockzoo.build.recover import NEAR, distance, nearest_block
from blockzoo.build.trials import MAX_FORWARDS, Candidate, Probe, compose
from blockzoo.build.yardstick import Yardstick, log_softmax
from blockzoo.engines.base import EngineMaker
from blockzoo.zoo.blocks import PROJECTIONS, Adapter, Block
from blockzoo.zoo.errors import ZooError
from blockzoo.zoo.manifest import EquivalenceRecord, LossRecord, ModelRecord
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
    loss: LossRecord


def likeness(seen: Sequence[np.ndarray], own: Sequence[np.ndarray], yardstick: Yardstick) -> Likeness:
    """Of f32 logits [tokens, vocab] of every sequence to the model's own."""
    cosines = []
    for theirs, ours in zip(seen, own, strict=True):
        p, q = np.exp(log_softmax(ours)), np.exp(log_softmax(theirs))
        norms = np.linalg.norm(p, axis=1) * np.linalg.norm(q, axis=1)
        cosines.append(np.einsum("ij,ij->i", p, q) / norms)
    return Likeness(float(np.concatenate(cosines).mean()), yardstick.judge(seen, own))


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


@dataclass(frozen=True, slots=True)
class Search:
    """What a search for equivalent blocks came to."""

    record: ModelRecord
    """Of the model with other models' blocks in it; as it was, where none is alike."""
    num_candidates: int
    num_trials: int
    num_forwards: float
    """Blocks that were run, in forwards of the whole model."""
    cut_short: bool
    """Whether it ended at its bound with candidates untried."""


def substitute(
    name: str,
    zoo: Zoo,
    encoded: Sequence[Sequence[int]],
    maker: EngineMaker,
    oracle: Oracle,
    threshold: float,
    probe_name: str,
    progress: Callable[[str, int, int, str], None],
    besides: Collection[str] = (),
) -> Search:
    """Look for blocks of other models that can stand for those of a model of the zoo.

    Args:
        encoded: the probe text as token ids.
        maker: of f32 engines.
        oracle: of the model.
        threshold: least mean cosine of the vocabulary probabilities.
        besides: models whose blocks are not taken.
    """
    record = zoo.manifest.models[name]
    candidates = candidates_of(name, zoo, {name, *besides})
    if not candidates:
        return Search(record, 0, 0, 0.0, False)
    config, length = record.config, len(record.chain)
    sequences = probe_sequences(encoded, config.max_length, config.vocab_size)
    # the first forward runs the candidates' blocks too
    most = length * MAX_FORWARDS + sum(len(candidate.blocks) for candidate in candidates)
    scores: dict[tuple[int, ...], Likeness] = {}
    run, cut_short = 0, False

    def on_block() -> None:
        nonlocal run
        run += 1
        done = f"{len(scores)} trials of {len(candidates)} candidates; the bound is {MAX_FORWARDS} forwards"
        progress(f"comparing {name}", run - 1, most, done)

    def read(position: int, block_id: str) -> tuple[Block, Adapter | None]:
        key = record.adapters.get(position)
        return zoo.read_block(block_id), zoo.read_adapter(key) if key is not None else None

    probe = Probe(record.chain, config, read, maker, sequences, candidates, on_block)
    yardstick = Yardstick.of(oracle, sequences)

    def judge(chosen: Sequence[Candidate]) -> float:
        found = likeness(probe.trial(chosen), probe.logits, yardstick)
        scores[_positions(chosen)] = found
        lost = min((1 - found.cosine) / max(1 - threshold, 1e-9), found.loss.excess)
        if lost <= 1:
            probe.keep()
        return lost

    def affordable(chosen: Sequence[Candidate]) -> bool:
        nonlocal cut_short
        cut_short = run + probe.cost(chosen) > most
        return not cut_short

    taken = compose(candidates, probe.strays, judge, affordable)
    progress(f"comparing {name}", 1, 1, "")
    search = Search(record, len(candidates), len(scores), run / length, cut_short)
    if not taken:
        return search
    found = scores[_positions(taken)]
    replaced = {at: key for candidate in taken for at, key in candidate.blocks.items()}
    equivalence = EquivalenceRecord(
        own_blocks={at: record.chain[at] for at in sorted(replaced)},
        threshold=threshold,
        cosine=found.cosine,
        kl=found.loss.stored.kl,
        top1=found.loss.stored.top1,
        num_tokens=probe.num_tokens,
        probe=probe_name,
        loss=found.loss,
    )
    chain = tuple(replaced.get(at, block_id) for at, block_id in enumerate(record.chain))
    return replace(search, record=replace(record, chain=chain, equivalence=equivalence))


def _positions(candidates: Sequence[Candidate]) -> tuple[int, ...]:
    return tuple(sorted(at for candidate in candidates for at in candidate.blocks))


def candidates_of(name: str, zoo: Zoo, besides: Collection[str]) -> list[Candidate]:
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
