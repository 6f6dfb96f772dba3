"""Placement of spans over workers: against the optimum of small cases, and what a plan must do."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from functools import cache
from itertools import product

import numpy as np
import pytest

from blockzoo.zoo.placement import (
    Chain,
    PlacementError,
    Plan,
    Span,
    Task,
    Worker,
    adapt,
    fits,
    judge,
    moves,
    place,
)
from blockzoo.zoo.placement_cells import place_in_cells

MIB = 1 << 20


def wires(workers: int, hop_s: float = 1e-4, byte_s: float = 1e-9) -> dict:
    def matrix(value: float) -> list[list[float]]:
        return [[0.0 if a == b else value for b in range(workers)] for a in range(workers)]

    disk = [[2e-9 if a == b else byte_s for b in range(workers)] for a in range(workers)]
    return {"hop_s": matrix(hop_s), "byte_s": disk}


def random_task(seed: int) -> Task:
    """Tenants of a base: a shared span, and an own one each behind it, some with a second base."""
    source = random.Random(seed)
    number = source.choice((2, 3))
    shared = [f"base{i}" for i in range(source.choice((1, 2)))]
    spans = {name: Span(source.randint(20, 60) * MIB, source.uniform(1, 4) * 1e-3) for name in shared}
    chains = {}
    tenants = 2 if number == 3 else 3  # few enough to try all plans
    for tenant in range(tenants):
        own = f"own{tenant}"
        spans[own] = Span(source.randint(5, 40) * MIB, source.uniform(0.2, 2) * 1e-3)
        head = ("head",) if source.random() < 0.5 else ()
        if head:
            spans["head"] = Span(30 * MIB, 5e-4)
        chains[f"tenant{tenant}"] = Chain((source.choice(shared), own, *head), source.uniform(20, 150))
    used = {span for chain in chains.values() for span in chain.spans}
    dear = source.choice((0.0, 0.0, 5e-3))  # of calls
    spans = {name: replace(span, call_seconds=dear) for name, span in spans.items() if name in used}
    total = sum(span.num_bytes for span in spans.values())
    memory = [int(total * source.uniform(0.5, 1.1)) for _ in range(number)]
    workers = [Worker(size, source.choice((1.0, 1.0, 2.0))) for size in memory]
    return Task(spans, chains, workers, **wires(number, source.choice((1e-5, 1e-4, 2e-3))))


def optimum(task: Task) -> Plan | None:
    """The best of all plans."""
    names = list(task.chains)
    ways = [list(product(range(len(task.workers)), repeat=len(task.chains[name].spans))) for name in names]
    best = None
    for combination in product(*ways):
        plan = judge(task, dict(zip(names, combination, strict=True)))
        if plan.cost < (math.inf if best is None else best.cost) and fits(task, plan.homes):
            best = plan
    return best


@cache
def placed(seed: int, copies: bool = True) -> Plan | None:
    """Of a random task; None: it has no plan."""
    try:
        return place(replace(random_task(seed), copies=copies))
    except PlacementError:
        return None


@pytest.mark.parametrize("copies", [True, False])
def test_near_the_optimum_of_small_cases(copies: bool) -> None:
    gaps, missed = [], 0
    for seed in range(40):
        task = replace(random_task(seed), copies=copies)
        best = optimum(task)
        plan = placed(seed, copies)
        if plan is None or best is None:
            assert plan is None
            missed += best is not None
            continue
        assert fits(task, plan.homes)
        assert copies or all(len(places) == 1 for places in plan.homes.values())
        gaps.append(plan.cost / best.cost - 1)
    assert min(gaps) > -1e-9
    assert len(gaps) >= 25
    assert missed == 0
    assert sum(gap < 1e-6 for gap in gaps) > 0.8 * len(gaps)
    assert np.mean(gaps) < 0.02
    assert max(gaps) < 0.2, sorted(gaps)[-5:]


def three(**more) -> Task:
    """A base that two tenants share, on three workers, each of which holds two spans."""
    spans = {name: Span(40 * MIB, 2e-3) for name in ("base", "a", "b")}
    chains = {"a": Chain(("base", "a"), 100.0), "b": Chain(("base", "b"), 100.0)}
    return replace(Task(spans, chains, [Worker(85 * MIB)] * 3, **wires(3)), **more)


def test_what_is_hot_is_held_twice() -> None:
    calm = {"a": Chain(("base", "a"), 10.0), "b": Chain(("base", "b"), 10.0)}
    quiet = place(three(chains=calm, horizon_s=10.0))
    assert sorted(map(len, quiet.homes.values())) == [1, 1, 1]
    chains = {"a": Chain(("base", "a"), 210.0), "b": Chain(("base", "b"), 210.0)}
    busy = place(three(chains=chains))
    assert len(busy.homes["base"]) == 2
    assert max(busy.loads) < 0.9


def test_what_can_meet_in_a_call_is_drawn_together() -> None:
    """Two bases of which each call is dear, on two workers that have room for both."""
    spans = {name: Span(40 * MIB, 1e-5, call_seconds=0.01) for name in ("base", "other")}
    chains = {f"{span}-{i}": Chain((span,), 100.0) for span in spans for i in range(4)}
    task = replace(three(), spans=spans, chains=chains, workers=[Worker(85 * MIB)] * 2, **wires(2))
    plan = place(task)
    assert [len(places) for places in plan.homes.values()] == [1, 1]
    assert plan.homes["base"] != plan.homes["other"]
    both = judge(task, {name: (number % 2,) for number, name in enumerate(chains)})
    assert plan.cost < 0.6 * both.cost
    assert plan.tokens[0] == pytest.approx(4.0, rel=0.1), "400 a second, each takes a round of 10 ms"


def test_what_talks_to_each_other_stands_together() -> None:
    plan = place(three(chains={"a": Chain(("base", "a"), 5.0)}, **wires(3, hop_s=0.01)))
    assert set(plan.routes["a"]) == {0}, "nothing is to be had from another worker"


def test_a_zoo_that_fits_no_worker_is_spread() -> None:
    plan = place(three(workers=[Worker(45 * MIB)] * 3))
    assert sorted(worker for places in plan.homes.values() for worker in places) == [0, 1, 2]
    with pytest.raises(PlacementError, match="spans have 125829120 bytes, workers room for 94371840"):
        place(three(workers=[Worker(45 * MIB)] * 2, **wires(2)))


def test_too_much_to_do_is_said() -> None:
    chains = {"a": Chain(("base", "a"), 2000.0)}
    with pytest.raises(PlacementError, match=r"keep 8\.00 workers of speed 1 busy, and there are 3"):
        place(three(chains=chains))


def test_moves_only_what_pays() -> None:
    calm = {"a": Chain(("base", "a"), 10.0), "b": Chain(("base", "b"), 10.0)}
    first = place(three(chains=calm, horizon_s=10.0))
    held = three(chains=calm, held=first.homes, horizon_s=10.0)
    assert place(held).moving == 0
    chains = {"a": Chain(("base", "a"), 210.0), "b": Chain(("base", "b"), 210.0)}
    slow = wires(3, byte_s=1e-5)  # 420 s for a span
    assert place(replace(held, chains=chains, **wires(3))).moving > 0
    slow["byte_s"] = [[1e-5] * 3] * 3
    stays = place(
        replace(held, chains={name: Chain(chain.spans, 60.0) for name, chain in calm.items()}, **slow)
    )
    assert stays.moving == 0


# ---- as rates change


def changed(seed: int) -> tuple[Task, Plan] | None:
    """A random task some time later: workers hold its plan, other chains are busy; None: it has no plan."""
    task, before, source = random_task(seed), placed(seed), random.Random(seed)
    if before is None:
        return None
    chains = {
        name: Chain(chain.spans, chain.rate * source.choice((0.2, 1.0, 1.0, 1.5)))
        for name, chain in task.chains.items()
    }
    byte_s = source.choice((1e-9, 1e-8, 1e-7))
    slower = wires(len(task.workers), 1e-4, byte_s)["byte_s"]
    horizon_s = source.choice((1.0, 30.0, 600.0))
    return replace(task, chains=chains, held=before.homes, byte_s=slower, horizon_s=horizon_s), before


@pytest.mark.slow
def test_goes_over_to_nearly_the_best_plan_that_there_is() -> None:
    gaps, stayed = [], 0
    for seed in range(40):
        found = changed(seed)
        best = None if found is None else optimum(found[0])
        if found is None or best is None:
            continue
        later, before = found
        plan = adapt(later, before.routes)
        assert fits(later, plan.homes)
        assert plan.cost <= judge(later, before.routes).cost
        stayed += plan.routes == before.routes
        gaps.append(plan.cost / best.cost - 1)
    assert min(gaps) > -1e-9
    assert len(gaps) >= 20
    assert sum(gap < 1e-6 for gap in gaps) > 0.8 * len(gaps)
    assert np.mean(gaps) < 0.02
    assert max(gaps) < 0.2, sorted(gaps)[-5:]
    assert 0 < stayed < len(gaps)


def test_nothing_is_moved_that_does_not_pay() -> None:
    """Whatever is moved, the plan is dearer without: with its chains where the span is already."""
    moved = 0
    for seed in range(40):
        found = changed(seed)
        if found is None:
            continue
        later, before = found
        try:
            plan = adapt(later, before.routes)
        except PlacementError:
            continue
        for move in moves(later, plan):
            moved += 1
            for holder in later.held[move.span]:
                routes = {
                    name: tuple(
                        holder if (span, worker) == (move.span, move.worker) else worker
                        for span, worker in zip(later.chains[name].spans, route, strict=True)
                    )
                    for name, route in plan.routes.items()
                }
                other = judge(later, routes)
                assert other.cost >= plan.cost * (1 - 1e-9) or not fits(later, other.homes)
    assert moved > 3


def test_what_moves_pays_for_its_traffic() -> None:
    calm = {name: Chain(("base", name), 10.0) for name in "ab"}
    first = place(three(chains=calm, horizon_s=10.0))
    busy = {name: Chain(("base", name), 210.0) for name in "ab"}
    later = three(chains=busy, held=first.homes, horizon_s=60.0)
    plan = adapt(later, first.routes)
    assert judge(later, first.routes).cost == math.inf
    assert max(plan.loads) < 0.9
    (move,) = moves(later, plan)
    assert move.seconds == pytest.approx(later.spans[move.span].num_bytes * 1e-9)
    assert move.worker not in first.homes[move.span]
    back = three(chains=calm, held=plan.homes, horizon_s=60.0)
    assert moves(back, adapt(back, plan.routes)) == []
    slow = [[1.0] * 3] * 3  # a second a byte
    bearable = {name: Chain(("base", name), 60.0) for name in "ab"}
    stays = adapt(replace(later, chains=bearable, byte_s=slow), first.routes)
    assert stays.routes == first.routes


def test_chains_and_workers_come_and_go() -> None:
    task = three()
    plan = place(task)
    chains = {"b": task.chains["b"], "c": Chain(("base", "b"), 20.0)}
    later = adapt(replace(task, chains=chains, held=plan.homes), plan.routes)
    assert later.routes.keys() == {"b", "c"}
    two = replace(task, workers=task.workers[:2], **wires(2))
    assert {worker for route in adapt(two, plan.routes).routes.values() for worker in route} <= {0, 1}
    with pytest.raises(PlacementError, match=r"keep 8\.00 workers"):
        adapt(replace(task, chains={"a": Chain(("base", "a"), 2000.0)}), plan.routes)


# ---- cells


def many(number: int) -> Task:
    """Forty chains of two bases, with an own span each, on workers of which each holds a base and some."""
    source = random.Random(7)
    spans = {f"base{i}": Span(40 * MIB, 1e-4, call_seconds=2e-3) for i in range(2)}
    chains = {}
    for i in range(40):
        spans[f"own{i}"] = Span(4 * MIB, 1e-4, call_seconds=2e-4)
        chains[f"c{i}"] = Chain((f"base{i % 2}", f"own{i}"), source.uniform(1, 60))
    return Task(spans, chains, [Worker(100 * MIB)] * number, **wires(number))


def test_each_chain_stays_in_a_cell() -> None:
    task = many(8)
    cells = [(0, 1), (2, 3, 4), (5, 6, 7)]
    plan = place_in_cells(task, cells)
    assert plan.routes.keys() == task.chains.keys()
    assert fits(task, plan.homes)
    for route in plan.routes.values():
        assert any(set(route) <= set(cell) for cell in cells)
    assert plan.cost < 1.5 * place(task).cost


def test_one_cell_is_all() -> None:
    task = many(4)
    assert place_in_cells(task, [range(4)]).routes == place(task).routes


def test_a_hundred_cells_are_placed_in_no_time() -> None:
    task = many(100)
    plan = place_in_cells(task, [range(first, first + 4) for first in range(0, 100, 4)])
    assert plan.cost < math.inf
    with pytest.raises(PlacementError, match="workers room for"):
        place_in_cells(replace(task, workers=[Worker(10 * MIB)] * 100), [range(50), range(50, 100)])
