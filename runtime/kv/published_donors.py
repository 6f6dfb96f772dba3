"""Published documents as donors of approximate reuse, for every scope of their chain (see `reuse`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from blockzoo.runtime.approx.matching import Donor, DonorIndex, Run
from blockzoo.runtime.kv.sequence import Chain, TokenSequence

if TYPE_CHECKING:
    from blockzoo.runtime.kv.published_pages import Publication

Found = tuple[Run, Donor]


class PublishedDonors:
    """What is published in one KV cache, by chain: whole documents, and their windows.

    Args:
        window: tokens of a window.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._numbers = count()
        self._number_of: dict[Publication, int] = {}
        self._indexes: dict[Chain, DonorIndex] = {}
        self._whole: dict[Chain, dict[bytes, list[Publication]]] = {}  # by its tokens

    def add(self, publication: Publication) -> None:
        """Make a donor of a publication."""
        number = self._number_of[publication] = next(self._numbers)
        index = self._indexes.setdefault(publication.segments, DonorIndex(self._window))
        index.add(number, _donor(publication))
        whole = self._whole.setdefault(publication.segments, {})
        whole.setdefault(_words(publication), []).append(publication)

    def remove(self, publication: Publication) -> None:
        """Let a publication be a donor no more."""
        segments = publication.segments
        if self._indexes[segments].remove(self._number_of.pop(publication)):
            del self._indexes[segments]
        words = _words(publication)
        self._whole[segments][words].remove(publication)
        if not self._whole[segments][words]:
            del self._whole[segments][words]

    def reshape(self, chains: Mapping[Chain, Chain]) -> None:
        """Go over to other segments (`KVCache.reshape`)."""
        self._indexes = {chains[segments]: index for segments, index in self._indexes.items()}
        # where nothing is published any more the old segments may stand for no chain
        self._whole = {chains[s]: whole for s, whole in self._whole.items() if s in chains}

    def match(self, seq: TokenSequence, start: int, end: int) -> list[Found]:
        """Runs of tokens [start, end) that are published, without overlap.

        What the request marks as a document is looked up whole; windows are compared only between.
        """
        index = self._indexes.get(seq.segments)
        if index is None:
            return []
        found: list[Found] = []
        place = start
        for first, last in seq.documents:
            if first < start or last > end:
                continue
            known = self._whole[seq.segments].get(seq.token_ids[first:last].tobytes())
            if known is not None:
                number = self._number_of[known[0]]
                found += self._windows(index, seq, place, first)
                found.append((Run(first, last - first, number, known[0].lead), index.donor(number)))
                place = last
        return found + self._windows(index, seq, place, end)

    @staticmethod
    def _windows(index: DonorIndex, seq: TokenSequence, start: int, end: int) -> list[Found]:
        return [(run, index.donor(run.donor)) for run in index.match(seq.token_ids, start, end)]


def without_overlap(found: Iterable[Found], shortest: int) -> list[Found]:
    """The same runs in order, each token in the longest around it; of others what is left, if long enough."""
    by_length = sorted(found, key=lambda item: -item[0].length)
    taken = np.zeros(max((run.start + run.length for run, _ in by_length), default=0), bool)
    kept: list[Found] = []
    for run, donor in by_length:
        free = np.flatnonzero(~taken[run.start : run.start + run.length])
        for piece in np.split(free, np.flatnonzero(np.diff(free) > 1) + 1):
            if piece.size >= shortest:
                offset = int(piece[0])
                part = Run(run.start + offset, piece.size, run.donor, run.donor_start + offset)
                kept.append((part, donor))
        taken[run.start : run.start + run.length] = True
    return sorted(kept, key=lambda item: item[0].start)


def _donor(publication: Publication) -> Donor:
    return Donor(publication.token_ids, publication.keys)


def _words(publication: Publication) -> bytes:
    return publication.token_ids[publication.lead :].tobytes()
