"""The cluster simulator: its arithmetic by hand, and that requests go through it as they should."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from benchmarks.cluster_sim.cluster import HEAD_S, HEAD_SEQ_S, Cluster, Place, Router, Stage
from benchmarks.cluster_sim.devices import A100, NETWORK, PUBLISHED, SHAPES, Link, Machines, Piece
from benchmarks.cluster_sim.drift import changing
from benchmarks.cluster_sim.events import Clock, Worker
from benchmarks.cluster_sim.lanes import Lane
from benchmarks.cluster_sim.real import StepCosts
from benchmarks.cluster_sim.runs import Setting, run
from benchmarks.cluster_sim.sides import BLOCKS_SIDE, PER_MODEL, pieces_and_chains
from benchmarks.cluster_sim.traffic import Mix, Request, make_apps, make_requests
from blockzoo.runtime.serve.config import SchedulerConfig

ROOT = Path(__file__).parents[1]
LONG = 1.0  # seconds that a step takes in the simplest lanes
CONFIG = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64)
BASE = Piece(SHAPES["7B"], 24, False)
TOP = Piece(SHAPES["7B"], 8, True)


def request(
    number: int, app: str = "a", prompt: int = 40, answer: int = 3, session: int | None = None
) -> Request:
    tokens = np.arange(prompt, dtype=np.int32) + 1000 * number
    return Request(
        number, app, number if session is None else session, 0.0, tokens, np.full(answer, 7, np.int32)
    )


def lane(clock: Clock, **more) -> Lane:
    def run_step(_: Lane, items: list, done: Callable[[], None]) -> None:
        clock.after(LONG, done)

    return Lane(clock, run_step, 100, CONFIG, **more)


# ---- parts


def test_workers_do_one_thing_after_the_other() -> None:
    clock, ends = Clock(), []
    worker = Worker(clock)
    for begin, seconds in ((0.0, 2.0), (1.0, 3.0), (9.0, 1.0)):
        clock.after(begin, lambda seconds=seconds: worker.run(seconds, 5.0, lambda: ends.append(clock.now)))
    clock.run(4.0)
    assert ends == [2.0]
    clock.run()
    assert (ends, worker.busy_s, worker.flops) == ([2.0, 5.0, 10.0], 6.0, 15.0)


def test_a_call_takes_the_longer_of_two_times() -> None:
    assert BASE.num_bytes == 24 * 2 * (4 * 4096**2 + 3 * 4096 * 11008)
    overhead = A100.call_s + 24 * A100.layer_s
    few = BASE.seconds(A100, 1, 1, 0.0, 0.0, 0.0)
    assert few == pytest.approx(BASE.num_bytes / (2.039e12 * 0.8) + overhead)
    kv = BASE.seconds(A100, 1, 1, 0.0, 1000.0, 0.0) - few
    assert kv == pytest.approx(1000 * 2 * 2 * 4096 * 24 / (2.039e12 * 0.8))
    many = BASE.seconds(A100, 2048, 0, 0.0, 0.0, 0.0)
    assert many == pytest.approx(2048 * BASE.num_bytes / (312e12 * 0.6) + overhead)
    assert TOP.flops(1, 1, 0.0) - TOP.flops(1, 0, 0.0) == SHAPES["7B"].head_bytes


def test_what_is_shared_by_kind() -> None:
    apps = make_apps(10, Mix(bases={"7B": 1.0}), seed=0)
    assert sorted(app.kind for app in apps).count("lora") == 5
    pieces, chains = pieces_and_chains(apps, shared=True)
    for app in apps:
        want = {"lora": ("7B/trunk", "7B/top"), "top": ("7B/trunk", f"{app.name}/top"), "full": (app.name,)}
        assert chains[app.name] == want[app.kind]
    whole = Piece(SHAPES["7B"], 32, True).num_bytes
    assert sum(p.num_bytes for p in pieces.values()) == 3 * whole + 3 * TOP.num_bytes
    alone, _ = pieces_and_chains(apps, shared=False)
    assert sum(p.num_bytes for p in alone.values()) == 10 * whole


def test_turns_repeat_what_was_said() -> None:
    apps = make_apps(5, Mix(), seed=1)
    found = make_requests(apps, Mix(), rate=10.0, seconds=200.0, seed=1)
    assert len(found) == pytest.approx(2000, rel=0.2)
    assert [r.arrival for r in found] == sorted(r.arrival for r in found)
    sessions: dict[int, list[Request]] = {}
    for each in found:
        sessions.setdefault(each.session, []).append(each)
    pairs = [(a, b) for turns in sessions.values() for a, b in pairwise(turns)]
    assert len(pairs) > 300
    for first, second in pairs:
        said = np.concatenate([first.tokens, first.answer])
        assert second.app == first.app
        assert (second.tokens[: len(said)] == said).all()
    again = make_requests(apps, Mix(), rate=10.0, seconds=200.0, seed=1)
    assert all(
        (a.tokens == b.tokens).all() and a.arrival == b.arrival for a, b in zip(found, again, strict=True)
    )


# ---- lanes


def test_a_lane_serves_as_the_engine_does() -> None:
    clock = Clock()
    one, two, both = request(1), request(2, prompt=60), []
    served = lane(clock)
    served.on_finished = both.append
    served.submit(one)
    served.submit(two)
    clock.run()
    # 64 tokens a step: the first prompt; the second one beside a token; then tokens
    assert (one.first_token, one.end, two.first_token, two.end) == (1.0, 3.0, 2.0, 4.0)
    assert both == [one, two]
    assert served.num_requests == 0
    served.cache.check_integrity([])


def test_guesses_that_come_true_spare_steps() -> None:
    ends = {}
    for chance in (None, 0.0, 1.0):
        clock, each = Clock(), request(1, answer=60)
        served = lane(clock, chances=None if chance is None else {"a": chance})
        served.submit(each)
        clock.run()
        assert each.end is not None
        ends[chance] = each.end
        served.cache.check_integrity([])
    assert ends[None] == 60.0
    assert ends[0.0] == pytest.approx(60.0)
    assert ends[1.0] < 30.0


def test_kv_that_comes_from_elsewhere_is_not_computed() -> None:
    clock, each = Clock(), request(1, prompt=200)
    served = lane(clock)
    assert served.cache.probe(served.sequence(each)) == 0
    served.take_in(each, 130)
    assert served.cache.probe(served.sequence(each)) == 128
    served.submit(each)
    clock.run()
    assert each.first_token == 2.0, "72 tokens are left, 64 a step"
    served.cache.check_integrity([])


# ---- steps over workers


def cluster(routes: dict[str, tuple[Stage, ...]], **more) -> tuple[Cluster, Lane]:
    made = Cluster(Machines(A100, (1, 1)), {"base": BASE, "top": TOP, "other": TOP}, **more)
    served = Lane(made.clock, made.run_step, 1000, SchedulerConfig())
    made.routes[served] = routes
    for app in routes:
        made.places[app].append(Place(served, 0, SHAPES["7B"].kv_bytes, 1e-4, 1e-4))
    return made, served


def decode_seconds(made: Cluster, served: Lane, apps: list[str]) -> float:
    """Of a step in which each application has one row: behind 40 tokens and one more for each after it."""
    each = [request(number, app, answer=1 + len(apps) - number) for number, app in enumerate(apps)]
    for one in each:
        served.submit(one)  # the first runs alone, then all others' prompts
    made.clock.run()
    (end,) = {one.end for one in each}
    assert end is not None
    assert each[-1].first_token is not None
    return end - each[-1].first_token


def host(sequences: int) -> float:
    return HEAD_S + HEAD_SEQ_S * sequences


def test_a_step_on_one_worker_is_the_sum_of_its_calls() -> None:
    made, served = cluster({"a": (Stage("base", 0), Stage("top", 0))})
    calls = [piece.seconds(A100, 1, 1, 41.0, 41.0, 0.0) for piece in (BASE, TOP)]
    assert decode_seconds(made, served, ["a"]) == pytest.approx(sum(calls) + host(1))
    assert made.workers[1].busy_s == 0


def test_applications_meet_in_the_calls_of_a_span() -> None:
    routes = {"a": (Stage("base", 0), Stage("top", 0)), "b": (Stage("base", 0), Stage("other", 0))}
    together = decode_seconds(*cluster(routes), ["a", "b"])
    apart = decode_seconds(*cluster(routes, per_block=False), ["a", "b"])
    base = BASE.seconds(A100, 2, 2, 83.0, 83.0, 0.0)
    own = TOP.seconds(A100, 1, 1, 41.0, 41.0, 0.0)
    assert together == pytest.approx(base + 2 * own + host(2), rel=1e-4)
    assert apart - together == pytest.approx(BASE.seconds(A100, 1, 1, 41.0, 41.0, 0.0), rel=0.02)


def test_hidden_states_take_their_time_between_workers() -> None:
    routes = {"a": (Stage("base", 0), Stage("top", 1)), "b": (Stage("base", 0), Stage("other", 1))}
    made, served = cluster(routes, head=0)
    base = BASE.seconds(A100, 2, 2, 83.0, 83.0, 0.0)
    own = TOP.seconds(A100, 1, 1, 41.0, 41.0, 0.0)
    hop = NETWORK.seconds(2 * 4096) + NETWORK.seconds(0)
    assert decode_seconds(made, served, ["a", "b"]) == pytest.approx(base + 2 * own + hop + host(2), rel=1e-4)


def test_a_far_head_is_asked_once_a_step() -> None:
    routes = {"a": (Stage("base", 0), Stage("top", 0))}
    near, far = (decode_seconds(*cluster(routes, head_link=Link(s, 1e9)), ["a"]) for s in (0.0, 0.01))
    assert far - near == pytest.approx(0.02)


# ---- the router


def two_places(coordination) -> tuple[Cluster, Router, list[Lane]]:
    """An application on two workers that are a network apart."""
    made, first = cluster({"a": (Stage("base", 0), Stage("top", 0))})
    second = Lane(made.clock, made.run_step, 1000, SchedulerConfig())
    made.routes[second] = {"a": (Stage("base", 1), Stage("top", 1))}
    made.places["a"].append(Place(second, 1, SHAPES["7B"].kv_bytes, 1e-4, 1e-4))
    return made, Router(made, coordination), [first, second]


@pytest.mark.parametrize(
    ("coordination", "lane_of_second", "moved"),
    [("stay", 0, 0), ("anew", 1, 0), ("move", 1, 1984), ("best", 0, 0)],
)
def test_where_the_next_turn_goes(coordination, lane_of_second: int, moved: int) -> None:
    made, router, lanes = two_places(coordination)
    router.submit(first := request(1, prompt=2000, answer=4, session=9))
    made.clock.run()
    busy = request(2, prompt=50, answer=200, session=10)  # a little work at the owner
    lanes[0].submit(busy)
    second = replace(first, number=3, first_token=None, end=None)
    router.submit(second)
    made.clock.run()
    assert [each.lookups for each in (lanes[0].cache, lanes[1].cache)][lane_of_second] >= 1 + (
        lane_of_second == 0
    )
    assert router.moved_bytes == moved * SHAPES["7B"].kv_bytes
    assert second.end is not None


def test_the_best_leaves_an_owner_that_is_too_busy() -> None:
    made, router, lanes = two_places("best")
    router.submit(first := request(1, prompt=2000, answer=4, session=9))
    made.clock.run()
    for number in range(20):
        lanes[0].submit(request(10 + number, prompt=1000, answer=100, session=20 + number))
    router.submit(second := replace(first, number=3, first_token=None, end=None))
    made.clock.run()
    assert router.moved_bytes > 0, "moved, as that takes less than computing it"
    assert second.end is not None


# ---- runs


SMALL = Setting(PUBLISHED, 8, Mix(bases={"7B": 1.0}), 10.0)


def test_runs_repeat_and_serve_all() -> None:
    first, second = run(SMALL, BLOCKS_SIDE, 6.0, seed=3), run(SMALL, BLOCKS_SIDE, 6.0, seed=3)
    assert first == second
    assert first.failed == 0
    assert first.p50_s <= first.p95_s < float("inf")
    assert 0 < first.useful < first.useful_busy < 1
    assert first.busy < 1
    alone = run(SMALL, PER_MODEL, 6.0, seed=3)
    assert alone.weight_copies >= 1
    assert alone.moved_gb == 0 or alone.failed == 0


@pytest.mark.slow
def test_a_drift_moves_weights_where_it_pays() -> None:
    setting = replace(SMALL, seconds=40.0)
    stays, none = changing(setting, 6.0, 0, None)
    _, dear = changing(setting, 6.0, 0, 1e-6)
    assert (none, dear) == (0.0, 0.0), "nothing pays within a microsecond"
    assert stays.p95_s < float("inf")


def test_costs_of_steps_are_found_again() -> None:
    rng = np.random.default_rng(0)
    features = np.zeros((400, 12))
    features[:, 0] = 1
    features[:, 3] = rng.integers(1, 200, 400)
    features[:, 7] = np.maximum(0, features[:, 3] - 32)
    seconds = 0.01 + 0.001 * features[:, 3] - 0.0004 * features[:, 7]
    costs = StepCosts.fitted(features, seconds)
    assert costs.weights[[0, 3, 7]] == pytest.approx([0.01, 0.001, -0.0004])
    assert costs.ratios == pytest.approx(1.0)
    assert costs.seconds(features[0], rng) == pytest.approx(seconds[0])


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.cluster_sim", "scale", "--gpus", "32", "--apps", "40"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert "None of that is measured" in " ".join(done.stdout.split())
    found = json.loads((tmp_path / "cluster_sim.json").read_text())["shapes"]["scale"]["results"]
    assert (found["gpus"], found["failed"]) == (32, 0)
    assert found["assumptions"]


@pytest.mark.slow
def test_the_engine_beside_the_simulation(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.cluster_sim",
        "validate",
        "--shape",
        "tiny",
        "--seconds",
        "4",
    ]
    folders = ["--workdir", str(tmp_path), "--out", str(tmp_path), "--threads", "1"]
    done = subprocess.run([*command, *folders], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "cluster_sim.json").read_text())["shapes"]["validate"]["results"]
    for load in found["loads"].values():
        for name in ("request p50", "request p95", "first token p50", "first token p95"):
            assert 0 < load[name]["real"] < 60
            assert 0 < load[name]["simulated"] < 60
