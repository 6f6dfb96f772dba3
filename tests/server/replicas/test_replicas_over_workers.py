"""Replicas each of which has workers: one is killed under requests, then a replica with all of its own."""

from __future__ import annotations

import os
import signal
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from blockzoo.runtime import LLM, SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
TOKENS = 120
PROMPTS = [f"{number} parties agree that" for number in range(12)]


def ask(served: Any, model: str, prompt: str) -> str | openai.APIError:
    """An answer in one piece."""
    try:
        return served.complete(model, prompt, TOKENS, extra_body={"ignore_eos": True}).choices[0].text
    except openai.APIError as error:
        return error


def test_what_is_killed_takes_its_own_along_and_nothing_else(serve_replicas, demo_zoo) -> None:
    options = ("--replicas=2", "--workers=2", "--threads=1", "--max-num-seqs=3")
    served = serve_replicas(demo_zoo, *options)
    llm = LLM(str(demo_zoo), kv_cache_bytes=32 << 20, num_threads=1, precision="f32")
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    expected = [
        answer.text for model in ("base", "solver") for answer in llm.generate(model, PROMPTS, params)
    ]
    del llm

    def answers_while(kill: int) -> None:
        """All requests are answered as from one process, though a process is killed under them."""
        with ThreadPoolExecutor(2 * len(PROMPTS)) as pool:
            running: list[Future[str | openai.APIError]] = [
                pool.submit(ask, served, model, prompt) for model in ("base", "solver") for prompt in PROMPTS
            ]
            served.wait_for(lambda: min(served.by_replica("requests_running").values()) > 0, 60)
            os.kill(kill, signal.SIGKILL)
            assert [each.result(300) for each in running] == expected

    replicas = served.replica_pids()
    assert [len(served.workers_of(pid)) for pid in replicas] == [2, 2]
    own = served.workers_of(replicas[0])
    answers_while(own[0])
    assert served.replica_pids() == replicas
    served.wait_for(lambda: len(served.workers_of(replicas[0])) == 2, 60)
    assert own[0] not in served.workers_of(replicas[0])

    own, others = served.workers_of(replicas[0]), served.workers_of(replicas[1])
    answers_while(replicas[0])
    served.wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in own), 30)
    assert served.workers_of(replicas[1]) == others
    served.wait_for(lambda: served.metrics()["blockzoo_replicas"] == 2, 120)
    left = [pid for replica in served.replica_pids() for pid in served.workers_of(replica)]
    assert len(left) == 4
    assert served.stop() == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in left)
