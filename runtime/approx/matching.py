"""Runs of tokens that also occur in a donor's prompt: found by rolling hash, verified token by token."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from itertools import islice, pairwise
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from blockzoo.runtime.approx.config import ReuseConfig

_BASE = np.uint64(0x9E3779B97F4A7C15)
_MAX_CANDIDATES = 4  # donors per window that have KV, the newest
_MAX_LOOKED_AT = 64  # whether they have


class Run(NamedTuple):
    """Tokens [start, start + length) of a prompt equal those of `donor` from donor_start on."""

    start: int
    length: int
    donor: int
    donor_start: int


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


NumThere = Callable[[Donor], int]
"""How many of a donor's first tokens still have KV."""


def _everything(donor: Donor) -> int:
    return donor.token_ids.size


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

    def match(
        self, token_ids: np.ndarray, start: int, end: int, num_there: NumThere = _everything
    ) -> list[Run]:
        """Runs within tokens [start, end), without overlap; each token goes with the longest around it.

        `num_there` says how many of a donor's first tokens still have KV: others are no match. What is gone
        for good must not hide what is there, and the longer a cache lives the more is gone.
        """
        best = np.zeros(token_ids.size, np.int64)  # length of the run each token goes with
        donor_of = np.full(token_ids.size, -1, np.int64)
        place_of = np.zeros(token_ids.size, np.int64)
        seen: dict[tuple[int, int], int] = {}  # (donor, shift) -> end of the run found there last
        there: dict[int, int] = {}
        hashes = window_hashes(token_ids[start:end], self._window).tolist()
        for position, value in enumerate(hashes, start):
            for number, place in self._newest_there(value, there, num_there):
                if seen.get((number, position - place), -1) > position:
                    continue
                known = self._donors[number].token_ids[: there[number]]
                first, length = _extend(token_ids[:end], start, position, known, place)
                seen[number, position - place] = first + length
                if length < self._window:
                    continue  # another window of this hash
                run = np.arange(first, first + length)
                run = run[best[run] < length]
                best[run], donor_of[run] = length, number
                place_of[run] = run - (position - place)
        return _runs(donor_of, place_of, self._window)

    def _newest_there(self, value: int, there: dict[int, int], num_there: NumThere) -> list[tuple[int, int]]:
        """The newest (donor, position) of windows of this hash that still have KV; `there` remembers."""
        found: list[tuple[int, int]] = []
        for number, place in islice(reversed(self._places.get(value, [])), _MAX_LOOKED_AT):
            if number not in there:
                there[number] = num_there(self._donors[number])
            if place + self._window <= there[number]:
                found.append((number, place))
                if len(found) == _MAX_CANDIDATES:
                    break
        return found


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


Where = TypeVar("Where", bound=Hashable)


class Donors(Generic[Where]):
    """All donors, by scope and chain, bounded in number."""

    def __init__(self, config: ReuseConfig) -> None:
        self._config = config
        self._indexes: dict[Where, DonorIndex] = {}
        # by where it is and its last page's key: what another model's prompt of the same tokens is not
        self._known: OrderedDict[tuple[Where, bytes], int] = OrderedDict()  # oldest use first
        self._count = 0

    def __len__(self) -> int:
        return len(self._known)

    def add(self, where: Where, token_ids: np.ndarray, keys: Sequence[bytes]) -> None:
        """Remember a prompt of whole pages; `where`: scope and chain, only the same may use it."""
        if not keys:
            return
        name = where, keys[-1]
        if name in self._known:
            self._known.move_to_end(name)
            return
        self._count += 1
        self._known[name] = self._count
        index = self._indexes.setdefault(where, DonorIndex(self._config.window))
        index.add(self._count, Donor(token_ids.copy(), tuple(keys)))
        while len(self._known) > self._config.max_donors:
            (place, _), number = self._known.popitem(last=False)
            if self._indexes[place].remove(number):
                del self._indexes[place]

    def move(self, now: Callable[[Where], Where | None]) -> None:
        """Know donors by other scopes and chains; forget those of which `now` says None."""
        places = {where: now(where) for where in self._indexes}
        known = [(places[where], key, number) for (where, key), number in self._known.items()]
        self._known = OrderedDict(((w, key), number) for w, key, number in known if w is not None)
        self._indexes = {w: self._indexes[old] for old, w in places.items() if w is not None}

    def match(
        self, where: Where, token_ids: np.ndarray, start: int, end: int, num_there: NumThere
    ) -> list[tuple[Run, Donor]]:
        """Runs of tokens [start, end) that donors of `where` hold (`DonorIndex.match`)."""
        index = self._indexes.get(where)
        if index is None:
            return []
        return [(run, index.donor(run.donor)) for run in index.match(token_ids, start, end, num_there)]
