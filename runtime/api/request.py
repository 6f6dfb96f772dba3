"""What a request asks for (`SamplingParams`) and what comes back step by step (`RequestOutput`).

Knows nothing of models, tokenizers or engines: bounds that depend on those (prompt length,
vocabulary) are checked where they are known.
"""

from __future__ import annotations

import numbers
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from blockzoo.runtime.api.errors import InvalidRequestError

FinishReason = Literal["stop", "length", "abort", "error"]
GuideKind = Literal["json", "json_schema", "regex", "lark"]
KVReuse = Literal["off", "exact", "approx"]
"""What KV of earlier requests a request may use: none, that of equal prefixes, or also that of equal words
behind other ones."""

MAX_TOKENS_LIMIT = 1_000_000
CHAT_TOKENS = 1024
"""Of an answer in a chat at most, where a request does not say."""
MAX_LOGPROBS = 20
MAX_WORDS = 64
MAX_BIASES = 1024
MAX_GUIDE_CHARS = 1 << 16
MAX_WORD_CHARS = 256
GREEDY_BELOW = 1e-5


@dataclass(frozen=True, slots=True)
class GuidedDecoding:
    """A form that an answer must have.

    Attributes:
        kind: "json" (any object), "json_schema", "regex" or "lark" (a grammar, in llguidance's dialect).
        guide: the schema as text, the expression or the grammar, at most 64 KiB; "" for "json".

    Raises InvalidRequestError where a field is something else. What the guide says is read by the engine.
    """

    kind: GuideKind
    guide: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(GuideKind):
            raise _wrong("guided.kind", self.kind, f"one of {', '.join(get_args(GuideKind))}")
        if not isinstance(self.guide, str) or (self.kind == "json") != (self.guide == ""):
            raise _wrong("guided.guide", self.guide, 'a text, "" for json alone')
        if len(self.guide) > MAX_GUIDE_CHARS:
            raise InvalidRequestError(
                f"guided.guide has {len(self.guide)} characters; expected at most {MAX_GUIDE_CHARS}."
            )
        if any("\ud800" <= char <= "\udfff" for char in self.guide):
            raise _wrong("guided.guide", self.guide, "text without lone surrogates")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it ends.

    Every field is checked on construction; `InvalidRequestError` names the field, the value seen
    and the range. Lists are accepted for `stop` and `bad_words` and kept as tuples.

    Attributes:
        max_tokens: tokens to generate at most, 1 to 1,000,000; with `prompt_logprobs` also 0.
        temperature: 0 to 100. Below 1e-5 the choice is greedy (as in vLLM): dividing logits by less
            only makes them overflow.
        top_k: keep the k likeliest tokens; 0 is off, and so is -1, which is stored as 0.
        top_p: keep the fewest tokens whose mass reaches this, in (0, 1]; 1 is off.
        min_p: keep tokens at least this likely relative to the likeliest, 0 to 1; 0 is off.
        repetition_penalty: 0.01 to 100, over prompt and generated tokens (CTRL, arXiv 1909.05858);
            1 is off.
        presence_penalty: -2 to 2, taken once from tokens generated before.
        frequency_penalty: -2 to 2, taken once per earlier generation of the token.
        seed: 0 to 2^64 - 1; None draws from the operating system. The same seed draws the same token from
            the same logits. These depend in their last bits on the other rows of a step and on what was
            cached: in f32 answers are the same whatever else the engine serves, but where two tokens are
            alike to rounding; in bf16, whose rounding is coarse, the same where the same requests come in
            the same steps to the same cache, as one at a time with kv_reuse "off". So are greedy answers.
        stop: at most 64 texts of 1 to 256 characters that end the generation where one is completed. Special
            tokens may be (in) such a text, as "<|im_end|>"; they end it whether or not they are shown.
        bad_words: at most 64 texts of 1 to 256 characters never to be generated.
        logprobs: number of top alternatives reported per token, 0 (the chosen token alone) to 20;
            None reports none.
        prompt_logprobs: the same for the tokens of the prompt, from the second on. All of them are computed:
            nothing cached is used, and nothing left.
        ignore_eos: go on past the model's end-of-sequence tokens, but for one named in `stop`.
        min_tokens: neither end-of-sequence nor stop words end the generation before as many tokens.
        skip_special_tokens: leave special tokens out of the text, but for a stop word that is to be in it.
        include_stop: let the text end with the stop word instead of before it.
        logit_bias: at most 1024 token ids, each with -100 to 100 that is added to its logit: a mapping,
            kept as pairs.
        guided: a form that the answer must have, or a mapping of its fields; not with `ignore_eos` and
            `min_tokens`, which would have it go on beyond.
        speculate: let tokens be guessed ahead where that is hoped to be faster. It changes no answer, beyond
            what other rows of a step do (see `seed`).
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    bad_words: tuple[str, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    skip_special_tokens: bool = True
    include_stop: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()
    guided: GuidedDecoding | None = None
    speculate: bool = True

    def __post_init__(self) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._check_int(name, 0, MAX_LOGPROBS)
        self._check_int("max_tokens", 1 if self.prompt_logprobs is None else 0, MAX_TOKENS_LIMIT)
        self._check_int("top_k", -1, 2**31 - 1)
        self._check_int("min_tokens", 0, MAX_TOKENS_LIMIT)
        self._check_real("temperature", 0.0, 100.0)
        self._check_real("top_p", 0.0, 1.0, low_is_out=True)
        self._check_real("min_p", 0.0, 1.0)
        self._check_real("repetition_penalty", 0.01, 100.0)
        self._check_real("presence_penalty", -2.0, 2.0)
        self._check_real("frequency_penalty", -2.0, 2.0)
        if self.seed is not None:
            self._check_int("seed", 0, 2**64 - 1)
        self._check_words("stop")
        self._check_words("bad_words")
        self._check_bias()
        self._check_guided()
        for field in ("ignore_eos", "skip_special_tokens", "include_stop", "speculate"):
            if not isinstance(getattr(self, field), bool):
                raise _wrong(field, getattr(self, field), "true or false")
        if self.min_tokens > self.max_tokens:
            raise _wrong("min_tokens", self.min_tokens, f"at most max_tokens ({self.max_tokens})")
        if self.top_k == -1:
            self._set("top_k", 0)

    @property
    def greedy(self) -> bool:
        """True where the likeliest token is taken and nothing is drawn."""
        return self.temperature < GREEDY_BELOW

    @property
    def has_penalties(self) -> bool:
        """True where the tokens seen so far change the logits."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def _set(self, field: str, value: object) -> None:
        object.__setattr__(self, field, value)  # frozen for everybody else

    def _check_int(self, field: str, low: int, high: int) -> None:
        value = getattr(self, field)
        # bool is an int in Python; numpy integers are Integral
        is_int = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if not is_int or not low <= value <= high:
            raise _wrong(field, value, f"a whole number from {low} to {high}")
        self._set(field, int(value))

    def _check_real(self, field: str, low: float, high: float, low_is_out: bool = False) -> None:
        value = getattr(self, field)
        is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        # compared before float(), which overflows on huge integers; NaN fails the comparison
        if not is_real or not low <= value <= high or (low_is_out and value == low):
            expected = f"above {low:g} and at most {high:g}" if low_is_out else f"from {low:g} to {high:g}"
            raise _wrong(field, value, f"a number {expected}")
        self._set(field, float(value))

    def _check_guided(self) -> None:
        guided = self.guided
        if isinstance(guided, Mapping):
            unknown = [key for key in guided if key not in ("kind", "guide")]
            if unknown or "kind" not in guided:
                raise _wrong("guided", dict(guided), "an object with kind and guide")
            self._set("guided", GuidedDecoding(**guided))
        elif guided is not None and not isinstance(guided, GuidedDecoding):
            raise _wrong("guided", guided, "a GuidedDecoding, or nothing")
        if self.guided is not None and (self.ignore_eos or self.min_tokens):
            raise InvalidRequestError("guided cannot go with ignore_eos and min_tokens; leave them out.")

    def _check_bias(self) -> None:
        given = self.logit_bias
        pairs: Any = tuple(given.items()) if isinstance(given, Mapping) else given
        expected = "token ids, each with a number from -100 to 100"
        if not isinstance(pairs, (tuple, list)):
            raise _wrong("logit_bias", given, expected)
        if len(pairs) > MAX_BIASES:
            raise InvalidRequestError(f"logit_bias has {len(pairs)} tokens; expected at most {MAX_BIASES}.")
        biases: dict[int, float] = {}
        for pair in pairs:
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise _wrong("logit_bias", given, expected)
            token_id: Any = pair[0]
            bias: Any = pair[1]
            if isinstance(token_id, str) and re.fullmatch("[0-9]{1,10}", token_id):  # a key of JSON
                token_id = int(token_id)
            if isinstance(token_id, bool) or not isinstance(token_id, numbers.Integral) or token_id < 0:
                raise _wrong("logit_bias", given, expected)
            is_real = isinstance(bias, numbers.Real) and not isinstance(bias, bool)
            if not is_real or not -100 <= bias <= 100:
                raise _wrong(f"logit_bias[{token_id}]", bias, "a number from -100 to 100")
            biases[int(token_id)] = float(bias)
        self._set("logit_bias", tuple(biases.items()))

    def _check_words(self, field: str) -> None:
        words = getattr(self, field)
        if not isinstance(words, (tuple, list)):
            raise _wrong(field, words, "a list of texts, also for a single one")
        if len(words) > MAX_WORDS:
            raise InvalidRequestError(f"{field} has {len(words)} texts; expected at most {MAX_WORDS}.")
        for index, word in enumerate(words):
            if not isinstance(word, str):
                raise _wrong(f"{field}[{index}]", word, "a text")
            if not 1 <= len(word) <= MAX_WORD_CHARS:
                raise InvalidRequestError(
                    f"{field}[{index}] has {len(word)} characters; expected 1 to {MAX_WORD_CHARS}."
                )
            if any("\ud800" <= char <= "\udfff" for char in word):
                raise _wrong(f"{field}[{index}]", word, "text without lone surrogates")
        self._set(field, tuple(words))


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one token and of the likeliest tokens in its place.

    Natural logarithms under the model's own distribution: before temperature, penalties and
    filters. `top` is sorted from the likeliest down and holds as many entries as were asked for.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


PromptLogprobs = tuple[TokenLogprob | None, ...]


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What one step added to one request.

    `text`, `token_ids` and `logprobs` are deltas; put together they give the whole. The text may
    lag behind the tokens (half characters and possible beginnings of stop words are held back) and
    a stop word is cut from the text but not from the tokens. The last output of a request has
    `finished` set and a `finish_reason`; `error` is set with the reason "error" only. `prompt_token_ids`
    and `prompt_logprobs`, where they are asked for, come with the first output, one for each token of the
    prompt; that of the first is None.
    """

    request_id: str
    model: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    finished: bool
    finish_reason: FinishReason | None
    error: str | None
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generated: int
    prompt_token_ids: tuple[int, ...] | None = None
    prompt_logprobs: PromptLogprobs | None = None


def shown(value: object) -> str:
    """A value of any kind as an error message shows it: at most 80 characters."""
    try:
        seen = repr(value)
    except ValueError:  # an int of more digits than Python prints
        seen = f"an {type(value).__name__} that is too large"
    return seen if len(seen) <= 80 else f"{seen[:77]}..."


def _wrong(field: str, value: Any, expected: str) -> InvalidRequestError:
    return InvalidRequestError(f"{field} is {shown(value)}; expected {expected}.")
