"""Approximate reuse of KV: what was computed for the same words elsewhere (KVShare, arXiv 2503.16525).

    match    runs of tokens that also occur in a donor's prompt, by rolling hash, verified token by token
    plan     which positions take a donor's K and V (K rotated from its old to its new position), and which
             of those are computed anew all the same: in the prefill, and later, a few in each decode step

What is taken was computed behind other words, so it is approximate: it never enters the exact tree, is never
a donor, and stays within its scope. Ints and numpy only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import Literal, NamedTuple

import numpy as np

from blockzoo.runtime.pool import PAGE_TOKENS

_BASE = np.uint64(0x9E3779B97F4A7C15)
_MAX_CANDIDATES = 4  # donors looked at per window, the newest

Selector = Literal["head-of-run", "random"]


@dataclass(frozen=True, slots=True)
class ReuseConfig:
    """How approximate reuse works.

    Attributes:
        recompute: share of the reused tokens computed anew in the prefill, 0 (naive reuse) to 1 (full).
        refresh: reused tokens computed anew beside each generated one, in order of position.
        selector: "head-of-run" takes the first tokens of each run, whose context differs the most (EPIC,
            2410.15332); "random" is the control.
        page_aligned: round what is chosen up to whole pages, which run faster than scattered tokens.
        min_share: of the tokens to compute; a prompt with fewer matched is computed in full.
        window: tokens of a window. Runs of 2 * window - 1 are always found, shorter than window never.
        max_donors: prompts remembered as donors in all; the least recently used go first.
    """

    recompute: float = 0.15
    refresh: int = 3
    selector: Selector = "head-of-run"
    page_aligned: bool = True
    min_share: float = 0.3
    window: int = 16
    max_donors: int = 1024

    def __post_init__(self) -> None:
        """Raise ValueError naming the setting that is out of range."""
        for name in ("recompute", "min_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 to 1")
        for name, low in (("refresh", 0), ("window", 2), ("max_donors", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least {low}")
        if self.selector not in SELECTORS:
            raise ValueError(f"selector is {self.selector!r}; expected {' or '.join(SELECTORS)}")


class Run(NamedTuple):
    """Tokens [start, start + length) of a prompt equal those of `donor` from donor_start on."""

    start: int
    length: int
    donor: int
    donor_start: int


class Borrowed(NamedTuple):
    """K and V to take over, before anything of the sequence runs: n tokens, L layers.

    Attributes:
        positions: int64 [n], of the sequence.
        pages, slots: int64 [L, n] and [n], where they lie.
        shift: int64 [n], by how many positions K is to be rotated.
    """

    positions: np.ndarray
    pages: np.ndarray
    slots: np.ndarray
    shift: np.ndarray


# ---- matching


def window_hashes(token_ids: np.ndarray, window: int) -> np.ndarray:
    """A polynomial hash modulo 2^64 of each window of `token_ids` int32 [n]: uint64 [n - window + 1]."""
    if token_ids.size < window:
        return np.empty(0, np.uint64)
    hashes = np.zeros(token_ids.size - window + 1, np.uint64)
    tokens = token_ids.astype(np.uint64) + np.uint64(1)
    for offset in range(window):
        hashes = hashes * _BASE + tokens[offset : offset + hashes.size]
    return hashes


class Donor(NamedTuple):
    """A prompt whose KV may be in the tree: its full pages, their keys."""

    token_ids: np.ndarray  # int32 [32 * pages]
    keys: tuple[bytes, ...]


class DonorIndex:
    """The prompts of one scope and chain by the windows they hold.

    Args:
        window: tokens of a window; those at multiples of it are indexed.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._donors: dict[int, Donor] = {}
        self._places: dict[int, list[tuple[int, int]]] = {}  # hash -> (donor, position), the oldest first

    def donor(self, number: int) -> Donor:
        """A donor that a run names."""
        return self._donors[number]

    def add(self, number: int, donor: Donor) -> None:
        """Enter a donor under a number of its own."""
        self._donors[number] = donor
        hashes = window_hashes(donor.token_ids, self._window)[:: self._window]
        for index, value in enumerate(hashes.tolist()):
            self._places.setdefault(value, []).append((number, index * self._window))

    def remove(self, number: int) -> bool:
        """Forget a donor; whether none is left."""
        donor = self._donors.pop(number)
        for value in set(window_hashes(donor.token_ids, self._window)[:: self._window].tolist()):
            places = [place for place in self._places[value] if place[0] != number]
            if places:
                self._places[value] = places
            else:
                del self._places[value]
        return not self._donors

    def match(self, token_ids: np.ndarray, start: int, end: int) -> list[Run]:
        """Runs within tokens [start, end), without overlap; each token goes with the longest around it."""
        best = np.zeros(token_ids.size, np.int64)  # length of the run each token goes with
        donor_of = np.full(token_ids.size, -1, np.int64)
        place_of = np.zeros(token_ids.size, np.int64)
        seen: dict[tuple[int, int], int] = {}  # (donor, shift) -> end of the run found there last
        hashes = window_hashes(token_ids[start:end], self._window).tolist()
        for position, value in enumerate(hashes, start):
            for number, place in self._places.get(value, [])[-_MAX_CANDIDATES:]:
                if seen.get((number, position - place), -1) > position:
                    continue
                first, length = _extend(
                    token_ids[:end], start, position, self._donors[number].token_ids, place
                )
                seen[number, position - place] = first + length
                if length < self._window:
                    continue  # another window of this hash
                run = np.arange(first, first + length)
                run = run[best[run] < length]
                best[run], donor_of[run] = length, number
                place_of[run] = run - (position - place)
        return _runs(donor_of, place_of, self._window)


