"""From a sequence and the prefix tree to the KV that it takes over approximately (`reuse`)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import compress
from math import ceil
from typing import NamedTuple

import numpy as np

from blockzoo.engines.base import PAGE_TOKENS, pages_for
from blockzoo.runtime.approx.config import ReuseConfig
from blockzoo.runtime.approx.first_pass import FirstPass
from blockzoo.runtime.approx.matching import Donor, Donors, Run
from blockzoo.runtime.approx.selection import matched_positions, reused_positions, within_budget
from blockzoo.runtime.approx.state import ApproximateKV, Borrowed
from blockzoo.runtime.kv.nodes import Node, SegmentTree
from blockzoo.runtime.kv.published_donors import PublishedDonors, without_overlap
from blockzoo.runtime.kv.sequence import Chain, TokenSequence

MAX_EDIT_TOKENS = 64
"""Between equal words, in the donor or in the prompt: more than that is no edit, but other text."""

Where = tuple[bytes, Chain]
"""A scope's root key, and a chain."""


class Plan(NamedTuple):
    """What to take over, and the nodes it lies in, each once."""

    approx: ApproximateKV
    num_borrowed: int  # tokens
    nodes: tuple[Node, ...]


class ReusePlanner:
    """Remembers prompts whose KV is in the tree, and finds what others may take over."""

    def __init__(self, config: ReuseConfig) -> None:
        self.config = config  # may be replaced, but for what the donors are indexed by
        self._donors: Donors[Where] = Donors(config)
        self.published = PublishedDonors(config.window)

    def remember(self, seq: TokenSequence) -> None:
        """Make a donor of a sequence whose prompt has just entered the tree."""
        pages = seq.num_prompt_pages
        self._donors.add(_where(seq), seq.token_ids[: pages * PAGE_TOKENS], seq.page_keys(pages)[:pages])

    def reshape(self, chains: Mapping[Chain, Chain]) -> None:
        """Go over to other segments (`KVCache.reshape`); prompts of chains that are gone give no more."""

        def now(where: Where) -> Where | None:
            root, segments = where
            return (root, chains[segments]) if segments in chains else None

        self._donors.move(now)
        self.published.reshape(chains)

    def plan(self, seq: TokenSequence, trees: Sequence[SegmentTree]) -> Plan | None:
        """What `seq` may take over behind its exact prefix; None where it is too little to be worth it."""
        config = self.config if seq.approximate is None else seq.approximate
        if config.uses_check and seq.num_layers <= config.check_layers:
            return None
        start, end = len(seq.nodes[0]) * PAGE_TOKENS, seq.num_tokens - 1
        found = [
            (cut, donor)
            for run, donor in self._match(seq, start, end, trees)
            if (cut := self._present(run, donor, trees)).length >= config.window
        ]
        behind, in_place = _edits(seq, found)
        behind_edits = min(config.edit_recompute, config.recompute)
        shares = [behind_edits if alone else config.recompute for alone in in_place]
        taken_over = [share < 1 for share in shares]
        found = list(compress(found, taken_over))
        behind, shares = list(compress(behind, taken_over)), list(compress(shares, taken_over))
        runs = [(run.start, run.length) for run, _ in found]
        count = sum(length for _, length in runs)
        if count == 0 or count < config.min_share * (seq.num_tokens - start):
            return None
        budget = ceil(sum(share * length for share, (_, length) in zip(shares, runs, strict=True)) - 1e-9)
        edits_alone = all(alone for alone, taken in zip(in_place, taken_over, strict=True) if taken)
        fronts = _fronts(runs, behind, config, edits_alone, budget)
        anew = matched_positions([(run[0], n) for run, n in zip(runs, fronts, strict=True)], seq.num_tokens)
        matched, first_pass = matched_positions(runs, seq.num_tokens), None
        if edits_alone:  # what leans on them stands right behind them: nothing is looked for, nor refreshed
            config = replace(config, refresh=0)
            reused = taken = matched & ~anew
        elif config.looks_first:
            taken = matched
            first_pass = FirstPass(config, matched, anew, start, seq.line_ends(), budget)
            reused = first_pass.first_reused()
        else:
            reused = taken = reused_positions(runs, shares, seq.num_tokens, config) & ~anew
        parts = [self._borrowed(run, donor, trees, taken) for run, donor in found]
        borrowed = Borrowed(*(np.concatenate(arrays, axis=-1) for arrays in zip(*parts, strict=True)))
        if not borrowed.positions.size:
            return None
        # With all nodes before them, parents first: eviction takes children first, and must go on doing so.
        nodes = dict.fromkeys(
            tree.nodes[key]
            for run, donor in found
            for key in donor.keys[: pages_for(run.donor_start + run.length)]
            for tree in trees
        )
        approx = ApproximateKV(config, reused, borrowed, first_pass)
        return Plan(approx, borrowed.positions.size, tuple(nodes))

    def _match(
        self, seq: TokenSequence, start: int, end: int, trees: Sequence[SegmentTree]
    ) -> list[tuple[Run, Donor]]:
        """Runs of tokens [start, end) that donors of the scope hold, or published documents."""
        found = self._donors.match(
            _where(seq), seq.token_ids, start, end, lambda donor: _num_present(donor, trees) * PAGE_TOKENS
        )
        published = self.published.match(seq, start, end)
        return without_overlap(found + published, self.config.window) if published else found

    @staticmethod
    def _present(run: Run, donor: Donor, trees: Sequence[SegmentTree]) -> Run:
        """The run as far as the donor's pages are still in the tree in all segments."""
        limit = _num_present(donor, trees)
        return run._replace(length=min(run.length, limit * PAGE_TOKENS - run.donor_start))

    @staticmethod
    def _borrowed(
        run: Run, donor: Donor, trees: Sequence[SegmentTree], reused: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        offsets = np.flatnonzero(reused[run.start : run.start + run.length])
        places = run.donor_start + offsets
        first = run.donor_start // PAGE_TOKENS
        keys = _keys(run, donor)
        pages = np.concatenate([np.stack([tree.nodes[key].pages for key in keys], axis=1) for tree in trees])
        shift = np.full(offsets.size, run.start - run.donor_start)
        columns = places // PAGE_TOKENS - first
        return run.start + offsets, pages[:, columns].astype(np.int64), places % PAGE_TOKENS, shift


def _edits(seq: TokenSequence, found: Sequence[tuple[Run, Donor]]) -> tuple[list[int | None], list[bool]]:
    """Of each run the tokens of an edit right before it, here or in its donor, whatever is more; None where
    no equal words stand before that. And whether all before the run is its donor's but for edits."""
    last: dict[bytes, tuple[int, int, bool]] = {}  # where a donor's words ended, here and in it; and the same
    behind: list[int | None] = []
    in_place: list[bool] = []
    for run, donor in found:
        key = donor.keys[-1]
        if key not in last:
            same = min(_num_same(seq.token_ids, donor.token_ids), run.start)
            last[key] = (same, same, True) if same or run.start == 0 else (0, run.donor_start + 1, False)
        end, donor_end, alone = last[key]
        gap, donor_gap = run.start - end, run.donor_start - donor_end
        is_edit = donor_gap >= 0 and max(gap, donor_gap) <= MAX_EDIT_TOKENS
        behind.append(max(gap, donor_gap) if is_edit else None)
        in_place.append(is_edit and alone)
        last[key] = run.start + run.length, run.donor_start + run.length, in_place[-1]
    return behind, in_place


def _num_same(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens both begin with."""
    length = min(one.size, other.size)
    differs = one[:length] != other[:length]
    return int(differs.argmax()) if differs.any() else length


def _fronts(
    runs: Sequence[tuple[int, int]],
    behind: Sequence[int | None],
    config: ReuseConfig,
    edits_alone: bool,
    budget: int,
) -> list[int]:
    """How many first tokens of each (start, length) run to compute anew in any case.

    None where all words before a run are its donor's (`behind`: see `_edits`). Windows behind edits go on to
    the end of a page, as tokens short of one would run one by one (`pieces`).
    """
    wanted = []
    for (_, length), words in zip(runs, behind, strict=True):
        window = length if edits_alone else config.edit
        wanted.append(min(length, config.head if words is None else window if words else 0))
    fronts = within_budget(wanted, budget)
    return [
        min(length, count + -(start + count) % PAGE_TOKENS) if count and words else count
        for (start, length), words, count in zip(runs, behind, fronts, strict=True)
    ]


def _num_present(donor: Donor, trees: Sequence[SegmentTree]) -> int:
    """How many of a donor's pages are still in the tree in all segments: the first ones."""
    limit = len(donor.keys)
    for tree in trees:  # no node outlives its parent
        limit = bisect_left(donor.keys, True, 0, limit, key=lambda key: key not in tree.nodes)
    return limit


def _keys(run: Run, donor: Donor) -> tuple[bytes, ...]:
    return donor.keys[run.donor_start // PAGE_TOKENS : pages_for(run.donor_start + run.length)]


def _where(seq: TokenSequence) -> Where:
    """Only sequences of one scope and one chain give to each other."""
    return seq.root_key, seq.segments
