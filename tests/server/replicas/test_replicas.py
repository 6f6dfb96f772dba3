"""Two replicas behind one endpoint: answers, where requests go, who can reach them."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from patience import PATIENCE_S, wait_for

from blockzoo.runtime import LLM, SamplingParams

LOOPBACK = re.compile("0100007F|0{16}FFFF00000100007F|0{24}01000000")  # as /proc/net/tcp writes them
PROMPT = "The parties agree that the quick brown fox jumps over the lazy dog, and so on. " * 3


@pytest.fixture(scope="module")
def served(serve_replicas, demo_zoo, tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys") / "keys"
    lines = (
        f"{name} {hashlib.sha256(name.encode()).hexdigest()} {settings}\n"
        for name, settings in (("alice", "weight=2"), ("bob", "models=base requests=1"))
    )
    keys.write_text("".join(lines))
    return serve_replicas(demo_zoo, "--replicas=2", "--threads=1", f"--api-keys={keys}", key="alice")


def test_answers_are_those_of_the_runtime(served, demo_zoo) -> None:
    llm = LLM(str(demo_zoo), kv_cache_bytes=32 << 20, num_threads=1, precision="f32")
    for model in ("base", "notes", "solver"):
        expected = llm.generate(model, [PROMPT], SamplingParams(temperature=0.0, max_tokens=10))[0]
        assert served.complete(model, PROMPT, 10).choices[0].text == expected.text
        chunks = served.complete(model, PROMPT, 10, stream=True)
        assert "".join(chunk.choices[0].text for chunk in chunks) == expected.text


def test_prompts_stay_with_the_replica_that_holds_them(served) -> None:
    prompts = [f"This is document {number}. " + PROMPT for number in range(6)]
    for prompt in prompts:
        served.complete("base", prompt, 1)
    for _ in range(3):
        for prompt in prompts:
            usage = served.complete("base", prompt + "What is it?", 1).usage
            assert usage.prompt_tokens_details.cached_tokens >= 0.8 * usage.prompt_tokens
    assert all(served.by_replica("prompt_tokens_total").values()), "one replica has had everything"


def test_a_crowd_is_spread(served) -> None:
    def ask(number: int) -> int:
        return served.complete("base", f"{number} {PROMPT}", 24).usage.prompt_tokens

    def more() -> list[float]:
        return [count - before[name] for name, count in served.by_replica("prompt_tokens_total").items()]

    before = served.by_replica("prompt_tokens_total")
    with ThreadPoolExecutor(32) as pool:  # all at once: what has ended makes room where it was
        asked = sum(pool.map(ask, range(32)))
    served.wait_for(lambda: sum(more()) >= asked)  # a busy replica tells its figures later
    assert min(more()) > 0.3 * asked


def test_a_client_that_goes_away_ends_its_request(served) -> None:
    def generated() -> float:
        return served.metrics()["blockzoo_generated_tokens_total"]

    before = generated()
    for _ in range(8):  # Ray loses about every second cancellation
        stream = served.complete("base", "On and on", 4000, stream=True, extra_body={"ignore_eos": True})
        next(iter(stream))
        stream.close()
    served.wait_for(lambda: served.metrics()["blockzoo_requests_running"] == 0)
    assert generated() - before < 8 * 1000


def test_what_is_refused_has_its_status(served) -> None:
    with pytest.raises(openai.NotFoundError):
        served.complete("nobody", "x")
    with pytest.raises(openai.BadRequestError, match="shorten it") as refused:
        served.complete("base", [5] * 100_000)
    assert refused.value.code == "context_length_exceeded"


def test_keys_are_those_of_a_single_server(served) -> None:
    with served.client_of("nobody") as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    with served.client_of("bob") as bob:
        assert [model.id for model in bob.models.list()] == ["base"]
        first = bob.completions.create(model="base", prompt="Whose is it? " + PROMPT, max_tokens=1)
        assert first.usage.prompt_tokens_details.cached_tokens == 0
    for cached in (False, True):  # what bob's prompt left is not for alice
        usage = served.complete("base", "Whose is it? " + PROMPT, 1).usage
        assert (usage.prompt_tokens_details.cached_tokens > 0) == cached


def test_health_models_and_page(served) -> None:
    assert served.ask("GET", "/health") == (200, '{"status":"ok"}')
    assert {model.id for model in served.client.models.list()} == {
        *("base", "base-sharded", "notes", "notes-merged", "solver")
    }
    assert json.loads(served.ask("GET", "/page/figures")[1])["pages_total"] > 0
    assert served.metrics()["blockzoo_replicas"] == 2


def open_to_all(served, pid: int) -> list[int]:
    """Ports of a process that take connections from elsewhere."""
    return [port for address, port in served.listening(pid) if not LOOPBACK.fullmatch(address)]


def test_only_this_machine_can_connect(served) -> None:
    """But for the gRPC port that Ray Serve gives each replica, whose token the next test asks for."""
    exposed = [command for pid, command in served.processes().items() if open_to_all(served, pid)]
    assert all("ServeReplica" in command for command in exposed), exposed


CALL = """
import sys, grpc
from ray.serve.generated.serve_pb2 import ASGIRequest
from ray.serve.generated.serve_pb2_grpc import ASGIServiceStub
for port in sys.argv[1:]:
    try:
        ASGIServiceStub(grpc.insecure_channel(f"127.0.0.1:{port}")).HandleRequest(ASGIRequest(), timeout=60)
    except grpc.RpcError as error:
        print(error.code().name)
"""


def test_strangers_need_the_token(served) -> None:
    ports = [str(port) for pid in served.replica_pids() for port in open_to_all(served, pid)]
    assert len(ports) == 2
    script = subprocess.run(
        [sys.executable, "-c", CALL, *ports], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert script.stdout.split() == ["UNAUTHENTICATED"] * 2, script.stderr


def test_ends_with_nothing_left_behind(served) -> None:
    before = served.processes()
    assert len(served.replica_pids()) == 2
    assert served.stop() == 0
    wait_for(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in before))
