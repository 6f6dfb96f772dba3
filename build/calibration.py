"""What goes into each matrix of a model over text of its own, for rounding that knows it.

A few thousand tokens are too few to tell the directions of a matrix' inputs apart, and no text at hand is
like that which a model is used for: so the model writes it itself, by sampling (as in arXiv 2410.17170).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from blockzoo.build.oracle import Oracle
from blockzoo.engines.base import EngineMaker
from blockzoo.engines.probe import ProbeChain
from blockzoo.zoo.blocks import Adapter, Block
from blockzoo.zoo.model_config import ModelConfig

NUM_TEXTS, NUM_TOKENS = 64, 256
"""Of a model's own text, and tokens of each."""
FEWEST_TEXTS = 8
_MAX_KV_BYTES = 1 << 30


class Met:
    """What the matrices of one block are multiplied with, over a text.

    Args:
        oracle: of the model.
        run: gives the block's output by an oracle.
    """

    def __init__(self, oracle: Oracle, run: Callable[[Oracle], list[np.ndarray]]) -> None:
        self._oracle, self._run = oracle, run
        self._rows, self.out = self._listened(oracle.weight)
        self._grams: list[tuple[np.ndarray, np.ndarray]] = []  # of rows that were asked for

    def gram(self, name: str) -> np.ndarray:
        """float32 [in, in], X^T X / rows of the rows X that the matrix of this HF name met."""
        rows = self._rows[name]
        for seen, gram in self._grams:  # q, k and v have them in common, and 4 bits and 8
            if seen is rows:
                return gram
        self._grams.append((rows, _product(rows, rows)))
        return self._grams[-1][1]

    def after(self, changes: Mapping[str, np.ndarray], name: str) -> tuple[np.ndarray, np.ndarray]:
        """What a matrix meets instead when others of the block have changed.

        Args:
            changes: HF name -> what is added to the matrix, float32.
            name: of the matrix.

        Returns:
            float32 [in, in] both: Y^T Y / rows of the rows Y that it meets then, and (X - Y)^T Y / rows.
        """

        def changed(of: str) -> np.ndarray | None:
            weight = self._oracle.weight(of)
            return weight + changes[of] if weight is not None and of in changes else weight

        rows = self._listened(changed)[0][name]
        return _product(rows, rows), _product(self._rows[name] - rows, rows)

    def _listened(
        self, weight: Callable[[str], np.ndarray | None]
    ) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
        rows: dict[str, np.ndarray] = {}
        out = self._run(replace(self._oracle, weight=weight, on_input=rows.__setitem__))
        return rows, out


def _product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return left.T @ right / np.float32(len(left))


def calibrate(
    oracle: Oracle, sequences: Sequence[Sequence[int]], on_block: Callable[[int, Met], None]
) -> None:
    """Run token sequences through a model; hand on, block by block, what its matrices met.

    Args:
        oracle: of the model.
        sequences: token ids.
        on_block: told a position in the chain, of attention or feed-forward, and what was met there.
    """
    hidden = oracle.embedded(sequences)
    for layer in range(oracle.config["num_hidden_layers"]):
        for half, run in enumerate((Oracle.attention, Oracle.feed_forward)):
            met = Met(oracle, partial(_halved, run, layer, hidden))
            on_block(1 + 2 * layer + half, met)
            hidden = met.out


def _halved(
    run: Callable[[Oracle, int, list[np.ndarray]], list[np.ndarray]],
    layer: int,
    hidden: list[np.ndarray],
    oracle: Oracle,
) -> list[np.ndarray]:
    return run(oracle, layer, hidden)


def own_texts(
    maker: EngineMaker,
    blocks: Sequence[Block],
    config: ModelConfig,
    adapters: Mapping[int, Adapter],
    starts: Sequence[Sequence[int]],
    temperatures: Sequence[float],
    length: int,
    on_token: Callable[[int, int], None],
) -> list[list[int]]:
    """Texts that a model writes, as token ids, one behind each start.

    Args:
        starts: token ids, at least one each.
        temperatures: of each text, at which it is sampled; 0: greedily.
        length: of all texts, their starts included.
        on_token: told how many tokens of it are there.

    Returns:
        As many of the first ones as fit into the memory for their KV, but a few in any case.
    """
    token_bytes = 2 * 4 * config.num_layers * config.num_kv_heads * config.head_dim
    count = max(FEWEST_TEXTS, _MAX_KV_BYTES // (token_bytes * length))
    starts = [start[:length] for start in starts[:count]]
    chain = ProbeChain(maker, blocks, config, length, adapters, len(starts))
    rng = np.random.default_rng(0)
    noise = np.array(temperatures[: len(starts)], np.float32)[:, None]
    texts: list[list[int]] = [[start[0]] for start in starts]
    for position in range(1, length):
        on_token(position, length)
        logits = chain.forward([text[-1] for text in texts], position - 1)
        drawn = (logits + noise * rng.gumbel(size=logits.shape).astype(np.float32)).argmax(axis=1)
        for text, start, token in zip(texts, starts, drawn.tolist(), strict=True):
            text.append(start[position] if position < len(start) else token)
    return texts
