"""Replicas that are killed, and a zoo that changes, under requests."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import openai
import pytest

from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.runtime import LLM, SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
TOKENS = 120
FAST = CompileOptions(verify=False, profile=False)


@dataclass
class Told:
    """What came of one request."""

    text: str = ""
    finish_reason: str | None = None
    error: openai.APIError | None = None


def stream(served, model: str, prompt: str, told: Told, max_tokens: int = TOKENS) -> Told:
    try:
        for chunk in served.complete(model, prompt, max_tokens, stream=True, extra_body={"ignore_eos": True}):
            told.text += chunk.choices[0].text
            told.finish_reason = chunk.choices[0].finish_reason
    except openai.APIError as error:
        told.error = error
    return told


def whole(served, model: str, prompt: str, told: Told) -> Told:
    try:
        answer = served.complete(model, prompt, TOKENS, extra_body={"ignore_eos": True})
        told.text, told.finish_reason = answer.choices[0].text, answer.choices[0].finish_reason
    except openai.APIError as error:
        told.error = error
    return told


def test_a_killed_replica_loses_only_what_had_begun_and_says_so(serve_replicas, demo_zoo) -> None:
    served = serve_replicas(demo_zoo, "--replicas=2", "--threads=1", "--max-num-seqs=3")
    prompts = [f"{number} parties agree that" for number in range(24)]
    llm = LLM(str(demo_zoo), kv_cache_bytes=32 << 20, num_threads=1, precision="f32")
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    expected = [answer.text for answer in llm.generate("base", prompts, params)]
    del llm
    told = [Told() for _ in range(2 * len(prompts))]
    with ThreadPoolExecutor(len(told)) as pool:
        running = [
            pool.submit(ask, served, "base", prompt, told[2 * number + kind])
            for number, prompt in enumerate(prompts)
            for kind, ask in enumerate((stream, whole))
        ]
        served.wait_for(
            lambda: (
                sum(bool(each.text) for each in told[::2]) >= 3
                and min(served.by_replica("requests_waiting").values()) > 0
            ),
            60,
        )
        victim = served.replica_pids()[0]
        os.kill(victim, signal.SIGKILL)
        for each in running:
            each.result(300)
    lost = [each for each in told if each.error is not None]
    assert 1 <= len(lost) <= 3, [str(each.error) for each in lost]  # as many as ran there at once
    for each in lost:
        assert each.text, "it had not begun"
        assert each.error.body["code"] == "replica_lost"
        assert "was lost after" in str(each.error)
    for number, answer in enumerate(expected):
        for each in told[2 * number : 2 * number + 2]:
            assert answer.startswith(each.text)
            assert each.error or (each.text, each.finish_reason) == (answer, "length")
    served.wait_for(lambda: served.metrics()["blockzoo_replicas"] == 2, 120)
    assert victim not in served.replica_pids()


def test_a_changed_zoo_goes_round_and_loses_no_stream(serve_replicas, demo_family, tmp_path) -> None:
    zoo = tmp_path / "zoo"
    compile_models({"base": demo_family["base"], "solver": demo_family["solver"]}, zoo, FAST)
    served = serve_replicas(zoo, "--replicas=2", "--threads=1", "--enable-lora")
    stop = threading.Event()
    answers: list[list[Told]] = [[] for _ in range(4)]

    def keep_asking(number: int) -> None:
        while not stop.is_set():
            answers[number].append(stream(served, "base", f"{number} is the number of", Told(), 60))

    def models() -> set[str]:
        return {model.id for model in served.client.models.list()}

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(keep_asking, number) for number in range(4)]
        try:
            compile_models({"notes": f"{demo_family['notes']}@base"}, zoo, FAST)
            served.wait_for(lambda: sum("added notes" in line for line in served.err) == 2, 120)
            served.wait_for(lambda: models() == {"base", "notes", "solver"}, 30)
            assert served.complete("notes", "The parties agree").choices[0].text
            compile_models({}, zoo, FAST, remove=["solver"])
            served.wait_for(lambda: sum("removed solver" in line for line in served.err) == 2, 120)
            served.wait_for(lambda: models() == {"base", "notes"}, 30)
        finally:
            stop.set()
        for each in asking:
            each.result(60)
    for told in answers:
        assert len(told) > 2
        assert [each.error for each in told if each.error or each.finish_reason != "length"] == []
        assert len({each.text for each in told}) == 1
    shutil.rmtree(zoo)


def test_a_killed_launcher_takes_all_along(serve_replicas, demo_zoo) -> None:
    served = serve_replicas(demo_zoo, "--replicas=1", "--threads=1")
    before = served.processes()
    assert served.stop(signal.SIGKILL) == -signal.SIGKILL
    deadline = time.monotonic() + 150  # some of Ray's look for their parent now and then
    while left := [command for pid, command in before.items() if os.path.exists(f"/proc/{pid}/exe")]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def test_more_replicas_come_with_the_requests(serve_replicas, demo_zoo) -> None:
    served = serve_replicas(demo_zoo, "--replicas=1-2", "--threads=1", "--max-num-seqs=2")
    assert served.metrics()["blockzoo_replicas"] == 1
    stop = threading.Event()

    def keep_asking(number: int) -> None:
        while not stop.is_set():
            assert stream(served, "base", f"{number} is", Told(), 60).error is None

    with ThreadPoolExecutor(6) as pool:
        asking = [pool.submit(keep_asking, number) for number in range(6)]
        try:
            served.wait_for(lambda: served.metrics()["blockzoo_replicas"] == 2, 180)
        finally:
            stop.set()
        for each in asking:
            each.result(60)


RAY = """
import os
from blockzoo.server_config.replicas.local_ray import TOKEN_VARIABLE, local_ray
with local_ray(1) as address:
    print(address, os.environ[TOKEN_VARIABLE], flush=True)
    input()
"""


def test_a_ray_that_runs_is_joined_and_left(serve_replicas, demo_zoo) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", RAY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as ray:
        try:
            address, token = ray.stdout.readline().split()
            environment = {
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN": token,
                "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            }
            served = serve_replicas(
                demo_zoo, "--replicas=1", "--threads=1", f"--ray-address={address}", **environment
            )
            assert served.complete("base", "The parties agree").choices[0].text
            assert served.replica_pids() == []  # they are that Ray's
            assert served.stop() == 0
            assert ray.poll() is None
        finally:
            ray.communicate("", timeout=60)


def test_what_keeps_a_replica_from_starting_is_said(demo_zoo) -> None:
    command = [sys.executable, "-m", "blockzoo.server_config.serve", str(demo_zoo), "--openai-port=9997"]
    run = subprocess.run(
        [*command, "--replicas=1", "--kv-cache-gb=0.000001"], capture_output=True, text=True, timeout=400
    )
    assert run.returncode == 1
    assert "zoo-serve: the replicas did not start: " in run.stderr
    assert "kv_cache_bytes" in run.stderr
