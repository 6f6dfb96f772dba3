"""The engine of a replica, in this process, against the runtime's own API."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import aclosing
from pathlib import Path

import pytest

from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.runtime import LLM, SamplingParams
from blockzoo.server_config.openai.engine import Delta, EngineRequest
from blockzoo.server_config.replicas.host import EngineHost, Refusal, ReplicaSettings

SETTINGS = {"kv_cache_bytes": 32 << 20, "precision": "f32"}


@pytest.fixture(scope="module")
def host(demo_zoo):
    host = EngineHost(ReplicaSettings(str(demo_zoo), {**SETTINGS, "max_num_seqs": 4, "max_waiting": 8}))
    yield host
    host.close()


def a_request(model="base", prompt="The parties agree", stream=True, **params) -> EngineRequest:
    return EngineRequest(
        model, prompt, SamplingParams(**{"temperature": 0.0, "max_tokens": 12, **params}), stream
    )


async def collect(host, request) -> list[Delta | Refusal]:
    return [item async for item in host.generate(request, uuid.uuid4().hex)]


def test_answers_are_those_of_the_runtime(host, demo_zoo) -> None:
    llm = LLM(str(demo_zoo), **SETTINGS)
    for model in ("base", "notes", "solver"):
        params = SamplingParams(temperature=0.0, max_tokens=12, logprobs=2)
        expected = llm.generate(model, ["The parties agree"], params)[0]
        for stream in (True, False):
            items = asyncio.run(collect(host, a_request(model, stream=stream, logprobs=2)))
            assert stream or len(items) == 1
            assert "".join(item.text for item in items) == expected.text
            assert tuple(t for item in items for t in item.token_ids) == tuple(expected.token_ids)
            found = [value for item in items for value in item.logprobs]
            assert found == pytest.approx([token.logprob for token in expected.logprobs], abs=1e-4)
            assert [len(top) for item in items for top in item.tops] == [2] * len(found)
            assert items[-1].finish_reason == "length"
            assert items[-1].num_prompt_tokens == expected.num_prompt_tokens


def test_over_workers_too(demo_zoo) -> None:
    settings = {**SETTINGS, "workers": 2, "num_threads": 1, "worker_cores": 1}
    spread = EngineHost(ReplicaSettings(str(demo_zoo), settings))
    pids = spread._engine.engine.worker_pids
    try:
        here = LLM(str(demo_zoo), **SETTINGS)
        expected = here.generate("solver", ["The parties agree"], a_request().params)[0]
        items = asyncio.run(collect(spread, a_request("solver")))
        assert tuple(t for item in items for t in item.token_ids) == tuple(expected.token_ids)
    finally:
        spread.close()
    assert len(pids) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_log_probabilities_of_the_prompt_come_with_the_first(host) -> None:
    items = asyncio.run(collect(host, a_request(max_tokens=2, logprobs=1, prompt_logprobs=1)))
    prompt = items[0].prompt
    assert len(prompt.token_ids) - 1 == len(prompt.logprobs) == len(prompt.tops)
    assert all(item.prompt is None for item in items[1:])


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        (a_request("nobody"), "NOT_FOUND", "no model 'nobody'"),
        (a_request(prompt=[10**6]), "INVALID_ARG", "1000000"),
        (a_request(prompt="x" * (1 << 21)), "INVALID_ARG", "expected at most 1048576"),
        (a_request(prompt=[5] * 600_000), "INVALID_ARG", "shorten it"),
        (EngineRequest("base", "x", SamplingParams(), True, kv_scope="s" * 257), "INVALID_ARG", "kv_scope"),
        (EngineRequest("base", "x", SamplingParams(), True, kv_reuse="some"), "INVALID_ARG", "kv_reuse"),
    ],
)
def test_what_is_refused(host, request_, status, message) -> None:
    (refusal,) = asyncio.run(collect(host, request_))
    assert isinstance(refusal, Refusal)
    assert refusal.status == status
    assert message in refusal.message


def test_a_full_queue_refuses_and_says_when(host) -> None:
    async def flood() -> list:
        asked = [a_request(prompt=f"{number} is", max_tokens=150) for number in range(20)]
        return await asyncio.gather(*(collect(host, request) for request in asked))

    answers = asyncio.run(flood())
    refused = [items[0] for items in answers if isinstance(items[0], Refusal)]
    assert 0 < len(refused) <= 8
    assert all(one.status == "UNAVAILABLE" and "again later" in one.message for one in refused)
    finished = [items[-1].finish_reason for items in answers if isinstance(items[0], Delta)]
    assert finished == ["length"] * (20 - len(refused))


def test_closing_the_iterator_frees_the_request(host) -> None:
    async def leave() -> None:
        async with aclosing(host.generate(a_request(max_tokens=200, ignore_eos=True), "left")) as items:
            async for _ in items:
                break
        for _ in range(2400):
            if host.metrics().requests_running == 0:
                return
            await asyncio.sleep(0.05)
        raise AssertionError("the request still runs")

    before = host.metrics().requests_total["abort"]
    asyncio.run(leave())
    assert host.metrics().requests_total["abort"] == before + 1
    assert host.problem() is None


@pytest.mark.parametrize("when", ["before it comes", "while it waits", "when it has begun"])
def test_a_request_that_is_left_ends(host, when) -> None:
    """By its name: Ray may lose that a call was cancelled."""
    request = a_request(max_tokens=3000, ignore_eos=True)

    async def leave() -> list[Delta | Refusal]:
        if when == "before it comes":
            host.leave(when)
        found = []
        async for item in host.generate(request, when):
            found.append(item)
            host.leave(when)
        return found

    async def leave_at_once() -> list[Delta | Refusal]:
        task = asyncio.create_task(collect_named())
        await asyncio.sleep(0)
        host.leave(when)
        return await task

    async def collect_named() -> list[Delta | Refusal]:
        return [item async for item in host.generate(request, when)]

    before = host.metrics().requests_total["length"]
    found = asyncio.run(leave_at_once() if when == "while it waits" else leave())
    assert isinstance(found[-1], Refusal)
    assert sum(len(item.token_ids) for item in found if isinstance(item, Delta)) < 1000
    assert host.metrics().requests_total["length"] == before
    assert host.problem() is None


def test_a_change_of_the_zoo(demo_family, tmp_path) -> None:
    zoo = tmp_path / "zoo"
    fast = CompileOptions(verify=False, profile=False)
    compile_models({"base": demo_family["base"]}, zoo, fast)
    host = EngineHost(
        ReplicaSettings(str(zoo), {**SETTINGS, "adapter_cache_bytes": 1})
    )  # none stays in memory
    try:
        before = host.state()
        assert before.models == before.warm == ("base",)
        assert before.kv_tokens > 100
        compile_models({"notes": f"{demo_family['notes']}@base"}, zoo, fast)
        assert host.reload().added == ("notes",)
        after = host.state()
        assert (after.models, after.warm) == (("base", "notes"), ("base",))
        assert after.stamp != before.stamp
    finally:
        host.close()
    assert host.problem() is not None
