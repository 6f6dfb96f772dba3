"""Which of the reused tokens are computed anew, and how they are laid out to run.

Ints and numpy only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil

import numpy as np

from blockzoo.engines.base import PAGE_TOKENS, pages_for
from blockzoo.runtime.approx.config import ReuseConfig

LINE_REACH = 16
"""Tokens of a line that are taken to either side, at most."""

SelectorFunction = Callable[[Sequence[tuple[int, int]], float], np.ndarray]


def head_of_run(runs: Sequence[tuple[int, int]], share: float) -> np.ndarray:
    """The first `share` of each (start, length), rounded up: positions int64 [n]."""
    heads = [np.arange(start, start + ceil(share * length)) for start, length in runs]
    return np.concatenate([np.empty(0, np.int64), *heads])


def at_random(runs: Sequence[tuple[int, int]], share: float) -> np.ndarray:
    """A random `share` of all positions, the same for the same runs: int64 [n]."""
    everything = head_of_run(runs, 1.0)
    rng = np.random.default_rng(everything.size)
    return rng.choice(everything, ceil(share * everything.size), replace=False)


_BLIND: dict[str, SelectorFunction] = {"head-of-run": head_of_run, "random": at_random}


def _each(select: SelectorFunction, runs: Sequence[tuple[int, int]], shares: Sequence[float]) -> np.ndarray:
    """What is selected of each run by its share."""
    chosen = [select([run], share) for run, share in zip(runs, shares, strict=True)]
    return np.concatenate([np.empty(0, np.int64), *chosen])


def highest(scores: np.ndarray, matched: np.ndarray, share: float, page_aligned: bool) -> np.ndarray:
    """Those with the highest scores, until they are `share` of the matched tokens.

    Args:
        scores: float [num_tokens], above 0 where computing anew may help.
        matched: bool [num_tokens].
        share: 0 to 1.
        page_aligned: take whole pages, by the sums of their matched tokens' scores.

    Returns:
        bool [num_tokens], matched tokens only.
    """
    units = np.arange(matched.size) // (PAGE_TOKENS if page_aligned else 1)
    sums = np.bincount(units, np.where(matched, scores, 0.0))
    counts = np.bincount(units, matched)
    order = np.argsort(-sums, kind="stable")
    before = np.cumsum(counts[order]) - counts[order]  # tokens chosen ahead of each
    taken = order[(before < share * matched.sum()) & (sums[order] > 0)]
    chosen = np.zeros(sums.size, bool)
    chosen[taken] = True
    return chosen[units] & matched


def lines_of_highest(
    scores: np.ndarray, matched: np.ndarray, share: float, line_ends: np.ndarray
) -> np.ndarray:
    """The lines around the tokens with the highest scores, until they are `share` of the matched tokens.

    Args:
        scores, matched, share: as for `highest`.
        line_ends: bool [num_tokens], tokens that end a line.

    Returns:
        bool [num_tokens], matched tokens only.
    """
    places = np.arange(matched.size)
    starts = np.maximum.accumulate(np.where(np.append(True, line_ends[:-1]), places, 0))
    ends = np.minimum.accumulate(np.where(line_ends, places, matched.size)[::-1])[::-1] + 1
    starts, ends = np.maximum(starts, places - LINE_REACH), np.minimum(ends, places + LINE_REACH + 1)
    chosen = np.zeros(matched.size, bool)
    wanted, count = share * matched.sum(), 0
    scores = np.where(matched, scores, 0.0)
    for token in np.argsort(-scores, kind="stable"):
        if count >= wanted or scores[token] <= 0:
            break
        if not chosen[token]:
            line = slice(starts[token], ends[token])
            count += int((matched[line] & ~chosen[line]).sum())
            chosen[line] = matched[line]
    return chosen


def matched_positions(runs: Sequence[tuple[int, int]], num_tokens: int) -> np.ndarray:
    """bool [num_tokens]: the tokens of (start, length) `runs`."""
    matched = np.zeros(num_tokens, bool)
    for start, length in runs:
        matched[start : start + length] = True
    return matched


def within_budget(wanted: Sequence[int], budget: int) -> list[int]:
    """Of several numbers of tokens as many as `budget` allows: the largest give way."""
    left, cap = budget, 0
    for index, count in enumerate(sorted(wanted)):
        cap = min(count, left // (len(wanted) - index))
        left -= cap
        if cap < count:
            break
    return [min(count, cap) for count in wanted]


def reused_positions(
    runs: Sequence[tuple[int, int]], shares: Sequence[float], num_tokens: int, config: ReuseConfig
) -> np.ndarray:
    """bool [num_tokens]: the tokens of (start, length) `runs` whose KV stays as taken over, where the
    selector need not look at it; `shares` of each run's tokens are computed anew."""
    reused = matched_positions(runs, num_tokens)
    if config.recompute == 0:
        return reused
    select = _BLIND[config.selector]
    if config.unit != "token":
        ends = [(start // PAGE_TOKENS, pages_for(start + length)) for start, length in runs]
        pages = _each(select, [(first, end - first) for first, end in ends], shares)
        chosen = (pages[:, None] * PAGE_TOKENS + np.arange(PAGE_TOKENS)).ravel()
        chosen = chosen[chosen < num_tokens]
    else:
        chosen = _each(select, runs, shares)
    reused[chosen] = False
    return reused


def pieces(positions: np.ndarray, num_tokens: int) -> list[tuple[int, int]]:
    """Cut ascending positions into (start, end) to run as sequences of their own, in the middle of others.

    An attention operator zeroes V from a sequence's end to the end of its page where the sequence has more
    than one token. So a piece of several tokens ends on a page border, or where nothing is known behind:
    at `num_tokens`. What is left over runs token by token.
    """
    if not positions.size:
        return []
    starts = np.flatnonzero(np.diff(positions, prepend=positions[0] - 2) != 1)
    result = []
    for first, last in zip(starts, [*starts[1:], positions.size], strict=True):
        start, end = int(positions[first]), int(positions[last - 1]) + 1
        border = end if end == num_tokens else end - end % PAGE_TOKENS
        if border > start:
            result.append((start, border))
        result += [(position, position + 1) for position in range(max(start, border), end)]
    return result
