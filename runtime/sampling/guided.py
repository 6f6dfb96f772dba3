"""Guided decoding: which tokens a JSON schema, a regular expression or a grammar allows next, by llguidance.

A guide is compiled in the thread that checks a request, within bounds of work, and kept for further requests;
the engine's thread asks it for a mask before each token and tells it which one was taken.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from blockzoo.runtime.api.errors import InvalidRequestError
from blockzoo.runtime.api.request import GuidedDecoding

_KEPT = 64  # compiled guides
_MAX_LOOKS = 256  # at parts of a schema, to say which is at fault
_MAX_MESSAGE = 500
_LIMITS = {  # work in compiling (50,000 units take a millisecond) and in one step
    "initial_lexer_fuel": 5_000_000,
    "max_grammar_size": 200_000,
    "max_lexer_states": 50_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "verbose_errors": False,
}
# without a bound a model may put spaces until its last token
_JSON = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,16}", "lenient": False}
# how JSON is mostly written: of those two ways more is certain than of the schema alone
_STYLES = tuple(
    {"whitespace_flexible": False, "item_separator": item, "key_separator": key, "lenient": False}
    for item, key in ((",", ":"), (", ", ": "))
)
NUM_STYLES = len(_STYLES)
_MOST_FORCED = 512  # bytes of text that is certain, as far as it is looked at
_TAIL = 4  # bytes of an answer
_VALUE_BEGINS = re.compile(rb'[:\[,] ?"?$')  # in JSON behind such a text
_PARTS = ("properties", "$defs", "definitions", "patternProperties")
_ITEMS = ("items", "additionalProperties", "anyOf", "oneOf", "allOf", "prefixItems", "not")


class Vocabulary(Protocol):
    """A tokenizer, as far as guides need it."""

    def to_json(self) -> str:
        """The content of its `tokenizer.json`."""


class Guide:
    """What one request may generate next.

    Args:
        matcher: of llguidance.
        vocabulary: llguidance's tokenizer.
        vocab_size: width of the logits.
        styles: matchers of what is narrower, each as long as the answer keeps to it.
    """

    def __init__(
        self, matcher: Any, vocabulary: Any, vocab_size: int, styles: Mapping[int, Any] = MappingProxyType({})
    ) -> None:
        self._matcher, self._vocabulary, self._vocab_size = matcher, vocabulary, vocab_size
        self._styles = dict(styles)
        self._tail = b""  # of the answer's text, and tokens that it and the styles lack until they are asked
        self._untold: list[int] = []
        self._bits: bytes | None = None  # of what may come next, once they are asked for

    def allows(self, token_id: int) -> bool:
        """Whether a token may come next; none may where the guide has failed."""
        bits = self._mask()
        return bits is not None and bool(bits[token_id >> 3] >> (token_id & 7) & 1)

    def allowed(self) -> npt.NDArray[np.bool_] | None:
        """bool [vocab]: the tokens that may come next; None where the guide has failed, as `error` says."""
        bits = self._mask()
        if bits is None:
            return None
        found = np.frombuffer(bits, np.uint8)
        return np.unpackbits(found, count=self._vocab_size, bitorder="little").view(np.bool_)

    def _mask(self) -> bytes | None:
        if self._bits is None:
            bits = self._matcher.compute_bitmask()
            self._bits = None if self._matcher.is_error() else bits
        return self._bits

    def append(self, token_id: int) -> None:
        """Take note of a generated token, which was allowed."""
        self._bits = None
        self._matcher.consume_token(token_id)
        self._untold.append(token_id)

    def after(self, token_ids: Sequence[int]) -> Guide:
        """A guide of its own as this one would be behind tokens, which are allowed (`num_allowed`)."""
        found = self.copy()
        for token_id in token_ids:
            found.append(token_id)
        return found

    def copy(self) -> Guide:
        """A guide of its own at the same place."""
        styles = {number: style.deep_copy() for number, style in self._styles.items()}
        found = Guide(self._matcher.deep_copy(), self._vocabulary, self._vocab_size, styles)
        found._tail, found._untold = self._tail, list(self._untold)
        return found

    def num_allowed(self, token_ids: Sequence[int]) -> int:
        """How many tokens, from the first, may come one after the other."""
        if self._matcher.is_error():
            return 0
        known = takewhile(lambda token_id: 0 <= token_id < self._vocab_size, token_ids)
        return int(self._matcher.validate_tokens(list(known)))

    def forced(self) -> list[int]:
        """The tokens of a text that must come next, as a tokenizer would cut it; another cut is allowed."""
        return [] if self._matcher.is_error() else list(self._matcher.compute_ff_tokens())

    def likely(self, number: int) -> tuple[list[int], bool]:
        """Tokens of JSON that is written in one of NUM_STYLES ways, none once the answer differs from it; and
        whether their text must come next there, but for a quote at its end.

        Else the value that is being written may end here: so what would then follow, as far as that must.
        """
        self._tell_styles()
        style = self._styles.get(number)
        if style is None:
            return [], False
        ahead, text = style.deep_copy(), style.compute_ff_bytes()[:_MOST_FORCED]
        must_come = bool(text)
        if not self._goes_on(ahead, text):
            return [], False
        if not must_come and not _VALUE_BEGINS.search(self._tail):
            text = self._taken(ahead, b'"', b",", b"}", b"]")
        if text.endswith((b":", b": ")):
            text += self._taken(ahead, b'"')
        return list(self._vocabulary.tokenize_bytes(text)), must_come

    def _tell_styles(self) -> None:
        tokens, self._untold = self._untold, []
        if tokens and self._styles:
            self._tail = (self._tail + self._vocabulary.decode_bytes(tokens))[-_TAIL:]
            self._styles = {
                number: style
                for number, style in self._styles.items()
                if style.try_consume_tokens(tokens) == len(tokens)
            }

    def _taken(self, matcher: Any, *texts: bytes) -> bytes:
        """The first of some texts that a matcher takes, and what must then follow, which it takes too."""
        for text in texts:
            if self._goes_on(matcher, text):
                following = matcher.compute_ff_bytes()[:_MOST_FORCED]
                return text + (following if self._goes_on(matcher, following) else b"")
        return b""

    def _goes_on(self, matcher: Any, text: bytes) -> bool:
        """Have a matcher take a text, which does not change it where it cannot."""
        tokens = self._vocabulary.tokenize_bytes(text)
        if matcher.validate_tokens(tokens) < len(tokens):
            return False
        return bool(matcher.try_consume_tokens(tokens) == len(tokens))

    @property
    def error(self) -> str:
        """Why there is no mask."""
        return self._matcher.get_error()[:_MAX_MESSAGE]


class Guides:
    """Compiles guides. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tokenizers: OrderedDict[tuple[int, int, tuple[int, ...]], tuple[Vocabulary, Any]] = (
            OrderedDict()
        )
        self._kept: OrderedDict[tuple[Any, GuidedDecoding], Guide] = OrderedDict()

    def guide(
        self, guided: GuidedDecoding, tokenizer: Vocabulary, vocab_size: int, end_ids: tuple[int, ...]
    ) -> Guide:
        """A guide at its beginning.

        Args:
            vocab_size: width of the logits.
            end_ids: the tokens that end an answer: allowed where the guide is satisfied.

        Raises:
            InvalidRequestError: it cannot be compiled; says where it is wrong.
        """
        if not end_ids:
            raise InvalidRequestError("guided: the model has no token that ends an answer, so none could end")
        place = (id(tokenizer), vocab_size, end_ids)
        with self._lock:
            kept = self._kept.get((place, guided))
            if kept is not None:
                self._kept.move_to_end((place, guided))
                return kept.copy()
        kept = self._compile(guided, self._vocabulary(place, tokenizer), vocab_size)
        with self._lock:
            self._kept[place, guided] = kept
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
            return kept.copy()

    def _vocabulary(self, place: tuple[int, int, tuple[int, ...]], tokenizer: Vocabulary) -> Any:
        with self._lock:
            if place not in self._tokenizers:
                from llguidance import LLTokenizer

                made = LLTokenizer(tokenizer.to_json(), n_vocab=place[1], eos_token=list(place[2]))
                self._tokenizers[place] = (tokenizer, made)  # the first keeps its id from being another's
                while len(self._tokenizers) > _KEPT:
                    gone, _ = self._tokenizers.popitem(last=False)
                    for key in [key for key in self._kept if key[0] == gone]:
                        del self._kept[key]
            return self._tokenizers[place][1]

    def _compile(self, guided: GuidedDecoding, vocabulary: Any, vocab_size: int) -> Guide:
        styles: dict[int, Any] = {}
        if guided.kind == "regex":
            problem, matcher = _matcher(vocabulary, "regex", guided.guide)
        elif guided.kind == "lark":
            problem, matcher = _matcher(vocabulary, "lark", guided.guide)
        else:
            schema = {"type": "object"} if guided.kind == "json" else _schema(guided.guide)
            problem, matcher = _matcher(vocabulary, "json_schema", schema)
            if problem:
                path, problem = _fault(schema, problem)
                problem = f"at {path}: {problem}"
            for number, style in enumerate(_STYLES):
                lacks, narrower = _matcher(vocabulary, "json_schema", schema, style)
                if not lacks:
                    styles[number] = narrower
        if problem:
            raise InvalidRequestError(f"guided: the {guided.kind} cannot be used: {problem[:_MAX_MESSAGE]}")
        return Guide(matcher, vocabulary, vocab_size, styles)


