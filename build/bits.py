"""Bits for each block of models that share them, so that each model stays near to itself: the cheapest first.

What a block in 4 bits costs is measured in the whole chain: the divergence of the model's distributions with
that block alone in 4 bits, over a part of the probe text. Blocks then go to 4 bits in the order of divergence
for the bytes that are saved, as many as the bound allows with all of them together, which is found by
halving (which models choose together: `common_bits`).

Hidden states below the first block that is replaced do not change, so chains are run from there.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from blockzoo.build.likeness import Strayed, Text, log_probabilities, strayed
from blockzoo.engines.arrays import Array
from blockzoo.engines.base import EngineMaker
from blockzoo.engines.probe import ProbeBlock
from blockzoo.zoo.blocks import Adapter, Block
from blockzoo.zoo.manifest import ModelRecord

Replaced = Mapping[int, str]
"""Position in the chain -> block id."""


class Trial:
    """A model over a text, and how far it strays with other blocks in it.

    Args:
        read: id of a block -> the block.
        record: the model with its own blocks.
        adapters: of the model, by position.
        maker: of f32 engines.
        texts: along which it is compared.
    """

    def __init__(
        self,
        read: Callable[[str], Block],
        record: ModelRecord,
        adapters: Mapping[int, Adapter],
        maker: EngineMaker,
        texts: Sequence[Text],
    ) -> None:
        self._read, self._record, self._adapters = read, record, adapters
        self._maker, self._texts = maker, texts
        self._blocks: dict[tuple[int, str], ProbeBlock] = {}
        self._hidden: list[list[Array]] = [[]]  # by position, what enters the block there
        self._own: list[np.ndarray] = []
        self._own = self._run({}, keep=True)

    def strays(self, replaced: Replaced, num_texts: int | None = None) -> Strayed:
        """How far from the model's own distributions; over some texts, or all."""
        if not replaced:
            return Strayed(0.0, 1.0)
        return strayed(self._own[:num_texts], self._run(replaced, num_texts))

    def _run(self, replaced: Replaced, num_texts: int | None = None, keep: bool = False) -> list[np.ndarray]:
        first = min(replaced, default=0)
        states = self._hidden[first][:num_texts] if first < len(self._hidden) else []
        for position in range(first, len(self._record.chain)):
            key = replaced.get(position, self._record.chain[position])
            if position == 0:
                states = self._embedded(key)[:num_texts]
            else:
                if position == len(self._record.chain) - 1:  # the head computes what counts alone
                    states = [rows[text.start :] for rows, text in zip(states, self._texts, strict=False)]
                states = self._outputs(position, key, states)
            if keep and position < len(self._record.chain) - 1:
                self._hidden.append(states)
        return [log_probabilities(logits) for logits in states]

    def _outputs(self, position: int, key: str, states: Sequence[Array]) -> list[Array]:
        if (position, key) not in self._blocks:
            longest = max(len(text.tokens) for text in self._texts)
            block, adapter = self._read(key), self._adapters.get(position)
            self._blocks[position, key] = ProbeBlock(
                self._maker, block, self._record.config, longest, adapter
            )
        return [self._blocks[position, key].forward(rows) for rows in states]

    def _embedded(self, key: str) -> list[Array]:
        block, arrays = self._read(key), self._maker.arrays
        table, found = self._maker.embedding(block), []
        for tokens, _ in self._texts:
            out = arrays.zeros((len(tokens), block.spec.hidden_size), "activation")
            table.lookup(arrays.mirror(np.asarray(tokens, np.int32)), out)
            found.append(out)
        return found


Step = TypeVar("Step", bound=Hashable)


def affordable(
    shares: Sequence[Mapping[Step, float]],
    saved: Mapping[Step, int],
    bears: Sequence[Callable[[Sequence[Step]], bool]],
) -> list[Step]:
    """The steps that several models take together: the cheapest for what they save first.

    What a step costs is what it costs the model that it costs most. Each model, those that steps cost most
    first, strikes out those of its own steps that it cannot bear with the ones before them; how many it bears
    is found by halving: that it bears fewer where it bears more is taken for granted. It bears none.

    Args:
        shares: of each model, what each of its own steps costs it alone, in parts of what it may lose.
        saved: bytes, more than none, of all steps.
        bears: of each model, whether it bears some of its own steps together.
    """
    worst = {step: max(costs[step] for costs in shares if step in costs) for step in saved}
    order = sorted(saved, key=lambda step: worst[step] / saved[step])
    for index in sorted(range(len(shares)), key=lambda index: -sum(shares[index].values())):
        own = [step for step in order if step in shares[index]]
        low, high, middle = 0, len(own), len(own)  # all at once: what others bear is often borne
        while low < high:
            if bears[index](own[:middle]):
                low = middle
            else:
                high = middle - 1
            middle = (low + high + 1) // 2
        struck = set(own[low:])
        order = [step for step in order if step not in struck]
    return order
