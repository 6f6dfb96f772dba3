"""How near a model with quantized weights is to itself with its weights as they were given."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from blockzoo.build.verify import NUM_GENERATED, Answer, answer_greedily, check_memory
from blockzoo.engines.base import EngineMaker
from blockzoo.engines.probe import ProbeChain
from blockzoo.zoo.blocks import Adapter, Block
from blockzoo.zoo.manifest import QuantizationFigures
from blockzoo.zoo.model_config import ModelConfig


class Text(NamedTuple):
    """A text that models are compared along."""

    tokens: Sequence[int]
    start: int
    """The first position whose distribution counts: those before it are of what a model is asked."""


class Strayed(NamedTuple):
    """How far distributions are from others."""

    kl: float
    """Mean Kullback-Leibler divergence, in nats."""
    top1: float
    """Share of positions with the same likeliest token."""


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """A model whose chains are compared: what all of them have in common."""

    name: str
    config: ModelConfig
    adapters: Mapping[int, Adapter]
    prompts: Sequence[Sequence[int]]
    """Token ids; what is said to them greedily is compared."""
    texts: Sequence[Text]
    """Over which distributions are compared."""

    def chain(self, maker: EngineMaker, blocks: Sequence[Block]) -> ProbeChain:
        """Engines of one of its chains. Raises VerificationError where there is no memory for it in f32."""
        check_memory(self.name, [*blocks, *self.adapters.values()])
        longest = max(max(map(len, self.prompts)) + NUM_GENERATED, *(len(text.tokens) for text in self.texts))
        return ProbeChain(maker, blocks, self.config, longest, self.adapters)

    def distributions(self, chain: ProbeChain) -> list[np.ndarray]:
        """Of one of its chains, over each text: log-probabilities, float32 [tokens that count, vocab]."""
        return [_distributions(chain, text) for text in self.texts]


class Reference:
    """What a model says with its weights as they were given, in f32.

    Args:
        judged: the model.
        maker: of f32 engines.
        blocks: as they were given.
        on_prompt: told how many prompts are answered.
    """

    def __init__(
        self,
        judged: Judged,
        maker: EngineMaker,
        blocks: Sequence[Block],
        on_prompt: Callable[[int], None] = lambda done: None,
    ) -> None:
        self._judged = judged
        chain = judged.chain(maker, blocks)
        self._answers: list[Answer] = []
        for prompt in judged.prompts:
            on_prompt(len(self._answers))
            self._answers.append(answer_greedily(chain, list(prompt)))
        self._texts = judged.distributions(chain)
        self.perplexity = perplexity([text.tokens[text.start :] for text in judged.texts], self._texts)

    def figures(self, maker: EngineMaker, blocks: Sequence[Block]) -> QuantizationFigures:
        """Of another chain of the model, or of the same in another precision."""
        chain = self._judged.chain(maker, blocks)
        same = total = 0
        for answer in self._answers:
            seen = chain.forward(answer.tokens, 0)[-NUM_GENERATED:]
            same += int((seen.argmax(axis=1) == answer.logits.argmax(axis=1)).sum())
            total += NUM_GENERATED
        texts = self._judged.texts
        theirs = self._judged.distributions(chain)
        kl, top1 = strayed(self._texts, theirs)
        return QuantizationFigures(
            greedy_agreement=same / total,
            kl=kl,
            top1=top1,
            perplexity=perplexity([text.tokens[text.start :] for text in texts], theirs),
        )


def _distributions(chain: ProbeChain, text: Text) -> np.ndarray:
    """float32 [tokens that count, vocab], log-probabilities."""
    return log_probabilities(chain.forward(text.tokens, 0)[text.start :].copy())


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """float32 [tokens, vocab] of logits, which are overwritten."""
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return logits


def strayed(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> Strayed:
    """How far log-probabilities [tokens, vocab] are from others, over all positions of both."""
    same = [a.argmax(axis=1) == b.argmax(axis=1) for a, b in zip(ours, theirs, strict=True)]
    return Strayed(divergence(ours, theirs), float(np.concatenate(same).mean()))


def divergence(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
    """Mean Kullback-Leibler divergence in nats, over all positions of log-probabilities [tokens, vocab].

    NaN where one of them is.
    """
    parts = [np.einsum("ij,ij->i", np.exp(a), a - b) for a, b in zip(ours, theirs, strict=True)]
    return float(np.maximum(np.concatenate(parts).mean(dtype=np.float64), 0.0))


def perplexity(texts: Sequence[Sequence[int]], log_probs: Sequence[np.ndarray]) -> float:
    """Of each token given those before it."""
    said = [-rows[np.arange(len(t) - 1), t[1:]] for t, rows in zip(texts, log_probs, strict=True)]
    return float(np.exp(np.concatenate(said).mean(dtype=np.float64)))