def _matcher(
    vocabulary: Any, kind: str, guide: Any, style: Mapping[str, Any] = MappingProxyType(_JSON)
) -> tuple[str, Any]:
    """What is wrong ("" if nothing) and the matcher."""
    from llguidance import LLMatcher, LLParserLimits

    options = {"overrides": dict(style)} if kind == "json_schema" else {}
    grammar = getattr(LLMatcher, f"grammar_from_{kind}")(guide, **options)
    matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=LLParserLimits(**_LIMITS))
    return (matcher.get_error() if matcher.is_error() else ""), matcher


def _schema(text: str) -> Any:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"guided: the JSON schema is not JSON: {str(error)[:200]}") from None
    if not isinstance(schema, dict):
        raise InvalidRequestError(f"guided: the JSON schema is a {type(schema).__name__}; expected an object")
    return schema


def _fault(schema: Mapping[str, Any], problem: str) -> tuple[str, str]:
    """JSON pointer of the smallest part that cannot be used, and why."""
    from llguidance import LLTokenizer

    vocabulary = LLTokenizer("byte")
    shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    path, looks = "#", 0
    part: Any = schema
    while True:
        for name, child in _children(part):
            looks += 1
            if looks > _MAX_LOOKS:
                return path, problem
            if not isinstance(child, Mapping):
                continue
            found, _ = _matcher(
                vocabulary, "json_schema", {**shared, **child} if part is not schema else child
            )
            if found:
                path, part, problem = f"{path}/{name}", child, found
                break
        else:
            return path, problem


def _children(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name in _PARTS:
        inner = schema.get(name)
        if isinstance(inner, Mapping):
            yield from ((f"{name}/{key}", child) for key, child in inner.items())
    for name in _ITEMS:
        inner = schema.get(name)
        if isinstance(inner, list):
            yield from ((f"{name}/{index}", child) for index, child in enumerate(inner))
        elif isinstance(inner, Mapping):
            yield name, inner
