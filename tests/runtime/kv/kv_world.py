"""A world for cache and scheduler, with a stand-in for the K and V that an engine would hold.

For each slot of each page the memory holds a number that stands for all its K and V depend on, the layers
below and all tokens up to it, and for whose request wrote it. Each step first checks that every page table
leads to exactly the right numbers for all tokens before it (what attention would read), written in the own
scope or published; then it writes those of the step's own tokens. Tokens that enter at a boundary must come
with the right hidden states, and nothing is written in the layers below. Models come and go in between: what
layers they share changes, under all that runs and all that is cached.
"""

from collections import Counter
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import numpy as np
from hypothesis import strategies as st

from blockzoo.engines.base import PAGE_TOKENS, pages_for
from blockzoo.runtime.api.errors import OverloadedError
from blockzoo.runtime.kv.boundary import BoundaryCache
from blockzoo.runtime.kv.prefix_cache import KVCache, path_lengths
from blockzoo.runtime.kv.published_pages import Publication
from blockzoo.runtime.kv.sequence import Part, Segment, TokenSequence
from blockzoo.runtime.serve.change_over import parts_of
from blockzoo.runtime.serve.config import SchedulerConfig
from blockzoo.runtime.serve.scheduler import Scheduled, Scheduler

LAYERS = {  # d leaves a and b after one layer, a and b part after two; c has another geometry and cache
    "a": ("low", "low+middle", "low+middle+a"),
    "b": ("low", "low+middle", "low+middle+b"),
    "c": ("other", "other+c"),
    "d": ("low", "low+d", "low+d+d"),
}
ROW_BYTES = 8
PRIME = 2_147_483_629
AUTHOR = 40  # bits behind which a number says who wrote it
PUBLISHED = 0


