"""Approximate reuse end to end: its limits are exact, and nothing approximate gets out of its request."""

from __future__ import annotations

import random
from collections.abc import Iterable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quiet
from quiet import words

from blockzoo.runtime import LLM, EngineConfig, LLMEngine, SamplingParams
from blockzoo.runtime.api.errors import InvalidRequestError
from blockzoo.runtime.approx.config import RefreshOrder, ReuseConfig, Selector, Unit
from blockzoo.runtime.kv.sequence import TokenSequence

# the tests count tokens; the queue that they drain is in order of position
Reuse = partial(ReuseConfig, head=0, pointed=1.0, refresh_order="position")
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=1)
LONG = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)


DOCUMENT = words(150, 1)
TOLD: dict[str, np.ndarray] = {}
DONOR = words(20, 2) + DOCUMENT + words(30, 3)
PROMPT = words(37, 4) + DOCUMENT + words(25, 5)  # the document stands 17 tokens further
EDITED = DONOR[:40] + words(6, 31) + DONOR[46:170] + words(25, 5)


def serve(zoo: Path, reuse: ReuseConfig | None, **settings: Any) -> LLMEngine:
    settings = {"precision": "f32", "kv_cache_bytes": 32 << 20} | settings
    return LLMEngine(zoo, EngineConfig(approximate=reuse, **settings))


def ask(
    engine: LLMEngine, prompt: list[int], how: str = "exact", **more: Any
) -> tuple[list, list[float], int]:
    """Tokens, their log-probabilities and how many prompt tokens came from the exact cache."""
    return quiet.ask(engine, "base", prompt, GREEDY, kv_reuse=how, **more)


def approximated(engine: LLMEngine) -> int:
    return sum(cache.stats().approximate_tokens for cache in engine._zoo.caches.values())


