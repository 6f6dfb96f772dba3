"""How often drafts of cheaper chains come true, over the K and V of the model for which they guess.

What a chain guesses is seen as it would be served: it drafts greedily at many places of texts that the model
writes greedily, and its drafts are held against what the texts go on with.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from blockzoo.engines.arrays import Array
from blockzoo.engines.base import Embedding, EngineMaker
from blockzoo.engines.probe import ProbeBlock
from blockzoo.zoo.blocks import Adapter, Block
from blockzoo.zoo.manifest import ModelRecord

Chain = Mapping[int, str]
"""Position in the model's chain -> id of the block that runs there."""

NUM_DRAFTED = 4
"""Guesses that are told apart; those behind are taken to be like the last."""
_NUM_TEXTS, _NUM_TOKENS = 16, 128
_LEAD = 32  # of a text: its start, and sampled tokens that make texts of equal starts differ
_STRIDE = 6  # between drafts of a text


class DraftTrial:
    """A model along texts of its own, and how often drafts of other chains over its K and V come true.

    Args:
        read: id of a block -> the block.
        record: the model.
        adapters: of the model, by position.
        maker: of engines, as the model is served.
        starts: what its texts begin with, as token ids.
        on_token: told of the texts' tokens as they come, and of how many there will be.
        texts: that it is run along, another model's; None: it writes its own.
    """

    def __init__(
        self,
        read: Callable[[str], Block],
        record: ModelRecord,
        adapters: Mapping[int, Adapter],
        maker: EngineMaker,
        starts: Sequence[Sequence[int]],
        on_token: Callable[[int, int], None] = lambda done, total: None,
        texts: np.ndarray | None = None,
    ) -> None:
        self._read, self._record, self._adapters, self._maker = read, record, adapters, maker
        self._blocks: dict[tuple[int, str], ProbeBlock] = {}
        self._tables: dict[str, Embedding] = {}
        longest = _NUM_TOKENS if texts is None else texts.shape[1]
        self._length = min(longest, record.config.max_length)
        self._own = dict(enumerate(record.chain))
        self.texts = self._written(starts, on_token, texts)
        """[texts, tokens]"""
        self._kv = [tuple(p.copy() for p in pages) for pages in self._pages()]

    @property
    def places(self) -> list[int]:
        """Tokens of each text behind which chains draft; none stands in what a later one has written."""
        first = min(_LEAD, self._length // 2)
        return list(range(first, self._length - NUM_DRAFTED, _STRIDE))[::-1]

    @property
    def num_guesses(self) -> int:
        """First guesses of a trial."""
        return len(self.places) * len(self.texts)

    def acceptance(self, chain: Chain, num_drafted: int = NUM_DRAFTED) -> tuple[float, ...]:
        """How often the first guess comes true, and those behind it where those before do."""
        for pages, kept in zip(self._pages(), self._kv, strict=True):
            for array, own in zip(pages, kept, strict=True):
                array[...] = own
        tried, true = np.zeros(num_drafted, np.int64), np.zeros(num_drafted, np.int64)
        for place in self.places:
            tokens, alive = self.texts[:, place], np.ones(len(self.texts), bool)
            for ahead in range(num_drafted):
                tokens = self._run(chain, tokens, place + ahead).argmax(axis=1)
                tried[ahead] += alive.sum()
                alive &= tokens == self.texts[:, place + ahead + 1]
                true[ahead] += alive.sum()
        return tuple((true / np.maximum(tried, 1)).tolist())

    def _written(
        self,
        starts: Sequence[Sequence[int]],
        on_token: Callable[[int, int], None],
        given: np.ndarray | None,
    ) -> np.ndarray:
        rng, lead = np.random.default_rng(0), min(_LEAD, self._length // 2)
        begun = [list(starts[i % len(starts)])[:lead] for i in range(_NUM_TEXTS)]
        texts = np.zeros((_NUM_TEXTS, self._length), np.int64)
        texts[:, 0] = [start[0] for start in begun]
        for position in range(1, self._length):
            on_token(position, self._length)
            before = texts if given is None else given
            logits = self._run(self._own, before[:, position - 1], position - 1)
            if position < lead:
                logits = logits + rng.gumbel(size=logits.shape).astype(np.float32)
            texts[:, position] = logits.argmax(axis=1)
            for text, start in enumerate(begun):
                if position < len(start):
                    texts[text, position] = start[position]
        return texts if given is None else given

    def _run(self, chain: Chain, tokens: np.ndarray, past: int) -> np.ndarray:
        """Logits, float32 [texts, vocab], behind one more token of each text."""
        hidden = self._embedded(chain[0], tokens)
        for position in sorted(chain)[1:]:
            hidden = self._block(position, chain[position]).forward(hidden, past)
        return self._maker.arrays.to_host(hidden)

    def _embedded(self, key: str, tokens: np.ndarray) -> Array:
        if key not in self._tables:
            self._tables[key] = self._maker.embedding(self._read(key))
        arrays = self._maker.arrays
        out = arrays.zeros((len(tokens), self._record.config.hidden_size), "activation")
        self._tables[key].lookup(arrays.mirror(tokens.astype(np.int32)), out)
        return out

    def _block(self, position: int, key: str) -> ProbeBlock:
        if (position, key) not in self._blocks:
            own = self._own[position]
            block = self._read(key)
            self._blocks[position, key] = ProbeBlock(
                self._maker,
                block,
                self._record.config,
                self._length,
                self._adapters.get(position),
                _NUM_TEXTS,
                None if key == own else self._block(position, own),
            )
            block.drop_pages()
        return self._blocks[position, key]

    def _pages(self) -> list[tuple[Array, Array]]:
        found = (self._block(position, key).pages for position, key in self._own.items() if position)
        return [pages for pages in found if pages is not None]
