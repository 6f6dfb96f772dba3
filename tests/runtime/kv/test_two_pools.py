"""The load of the KV cache's property tests over the pools of two workers, between which layers move.

A page id means the same in both, and holds something in one of them at a time: where it is taken by the
other, or has moved, rubbish is left behind. So what is read in the wrong pool, or was not sent, is seen.
"""

from __future__ import annotations

import random
from collections.abc import Collection

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from kv_world import LAYERS, World, prompts

from blockzoo.engines.base import PAGE_TOKENS, pages_for
from blockzoo.runtime.kv.nodes import Node
from blockzoo.runtime.kv.prefix_cache import KVCache
from blockzoo.runtime.kv.sequence import TokenSequence
from blockzoo.runtime.serve.config import SchedulerConfig
from blockzoo.runtime.serve.kv_moves import KVMoves, LayerMoves, Pages, choose_moves, forget
from blockzoo.runtime.serve.scheduler import Scheduled

MODELS = "abcd"
KEYS = sorted({key for keys in LAYERS.values() for key in keys})
RUBBISH = -2


class TwoPools(World):
    """`World`, with the pages of each layer in one of two workers' memories."""

    def __init__(self, num_pages: int, config: SchedulerConfig) -> None:
        super().__init__(num_pages, config, hidden_pages=0)
        shapes = {cache: memory.shape for cache, memory in self.memory.items()}
        self.pools = {cache: np.full((2, *shape), RUBBISH, np.int64) for cache, shape in shapes.items()}
        self.owners = {cache: np.full(shape[0], -1, np.int8) for cache, shape in shapes.items()}
        self.homes = {key: number % 2 for number, key in enumerate(KEYS)}
        self.moved = self.ahead = self.anew = self.dropped = self.kept = 0

    def layer_homes(self, model: str) -> np.ndarray:
        return np.array([self.homes[key] for key in LAYERS[model]], np.int8)

    def pool_of(self, seq: TokenSequence, layer: int) -> np.ndarray:
        return self.pools[seq.cache][self.layer_homes(seq.model)[layer]]

    def compute(self, seq: TokenSequence, num_tokens: int) -> list[tuple[str, int, np.ndarray]]:
        first = pages_for(seq.num_computed)
        begun = seq.page_table[:, first : pages_for(seq.num_computed + num_tokens)]
        homes = np.broadcast_to(self.layer_homes(seq.model)[:, None], begun.shape)
        self.take(seq.cache, begun.ravel(), homes.ravel())
        return super().compute(seq, num_tokens)

    def take(self, cache: KVCache, pages: np.ndarray, workers: np.ndarray) -> None:
        """Pages belong to workers; who had them gives back the memory."""
        self.pools[cache][1 - workers, pages] = RUBBISH
        self.owners[cache][pages] = workers

    def copy(self, scheduled: list[Scheduled]) -> None:
        for seq, _ in scheduled:
            copies = seq.cache.take_copies(seq)
            if copies is not None:
                (source, destination), pools = copies, self.pools[seq.cache]
                owners = self.owners[seq.cache][source]
                assert np.array_equal(owners, self.layer_homes(seq.model))
                contents = pools[owners, source]
                self.take(seq.cache, destination, owners)
                pools[owners, destination] = contents
                pools[owners, destination, seq.num_computed % PAGE_TOKENS :] = -1

    def choose(self, cache: KVCache, keys: Collection[str], page_s: float, sent: set[Node]) -> KVMoves:
        """As layers go to the other worker, by what a page takes on the way (a token takes 1 to compute)."""
        moves = {}
        for index, model in enumerate(MODELS):
            layers = np.flatnonzero([key in keys for key in LAYERS[model]])
            if self.caches[model] is cache and layers.size and model in self.shapes:
                workers, seconds = 1 - self.layer_homes(model)[layers], np.full(layers.size, page_s)
                moves[index] = LayerMoves(self.shapes[model], layers, workers, seconds, 1.0)
        running = [seq for seq in self.scheduler.running if seq.cache is cache]
        for seq in running:
            seq.chain_index = MODELS.index(seq.model)
        return choose_moves(cache.tree, running, moves, sent)

    def send(self, cache: KVCache, pages: Pages) -> None:
        ids, workers = pages
        assert np.unique(ids).size == ids.size
        assert np.array_equal(self.owners[cache][ids], 1 - workers)
        self.pools[cache][workers, ids] = self.pools[cache][1 - workers, ids]

    def move(self, keys: Collection[str], page_s: float, steps: int = 0) -> None:
        """Have layers in the other worker: some pages ahead, while so many steps go on, then the others."""
        sent: set[Node] = set()
        for _ in range(steps):
            for cache in self.memory:
                found = self.choose(cache, keys, page_s, sent)
                for node, pages in [*found.nodes.items()][:: 2 if sent else 1]:
                    if node not in sent:
                        self.send(cache, pages)
                        sent.add(node)
            self.step()
        for cache in self.memory:
            found = self.choose(cache, keys, page_s, sent)
            unsent, (ids, workers) = found.unsent(sent), found.all_pages()
            self.send(cache, unsent)
            self.take(cache, ids, workers)
            self.anew += len(found.anew)
            self.kept += self.scheduler.num_running - len(found.anew)
            self.moved += unsent[0].size
            self.ahead += ids.size - unsent[0].size
            for seq in found.anew:
                self.scheduler.put_back(seq)
            self.dropped += forget(cache, found.dropped)
        self.homes |= {key: 1 - self.homes[key] for key in keys}
        self.check()

    def check(self) -> None:
        super().check()
        for cache in self.memory:
            homes = {
                segment: self.layer_homes(model)[segment.first_layer : segment.end_layer]
                for model, segments in self.shapes.items()
                for segment in segments
            }
            for tree in cache.tree.segments:
                for node in tree.nodes.values():
                    assert np.array_equal(self.owners[cache][node.pages], homes[tree.segment])


