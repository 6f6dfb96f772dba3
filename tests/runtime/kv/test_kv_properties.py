"""Cache and scheduler under random load (`kv_world`)."""

import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from kv_world import World, prompts

from blockzoo.runtime.serve.config import SchedulerConfig


class KVMachine(RuleBasedStateMachine):
    """Random adds, steps and aborts."""

    @initialize(
        columns=st.integers(4, 14),
        tokens=st.sampled_from([6, 40, 64, 200]),
        policy=st.sampled_from(["hit-first", "fair"]),
        ageing_s=st.sampled_from([0.0, 0.05, 100.0]),
        caching=st.sampled_from([True, True, True, False]),
        hidden_pages=st.sampled_from([0, 2, 8, 100]),
        weights=st.sampled_from([{}, {}, {"a": 5}, {"b": 0.1, "d": 2}]),
    )
    def start(self, columns, tokens, policy, ageing_s, caching, hidden_pages, weights):
        config = SchedulerConfig(
            max_num_seqs=6,
            max_num_batched_tokens=tokens,
            max_waiting=8,
            policy=policy,
            ageing_s=ageing_s,
            tenant_weights=weights,
        )
        self.world = World(columns * 3, config, caching, hidden_pages)

    @rule(
        model=st.sampled_from("aabbcd"), scope=st.sampled_from("xxy"), prompt=prompts(), n=st.integers(1, 90)
    )
    def add(self, model, scope, prompt, n):
        self.world.add(model, scope, prompt, n)

    @rule(model=st.sampled_from("aabd"), document=prompts())
    def publish(self, model, document):
        self.world.publish(model, document)

    @rule(choice=st.integers(0, 100))
    def withdraw(self, choice):
        self.world.withdraw(choice)

    @rule(models=st.sets(st.sampled_from("abd")))
    def change_models(self, models):
        self.world.have(models)

    @rule(count=st.sampled_from([1, 1, 5, 40]))
    def steps(self, count):
        for _ in range(count):
            if not self.world.step():
                break

    @rule(choice=st.integers(0, 100))
    def step_with_abort(self, choice):
        self.world.step(abort=choice)

    @rule()
    def step_that_fails(self):
        self.world.step(fault=True)

    @rule(choice=st.integers(0, 100))
    def abort(self, choice):
        self.world.abort(choice)

    @invariant()
    def whole(self):
        self.world.check()

    def teardown(self):
        self.world.drain()


KVMachine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
TestKVMachine = KVMachine.TestCase


@pytest.mark.parametrize("seed", range(3))
def test_soak_sees_every_kind_of_event(seed):
    """One long random run under pressure: the properties above hold, and nothing above was idle."""
    rng = random.Random(seed)
    config = SchedulerConfig(max_num_seqs=6, max_num_batched_tokens=96, max_waiting=12, ageing_s=0.5)
    world = World(45, config)
    for number in range(800):
        models = ("aabbcd", "aac", "aabbcd", "abb")[number // 100 % 4]
        if number % 100 == 0:
            world.leave_only(models)
        if rng.random() < 0.25:
            shared = rng.choice([0, 32, 64, 100, 130])
            tail = [rng.randrange(3) for _ in range(rng.choice([1, 20, 70, 500]))]
            world.add(rng.choice(models), rng.choice("xxxy"), [0] * shared + tail, rng.randrange(1, 120))
        if rng.random() < 0.05:
            world.abort(rng.randrange(100))
        if rng.random() < 0.02:
            world.publish(rng.choice(models.replace("c", "")), [0] * rng.choice([20, 64, 75]) + [2])
        if rng.random() < 0.01:
            world.withdraw(rng.randrange(100))
        if rng.random() < 0.05:
            world.have(set(rng.sample("abd", rng.randrange(4))))
        world.step(abort=rng.randrange(100) if rng.random() < 0.02 else None, fault=rng.random() < 0.02)
    world.drain()
    stats = world.caches["a"].stats()
    assert stats.evictions > 0
    world.note_gains()
    assert {"low", "low+middle+a"} <= world.hit
    assert "low" in world.deduped
    assert world.num_reshaped > 3
    assert stats.copied_pages > 0
    assert stats.published_hit_tokens > 0
    assert world.late_tokens > 0
    assert world.boundaries.evictions > 0
    assert stats.resumed_tokens > 0
    assert world.scheduler.num_preemptions > 0
    assert world.refused > 0


def test_same_load_makes_the_same_choices():
    """Nothing hangs on hash seeds, memory addresses or the secret of the page keys."""

    def trace() -> list[list[int]]:
        rng = random.Random(4)
        world = World(30, SchedulerConfig(max_num_seqs=6, max_num_batched_tokens=96))
        tables = []
        for _ in range(12):
            prompt = [0] * rng.choice([0, 32, 64]) + [rng.randrange(3) for _ in range(rng.randrange(1, 90))]
            world.add(rng.choice("abd"), rng.choice("xy"), prompt, rng.randrange(1, 60))
        while world.scheduler.has_unfinished():
            world.step()
            tables.append([int(seq.page_table.sum()) for seq in world.scheduler.running])
        return tables

    assert trace() == trace()
