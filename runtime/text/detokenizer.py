"""From generated tokens to text that may be shown, one token at a time.

Two things are held back: bytes that are no whole character yet, and text that may turn out to be the
beginning of a stop word. `tokenizers.decoders.DecodeStream` does the first of these, but it keeps its
tokens to itself (what is left at the end cannot be had), gives up with "Invalid prefix encountered" on
some byte sequences, and decodes ever longer runs of tokens while they make no valid text; hence the
bytes of tokens below.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from itertools import islice

from blockzoo.runtime.api.request import SamplingParams
from blockzoo.runtime.text.tokenizer import Symbols, Tokenizer

_CONTEXT = 4  # tokens of the prompt that matter: one before the at most three of an unfinished character


class Detokenizer:
    """Text of one request.

    The pushes and the flush together give the text of `Characters`, cut at the stop word that is completed
    first (of several completed by the same character, the longest). Where the pieces lie is decided by
    characters, so the cut does not depend on how the text was split into tokens.

    Stop words are looked for in the text as shown. One that holds a special token's text is also found
    where that token is generated and, with `skip_special_tokens`, not shown. None ends the text before
    `min_tokens` tokens are pushed.

    Args:
        tokenizer: the model's.
        params: stop, include_stop, min_tokens and skip_special_tokens matter here.
        prompt_token_ids: tokens before the generated ones.
    """

    def __init__(
        self, tokenizer: Tokenizer, params: SamplingParams, prompt_token_ids: Sequence[int] = ()
    ) -> None:
        self.stopped = False
        self._hidden = tokenizer.special_tokens if params.skip_special_tokens else {}
        self._include_stop = params.include_stop
        self._min_tokens = params.min_tokens
        self._num_tokens = 0
        words: list[tuple[str, Symbols]] = [(word, tuple(word)) for word in params.stop]
        words += [(word, tokenizer.with_special_tokens(word)) for word in params.stop]
        self._stop_words = _StopWords(words)
        self._held = ""  # characters that may begin a stop word
        shown = (
            token
            for token in reversed(prompt_token_ids)
            if token not in self._hidden and tokenizer.bytes_of(token) != b""
        )
        self._characters = Characters(tokenizer, [*islice(shown, _CONTEXT)][::-1])

    def push(self, token_id: int) -> str:
        """Takes the next token and returns the text that it makes safe to show; nothing once stopped."""
        if self.stopped:
            return ""
        self._num_tokens += 1
        if token_id in self._hidden:
            return self._up_to_stop([token_id])
        return self._up_to_stop(self._characters.push(token_id))

    def end(self, token_id: int) -> str:
        """Takes the last token, which ends the text and is not shown, but as (the end of) a stop word."""
        if self.stopped:
            return ""
        self._num_tokens += 1
        return self._up_to_stop([token_id])

    def flush(self) -> str:
        """Ends the text: returns what was held back, U+FFFD in place of characters left unfinished."""
        if self.stopped:
            return ""
        text = self._up_to_stop(self._characters.flush())
        if not self.stopped:
            text += self._held
        self._held = ""
        return text

    def _up_to_stop(self, symbols: Iterable[str | int]) -> str:
        """Moves characters, or a hidden token, past the search for stop words; returns what is certain."""
        may_stop = self._num_tokens >= self._min_tokens
        text = self._held
        for symbol in symbols:
            if isinstance(symbol, str):
                text += symbol
            found = self._stop_words.completed_by(symbol)
            if found is not None and may_stop:
                word, num_chars = found
                self.stopped = True
                self._held = ""
                if not num_chars:  # tokens alone: an unfinished character stands before them
                    text += self._characters.flush()
                return text[: len(text) - num_chars] + (word if self._include_stop else "")
        certain = len(text) - self._stop_words.num_begun
        self._held = text[certain:]
        return text[:certain]


class Characters:
    """Text of tokens, in whole characters.

    The pushes and the flush together give `decode(prompt + tokens)` without `decode(prompt)`; a character
    that the prompt leaves unfinished is shown where the tokens end it, and U+FFFD where they do not is the
    prompt's. In one case it is not the decoding of the library: where tokens that stand for single bytes (of
    a BPE model with byte fallback) are no valid UTF-8, the library turns all of their run to U+FFFD, however
    long, so that nothing of a run could be shown before its end; here it is those bytes alone that are in no
    character.

    Args:
        prompt_token_ids: the last of those before that have a text; special tokens that are not to be shown
            must be left out, here and of what is pushed.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._bytes = codecs.getincrementaldecoder("utf-8")(tokenizer.on_broken_bytes)
        self._context: list[int] = []  # the token that gave the last text; none at the start of a text
        self._of_prompt = ""
        for token_id in prompt_token_ids[-_CONTEXT:]:
            self.push(token_id)
        unfinished, _ = self._bytes.getstate()
        self._of_prompt = unfinished.decode("utf-8", tokenizer.on_broken_bytes)

    def push(self, token_id: int) -> str:
        """The characters that this token ends."""
        data = self._tokenizer.bytes_of(token_id)
        if data is None:
            return self._without_prompt(self._bytes.decode(b"", True) + self._behind_context(token_id))
        text = self._bytes.decode(data)
        if data == b" " and not self._context:  # some decoders drop a space at the start of a text
            text = self._decode([token_id])
        if data:
            self._context = [token_id]
        return self._without_prompt(text)

    def flush(self) -> str:
        """U+FFFD in place of a character left unfinished."""
        return self._without_prompt(self._bytes.decode(b"", True))

    def _behind_context(self, token_id: int) -> str:
        """Text of a token whose decoding may depend on whether, and what, text stands before it."""
        text = self._decode([*self._context, token_id])[len(self._decode(self._context)) :]
        if text or not self._context:
            self._context = [token_id]
        return text

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)

    def _without_prompt(self, text: str) -> str:
        if text and self._of_prompt:
            text = text.removeprefix(self._of_prompt)  # broken; or else begins with the character, now whole
            self._of_prompt = ""
        return text