class TwoPoolsMachine(RuleBasedStateMachine):
    """Random adds, steps, aborts and moves."""

    @initialize(columns=st.integers(4, 14), tokens=st.sampled_from([6, 40, 200]))
    def start(self, columns, tokens):
        self.world = TwoPools(columns * 3, SchedulerConfig(6, tokens, 8))

    @rule(
        model=st.sampled_from("aabbcd"), scope=st.sampled_from("xxy"), prompt=prompts(), n=st.integers(1, 90)
    )
    def add(self, model, scope, prompt, n):
        self.world.add(model, scope, prompt, n)

    @rule(count=st.sampled_from([1, 1, 5, 40]))
    def steps(self, count):
        for _ in range(count):
            if not self.world.step():
                break

    @rule()
    def step_that_fails(self):
        self.world.step(fault=True)

    @rule(choice=st.integers(0, 100))
    def abort(self, choice):
        self.world.abort(choice)

    @rule(
        keys=st.sets(st.sampled_from(KEYS), min_size=1),
        page_s=st.sampled_from([1e-3, 1e-3, 5.0, 12.0, 20.0, 1e3]),
        steps=st.sampled_from([0, 0, 1, 6]),
    )
    def move(self, keys, page_s, steps):
        self.world.move(keys, page_s, steps)

    @invariant()
    def whole(self):
        self.world.check()

    def teardown(self):
        self.world.drain()


TwoPoolsMachine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
TestTwoPoolsMachine = TwoPoolsMachine.TestCase


def soak(seed: int, steps: int) -> TwoPools:
    rng = random.Random(seed)
    world = TwoPools(60, SchedulerConfig(6, 96, 12, ageing_s=0.5))
    for _ in range(steps):
        if rng.random() < 0.25:
            shared = rng.choice([0, 32, 64, 100, 130])
            tail = [rng.randrange(3) for _ in range(rng.choice([1, 20, 70]))]
            world.add(rng.choice("aabbcd"), rng.choice("xxxy"), [0] * shared + tail, rng.randrange(1, 120))
        if rng.random() < 0.05:
            world.abort(rng.randrange(100))
        if rng.random() < 0.15:
            keys = rng.sample(KEYS, rng.randrange(1, 4))
            world.move(keys, rng.choice([1e-3, 5.0, 12.0, 20.0, 1e3]), rng.choice([0, 1, 4]))
        world.step(fault=rng.random() < 0.02)
    world.drain()
    return world


def test_a_long_run_sees_every_kind_of_move() -> None:
    world = soak(0, 400)
    assert min(world.moved, world.ahead, world.anew, world.dropped, world.kept) > 0
    assert world.caches["a"].stats().copied_pages > 0
    assert world.scheduler.num_preemptions > 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
def test_longer_runs(seed: int) -> None:
    assert soak(seed, 3000).moved > 0
