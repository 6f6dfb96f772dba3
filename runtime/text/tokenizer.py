"""Text to token ids and back, over the `tokenizers` library.

Knows nothing of requests.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import AddedToken
from tokenizers import Tokenizer as TokenizersTokenizer

from blockzoo.runtime.api.errors import InvalidRequestError
from blockzoo.zoo.errors import ZooError

if TYPE_CHECKING:
    from blockzoo.runtime.text.chat import ChatTemplate

# After one of these a word is neither at the start of a text nor behind a space, where many tokenizers
# write it with other tokens.
_ANCHORS = ("\n", "(", '"')
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
Symbols = tuple[str | int, ...]
"""A text as characters and ids of special tokens."""


def _each_byte(error: UnicodeError) -> tuple[str, int]:
    """U+FFFD for each byte that is in no character, as byte fallback does it."""
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("blockzoo.each_byte", _each_byte)


class TokenizerError(ZooError):
    """A tokenizer folder that cannot be used."""


class Tokenizer:
    """The tokenizer of one model. Thread-safe."""

    def __init__(self, tokenizer: TokenizersTokenizer, folder: Path | None = None) -> None:
        decoders = _decoders(tokenizer)
        if "ByteLevel" in decoders and len(decoders) > 1:
            raise TokenizerError(
                f"The tokenizer's decoder is a sequence of {', '.join(decoders)}; expected ByteLevel alone, "
                "or none: tokens could not be shown one by one."
            )
        self._is_byte_level = "ByteLevel" in decoders
        self._has_byte_fallback = "ByteFallback" in decoders
        # settings for training batches that some tokenizer.json files carry along
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._folder = folder  # of the chat template

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Reads `tokenizer.json` from the folder `path`.

        Raises:
            TokenizerError: the file is missing or damaged.
        """
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            others = sorted(p.name for p in folder.glob("*") if p.suffix in {".model", ".tiktoken"})
            seen = f"only {', '.join(others)}" if others else "no tokenizer file"
            raise TokenizerError(
                f"{folder} has {seen}; expected tokenizer.json. Write it with "
                "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) of transformers."
            )
        try:
            library = TokenizersTokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(
                f"{file} cannot be read: {error}. Copy it again from the model's source, or update the "
                "package tokenizers if the file is newer."
            ) from error
        return cls(library, folder)

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """What makes prompts of messages, read when first asked for. Raises ZooError: it is damaged."""
        from blockzoo.runtime.text.chat import ChatTemplate  # jinja2 takes time to import

        return None if self._folder is None else ChatTemplate.load(self._folder)

    def chat_template_of(self, model: str) -> ChatTemplate:
        """`chat_template`, for requests to `model`. Raises InvalidRequestError where there is none."""
        if self.chat_template is None:
            raise InvalidRequestError(
                f"model {model} has no chat template: put one as chat_template.jinja into the model's folder "
                "and compile it again, or send the prompt as one text"
            )
        return self.chat_template

    def to_json(self) -> str:
        """The content of a `tokenizer.json`."""
        return self._tokenizer.to_str()

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; a model's logits may be wider (padding)."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @cached_property
    def longest_token(self) -> int:
        """Bytes of the longest token as the file writes it, at least those of a text that it stands for."""
        return max(len(token.encode()) for token in self._tokenizer.get_vocab(with_added_tokens=True))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, by default with what the tokenizer puts around it (such as <s>).

        What it puts before a text is put there once: not before a text that begins with it already, as texts
        from chat templates do. (transformers would put it twice.)

        Raises:
            InvalidRequestError: `text` is no text, or has lone surrogates (broken \\ud800-style escapes).
        """
        ids = self._encode(text, add_special_tokens)
        if not add_special_tokens:
            return ids
        lead = list(self.around[0])
        return ids[len(lead) :] if self._begins_with(lead, text, ids[len(lead) :]) else ids

    def encode_part(self, text: str) -> list[int]:
        """Token ids of a text behind what begins a prompt: without that, also where it is in the text.

        Raises: as `encode`.
        """
        ids = self._encode(text, add_special_tokens=False)
        lead = list(self.around[0])
        return ids[len(lead) :] if self._begins_with(lead, text, ids) else ids

    def _begins_with(self, lead: list[int], text: str, ids: list[int]) -> bool:
        """Whether a text that is tokenized to `ids` begins with what is put before any."""
        if not lead or ids[: len(lead)] != lead:
            return False
        return text.lstrip().startswith(self._token(lead[0]) or "")  # no unknown word with the id of <s>

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if not isinstance(text, str):
            raise InvalidRequestError(f"A text to tokenize is of type {type(text).__name__}; expected str.")
        try:
            # unlike `encode` it lets other threads run meanwhile, and makes no offsets
            (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            return encoding.ids
        except TypeError as error:  # the library's answer to str that is not valid Unicode
            raise InvalidRequestError(
                "The text has lone surrogates, which are no characters; expected valid Unicode."
            ) from error
        except BaseException as error:  # the library's panics are no Exception
            if type(error).__name__ != "PanicException":
                raise
            raise InvalidRequestError(f"The tokenizer cannot take this text: {error}") from error

    @cached_property
    def around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What `encode` puts before and behind a text, such as <s>."""
        whole, bare = self._encode("a", True), self._encode("a", False)
        start = next(i for i in range(len(whole) + 1) if whole[i : i + len(bare)] == bare)
        return tuple(whole[:start]), tuple(whole[start + len(bare) :])

    @cached_property
    def ends_line(self) -> np.ndarray:
        """bool [vocab_size]: whether a token's text holds a line break."""
        texts = self._tokenizer.decode_batch([[i] for i in range(self.vocab_size)], skip_special_tokens=False)
        return np.array(["\n" in text for text in texts], bool)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`; bytes that are no valid UTF-8 come out as U+FFFD, unknown ids as nothing."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    @cached_property
    def special_tokens(self) -> dict[int, AddedToken]:
        """The tokens that `decode` leaves out, by id."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {token_id: token for token_id, token in added.items() if token.special}

    def with_special_tokens(self, text: str) -> Symbols:
        """A text as its characters, but for special tokens in it their ids."""
        symbols: list[str | int] = []
        end = 0
        for match in self._special_texts.finditer(text) if self._special_texts else ():
            symbols += [*text[end : match.start()], int((match.lastgroup or "")[1:])]
            end = match.end()
        return (*symbols, *text[end:])

    @cached_property
    def _special_texts(self) -> re.Pattern[str] | None:
        """Matches a special token, in a group named after its id, as the tokenizer reads it."""
        tokens = [item for item in self.special_tokens.items() if item[1].content]
        tokens.sort(key=lambda item: -len(item[1].content))
        return re.compile("|".join(_special_text(*item) for item in tokens)) if tokens else None

    def bytes_of(self, token_id: int) -> bytes | None:
        """The bytes that a token stands for wherever it is; None: its text depends on those before it."""
        token = self._token(token_id)
        if token is None:  # decoded to nothing
            return b""
        if self._is_byte_level:
            data = [_BYTE_OF_CHAR.get(char) for char in token]
            return token.encode() if None in data else bytes(data)  # type: ignore[arg-type]
        byte = _BYTE_TOKEN.fullmatch(token) if self._has_byte_fallback else None
        return None if byte is None else bytes.fromhex(byte[1])

    @property
    def on_broken_bytes(self) -> str:
        """How bytes of `bytes_of` that are no UTF-8 are decoded, as an error handler of `codecs`."""
        return "replace" if self._is_byte_level else "blockzoo.each_byte"

    def _token(self, token_id: int) -> str | None:
        return self._tokenizer.id_to_token(token_id)

    def bad_word_ids(self, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
        """Token sequences to ban so that `words` are not generated; for `SamplerState`.

        Each word is tokenized at the start of a text, behind a space and behind other characters. A
        model may still spell a word in tokens it would not normally be written with.
        """
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            bare = word.lstrip(" ")
            for variant in (bare, f" {bare}") if bare else (word,):
                found[tuple(self.encode(variant, add_special_tokens=False))] = None
            for anchor in _ANCHORS:
                before = self.encode(anchor, add_special_tokens=False)
                both = self.encode(anchor + bare, add_special_tokens=False)
                if bare and both[: len(before)] == before:
                    found[tuple(both[len(before) :])] = None
        found.pop((), None)
        return tuple(found)


def _decoders(tokenizer: TokenizersTokenizer) -> list[str]:
    """The types of the decoders that make text of tokens, but for Fuse, which changes none."""
    pending = [] if tokenizer.decoder is None else [json.loads(tokenizer.decoder.__getstate__())]
    types = []
    while pending:
        decoder = pending.pop(0)
        pending += decoder.get("decoders", ())
        types.append(decoder["type"])
    return [each for each in types if each not in ("Sequence", "Fuse")]


def _special_text(token_id: int, token: AddedToken) -> str:
    # white space beside the token that the tokenizer takes as part of it
    before, behind = r"\s*" if token.lstrip else "", r"\s*" if token.rstrip else ""
    return f"{before}(?P<t{token_id}>{re.escape(token.content)}){behind}"


def _byte_of_char() -> dict[str, int]:
    """The characters of byte-level tokens (GPT-2): printable bytes as they are, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted({*range(0x100)} - {*printable})
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()
