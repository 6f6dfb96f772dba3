"""One client's large or forbidden requests beside the others, on a real server."""

from __future__ import annotations

import http.client
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tritonclient.grpc
import tritonclient.http
from patience import PATIENCE_S
from triton_tensors import tensors
from tritonclient.utils import InferenceServerException

LARGE = ("The quick brown fox jumps over the lazy dog; 12345 def main(x):\n" * 17_000)[: 1 << 20]


@pytest.fixture(scope="module")
def server(serve_zoo, demo_zoo):
    return serve_zoo(demo_zoo)


class Bystander(threading.Thread):
    """A stream that goes on while others do what they do, and health probes beside it."""

    TOKENS = 300

    def __init__(self, server) -> None:
        super().__init__()
        self.server, self.over = server, False
        self.probes: list[tuple[int, float]] = []
        body = {"text_input": "def f", "stream": True, "max_tokens": self.TOKENS}
        body["sampling_parameters"] = '{"ignore_eos": true}'
        self.connection = server.open("solver", body)
        self.response = self.connection.getresponse()
        self.first = self.response.read1(10)

    def run(self) -> None:
        while not self.over:
            asked = time.monotonic()
            for model in ("blockzoo", "blockzoo_unary", "preprocessing", "postprocessing"):
                self.probes.append((self.server.post(model, {"health": True})[0], asked))
            time.sleep(0.1)

    def finish(self) -> list[dict]:
        text = (self.first + self.response.read()).decode()
        self.over = True
        self.join()
        self.connection.close()
        return [json.loads(event.removeprefix("data: ")) for event in text.split("\n\n") if event.strip()]


def attack(server, model: str, body: dict) -> tuple[int, dict]:
    return server.post(model, body)


@pytest.mark.parametrize(
    ("model", "body", "clients", "message"),
    [
        (
            "blockzoo",
            {"model": "base", "text_input": "x", "documents": [LARGE] * 24},
            4,
            "the request has 25",
        ),
        ("blockzoo", {"model": "base", "text_input": "x", "documents": [LARGE]}, 8, "tokens"),
        ("base", {"text_input": LARGE}, 8, "tokens"),
        ("preprocessing", {"text_input@base": LARGE}, 8, None),
    ],
)
def test_large_requests_cost_nobody_else_an_answer(server, model, body, clients, message):
    bystander = Bystander(server)
    bystander.start()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda _: attack(server, model, {**body, "max_tokens": 1}), range(clients)))
    events = bystander.finish()
    if message is not None:
        assert {status for status, _ in answers} == {400}
        assert all(message in answer["error"] for _, answer in answers), answers
    assert (
        sum(len(event["token_ids"]) if isinstance(event["token_ids"], list) else 1 for event in events) == 300
    )
    assert events[-1]["finish_reason"] == "length"
    assert bystander.probes
    assert {status for status, _ in bystander.probes} == {200}
    assert not any("restarting" in line for line in server.err), server.err


def test_what_is_the_launchers_is_refused_to_clients(server):
    for model in ("blockzoo", "blockzoo_unary"):
        status, answer = server.post(model, {"reload": True})
        assert (status, "reload is not for clients" in answer["error"]) == (400, True)
        status, answer = server.post(model, {"reload": True, "secret": "a guess"})
        assert (status, "reload is not for clients" in answer["error"]) == (400, True)
    assert server.post("blockzoo", {"health": True})[1]["text_output"] == "ok"


def test_no_client_claims_a_tenant(server):
    body = {"model": "base", "text_input": "x", "max_tokens": 1}
    for model in ("blockzoo", "blockzoo_unary", "base"):
        for claim in ({"tenant": "key:alice"}, {"weight": 5.0}, {"tenant": "x", "secret": "a guess"}):
            given = body if model != "base" else {"text_input": "x", "max_tokens": 1}
            status, answer = server.post(model, {**given, **claim})
            assert (status, "tenant and weight are not for clients" in answer["error"]) == (400, True), answer


def test_the_secret_shows_nowhere_but_in_the_environment(server):
    environment = Path(f"/proc/{server.server_pid()}/environ").read_bytes().split(b"\0")
    (secret,) = (v.partition(b"=")[2] for v in environment if v.startswith(b"BLOCKZOO_SECRET="))
    assert len(secret) > 30
    for pid in (server.process.pid, server.server_pid(), server.model_pid("blockzoo")):
        assert secret not in Path(f"/proc/{pid}/cmdline").read_bytes()
    said = "".join(server.out + server.err)
    for model in ("blockzoo", "preprocessing", "base"):
        connection = server.open(model, b"{}")
        connection.getresponse().read()
        connection.close()
        connection = server.open(model, b"", "config")
        said += connection.getresponse().read().decode()
        connection.close()
    assert secret.decode() not in said + "".join(server.out + server.err)
    status, answer = server.post("blockzoo", {"health": True, "secret": secret.decode()})
    assert (status, "unfinished" in answer["text_output"]) == (200, True)