class _StopWords:
    """Searches for several words at once, symbol by symbol (Knuth, Morris and Pratt 1977).

    Args:
        words: what is searched for, as text and in symbols: characters, and ids of tokens that are not shown.
            Words of characters alone do not see such tokens.
    """

    def __init__(self, words: Sequence[tuple[str, Symbols]]) -> None:
        self._words = [_Word(text, symbols) for text, symbols in dict.fromkeys(words)]

    @property
    def num_begun(self) -> int:
        """How many of the last characters may belong to a stop word."""
        return max((word.num_chars[word.matched] for word in self._words), default=0)

    def completed_by(self, symbol: str | int) -> tuple[str, int] | None:
        """Takes the next symbol; the longest word that it completes, and the characters shown of it."""
        completed = [word for word in self._words if word.completed_by(symbol)]
        if not completed:
            return None
        longest = max(completed, key=lambda word: word.num_chars[-1])
        return longest.text, longest.num_chars[-1]


class _Word:
    """A stop word: its text, its symbols, and how many of them, from the first, what was read ends with."""

    def __init__(self, text: str, symbols: Symbols) -> None:
        self.text, self._symbols = text, symbols
        self.matched = 0
        self._has_tokens = not all(isinstance(symbol, str) for symbol in symbols)
        self._borders = _borders(symbols)
        self.num_chars = [0]  # [len(symbols) + 1]: characters among the first n symbols
        for symbol in symbols:
            self.num_chars.append(self.num_chars[-1] + isinstance(symbol, str))

    def completed_by(self, symbol: str | int) -> bool:
        if isinstance(symbol, int) and not self._has_tokens:
            return False
        symbols, matched = self._symbols, self.matched
        while matched and symbols[matched] != symbol:
            matched = self._borders[matched]
        matched += symbols[matched] == symbol
        completed = matched == len(symbols)
        self.matched = self._borders[matched] if completed else matched
        return completed


def _borders(symbols: Symbols) -> list[int]:
    """For each n up to the number of symbols: the longest proper prefix of symbols[:n] that also ends it."""
    borders = [0, 0]
    for symbol in symbols[1:]:
        length = borders[-1]
        while length and symbols[length] != symbol:
            length = borders[length]
        borders.append(length + (symbols[length] == symbol))
    return borders