def kv_of(engine: LLMEngine, seq: TokenSequence, num_tokens: int) -> np.ndarray:
    """K and V of the first tokens: [2, layers, tokens, heads, head_dim]."""
    (executor,) = engine._zoo.executors.values()
    positions = np.arange(num_tokens)
    pages = seq.page_table[:, positions // 32]
    return np.stack([pool[pages, :, positions % 32] for pool in executor._pool.values()])


def start(engine: LLMEngine, prompt: list[int], how: str) -> TokenSequence:
    """Run the prefill of a request that then goes on."""
    engine.add_request("r", "base", prompt, LONG, kv_reuse=how)
    while not any(output.token_ids for output in engine.step()):
        pass
    (seq,) = engine._scheduler.running
    return seq


@pytest.fixture(scope="module")
def exact(demo_zoo: Path) -> LLMEngine:
    return serve(demo_zoo, None, prefix_caching=False)


SELECTORS: list[Selector] = ["query", "head-of-run", "deviation", "importance*deviation", "random"]


def some_of(values: Iterable[str], *fast: str) -> list[Any]:
    """All as parameters, those but a few of slow tests."""
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.mark.parametrize(("budget", "unit"), [(512, "token"), (64, "page"), (512, "line")])
@pytest.mark.parametrize("selector", some_of(SELECTORS, "query", "deviation"))
def test_recomputing_everything_is_a_full_prefill(
    demo_zoo: Path, exact: LLMEngine, budget: int, unit: Unit, selector: Selector
) -> None:
    reuse = Reuse(recompute=0.999, refresh=0, unit=unit, selector=selector)
    engine = serve(demo_zoo, reuse, max_num_batched_tokens=budget)
    ask(engine, DONOR)
    tokens, logprobs, _ = ask(engine, PROMPT, "approx")
    assert approximated(engine) >= 150 * (selector not in ("head-of-run", "random"))
    expected, expected_logprobs, _ = ask(exact, PROMPT)
    assert tokens == expected
    assert logprobs == pytest.approx(expected_logprobs, abs=1e-4)


def composed(rng: random.Random) -> tuple[list[list[int]], list[int]]:
    """Known prompts, and one of their pieces: in another order, edited, cut, behind an equal beginning."""
    pieces = [words(rng.randint(20, 90), rng.randrange(10**6)) for _ in range(5)]
    opening = words(rng.choice([0, 40, 70]), 1)
    known = [[*opening, *chain(*rng.sample(pieces, 4)), *words(30, rng.randrange(10**6))] for _ in range(2)]
    prompt = list(opening)
    for piece in rng.sample(pieces, rng.randint(3, 5)):
        cut = rng.randrange(len(piece))
        edit = words(rng.choice([0, 0, 3, 12]), rng.randrange(10**6))
        prompt += piece[:cut] + edit + piece[cut + rng.choice([0, 0, 5]) :]
    return known, prompt + words(rng.randint(1, 20), rng.randrange(10**6))


@pytest.mark.parametrize("selector", some_of(SELECTORS, "query", "importance*deviation"))
def test_whatever_is_composed_all_of_it_anew_is_a_full_prefill(
    demo_zoo: Path, exact: LLMEngine, selector: Selector
) -> None:
    rng = random.Random(selector)
    engine = serve(demo_zoo, ReuseConfig(selector="importance*deviation"), max_num_batched_tokens=64)
    for number in range(4):
        engine.configure_reuse(
            ReuseConfig(
                selector=selector,
                recompute=0.9999,
                edit_recompute=0.9999,
                pointed=1.0,
                head=rng.choice([0, 8, 40]),
                edit=rng.choice([0, 8, 40]),
                rounds=rng.choice([1, 2]),
                unit=rng.choice(["token", "page", "line"]),
                refresh=rng.choice([0, 3]),
                refresh_order=rng.choice(["position", "importance"]),
                max_deviation=1e9,
                min_share=0.0,
            )
        )
        known, prompt = composed(rng)
        for donor in known:
            ask(engine, donor, scope=str(number))
        tokens, logprobs, _ = ask(engine, prompt, "approx", scope=str(number))
        expected, expected_logprobs, _ = ask(exact, prompt)
        assert tokens == expected
        assert logprobs == pytest.approx(expected_logprobs, abs=2e-4)


@pytest.mark.parametrize("selector", ["deviation", "importance*deviation"])
def test_what_deviates_beyond_bounds_is_computed_in_full(
    demo_zoo: Path, exact: LLMEngine, selector: Selector
) -> None:
    engine = serve(demo_zoo, Reuse(recompute=0.1, refresh=0, selector=selector, max_deviation=1e-6))
    ask(engine, DONOR)
    assert ask(engine, PROMPT, "approx")[1] == pytest.approx(ask(exact, PROMPT)[1], abs=1e-4)
    engine.configure_reuse(Reuse(recompute=0.9, refresh=0, selector=selector, negligible=1e6))
    seq = start(engine, [*PROMPT, 9], "approx")  # nothing is worth it
    assert seq.approx is not None
    assert int(seq.approx.reused.sum()) == 150
    engine.abort("r")


@pytest.mark.parametrize("rounds", [1, 3])
def test_the_question_chooses_what_it_attends_to(demo_zoo: Path, rounds: int) -> None:
    """A question that repeats a part of the document makes induction heads look there."""
    document = words(320, 21)
    reuse = Reuse(recompute=0.1, refresh=0, rounds=rounds)
    engine = serve(demo_zoo, reuse)
    ask(engine, words(20, 2) + document + words(30, 3))
    chosen = []
    for place in (90, 250):
        prompt = words(32, 4) + document + words(7, 5) + document[place : place + 12]
        seq = start(engine, prompt, "approx")
        assert seq.approx is not None
        fresh = np.flatnonzero(~seq.approx.reused[32:352])
        assert 0 < fresh.size <= 64
        chosen.append(set((fresh // 32).tolist()))
        engine.abort("r")
        engine.check_integrity()
    assert chosen[0] != chosen[1]


@pytest.mark.parametrize("refresh_order", ["position", "importance"])
def test_a_queue_without_news_is_given_up(demo_zoo: Path, refresh_order: RefreshOrder) -> None:
    engine = serve(demo_zoo, Reuse(recompute=0.0, refresh=4, refresh_order=refresh_order, negligible=1e6))
    ask(engine, DONOR)
    seq = start(engine, PROMPT, "approx")
    queue = seq.approx.stale.copy()
    assert queue.size >= 150
    engine.step()
    assert seq.approx.stale.size == queue.size - 4
    if refresh_order == "position":
        assert seq.approx.stale.tolist() == queue[4:].tolist()
    engine.step()
    assert seq.approx.stale.size == 0
    engine.abort("r")


@pytest.mark.parametrize("backend", ["openvino", "reference"])
def test_attention_is_told_as_it_is(demo_zoo: Path, exact: LLMEngine, backend: str) -> None:
    """Over exact KV: the document is known from the same place behind the same words."""
    engine = serve(
        demo_zoo,
        Reuse(recompute=0.2, refresh=0),
        backend=backend,
        device="cpu" if backend == "reference" else None,
    )
    ask(engine, DONOR)
    prompt = [*words(10, 40), *DOCUMENT, *words(20, 41)]
    seq = start(engine, prompt, "approx")
    assert seq.approx is not None
    heads, layers = 4, seq.num_layers
    assert seq.approx.importance.sum() == pytest.approx(heads * layers, rel=1e-3)
    TOLD[backend] = seq.approx.importance
    np.testing.assert_allclose(seq.approx.importance, next(iter(TOLD.values())), atol=2e-3)
    engine.abort("r")


def test_a_deployment_says_what_requests_get(demo_zoo: Path) -> None:
    llm = LLM(demo_zoo, precision="f32", kv_cache_bytes=16 << 20, kv_reuse="approx")
    llm.generate("base", [DONOR], GREEDY)
    edited, other = (DONOR[:9] + words(length, 31) + DONOR[20:] for length in (11, 12))
    llm.generate("base", [edited], GREEDY, kv_reuse="exact")
    llm.generate("base", [PROMPT], GREEDY)  # behind other words
    assert approximated(llm.engine) == 0
    llm.generate("base", [other, other], GREEDY, kv_reuse=["approx", "off"])
    assert approximated(llm.engine) > 0
    before = approximated(llm.engine)
    llm.generate("base", [DONOR[:9] + words(13, 32) + DONOR[20:]], GREEDY)
    assert approximated(llm.engine) > before
    with pytest.raises(InvalidRequestError, match="kv_reuse has 1 entries for 2 prompts"):
        llm.generate("base", [other, other], GREEDY, kv_reuse=["off"])


@pytest.mark.parametrize("budget", [512, 48])
def test_naive_reuse_moves_keys_and_keeps_values(demo_zoo: Path, exact: LLMEngine, budget: int) -> None:
    engine = serve(demo_zoo, Reuse(recompute=0.0, refresh=0), max_num_batched_tokens=budget)
    ask(engine, DONOR)
    seq = start(engine, PROMPT, "approx")
    assert seq.approx is not None
    assert np.flatnonzero(seq.approx.reused).tolist() == list(range(37, 37 + 150))
    found = kv_of(engine, seq, len(PROMPT))
    expected = kv_of(exact, start(exact, PROMPT, "exact"), len(PROMPT))
    np.testing.assert_allclose(found[:, 0], expected[:, 0], atol=1e-4)  # layer 0 sees nothing of other tokens
    np.testing.assert_allclose(found[:, :, :37], expected[:, :, :37], atol=1e-4)
    assert np.abs(found[:, 1:, 37:187] - expected[:, 1:, 37:187]).max() > 1e-2  # the price
    for each in (engine, exact):
        each.abort("r")
        each.check_integrity()


@pytest.mark.parametrize(("refresh", "unit"), [(1, "page"), (3, "token"), (64, "line")])
def test_a_drained_queue_leaves_exact_kv(demo_zoo: Path, exact: LLMEngine, refresh: int, unit: Unit) -> None:
    engine = serve(demo_zoo, Reuse(recompute=0.1, refresh=refresh, unit=unit))
    ask(engine, DONOR)
    seq = start(engine, PROMPT, "approx")
    left = seq.approx.stale.size
    assert left == len(PROMPT) - int(np.argmax(seq.approx.reused))
    steps = 0
    while seq.approx.stale.size:
        engine.step()
        steps += 1
    assert steps == -(-left // refresh)
    found = kv_of(engine, seq, len(PROMPT))
    expected = kv_of(exact, start(exact, PROMPT, "exact"), len(PROMPT))
    np.testing.assert_allclose(found, expected, atol=2e-4)
    for each in (engine, exact):
        each.abort("r")
        each.check_integrity()


def test_behind_an_edit_pages_are_taken_as_they_are(demo_zoo: Path, exact: LLMEngine) -> None:
    """But for a window right behind it; nothing is refreshed later, so guessing goes on."""
    engine = serve(demo_zoo, ReuseConfig())
    donor = start(engine, DONOR, "exact")
    known = kv_of(engine, donor, len(DONOR))
    engine.abort("r")
    ask(engine, DONOR)
    seq = start(engine, EDITED, "approx")
    assert seq.approx is not None
    assert np.flatnonzero(seq.approx.reused).tolist() == list(range(64, 170))
    assert not seq.approx.stale.size
    found = kv_of(engine, seq, len(EDITED))
    np.testing.assert_allclose(found[:, :, 64:170], known[:, :, 64:170], atol=1e-4)
    expected = kv_of(exact, start(exact, EDITED, "exact"), len(EDITED))
    np.testing.assert_allclose(found[:, :, :32], expected[:, :, :32], atol=1e-4)
    np.testing.assert_allclose(found[:, 1, 32:64], expected[:, 1, 32:64], atol=1e-4)  # sees one layer below
    assert np.abs(found[:, 1:, 64:170] - expected[:, 1:, 64:170]).max() > 1e-3  # the price
    for each in (engine, exact):
        each.abort("r")
        each.check_integrity()


def test_nothing_approximate_stays_behind(demo_zoo: Path, exact: LLMEngine) -> None:
    engine = serve(demo_zoo, Reuse(recompute=0.0, refresh=0))
    ask(engine, DONOR)
    ask(engine, PROMPT, "approx")
    assert approximated(engine) == 150
    before = engine.metrics().pages_cached
    expected = ask(exact, PROMPT)
    tokens, logprobs, cached = ask(engine, PROMPT)
    assert (tokens, cached) == (expected[0], 0)
    assert logprobs == pytest.approx(expected[1], abs=1e-4)
    assert engine.metrics().pages_cached > before
    # and it was no donor: only DONOR and the exact run of PROMPT are
    ask(engine, words(9, 6) + PROMPT[-25:], "approx")
    assert approximated(engine) == 150


def test_approximate_kv_keeps_to_its_scope_and_chain(demo_zoo: Path) -> None:
    engine = serve(demo_zoo, Reuse(recompute=0.0))
    ask(engine, DONOR, scope="red")
    ask(engine, PROMPT, "approx", scope="blue")
    ask(engine, PROMPT, "approx")
    assert approximated(engine) == 0
    engine.add_request("r", "solver", PROMPT, GREEDY, "red", "approx")
    while engine.has_unfinished():
        engine.step()
    assert approximated(engine) == 0
    ask(engine, PROMPT, "approx", scope="red")
    assert approximated(engine) == 150


def test_a_prompt_with_little_in_common_is_computed_in_full(demo_zoo: Path, exact: LLMEngine) -> None:
    engine = serve(demo_zoo, Reuse(recompute=0.0, min_share=0.5))
    ask(engine, DONOR)
    prompt = words(100, 7) + DOCUMENT[:40] + words(20, 8)
    assert ask(engine, prompt, "approx")[0] == ask(exact, prompt)[0]
    assert approximated(engine) == 0


def test_many_at_once_under_pressure(demo_zoo: Path) -> None:
    """Mixed with others, preempted, short of pages: every request ends, every page comes back."""
    reuse = Reuse(recompute=0.2, refresh=3)
    engine = LLMEngine(
        demo_zoo,
        EngineConfig(precision="f32", kv_cache_bytes=3 << 20, approximate=reuse, max_num_batched_tokens=96),
    )
    ask(engine, DONOR)
    rng = np.random.default_rng(0)
    for i in range(16):
        cut = int(rng.integers(0, 100))
        prompt = (
            words(int(rng.integers(1, 60)), 10 + i) + DOCUMENT[cut:] + words(int(rng.integers(1, 40)), 50 + i)
        )
        engine.add_request(str(i), "base", prompt, GREEDY, kv_reuse=("approx", "exact")[i % 3 == 2])
    reasons = []
    while engine.has_unfinished():
        reasons += [output.finish_reason for output in engine.step() if output.finished]
        engine.check_integrity()
    assert reasons == ["length"] * 16
    assert approximated(engine) > 150
    assert engine.metrics().pages_used == 0


def test_it_must_be_allowed(demo_zoo: Path, exact: LLMEngine, architecture_zoo: Path) -> None:
    with pytest.raises(InvalidRequestError, match="does not allow"):
        exact.add_request("r", "base", PROMPT, GREEDY, kv_reuse="approx")
    with pytest.raises(InvalidRequestError, match="approximate: recompute is 2"):
        EngineConfig(approximate={"recompute": 2})  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="needs prefix_caching"):
        EngineConfig(kv_reuse="approx", prefix_caching=False)
    blind = serve(demo_zoo, Reuse(selector="head-of-run"))
    for selector in ("query", "deviation"):
        with pytest.raises(InvalidRequestError, match="was made for selector 'head-of-run'"):
            blind.configure_reuse(Reuse(selector=selector))
    engine = serve(architecture_zoo, Reuse())
    with pytest.raises(InvalidRequestError, match="scaled rotary"):
        engine.add_request("r", "qwen2-rope-yarn", [5, 6, 7], GREEDY, kv_reuse="approx")


@pytest.mark.parametrize("selector", ["deviation", "importance*deviation", "query"])
def test_tokens_that_enter_late_stand_before_what_is_looked_at(
    demo_zoo: Path, exact: LLMEngine, selector: Selector
) -> None:
    """Another model has left hidden states of the head; the document behind it is known from elsewhere."""
    reuse = Reuse(recompute=0.999, refresh=0, selector=selector)
    engine = serve(demo_zoo, reuse, kv_sharing="scope")

    def answers(engine: LLMEngine, *jobs: tuple[str, list[int], str]) -> dict[str, list[int]]:
        for model, prompt, how in jobs:
            engine.add_request(model, model, prompt, GREEDY, kv_reuse=how)
        tokens: dict[str, list[int]] = {model: [] for model, *_ in jobs}
        while engine.has_unfinished():
            for output in engine.step():
                assert output.error is None
                tokens[output.request_id] += output.token_ids
        engine.check_integrity()
        return tokens

    head, prompt = words(64, 50), words(64, 50) + DOCUMENT + words(25, 51)
    answers(engine, ("solver", DONOR, "exact"))
    answers(engine, ("base", head + words(40, 52), "exact"))
    before = approximated(engine)
    found = answers(engine, ("solver", prompt, "approx"), ("notes", words(50, 53), "exact"))
    assert approximated(engine) > before
    assert engine._zoo.boundaries.max_bytes > 0
    wanted = answers(exact, ("solver", prompt, "off"), ("notes", words(50, 53), "off"))
    assert found == wanted


def test_preempted_requests_leave_no_refreshes_behind(demo_zoo: Path) -> None:
    """Steps stay within their budget: the executor refuses larger ones."""
    reuse = Reuse(recompute=0.3, refresh=8, selector="head-of-run", unit="token")
    engine = serve(demo_zoo, reuse, kv_cache_bytes=3500 << 10, max_num_seqs=4, max_num_batched_tokens=32)
    ask(engine, DONOR)
    for i in range(3):
        prompt = words(33 + i, 60 + i) + DOCUMENT + words(40, 70 + i)
        engine.add_request(str(i), "base", prompt, LONG, kv_reuse="approx")
    generated = dict.fromkeys("012", 0)
    while engine.has_unfinished():
        for output in engine.step():
            assert output.error is None
            generated[output.request_id] += len(output.token_ids)
        engine.check_integrity()
    assert generated == dict.fromkeys("012", 200)
    assert engine.metrics().preemptions_total > 0


def test_each_model_of_a_scope_has_donors_of_its_own(demo_zoo: Path) -> None:
    engine = serve(demo_zoo, Reuse(recompute=0.2), kv_sharing="scope")
    for model in ("solver", "base"):
        engine.add_request("r", model, DONOR, GREEDY)
        while engine.has_unfinished():
            engine.step()
    ask(engine, PROMPT, "approx")
    assert approximated(engine) > 0
