"""Text to token ids and back, over the `tokenizers` library.

Knows nothing of chat templates and of requests.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as TokenizersTokenizer

from blockzoo.runtime.errors import InvalidRequestError
from blockzoo.zoo.errors import ZooError

# After one of these a word is neither at the start of a text nor behind a space, where many tokenizers
# write it with other tokens.
_ANCHORS = ("\n", "(", '"')


class TokenizerError(ZooError):
    """A tokenizer folder that cannot be used."""


class Tokenizer:
    """The tokenizer of one model. Thread-safe."""

    def __init__(self, tokenizer: TokenizersTokenizer) -> None:
        # settings for training batches that some tokenizer.json files carry along
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer

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
            return cls(TokenizersTokenizer.from_file(str(file)))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(
                f"{file} cannot be read: {error}. Copy it again from the model's source, or update the "
                "package tokenizers if the file is newer."
            ) from error

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

        Raises:
            InvalidRequestError: `text` is no text, or has lone surrogates (broken \\ud800-style escapes).
        """
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

    @cached_property
    def around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What `encode` puts before and behind a text, such as <s>."""
        whole, bare = self.encode("a"), self.encode("a", add_special_tokens=False)
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
