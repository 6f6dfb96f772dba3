"""Trials of a model with other blocks in its chain: which of many changes to keep, for a bounded number of
forwards.

What counts is the whole model: its logits, position by position over a text, with blocks replaced against
those without. Errors of blocks add up, about as their squares do. So candidates are ranked by how far their
output strays from the block's own on the model's own hidden states, and kept in groups, the nearest first:
all of them; where that is too much, as many as the trial's loss says that there is room for.

Chains are run block by block, with one block in memory at a time. Hidden states below a trial's first
replaced block are those of the chain that was kept last, and are not run again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from blockzoo.engines.base import EngineMaker
from blockzoo.engines.probe import ProbeBlock
from blockzoo.zoo.blocks import Adapter, Block
from blockzoo.zoo.model_config import ModelConfig

MAX_FORWARDS = 12
"""What a search may run, in forwards of the whole model; the first, which ranks, counts up to two more."""
_MAX_STATE_BYTES = 1 << 29  # of hidden states kept of one chain
_PATIENCE = 3  # single candidates in a row that are too much: those ranked behind them are as well
_ENOUGH = 0.97  # of the loss that is borne: the rest is not worth a trial


_Chain = tuple[tuple[str, ...], dict[int, list[np.ndarray]]]
"""Block ids, and the hidden states [tokens, hidden] of every sequence after some of them."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """Blocks that may stand for the model's own: one, or the tied embedding and head."""

    blocks: Mapping[int, str]
    """Position in the chain -> block id."""


class Probe:
    """A model over a text, to hold chains with other blocks against.

    Args:
        chain: ids of the model's own blocks.
        config: of the model.
        read: position and id of an own block or a candidate's -> the block, and an adapter on it.
        maker: of f32 engines.
        sequences: token ids.
        candidates: whose outputs are compared with those of the model's own blocks.
        on_block: is told of every block that was run.
    """

    def __init__(
        self,
        chain: Sequence[str],
        config: ModelConfig,
        read: Callable[[int, str], tuple[Block, Adapter | None]],
        maker: EngineMaker,
        sequences: Sequence[Sequence[int]],
        candidates: Sequence[Candidate] = (),
        on_block: Callable[[], None] = lambda: None,
    ) -> None:
        self._chain, self._config, self._read, self._maker = tuple(chain), config, read, maker
        self._sequences, self._on_block = sequences, on_block
        self._others = {at: key for candidate in candidates for at, key in candidate.blocks.items()}
        self._strayed: dict[int, float] = {}
        state_bytes = 4 * self.num_tokens * config.hidden_size
        self._stride = -(-len(chain) * state_bytes // _MAX_STATE_BYTES)
        self._kept: _Chain = ((), {})
        self._last: _Chain = self._kept
        self.logits = self._run(self._chain, measure=True)
        """float32 [tokens, vocab] of every sequence, of the model's own blocks."""
        self.keep()

    @property
    def num_tokens(self) -> int:
        """Positions compared."""
        return sum(map(len, self._sequences))

    def strays(self, candidate: Candidate) -> float:
        """Squared distance of a candidate's outputs to those of the blocks it would replace, relative to
        their size."""
        return sum(self._strayed[at] for at in candidate.blocks)

    def cost(self, candidates: Sequence[Candidate]) -> int:
        """Blocks that a trial of them would run."""
        chain = self._with(candidates)
        return len(chain) - 1 - self._known(chain)

    def trial(self, candidates: Sequence[Candidate]) -> list[np.ndarray]:
        """Logits, float32 [tokens, vocab] of every sequence, of the chain with the candidates in it."""
        return self._run(self._with(candidates))

    def keep(self) -> None:
        """The trial that was run last is what the next ones will be like."""
        self._kept = self._last

    def _with(self, candidates: Sequence[Candidate]) -> tuple[str, ...]:
        taken = {at: key for candidate in candidates for at, key in candidate.blocks.items()}
        return tuple(taken.get(at, key) for at, key in enumerate(self._chain))

    def _known(self, chain: Sequence[str]) -> int:
        """The last position up to which hidden states of a chain are known, -1 where none are."""
        kept, states = self._kept
        equal = next((i for i, (a, b) in enumerate(zip(chain, kept, strict=False)) if a != b), len(kept))
        return max((at for at in states if at < equal), default=-1)

    def _run(self, chain: tuple[str, ...], measure: bool = False) -> list[np.ndarray]:
        """Logits of every sequence; `measure`: note how far the candidates stray too."""
        known, last = self._known(chain), len(chain) - 1
        states = {at: rows for at, rows in self._kept[1].items() if at <= known}
        hidden = states.get(known)
        for position in range(known + 1, last + 1):
            found = self._outputs(position, chain[position], hidden)
            if measure and position in self._others:
                theirs = self._outputs(position, self._others[position], hidden)
                self._strayed[position] = _strayed(theirs, found)
            if position < last and position % self._stride == 0:
                states[position] = found
            hidden = found
        self._last = chain, states
        assert hidden is not None, "a chain has blocks"
        return hidden

    def _outputs(self, position: int, block_id: str, hidden: list[np.ndarray] | None) -> list[np.ndarray]:
        """What a block makes of the sequences' hidden states [tokens, hidden]; the embedding, of tokens."""
        block, adapter = self._read(position, block_id)
        if hidden is None:
            found = self._embedded(block)
        else:
            longest = max(map(len, self._sequences))
            runner = ProbeBlock(self._maker, block, self._config, longest, adapter)
            found = [runner.forward(rows) for rows in hidden]
        block.drop_pages()
        self._on_block()
        return found

    def _embedded(self, block: Block) -> list[np.ndarray]:
        table, arrays = self._maker.embedding(block), self._maker.arrays
        found = []
        for tokens in self._sequences:
            out = arrays.zeros((len(tokens), block.spec.hidden_size), "activation")
            table.lookup(arrays.mirror(np.asarray(tokens, np.int32)), out)
            found.append(out)
        return found


def _strayed(theirs: Sequence[np.ndarray], ours: Sequence[np.ndarray]) -> float:
    """Squared distance of outputs [tokens, features], relative to their size."""
    apart = sum(float(np.square(a - b).sum()) for a, b in zip(theirs, ours, strict=True))
    return apart / max(sum(float(np.square(rows).sum()) for rows in ours), 1e-30)


def compose(
    candidates: Sequence[Candidate],
    strays: Callable[[Candidate], float],
    judge: Callable[[Sequence[Candidate]], float],
    affordable: Callable[[Sequence[Candidate]], bool] = lambda candidates: True,
) -> list[Candidate]:
    """The candidates to keep.

    Args:
        strays: what a candidate adds to a loss, on any scale.
        judge: loss of a set of them as a whole, relative to what is borne: up to 1 passes.
        affordable: whether a set may still be judged; the search ends where not.
    """
    left = sorted(candidates, key=strays)
    taken: list[Candidate] = []
    loss, size, failed = 0.0, len(left), 0
    while left and failed < _PATIENCE and loss < _ENOUGH:
        group = left[:size]
        if not affordable([*taken, *group]):
            break
        found = judge([*taken, *group])
        rate = (found - loss) / max(sum(map(strays, group)), 1e-30)
        if found <= 1:
            taken, left, loss, failed, most = [*taken, *group], left[size:], found, 0, 2 * size
        elif size == 1:
            left, failed, most = left[1:], failed + 1, 1
        else:
            most = size // 2
        room = np.cumsum([strays(candidate) for candidate in left[:most]]) * rate <= 1 - loss
        size = max(1, int(room.sum()))
    return taken