def _extend(target: np.ndarray, low: int, position: int, donor: np.ndarray, place: int) -> tuple[int, int]:
    """The longest run of equal tokens through `position` and `place`: its start in the target, its length."""
    behind = min(target.size - position, donor.size - place)
    differs = target[position : position + behind] != donor[place : place + behind]
    after = int(differs.argmax()) if differs.any() else behind
    ahead = min(position - low, place)
    differs = target[position - ahead : position][::-1] != donor[place - ahead : place][::-1]
    before = int(differs.argmax()) if differs.any() else ahead
    return position - before, before + after


def _runs(donor_of: np.ndarray, place_of: np.ndarray, shortest: int) -> list[Run]:
    """Maximal runs of one donor and shift."""
    shift = place_of - np.arange(donor_of.size)
    changes = (np.diff(donor_of) != 0) | (np.diff(shift) != 0)
    borders = [0, *(np.flatnonzero(changes) + 1).tolist(), donor_of.size]
    return [
        Run(a, b - a, int(donor_of[a]), int(place_of[a]))
        for a, b in pairwise(borders)
        if donor_of[a] >= 0 and b - a >= shortest
    ]


class Donors:
    """All donors, by scope and chain, bounded in number."""

    def __init__(self, config: ReuseConfig) -> None:
        self._config = config
        self._indexes: dict[object, DonorIndex] = {}
        self._known: OrderedDict[bytes, tuple[int, object]] = OrderedDict()  # by last page key, oldest first
        self._count = 0

    def __len__(self) -> int:
        return len(self._known)

    def add(self, where: object, token_ids: np.ndarray, keys: Sequence[bytes]) -> None:
        """Remember a prompt of whole pages; `where`: scope and chain, only the same may use it."""
        if not keys:
            return
        if keys[-1] in self._known:
            self._known.move_to_end(keys[-1])
            return
        self._count += 1
        self._known[keys[-1]] = self._count, where
        index = self._indexes.setdefault(where, DonorIndex(self._config.window))
        index.add(self._count, Donor(token_ids.copy(), tuple(keys)))
        while len(self._known) > self._config.max_donors:
            _, (number, place) = self._known.popitem(last=False)
            if self._indexes[place].remove(number):
                del self._indexes[place]

    def match(self, where: object, token_ids: np.ndarray, start: int, end: int) -> list[tuple[Run, Donor]]:
        """Runs of tokens [start, end) that donors of `where` hold."""
        index = self._indexes.get(where)
        if index is None:
            return []
        return [(run, index.donor(run.donor)) for run in index.match(token_ids, start, end)]


# ---- selection

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


SELECTORS: dict[str, SelectorFunction] = {"head-of-run": head_of_run, "random": at_random}


def reused_positions(runs: Sequence[tuple[int, int]], num_tokens: int, config: ReuseConfig) -> np.ndarray:
    """bool [num_tokens]: the tokens of (start, length) `runs` whose KV is taken over as it is."""
    reused = np.zeros(num_tokens, bool)
    for start, length in runs:
        reused[start : start + length] = True
    select = SELECTORS[config.selector]
    if config.page_aligned:
        ends = [(start // PAGE_TOKENS, -(-(start + length) // PAGE_TOKENS)) for start, length in runs]
        pages = select([(first, end - first) for first, end in ends], config.recompute)
        chosen = (pages[:, None] * PAGE_TOKENS + np.arange(PAGE_TOKENS)).ravel()
        chosen = chosen[chosen < num_tokens]
    else:
        chosen = select(runs, config.recompute)
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


# ---- K at another position


def rotate(keys: np.ndarray, shift: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotate keys float32 [..., tokens, heads, head_dim] by `shift` positions, int [tokens], of any sign.

    `cos` and `sin` float32 [positions, head_dim] are the tables of the plain rotary embedding, halves
    duplicated: the rotation by a difference of positions is that of the position itself.
    """
    half = keys.shape[-1] // 2
    distance = np.abs(shift)
    c = cos[distance, None, :half]
    s = sin[distance, None, :half] * np.sign(shift).astype(np.float32)[:, None, None]
    low, high = keys[..., :half], keys[..., half:]
    return np.concatenate([low * c - high * s, high * c + low * s], axis=-1)
