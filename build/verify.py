"""The end-to-end check of a compiled model: the chain that will be served against an independent oracle.

For a few built-in prompts the chain, read back from the zoo and run in f32, generates greedily; the oracle
scores the same sequences from the original files. The model is refused when any logit strays; what the
serving precision makes of it is reported beside it. One that was taken apart lacks the rounding of its merge:
it may stray as far as bf16 alone makes the checkpoint stray (`build.yardstick`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from blockzoo.build import oracle
from blockzoo.build.originals import oracle_for
from blockzoo.build.sources import Adapted, Source
from blockzoo.build.yardstick import Yardstick
from blockzoo.engines.base import EngineMaker, Precision
from blockzoo.engines.probe import ProbeChain
from blockzoo.zoo.blocks import Adapter, Block, Dtype
from blockzoo.zoo.errors import CheckpointError, ZooError
from blockzoo.zoo.manifest import VerificationFigures, VerificationRecord
from blockzoo.zoo.summary import human_bytes, loss_text

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived",
    "def fibonacci(n):\n    ",
    "Q: What is 12 + 30?\nA:",
    "Let b = a + 4. Let c = b + 2. If a = 1, then c",
    '{"name": "blockzoo", "version": "0.1.0", "dependencies": [',
    "La vie est belle, и мир прекрасен, 世界",
    "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36 "
    "37 38 39 40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63 64",
)
NUM_GENERATED = 32
TOLERANCE = 1e-3
"""f32 max_relative_error: sums in another order give 1e-6 to 1e-4, a wrong weight or operator far more."""

_F32_CHAIN_OVERHEAD = 1.25  # the engine's repacked weights and its scratch, and a layer of the oracle


class VerificationError(ZooError):
    """The compiled chain does not compute what the checkpoint computes."""


class RecoveryError(VerificationError):
    """A model that was taken apart loses more than bf16 does."""

    def __init__(self, message: str, sequences: Sequence[Sequence[int]], yardstick: Yardstick) -> None:
        super().__init__(message)
        self.sequences, self.yardstick = sequences, yardstick


@dataclass(frozen=True, slots=True)
class Answer:
    """What a chain generates greedily."""

    tokens: list[int]
    """Prompt and generated tokens, the last one left out (nothing is computed from it)."""
    logits: np.ndarray
    """f32 [NUM_GENERATED, vocab]: of the positions that generated."""


def verify(
    source: Source,
    blocks: Sequence[Block],
    adapters: Mapping[int, Adapter],
    maker: Callable[[Precision | None], EngineMaker],
    dtype: Dtype | None,
    progress: Callable[[str, int, int], None],
    recovered: bool = False,
    packed_kv: EngineMaker | None = None,
) -> VerificationRecord:
    """Check one model, compiled with its tensors converted to `dtype` where that is given.

    `adapters`: by position in the chain; `recovered`: some of them stand for a merge in the checkpoint;
    `packed_kv`: f32 engines with KV in 8 bits, of which it is told what they lose.
    `maker` gives engines of a precision, None being the one used for serving. Raises VerificationError beyond
    the tolerance (RecoveryError where blocks were recovered), CheckpointError for a tokenizer that does not
    fit the model.
    """
    config = source.config
    room = config.max_length - NUM_GENERATED
    if room < 1:
        raise CheckpointError(
            f"{source.name}: the model takes {config.max_length} tokens: verification needs "
            f"at least {NUM_GENERATED + 1}; --no-verify leaves it out"
        )
    check_memory(source.name, [*blocks, *adapters.values()])
    prompts = [prompt[:room] for prompt in encode_prompts(source)]
    longest = max(map(len, prompts)) + NUM_GENERATED
    chain = ProbeChain(maker("f32"), blocks, config, longest, adapters)
    layers = config.num_layers
    rounds_too = recovered or packed_kv is not None
    what, steps = f"verifying {source.name}", len(prompts) + layers * (2 if rounds_too else 1)
    probes: list[Answer] = []
    for prompt in prompts:
        progress(what, len(probes), steps)
        probes.append(answer_greedily(chain, prompt))
    sequences = [probe.tokens for probe in probes]
    everywhere = [chain.forward(tokens, 0) for tokens in sequences] if recovered else []
    del chain
    judge = oracle_for(source, True, dtype)
    last = longest if recovered else NUM_GENERATED
    scored = judge.logits(sequences, last, lambda layer: progress(what, len(prompts) + layer, steps))
    expected = [logits[-NUM_GENERATED:] for logits in scored]
    if not all(np.isfinite(rows).all() for rows in expected):
        raise VerificationError(
            f"{source.name}: the checkpoint itself gives NaN or infinity in f32: look for weights that are "
            "NaN or far too large"
        )
    figures = {"f32": compare([probe.logits for probe in probes], expected)}
    error, tolerance, loss, kv = figures["f32"].max_relative_error, TOLERANCE, None, None
    if rounds_too:
        seen_before = len(prompts) + layers
        yardstick = Yardstick.of(
            judge, sequences, scored, lambda layer: progress(what, seen_before + layer, steps), last
        )
    if packed_kv is not None:
        chain = ProbeChain(packed_kv, blocks, config, longest, adapters)
        own = everywhere if recovered else [probe.logits for probe in probes]
        found = yardstick.judge([_decoded(chain, tokens)[-last:] for tokens in sequences], own)
        kv = found if np.isfinite(found.stored.kl) else None  # as good as not measured: no model to serve so
        del chain
    if recovered:
        loss = yardstick.judge(everywhere, scored)
        tolerance = loss.bf16.max_relative_error
        if not loss.excess <= 1:
            raise RecoveryError(
                f"{source.name}: taken apart into other models' blocks and adapters it loses more than bf16 "
                f"does: {loss_text(loss)}",
                sequences,
                yardstick,
            )
    elif not error <= tolerance:
        raise VerificationError(
            f"{source.name}: the compiled model is not the checkpoint: relative logit error {error:.2e} in "
            f"f32, expected at most {TOLERANCE:.0e} (greedy agreement "
            f"{figures['f32'].greedy_agreement:.1%}); please report this with the model's config.json"
        )
    serving = maker(None)
    if serving.precision != "f32":
        chain = ProbeChain(serving, blocks, config, longest, adapters)
        seen = [chain.forward(tokens, 0)[-NUM_GENERATED:] for tokens in sequences]
        figures[serving.precision] = compare(seen, expected)
        if not np.isfinite(figures[serving.precision].max_relative_error):
            raise VerificationError(f"{source.name}: the model gives NaN or infinity in {serving.precision}")
    rounding_error = None
    replaces = isinstance(source.origin, Adapted) and source.origin.adapter.replacements
    if dtype is not None or replaces:
        exact = oracle_for(source, False, None).logits(sequences, NUM_GENERATED)
        rounding_error = compare(expected, exact).max_relative_error
    progress(what, steps, steps)
    count = len(prompts)
    return VerificationRecord(
        oracle=oracle.NAME,
        num_prompts=count,
        num_tokens=count * NUM_GENERATED,
        tolerance=tolerance,
        figures=figures,
        rounding_error=rounding_error,
        same_as=None,
        loss=loss,
        kv=kv,
    )


def _decoded(chain: ProbeChain, tokens: Sequence[int]) -> np.ndarray:
    """Logits along an answer, float32 [tokens, vocab]: its own tokens one at a time, as they are served. What
    reads K and V for one row is not what reads them for many."""
    begin = len(tokens) - NUM_GENERATED + 1
    rows = [chain.forward(tokens[:begin], 0)]
    rows += [chain.forward(tokens[at : at + 1], at) for at in range(begin, len(tokens))]
    return np.concatenate(rows)


def encode_prompts(source: Source) -> list[list[int]]:
    """The built-in prompts as a model's token ids. Raises CheckpointError for an unfit tokenizer."""
    return encode_texts(source, PROMPTS)