class World:
    """A scheduler over two caches, their memories, and an engine that checks what it reads."""

    def __init__(
        self, num_pages: int, config: SchedulerConfig, prefix_caching: bool = True, hidden_pages: int = 12
    ) -> None:
        self.now = 0.0
        self.scheduler = Scheduler(config, clock=lambda: self.now)
        self.boundaries = BoundaryCache(hidden_pages * PAGE_TOKENS * ROW_BYTES)
        large, small = (
            KVCache(pages, prefix_caching, self.boundaries) for pages in (num_pages, num_pages // 2)
        )
        self.caches = {"a": large, "b": large, "c": small, "d": large}
        self.shapes = planned("abcd")  # the segments of the models that there are
        self.seqs: dict[str, TokenSequence] = {}  # of unfinished requests
        self.num_reshaped = 0
        self.memory = {
            cache: np.zeros((cache.pool.num_pages, PAGE_TOKENS), np.int64) for cache in (large, small)
        }
        self.left: dict[str, int] = {}  # tokens still to generate, by unfinished request
        self.ended: Counter[str] = Counter()
        self.refused = 0
        self.num_added = 0
        self.values: dict[str, np.ndarray] = {}
        self.late_tokens = 0
        self.num_published = 0
        self.published: list[tuple[KVCache, Publication, str]] = []
        self.hit: set[str] = set()  # segments, also those that are no more
        self.deduped: set[str] = set()

    def add(self, model: str, scope: str, prompt: list[int], max_tokens: int) -> None:
        name = f"{self.num_added}"
        self.num_added += 1
        self.now += 0.01
        if model not in self.shapes:
            self.have({*self.shapes, model})
        seq = TokenSequence(name, model, self.caches[model], self.shapes[model], scope, prompt, self.now)
        try:
            self.scheduler.add(seq)
        except OverloadedError:
            self.refused += 1
            return
        self.left[name] = max_tokens
        self.seqs[name] = seq

    def have(self, models: set[str]) -> None:
        """Have these models, and those that requests or documents need."""
        in_use = {seq.model for seq in self.seqs.values()} | {model for _, _, model in self.published}
        before, self.shapes = self.shapes, planned({*models, *in_use, "c"})
        self.num_reshaped += self.shapes != before
        parts = parts_of(plans(before, "abd"), plans(self.shapes, "abd"))
        chains = {before[m]: self.shapes[m] for m in before if m in self.shapes and m != "c"}
        seqs = [seq for seq in self.seqs.values() if seq.model != "c"]
        for seq in seqs:
            now = chains[seq.segments]
            if now != seq.segments and path_lengths(seq, now, parts) is None:
                self.scheduler.put_back(seq)
        self.note_gains()
        self.caches["a"].reshape(parts, chains, seqs)
        self.boundaries.keep({s.boundary for segments in self.shapes.values() for s in segments})
        self.check()

    def abort(self, choice: int) -> None:
        if self.left:
            name = sorted(self.left)[choice % len(self.left)]
            seq = self.scheduler.abort(name)
            if seq is not None:  # otherwise it has failed and is about to be told so
                assert (seq.num_pages, seq.request_id) == (0, name)
                self.end(name)

    def publish(self, model: str, document: list[int]) -> None:
        """Publish a document between two steps, where half of the pool and the free pages allow it."""
        cache = self.caches[model]
        filled = document + [1] * (-len(document) % PAGE_TOKENS)
        self.num_published += 1
        name = f"document {self.num_published}"
        if model not in self.shapes:
            self.have({*self.shapes, model})
        seq = TokenSequence(name, model, cache, self.shapes[model], "", filled, 0.0, publishes=True)
        total = cache.published.num_pages + cache.pages_to_publish(seq)
        if not cache.prefix_caching or total > cache.pool.num_pages // 2:
            return
        cache.begin(seq)
        if cache.reserve(seq, seq.num_tokens):
            passed = self.compute(seq, seq.num_tokens - seq.num_computed)
            seq.num_computed = seq.num_tokens
            cache.commit(seq)
            for boundary, start, rows in passed:
                self.boundaries.record(seq, boundary, start, rows)
            self.published.append((cache, cache.publish(seq, len(document), lead=0), model))
        cache.release(seq)

    def withdraw(self, choice: int) -> None:
        if self.published:
            cache, publication, _ = self.published.pop(choice % len(self.published))
            cache.withdraw(publication)

    def leave_only(self, models: str) -> None:
        """End what others do, so that they can go."""
        for name in [name for name, seq in self.seqs.items() if seq.model not in models]:
            self.scheduler.abort(name)
            self.end(name)
        for item in [item for item in self.published if item[2] not in models]:
            self.published.remove(item)
            item[0].withdraw(item[1])

    def end(self, name: str) -> None:
        del self.left[name]
        self.seqs.pop(name, None)
        self.ended[name] += 1

    def step(self, abort: int | None = None, fault: bool = False) -> int:
        """One step; `abort`: a request goes away while the engine works; `fault`: the engine fails."""
        config = self.scheduler.config
        scheduled = self.scheduler.schedule()
        all_failed = self.scheduler.take_failed()
        for failed in all_failed:
            cache = failed.seq.cache
            left = cache.pool.num_pages - cache.published.num_pages
            assert pages_for(failed.seq.num_tokens) * failed.seq.num_layers > left
            self.end(failed.seq.request_id)
        assert len({seq.request_id for seq, _ in scheduled}) == len(scheduled) <= config.max_num_seqs
        assert sum(num_tokens for _, num_tokens in scheduled) <= config.max_num_batched_tokens
        assert scheduled or all_failed or not self.scheduler.has_unfinished()
        self.copy(scheduled)
        hidden = [self.compute(seq, num_tokens) for seq, num_tokens in scheduled]
        if abort is not None:
            self.abort(abort)
        if fault:  # nothing is known of what was written; the same work is scheduled again
            self.check()
            return len(scheduled)
        self.scheduler.advance(scheduled)
        for (seq, _), parts in zip(scheduled, hidden, strict=True):
            for boundary, start, rows in parts:
                self.boundaries.record(seq, boundary, start, rows)
        self.check()
        for seq, _ in scheduled:
            name = seq.request_id
            if name in self.left and seq.num_uncomputed == 0:
                seq.append_token((int(seq.token_ids.sum()) + len(seq.token_ids)) % 3)
                self.left[name] -= 1
                if self.left[name] == 0:
                    self.scheduler.finish(seq)
                    self.end(name)
        return len(scheduled)

    def copy(self, scheduled: list[Scheduled]) -> None:
        """Copy pages that begin like a sequence's next one; behind the part that is equal comes rubbish."""
        for seq, _ in scheduled:
            copies = seq.cache.take_copies(seq)
            if copies is not None:
                source, destination = copies
                memory = self.memory[seq.cache]
                memory[destination] = memory[source]
                memory[destination, seq.num_computed % PAGE_TOKENS :] = -1

    def compute(self, seq: TokenSequence, num_tokens: int) -> list[tuple[str, int, np.ndarray]]:
        """Read all KV before the step's tokens, write theirs; (boundary, first token, rows) passed."""
        assert num_tokens >= 1
        end = seq.num_computed + num_tokens
        assert end <= seq.num_tokens
        prefix = self.prefix_values(seq)
        position = np.arange(end)
        passed = []
        parts = seq.parts(end)
        assert [seq.num_computed, *(part.end for part in parts)] == [*(part.start for part in parts), end]
        for start, stop, level in parts:
            assert stop == end or stop % PAGE_TOKENS == 0
            for number, segment in enumerate(seq.segments):
                hidden = prefix[start:stop, None] ^ crc32(segment.boundary.encode())  # [n, 1]
                if number == level and level:
                    part = Part(start, stop, level)
                    self.check_read(seq, self.boundaries.entering(seq, part), hidden)
                    self.late_tokens += stop - start
                elif number > level:
                    passed.append((segment.boundary, start, hidden | author_of(seq) << AUTHOR))
                written = stop if number < level else start  # of these layers, before the step
                for layer in range(segment.first_layer, segment.end_layer):
                    expected = prefix[:stop] ^ crc32(LAYERS[seq.model][layer].encode())
                    memory = self.pool_of(seq, layer)
                    pages = seq.page_table[layer, position[:stop] // PAGE_TOKENS]
                    assert (pages >= 0).all()
                    seen = memory[pages[:written], position[:written] % PAGE_TOKENS]
                    self.check_read(seq, seen, expected[:written])
                    signed = expected[written:] | author_of(seq) << AUTHOR
                    memory[pages[written:], position[written:stop] % PAGE_TOKENS] = signed
        return passed

    def pool_of(self, seq: TokenSequence, layer: int) -> np.ndarray:
        """The memory in which a layer has its pages."""
        return self.memory[seq.cache]

    @staticmethod
    def check_read(seq: TokenSequence, seen: np.ndarray, expected: np.ndarray) -> None:
        assert np.array_equal(seen & ((1 << AUTHOR) - 1), expected)
        assert np.isin(seen >> AUTHOR, (PUBLISHED, author_of(seq))).all()

    def prefix_values(self, seq: TokenSequence) -> np.ndarray:
        """int64 [num_tokens]: a number per position for all tokens up to it."""
        known = self.values.get(seq.request_id, np.empty(0, np.int64))
        value = int(known[-1]) if known.size else 1
        new = []
        for token in seq.token_ids[known.size :].tolist():
            value = (value * 31337 + token + 1) % PRIME
            new.append(value)
        self.values[seq.request_id] = np.concatenate([known, np.array(new, np.int64)])
        return self.values[seq.request_id]

    def note_gains(self) -> None:
        stats = self.caches["a"].stats()
        self.hit |= {key for key, count in stats.hit_tokens.items() if count}
        self.deduped |= {key for key, count in stats.deduped_tokens.items() if count}

    def check(self) -> None:
        running = self.scheduler.running
        for cache in self.memory:
            cache.check_integrity([seq for seq in running if seq.cache is cache])
        assert len(running) + self.scheduler.num_waiting + len(self.scheduler.failed) == len(self.left)
        assert all(seq.num_tree_pages * PAGE_TOKENS <= seq.num_computed for seq in running)
        assert all(count == 1 for count in self.ended.values())
        trees = [tree for cache in self.memory for tree in cache.tree._segments.values()]
        assert all(any(key in tree.nodes for tree in trees) for key in self.boundaries._boundaries)

    def drain(self) -> None:
        """Run to the end: every request finishes once and all memory comes back."""
        steps = 0
        while self.scheduler.has_unfinished():
            self.step()
            steps += 1
            assert steps < 20_000, "no end"
        while self.published:
            self.withdraw(0)
        assert not self.left
        assert len(self.ended) + self.refused == self.num_added
        for cache in self.memory:
            cache.check_integrity([])
            stats = cache.stats()
            assert stats.pages_owned == stats.published_pages == 0
            assert stats.pages_evictable == stats.pages_cached


def planned(models: Iterable[str]) -> dict[str, tuple[Segment, ...]]:
    """The segments of each of some models, as they share layers."""
    models = sorted(set(models))
    sharers = {key: {m for m in models if key in LAYERS[m]} for m in models for key in LAYERS[m]}
    shapes = {}
    for model in models:
        keys = LAYERS[model]
        starts = [i for i in range(len(keys)) if i == 0 or sharers[keys[i]] != sharers[keys[i - 1]]]
        ends = [*starts[1:], len(keys)]
        shapes[model] = tuple(
            Segment(a, b, keys[b - 1], f"out of {keys[a - 1]}" if a else "")
            for a, b in zip(starts, ends, strict=True)
        )
    return shapes


def plans(shapes: dict[str, tuple[Segment, ...]], models: str) -> list[Any]:
    """As parts of chain plans."""
    return [
        SimpleNamespace(segments=segments, layer_keys=LAYERS[model])
        for model, segments in shapes.items()
        if model in models
    ]


def author_of(seq: TokenSequence) -> int:
    """PUBLISHED, or a number for the scope."""
    return PUBLISHED if seq.publishes else 1 + "xy".index(seq.scope)


@st.composite
def prompts(draw) -> list[int]:
    """Prompts that often begin alike: a shared run of zeros, then some that differ, sometimes too long."""
    shared = draw(st.sampled_from([0, 1, 31, 32, 33, 64, 96, 100, 128, 160]))
    tail = draw(st.lists(st.integers(0, 2), min_size=1, max_size=4))
    return [0] * shared + tail + [tail[-1]] * draw(st.sampled_from([0, 0, 10, 32, 60, 200]))
