"""Smaller models of the zoo that guess for others: they compute a request's text too, and go on with it.

    request -> a sequence of its own in the smaller model's cache: the same tokens, other pages

It holds pages only while it is of use. They go back with the request, and before anybody is preempted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import numpy as np

from blockzoo.runtime.exec.rows import Rows
from blockzoo.runtime.exec.topology import Family
from blockzoo.runtime.kv.prefix_cache import KVCache
from blockzoo.runtime.kv.sequence import TokenSequence
from blockzoo.runtime.serve.loaded import LoadedZoo
from blockzoo.runtime.serve.request_builder import Request
from blockzoo.runtime.serve.scheduler import Scheduled
from blockzoo.runtime.serve.step_runner import StepRunner

_CHUNK = 256  # tokens of a text that are computed at once
_WORTH = 16  # tokens of a text that one of the answer so far is worth: long answers go on being long


@dataclass(slots=True)
class _Follower:
    """A request's text in the smaller model.

    Attributes:
        seq: with tokens that the request has for certain.
        ahead: further tokens whose K and V are written: guesses of its own.
    """

    seq: TokenSequence
    ahead: list[int] = field(default_factory=list)

    def catch_up(self, token_ids: np.ndarray) -> None:
        """Take over the request's tokens, int32 [n]; what was guessed right is computed already."""
        seq, new = self.seq, token_ids[self.seq.num_tokens :].tolist()
        is_computed = seq.num_computed == seq.num_tokens
        for token_id in new:
            seq.append_token(token_id)
        if new and is_computed:
            right = takewhile(lambda pair: pair[0] == pair[1], zip(self.ahead, new[:-1], strict=False))
            seq.num_computed += sum(1 for _ in right)
            seq.cache.commit(seq)
        if new:
            self.ahead = []


class DraftModels:
    """Of one engine; for its thread alone.

    Args:
        zoo: what is loaded now.
        runner: runs prompts.
    """

    def __init__(self, zoo: Callable[[], LoadedZoo], runner: StepRunner) -> None:
        self._zoo, self._runner = zoo, runner
        self._followers: dict[str, _Follower] = {}  # by request id
        self._barred: set[str] = set()  # requests whose pages others needed

    def may_follow(self, request: Request) -> bool:
        """Whether a smaller model is to guess for a request: its text is not too long for that, as far as its
        answer is told."""
        follower = self._followers.get(request.seq.request_id)
        lacks = request.seq.num_tokens - (0 if follower is None else follower.seq.num_computed)
        is_worth = lacks <= _WORTH * max(1, request.num_generated)
        return is_worth and request.seq.request_id not in self._barred

    def draft(self, requests: Sequence[Request]) -> tuple[list[list[int]], list[float]]:
        """What smaller models say next, greedily: as many tokens as each request has drafted ones.

        Returns the tokens of each request, none where its text is not computed yet or pages lack, and the
        seconds of each run, but for those that computed much of a text.
        """
        drafts: list[list[int]] = [[] for _ in requests]
        by_family: dict[Family, list[tuple[int, _Follower]]] = {}
        for index, request in enumerate(requests):
            follower = self._following(request)
            if follower is not None:
                chain = self._zoo().topology.chains[follower.seq.chain_index]
                by_family.setdefault(chain.family, []).append((index, follower))
        seconds: list[float] = []
        for family, found in by_family.items():
            seconds += self._run(family, found, requests, drafts)
        return drafts, seconds

    def forget(self, request_id: str) -> None:
        """A request has ended: give back what is held for it."""
        self._barred.discard(request_id)
        follower = self._followers.pop(request_id, None)
        if follower is not None:
            follower.seq.cache.release(follower.seq)

    def give_back(self, cache: KVCache) -> bool:
        """Give back all pages of a cache, which others need; False where none are held."""
        found = [name for name, follower in self._followers.items() if follower.seq.cache is cache]
        for name in found:
            self.forget(name)
        self._barred.update(found)
        return bool(found)

    def forget_all(self) -> None:
        """Give everything back; what is needed is computed anew."""
        for name in list(self._followers):
            self.forget(name)

    def sequences(self, cache: KVCache) -> list[TokenSequence]:
        """Those that hold pages of a cache."""
        return [follower.seq for follower in self._followers.values() if follower.seq.cache is cache]

    def _following(self, request: Request) -> _Follower | None:
        """A request's text with pages for all that it is to have; None where there are none for it."""
        seq, surrogate = request.seq, request.model.surrogate
        assert surrogate is not None, f"nobody guesses for {seq}"
        follower = self._followers.get(seq.request_id)
        if follower is None:
            zoo = self._zoo()
            chain = zoo.topology.chains[surrogate.chain_index]
            own = TokenSequence(
                seq.request_id,
                seq.model,
                zoo.caches[chain.family],
                chain.segments,
                f"guesses for {seq.scope}",  # nobody else's
                seq.token_ids,
                seq.arrival,
                "off" if seq.reuse == "off" else "exact",
                chain_index=surrogate.chain_index,
                tenant=seq.tenant,
            )
            own.cache.begin(own)
            follower = self._followers[seq.request_id] = _Follower(own)
        follower.catch_up(seq.token_ids)
        own = follower.seq
        if not own.cache.reserve(own, own.num_tokens + len(seq.drafted)):
            self.forget(seq.request_id)
            self._barred.add(seq.request_id)
            return None
        return follower

    def _run(
        self,
        family: Family,
        found: Sequence[tuple[int, _Follower]],
        requests: Sequence[Request],
        drafts: list[list[int]],
    ) -> list[float]:
        executor, seconds = self._zoo().executors[family], list[float]()
        items = [Scheduled(each.seq, min(each.seq.num_uncomputed, _CHUNK)) for _, each in found]
        start = time.monotonic()
        done = self._runner.run(executor, items, _advance)
        for logits, members in done.logits:
            for member, token_id in zip(members, logits.argmax(axis=1).tolist(), strict=True):
                drafts[found[member][0]].append(token_id)
        longest = max(len(requests[i].seq.drafted) for i, _ in found)
        if max(item.num_tokens for item in items) <= 1 + longest:
            seconds.append(time.monotonic() - start)
        for member in done.failed:
            self.forget(requests[found[member][0]].seq.request_id)
        going = [(i, each) for m, (i, each) in enumerate(found) if m not in done.failed and drafts[i]]
        while left := [(i, each) for i, each in going if len(drafts[i]) < len(requests[i].seq.drafted)]:
            start = time.monotonic()
            result = executor.run([_next_row(each.seq, drafts[i]) for i, each in left])
            for logits, members in result.logits:
                for member, token_id in zip(members, logits.argmax(axis=1).tolist(), strict=True):
                    drafts[left[member][0]].append(token_id)
            seconds.append(time.monotonic() - start)
        for i, each in going:
            each.ahead = drafts[i][:-1]
        return seconds


def _advance(items: Sequence[Scheduled]) -> None:
    for seq, num_tokens in items:
        seq.num_computed = seq.end_after(num_tokens)
        seq.cache.commit(seq)


def _next_row(seq: TokenSequence, draft: Sequence[int]) -> Rows:
    last = np.array(draft[-1:], np.int32)
    return Rows(seq.chain_index, last, seq.num_tokens - 1 + len(draft), seq.page_table, num_logits=1)
