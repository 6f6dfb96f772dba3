"""From generated tokens to text that may be shown, one token at a time.

Two things are held back: bytes that are no whole character yet, and text that may turn out to be the
beginning of a stop word. `tokenizers.decoders.DecodeStream` does the first of these, but it keeps its
tokens to itself (what is left at the end cannot be had), gives up with "Invalid prefix encountered" on
some byte sequences, and decodes ever longer runs of tokens while they make no valid text; hence the
window below, which is the same idea with an end and a bound.
"""

from __future__ import annotations

from collections.abc import Sequence

from blockzoo.runtime.api.request import SamplingParams
from blockzoo.runtime.text.tokenizer import Tokenizer

_UNFINISHED = "\ufffd"  # what bytes decode to while they are no whole character
_MAX_WINDOW = 32  # tokens decoded at once; a character takes 4 at most
_CONTEXT = 8  # tokens of the prompt looked at


class Detokenizer:
    """Text of one request.

    The pushes and the flush together give exactly `tokenizer.decode` of the tokens, cut at the stop word
    that is completed first (of several completed by the same character, the longest). Where the pieces
    lie is decided by characters, so the cut does not depend on how the text was split into tokens.

    Stop words are looked for in the text as shown: with `skip_special_tokens` a special token's text is
    not in it. None ends the text before `min_tokens` tokens are pushed.

    Args:
        tokenizer: the model's.
        params: stop, include_stop, min_tokens and skip_special_tokens matter here.
        prompt_token_ids: tokens before the generated ones (the last 8 count). With them a tokenizer that
            drops a space at the start of a text does not drop it between the prompt and the answer.
    """

    def __init__(
        self, tokenizer: Tokenizer, params: SamplingParams, prompt_token_ids: Sequence[int] = ()
    ) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._skip_special_tokens = params.skip_special_tokens
        self._include_stop = params.include_stop
        self._min_tokens = params.min_tokens
        self._num_tokens = 0
        self._stop_words = _StopWords(params.stop)
        self._held = ""  # characters that may begin a stop word
        # The window is the tokens that gave the last text, for context, and those not yet shown:
        #     decode(window) = text shown before (_num_shown characters) + text to come
        self._window = list(prompt_token_ids[-_CONTEXT:])
        self._num_shown = len(self._decode(self._window).rstrip(_UNFINISHED))
        self._num_context = len(self._window)

    def push(self, token_id: int) -> str:
        """Takes the next token and returns the text that it makes safe to show; nothing once stopped."""
        if self.stopped:
            return ""
        self._num_tokens += 1
        return self._up_to_stop(self._next_text(token_id))

    def flush(self) -> str:
        """Ends the text: returns what was held back, U+FFFD in place of characters left unfinished."""
        if self.stopped:
            return ""
        text = self._up_to_stop(self._decode(self._window)[self._num_shown :])
        if not self.stopped:
            text += self._held
        self._held = ""
        self._window, self._num_shown, self._num_context = [], 0, 0
        return text

    def _next_text(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith(_UNFINISHED):
            return self._release_whole(text) if len(self._window) > _MAX_WINDOW else ""
        new = text[self._num_shown :]
        if new:
            del self._window[: self._num_context]
            self._num_context = len(self._window)
            self._num_shown = len(self._decode(self._window))
        elif self._num_shown or len(self._window) > _MAX_WINDOW:
            self._window.pop()  # a skipped token; at the start it could be a space not shown yet
        return new

    def _release_whole(self, text: str) -> str:
        """Shows what is settled of a window full of bytes that make no characters."""
        for cut in range(len(self._window) - 1, len(self._window) - 5, -1):
            head = self._decode(self._window[:cut])
            # true only where no character crosses the cut, nor can with the bytes to come
            if head + self._decode(self._window[cut:]) == text:
                break
        else:
            head = text  # a decoder whose output depends on more than the bytes: take it as it is
            cut = len(self._window)
        new = head[self._num_shown :]
        self._window, self._num_shown, self._num_context = self._window[cut:], 0, 0
        return new

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, self._skip_special_tokens) if token_ids else ""

    def _up_to_stop(self, text: str) -> str:
        """Moves `text` past the search for stop words; returns what is certain."""
        may_stop = self._num_tokens >= self._min_tokens
        start = len(self._held)
        text = self._held + text
        for end in range(start + 1, len(text) + 1):
            length = self._stop_words.completed_by(text[end - 1])
            if length and may_stop:
                self.stopped = True
                self._held = ""
                return text[: end if self._include_stop else end - length]
        certain = len(text) - self._stop_words.num_begun
        self._held = text[certain:]
        return text[:certain]


class _StopWords:
    """Searches for several words at once, character by character (Knuth, Morris and Pratt 1977)."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = [(word, _borders(word)) for word in words]
        self._matched = [0] * len(words)  # per word, how much of its beginning the text ends with

    @property
    def num_begun(self) -> int:
        """How many of the last characters may belong to a stop word."""
        return max(self._matched, default=0)

    def completed_by(self, char: str) -> int:
        """Takes the next character; length of the longest word that it completes, or 0."""
        longest = 0
        for index, (word, borders) in enumerate(self._words):
            matched = self._matched[index]
            while matched and word[matched] != char:
                matched = borders[matched]
            if word[matched] == char:
                matched += 1
            if matched == len(word):
                longest = max(longest, matched)
                matched = borders[matched]
            self._matched[index] = matched
        return longest


def _borders(word: str) -> list[int]:
    """For each n up to the length of `word`: the longest proper prefix of word[:n] that also ends it."""
    borders = [0, 0]
    for char in word[1:]:
        length = borders[-1]
        while length and word[length] != char:
            length = borders[length]
        borders.append(length + (word[length] == char))
    return borders