OPERATORS_PATHS = [
    ("GET", "systemsharedmemory/status"),
    ("POST", "systemsharedmemory/region/stolen/register"),
    ("POST", "systemsharedmemory/unregister"),
    ("GET", "cudasharedmemory/status"),
    ("POST", "repository/index"),
    ("POST", "repository/models/base/load"),
    ("POST", "repository/models/base/unload"),
    ("GET", "models/stats"),
    ("GET", "models/base/stats"),
    ("GET", "logging"),
    ("POST", "logging"),
    ("GET", "trace/setting"),
    ("POST", "models/base/trace/setting"),
]


@pytest.mark.parametrize(("method", "path"), OPERATORS_PATHS)
def test_what_is_the_operators_is_closed_over_http(server, method, path):
    for headers in ({}, {"locked": ""}, {"locked": "guess"}):
        connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=PATIENCE_S)
        connection.request(method, f"/v2/{path}", "{}", {"Connection": "close", **headers})
        response = connection.getresponse()
        said = response.read().decode()
        connection.close()
        assert (response.status, "This API is restricted" in said) == (403, True), said


@pytest.mark.parametrize(
    "ask",
    [
        lambda client: client.get_system_shared_memory_status(),
        lambda client: client.register_system_shared_memory("stolen", "/blockzoo", 64),
        lambda client: client.unregister_system_shared_memory(),
        lambda client: client.get_cuda_shared_memory_status(),
        lambda client: client.get_model_repository_index(),
        lambda client: client.load_model("base"),
        lambda client: client.unload_model("base"),
        lambda client: client.get_inference_statistics(),
        lambda client: client.get_log_settings(),
        lambda client: client.update_log_settings({"log_error": False}),
        lambda client: client.get_trace_settings(),
        lambda client: client.update_trace_settings("base", {"trace_level": ["TENSORS"]}),
    ],
)
def test_what_is_the_operators_is_closed_over_grpc(server, ask):
    with (
        tritonclient.grpc.InferenceServerClient(server.grpc) as client,
        pytest.raises(InferenceServerException, match="This protocol is restricted"),
    ):
        ask(client)


@pytest.fixture(scope="module")
def small(serve_zoo, demo_zoo):
    """On any ports, with a key for the operator, and full with two requests."""
    any_ports = [f"--{kind}-port=0" for kind in ("http", "grpc", "metrics")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLOCKZOO_OPERATOR_KEY", "known")
        few = ("--max-num-seqs", "1", "--max-waiting", "1", "--kv-cache-gb", "0.05")
        return serve_zoo(demo_zoo, *few, *any_ports)


def test_whoever_started_the_server_may_open_the_operators_protocols(small):
    with tritonclient.grpc.InferenceServerClient(small.grpc) as client:
        told = client.get_inference_statistics("base", headers={"triton-grpc-protocol-locked": "known"})
        assert told.model_stats[0].name == "base"
        with pytest.raises(InferenceServerException, match="This protocol is restricted"):
            client.get_inference_statistics("base", headers={"triton-grpc-protocol-locked": "guess"})


def test_what_clients_need_is_open(server):
    with tritonclient.grpc.InferenceServerClient(server.grpc) as client:
        assert client.is_server_ready()
        assert client.get_model_config("base", as_json=True)["config"]["name"] == "base"
        assert client.get_server_metadata().version
    assert any("server   tritonserver 2." in line for line in server.out)
    assert server.openai is None  # it was left out


def test_overload_says_so_where_triton_lets_it(small):
    """Its generate endpoint answers every error of a model with 400, its gRPC streams carry no status."""
    values = {"text_input": "x", "model": "base", "max_tokens": 300}
    values["sampling_parameters"] = '{"ignore_eos": true}'
    client = tritonclient.grpc.InferenceServerClient(small.grpc)
    over_http = tritonclient.http.InferenceServerClient(f"127.0.0.1:{small.http_port}", concurrency=8)

    def infer(protocol, asked) -> str:
        try:
            asked.infer("blockzoo_unary", tensors(protocol, **values))
        except InferenceServerException as error:
            return f"{error.status()}: {error.message()}"
        return "answered"

    refusal = (
        "2 requests are waiting or running already, 2 of them of 'base', whose share of the 2 that may be "
        "is 2 (max_waiting): send the request again later"
    )
    with client, over_http, ThreadPoolExecutor(6) as pool:
        said = list(pool.map(lambda _: infer(tritonclient.grpc, client), range(6)))
        assert set(said) == {"answered", f"StatusCode.UNAVAILABLE: {refusal}"}
        said = list(pool.map(lambda _: infer(tritonclient.http, over_http), range(6)))
        assert set(said) == {"answered", f"503: {refusal}"}
        said = list(pool.map(lambda _: small.post("blockzoo", values), range(6)))
    assert {answer["error"] for status, answer in said if status != 200} == {refusal}
