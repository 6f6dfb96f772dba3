"""How to compile."""

from dataclasses import dataclass
from typing import Literal

from blockzoo.build.calibration import NUM_TEXTS
from blockzoo.build.quantized_models import Weights
from blockzoo.build.tensorrt_plans import TensorRTOptions
from blockzoo.zoo.blocks import Dtype

Sharing = Literal["exact", "adapter", "equivalent", "delta"]
"""What counts as shareable: equal blocks; also blocks that are another one with a LoRA merged in; besides,
blocks that can take each other's place with little effect, or blocks near another one, as differences."""


@dataclass(frozen=True, slots=True)
class CompileOptions:
    """How to compile."""

    dtype: Dtype | None = None
    """Convert all weights; None keeps them exactly."""
    replace: bool = False
    """Whether a model of the same name and other content is replaced."""
    profile: bool = True
    """Whether to time blocks."""
    share: Sharing = "adapter"
    """How far full checkpoints share; PEFT folders always share their base."""
    threshold: float = 0.98
    """equivalent: least mean cosine of the vocabulary probabilities against the model's own."""
    probe: str | None = None
    """equivalent, delta, weights: file with text to compare on; None takes built-in prompts (equivalent), or
    text that the model writes."""
    weights: Weights | None = None
    """Store the blocks of all models given in 8 or 4 bits; None keeps them as they are."""
    max_kl: float | None = None
    """weights, delta: bound on the divergence from the weights as they were given, in nats; None: by what is
    asked for."""
    min_top1: float | None = None
    """weights auto: bound on the share of positions with the same likeliest token as with the weights as they
    were given; None: 0.95, or none with `max_kl`."""
    group_size: int | None = None
    """weights int8, int4: columns that share a scale, or `WHOLE_ROW`; None: as many as a model bears, in int4
    32."""
    calibration_texts: int = NUM_TEXTS
    """weights: texts that a model writes for its rounding to look at; 0 rounds to nearest."""
    surrogate: str | None = None
    """Look for what guesses what a model says next: of `SURROGATES`, or a model; None: leave that alone."""
    verify: bool = True
    """Whether to check every new chain against the numpy oracle."""
    judge_kv: bool = False
    """verify: whether to measure what KV in 8 bits loses too, which takes the oracle once more."""
    threads: int | None = None
    """Engine threads; None leaves it to the engine."""
    tensorrt: TensorRTOptions | None = None
    """What to build TensorRT plans for; None: no plans are built."""
    dry_run: bool = False
    """Only say what would be done."""
