"""What goes into each matrix of a model over text of its own, for rounding that knows it.

A few thousand tokens are too few to tell the directions of a matrix' inputs apart, and no text at hand is
like that which a model is used for: so the model writes it itself, by sampling (as in arXiv 2410.17170).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from blockzoo.build.oracle import Oracle
from blockzoo.engines.base import EngineMaker
from blockzoo.engines.probe import ProbeChain
from blockzoo.zoo.blocks import Adapter, Block
from blockzoo.zoo.model_config import ModelConfig

NUM_TEXTS, NUM_TOKENS = 64, 256
"""Of a model's own text, and tokens of each."""
_FEWEST_TEXTS = 8
_MAX_KV_BYTES = 1 << 30

Grams = dict[str, np.ndarray]
"""HF name of a matrix -> float32 [in, in], X^T X / rows of the rows X that it is multiplied with."""


def calibrate(
    oracle: Oracle, sequences: Sequence[Sequence[int]], on_layer: Callable[[int, Grams], None]
) -> None:
    """Run token sequences through a model; hand on, layer by layer, what its matrices met.

    Args:
        oracle: of the model.
        sequences: token ids.
        on_layer: told a layer and the Gram matrices of its projections; they are dropped afterwards.
    """
    met: Grams = {}
    last: list[np.ndarray] = []  # rows and their Gram matrix: q, k and v have them in common

    def listen(name: str, rows: np.ndarray) -> None:
        if not last or last[0] is not rows:
            last[:] = rows, rows.T @ rows / np.float32(len(rows))
        met[name] = last[1]

    def finish(layer: int) -> None:
        if layer >= 0:
            on_layer(layer, met)
        met.clear()

    replace(oracle, on_input=listen).logits(sequences, 1, lambda layer: finish(layer - 1))
    finish(oracle.config["num_hidden_layers"] - 1)


def own_texts(
    maker: EngineMaker,
    blocks: Sequence[Block],
    config: ModelConfig,
    adapters: Mapping[int, Adapter],
    prompts: Sequence[Sequence[int]],
    num_texts: int,
    on_token: Callable[[int, int], None],
) -> list[list[int]]:
    """Texts that a model writes behind prompts, in turn, sampled as it is (temperature 1): token ids.

    `num_texts`, or as many as fit into the memory for their KV, but a few in any case; all of one length.
    """
    length = min(NUM_TOKENS, config.max_length)
    token_bytes = 2 * 4 * config.num_layers * config.num_kv_heads * config.head_dim
    count = max(_FEWEST_TEXTS, min(num_texts, _MAX_KV_BYTES // (token_bytes * length)))
    chain = ProbeChain(maker, blocks, config, length, adapters, count)
    rng = np.random.default_rng(0)
    starts = [list(prompts[i % len(prompts)][:length]) for i in range(count)]
    texts: list[list[int]] = [[start[0]] for start in starts]
    for position in range(1, length):
        on_token(position, length)
        logits = chain.forward([text[-1] for text in texts], position - 1)
        drawn = (logits + rng.gumbel(size=logits.shape).astype(np.float32)).argmax(axis=1)
        for text, start, token in zip(texts, starts, drawn.tolist(), strict=True):
            text.append(start[position] if position < len(start) else token)
    return texts
