"""Approximate reuse of KV: what was computed for the same words elsewhere (KVShare, arXiv 2503.16525).

    match      runs of tokens that also occur in a donor's prompt, by rolling hash, verified token by token
    selection  which positions take a donor's K and V (K rotated from its old to its new position), and which
               of those are computed anew all the same: in the prefill, and later, a few in each decode step
    survey     a first pass over what was taken, for selectors that must see it

What is taken was computed behind other words, so it is approximate: it never enters the exact tree, is never
a donor, and stays within its scope. Ints and numpy only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

import numpy as np

_BASE = np.uint64(0x9E3779B97F4A7C15)
_MAX_CANDIDATES = 4  # donors looked at per window, the newest

Selector = Literal["query", "head-of-run", "deviation", "importance*deviation", "random"]
RefreshOrder = Literal["position", "importance"]
Unit = Literal["line", "page", "token"]


@dataclass(frozen=True, slots=True)
class ReuseConfig:
    """How approximate reuse works.

    Attributes:
        recompute: share of the reused tokens computed anew in the prefill, 0 (naive reuse) to 1 (full).
        refresh: reused tokens computed anew beside each generated one.
        refresh_order: "position" refreshes from the front, so that each is computed over exact KV and a
            drained queue leaves that of a full prefill; "importance" what received the most attention first.
        selector: what is computed anew in the prefill.
            "query": what the unmatched end of the prompt (the question) attends to: it runs first over the
            KV as taken, and its attention is read.
            "head-of-run": the first tokens of each run, whose context differs the most (EPIC, 2410.15332).
            "deviation": where V differs the most once the first `check_layers` have run in full (CacheBlend,
            2405.16444).
            "importance*deviation": that times the attention from the end of the prompt (KVShare).
            "random": the control.
        head: tokens at the front of each run that are always computed anew, beside the share: what stood at
            the front of another prompt draws attention wherever it is put.
        check_layers: that run in full for the selectors that look at deviations. Models that have no more
            are computed in full.
        rounds: of looking ("query"): in each but the first, what was chosen before looks too.
        unit: what is chosen at a time. "line": the line of text around a token, at most 16 tokens to either
            side (selectors that do not look take pages). "page": whole pages, which run faster than scattered
            tokens. "token".
        min_share: of the tokens to compute; a prompt with fewer matched is computed in full.
        max_deviation: mean deviation of V at the last check layer, relative to V; beyond it all is computed.
        negligible: deviation of V, relative to V. Tokens with less are not computed anew by the selectors
            that look at deviations, and a queue in which several in a row showed less is given up.
        window: tokens of a window. Runs of 2 * window - 1 are always found, shorter than window never.
        max_donors: prompts remembered as donors in all; the least recently used go first.
    """

    recompute: float = 0.07
    refresh: int = 3
    refresh_order: RefreshOrder = "importance"
    selector: Selector = "query"
    head: int = 0
    check_layers: int = 2
    rounds: int = 1
    unit: Unit = "line"
    min_share: float = 0.3
    max_deviation: float = 0.5
    negligible: float = 0.0
    window: int = 16
    max_donors: int = 1024

    def __post_init__(self) -> None:
        """Raise ValueError naming the setting that is out of range."""
        for name in ("recompute", "min_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 to 1")
        least = {"refresh": 0, "head": 0, "window": 2, "max_donors": 1, "check_layers": 1, "rounds": 1}
        for name, low in (least | {"max_deviation": 0, "negligible": 0}).items():
            if not getattr(self, name) >= low:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least {low}")
        for name, kind in (("selector", Selector), ("refresh_order", RefreshOrder), ("unit", Unit)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected {', '.join(get_args(kind))}")

    @property
    def uses_check(self) -> bool:
        """Whether the first layers run in full before it is decided what goes on."""
        return self.selector in ("deviation", "importance*deviation")

    @property
    def uses_scores(self) -> bool:
        """Whether engines must tell what attention tokens receive."""
        return self.selector in ("query", "importance*deviation") or self.refresh_order == "importance"

    @property
    def surveys(self) -> bool:
        """Whether what was taken over must be looked at before it is decided what is computed anew."""
        return (self.uses_check or self.selector == "query") and self.recompute > 0


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
