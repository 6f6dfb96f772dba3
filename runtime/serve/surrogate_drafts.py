"""What surrogates say next: greedy drafts by chains that stand for the models' own.

A surrogate reads the K and V that its model has computed, and writes behind them, into pages that are there
for drafted tokens. The model's step writes all of that anew, so nothing of a draft outlives it: no pages, no
prompt to compute, and whatever happens to a request happens as without (as in Draft & Verify, Zhang et al.,
2023).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from blockzoo.runtime.draft.guesses import Kind
from blockzoo.runtime.exec.interface import StepExecutor
from blockzoo.runtime.exec.rows import Rows
from blockzoo.runtime.kv.sequence import TokenSequence
from blockzoo.runtime.serve.loaded import Surrogate

NAME = "surrogate"
"""Of the drafter."""


class Asked(NamedTuple):
    """Whose next tokens are wanted: as many as it has drafted ones, which are not looked at."""

    seq: TokenSequence
    chain: int


def greedy_drafts(executor: StepExecutor, asked: Sequence[Asked]) -> tuple[list[list[int]], list[float]]:
    """Run surrogates, a token of each at a time.

    Args:
        executor: of the sequences' family.
        asked: sequences of which all but the last token is computed, with pages for their drafted ones.

    Returns:
        The tokens of each, and the seconds of each run.
    """
    drafts: list[list[int]] = [[] for _ in asked]
    seconds = []
    while left := [i for i, (seq, _) in enumerate(asked) if len(drafts[i]) < len(seq.drafted)]:
        start = time.monotonic()
        result = executor.run([_next_row(*asked[i], drafts[i]) for i in left])
        for logits, members in result.logits:
            for member, token_id in zip(members, logits.argmax(axis=1).tolist(), strict=True):
                drafts[left[member]].append(token_id)
        seconds.append(time.monotonic() - start)
    return drafts, seconds


def kinds(surrogate: Surrogate, count: int) -> list[Kind]:
    """Of its first `count` guesses: by their places, as far as these were told apart."""
    last = len(surrogate.acceptance) - 1
    return [Kind(NAME, min(place, last)) for place in range(count)]


def first_rates(surrogate: Surrogate | None) -> dict[Kind, float]:
    """How often its guesses come true, as zoo-compile found."""
    if surrogate is None:
        return {}
    return {Kind(NAME, place): rate for place, rate in enumerate(surrogate.acceptance)}


def _next_row(seq: TokenSequence, chain: int, draft: Sequence[int]) -> Rows:
    last = seq.token_ids[-1:] if not draft else np.array(draft[-1:], np.int32)
    return Rows(chain, last, seq.num_tokens - 1 + len(draft), seq.page_table, num_logits=1)