def encode_texts(source: Source, texts: Sequence[str]) -> list[list[int]]:
    """Texts as a model's token ids. Raises CheckpointError for an unfit tokenizer."""
    from tokenizers import Tokenizer

    where = source.path or source.name
    try:
        tokenizer = Tokenizer.from_buffer(source.tokenizer.files["tokenizer.json"])
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{where}: tokenizer.json is not readable ({error}); save it again") from error
    prompts = [tokenizer.encode(text).ids or [0] for text in texts]
    highest, vocab_size = max(map(max, prompts)), source.config.vocab_size
    if highest >= vocab_size:
        raise CheckpointError(
            f"{where}: tokenizer.json gives token id {highest}, but the model's vocab_size is {vocab_size}: "
            "is it the tokenizer of another model?"
        )
    return prompts


def check_memory(name: str, blocks: Sequence[Block | Adapter]) -> None:
    """Refuse what would end in the kernel killing the process: the f32 chain is larger than the model."""
    elements = sum(tensor.size for block in blocks for tensor in block.tensors.values())
    needed = int(_F32_CHAIN_OVERHEAD * 4 * elements)
    available = _available_memory()
    if available is not None and needed > available:
        raise VerificationError(
            f"{name}: verification in f32 needs about {human_bytes(needed)} of memory, "
            f"{human_bytes(available)} are available; --no-verify leaves it out"
        )


def _available_memory() -> int | None:
    """Bytes, None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def answer_greedily(chain: ProbeChain, prompt: list[int]) -> Answer:
    """NUM_GENERATED tokens after a prompt."""
    tokens = list(prompt)
    rows = [chain.forward(prompt, 0)[-1]]
    for _ in range(NUM_GENERATED - 1):
        tokens.append(int(rows[-1].argmax()))
        rows.append(chain.forward(tokens[-1:], len(tokens) - 1)[-1])
    return Answer(tokens, np.stack(rows))


def compare(seen: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> VerificationFigures:
    """Figures over pairs of f32 [rows, vocab]; NaN anywhere makes the error infinite."""
    agree, worst, rows = 0, 0.0, 0
    for ours, theirs in zip(seen, expected, strict=True):
        agree += int((ours.argmax(axis=1) == theirs.argmax(axis=1)).sum())
        rows += len(ours)
        scale = np.maximum(np.abs(theirs).max(axis=1), 1e-30)
        error = float((np.abs(ours - theirs).max(axis=1) / scale).max())
        worst = max(worst, error) if np.isfinite(error) else float("inf")
    return VerificationFigures(agree / rows, worst)
