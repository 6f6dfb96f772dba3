"""Prompt lookup: what followed the last time that the text ended like this (Saxena, 2023).

It costs no model, and is right where answers repeat what stands in the prompt or in other answers: quotes,
edits, records.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

from blockzoo.runtime.draft.guesses import Context, Guess, Kind

LEAST = 2
"""Tokens that must agree."""
MOST = 16
"""Tokens that are compared."""
_GRADES = (LEAST, 3, 5, 9, MOST)  # agreeing tokens from which a guess is surer
_RESUMED = 4  # tokens that agree before one that does not, for the copy to be taken up again behind it
_SEPARATOR = -1


class PromptLookup:
    """Looks in the request's own prompt and answer."""

    name = "prompt"

    def propose(self, context: Context, limit: int) -> list[Guess]:
        """What followed the longest of the latest equal endings; where that runs up to now, over and over."""
        tokens = context.token_ids
        found = find(tokens[:-1], tokens[-MOST:])
        resumed = _resumed(tokens[:-2], tokens) if found is None or found[1] < _RESUMED else None
        if resumed is not None:
            place, grade = resumed, 0
        elif found is not None:
            place, grade = found[0], _grade(found[1])
        else:
            return []
        following = tokens[place + np.arange(limit) % (tokens.size - place)]
        return _guesses(self.name, following, grade)


class AnswerLookup:
    """Looks in answers that were given in the same scope.

    Args:
        max_scopes: of which answers are kept; the one used longest ago goes first.
        max_tokens: of answers in each, the latest.
    """

    name = "answers"

    def __init__(self, max_scopes: int = 256, max_tokens: int = 8192) -> None:
        self._max_scopes, self._max_tokens = max_scopes, max_tokens
        self._kept: OrderedDict[Hashable, np.ndarray] = OrderedDict()  # int32 [n], answers and separators

    def remember(self, scope: Hashable, token_ids: np.ndarray, prompt_len: int) -> None:
        """Keep an answer, int32 [n] with its prompt, of which the end is kept too."""
        begin = max(0, prompt_len - MOST)
        kept = self._kept.pop(scope, np.empty(0, np.int32))
        text = np.concatenate([kept, token_ids[begin:], [_SEPARATOR]]).astype(np.int32)
        self._kept[scope] = text[-self._max_tokens :]
        while len(self._kept) > self._max_scopes:
            self._kept.popitem(last=False)

    def keep(self, wanted: Callable[[Any], bool]) -> None:
        """Forget the answers of any other scope."""
        for scope in [scope for scope in self._kept if not wanted(scope)]:
            del self._kept[scope]

    def propose(self, context: Context, limit: int) -> list[Guess]:
        """What followed the longest of the latest equal endings, up to the end of that answer."""
        kept = None if context.scope is None else self._kept.get(context.scope)
        if kept is None:
            return []
        self._kept.move_to_end(context.scope)
        found = find(kept[:-1], context.token_ids[-MOST:])
        if found is None or found[1] < _RESUMED:
            place = _resumed(kept[:-2], context.token_ids)
            found = found if place is None or kept[place - 1] == _SEPARATOR else (place, 0)
        if found is None:
            return []
        place, length = found
        following = kept[place : place + limit]
        ends = np.flatnonzero(following == _SEPARATOR)
        return _guesses(self.name, following[: ends[0]] if ends.size else following, _grade(length))


def find(text: np.ndarray, ending: np.ndarray) -> tuple[int, int] | None:
    """Where `text` int32 [n] agrees with an ending int32 [m] the longest, of several the last: the place
    behind that, and how many tokens agree. None: fewer than LEAST do."""
    places = np.flatnonzero(text == ending[-1]) + 1
    length = 1
    while places.size and length < ending.size:
        longer = places[places > length]
        longer = longer[text[longer - 1 - length] == ending[-1 - length]]
        if not longer.size:
            break
        places, length = longer, length + 1
    return (int(places[-1]), length) if places.size and length >= LEAST else None


def _resumed(text: np.ndarray, tokens: np.ndarray) -> int | None:
    """Where a copy from a text goes on in which the last token stands for another one; None: nowhere."""
    found = find(text, tokens[-1 - MOST : -1])
    return found[0] + 1 if found is not None and found[1] >= _RESUMED else None


def _grade(length: int) -> int:
    return sum(length >= least for least in _GRADES)


def _guesses(drafter: str, token_ids: np.ndarray, grade: int) -> list[Guess]:
    kind = Kind(drafter, grade)
    return [Guess(token_id, kind) for token_id in token_ids.tolist()]
