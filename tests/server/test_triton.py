"""A real tritonserver over a real zoo: every endpoint, every kind of client, every bad request."""

from __future__ import annotations

import json
import queue
import shutil
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from patience import PATIENCE_S
from quiet import near
from triton_tensors import tensors
from tritonclient.utils import InferenceServerException

TENANTS = ("base", "notes", "solver")
PROMPT = "def parse(line):\n    key, value = line."
FOREVER = {"max_tokens": 900, "sampling_parameters": '{"ignore_eos": true}'}


@pytest.fixture(scope="module")
def server(serve_zoo, demo_zoo):
    return serve_zoo(demo_zoo, "--kv-reuse", "on-request")


@pytest.fixture(scope="module")
def grpc(server):
    with tritonclient.grpc.InferenceServerClient(server.grpc) as client:
        yield client


def grpc_stream(server, model, inputs, **options):
    """All responses of one request on a stream of its own, and its error if it ended with one."""
    answers: queue.Queue = queue.Queue()
    responses = []
    with tritonclient.grpc.InferenceServerClient(server.grpc) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        client.async_stream_infer(model, inputs, enable_empty_final_response=True, **options)
        while True:
            result, error = answers.get(timeout=PATIENCE_S)
            if error is not None:
                return responses, error.message()
            if result.as_numpy("token_ids") is not None:
                responses.append(result)
            if result.get_response().parameters["triton_final_response"].bool_param:
                return responses, None


# ---- answers


def test_the_printed_curl_line_works(server):
    if shutil.which("curl") is None:
        pytest.skip("no curl")
    out = subprocess.run(server.curl, shell=True, capture_output=True, text=True, check=True).stdout
    assert json.loads(out)["text_output"].startswith("Hello")


def test_the_server_answers_as_the_library_does(server, demo_zoo):
    from blockzoo.runtime import LLM, SamplingParams

    llm = LLM(demo_zoo, precision="f32")
    params = SamplingParams(max_tokens=16, temperature=0.8, top_k=20, seed=7)
    sampling = {"temperature": 0.8, "top_k": 20, "random_seed": 7}
    for tenant in TENANTS:
        (completion,) = llm.generate(tenant, PROMPT, params, progress=False)
        assert server.generate(tenant, PROMPT, **sampling)["text_output"] == completion.text


@pytest.mark.parametrize("tenant", TENANTS)
def test_every_way_to_ask_gives_the_same_answer(server, grpc, tenant):
    direct = server.generate("blockzoo", PROMPT, model=tenant)
    assert direct["token_ids"]
    ensemble = server.generate(tenant, PROMPT)
    shared = direct.keys() - {"model_name", "num_cached_tokens"}
    assert {key: ensemble[key] for key in shared} == {key: direct[key] for key in shared}

    unary = server.generate("blockzoo_unary", PROMPT, model=tenant)
    assert unary["text_output"] == direct["text_output"]

    ids = server.post("preprocessing", {f"text_input@{tenant}": PROMPT})[1]["input_ids"]
    _, by_ids = server.post("blockzoo", {"input_ids": ids, "model": tenant, "max_tokens": 16})
    assert by_ids["text_output"] == direct["text_output"]

    inputs = tensors(tritonclient.grpc, text_input=PROMPT, max_tokens=16, exclude_input_in_output=True)
    (response,), error = grpc_stream(server, tenant, inputs)
    assert error is None
    assert response.as_numpy("text_output")[0, 0].decode() == direct["text_output"]


def test_the_prompt_is_echoed_unless_told_otherwise(server):
    answer = server.generate("base", PROMPT)["text_output"]
    for model, extra in (
        ("base", {}),
        ("blockzoo", {"model": "base"}),
        ("blockzoo_unary", {"model": "base"}),
    ):
        _, echoed = server.post(model, {"text_input": PROMPT, "max_tokens": 16, **extra})
        assert echoed["text_output"] == PROMPT + answer


def listed(events, name):
    """The values of all events; Triton gives a single one without a list."""
    values = [event[name] for event in events]
    return [each for value in values for each in (value if isinstance(value, list) else [value])]


@pytest.mark.parametrize("model", ["base", "blockzoo"])
def test_an_sse_stream_tells_tokens_as_they_come(server, model):
    body = {"text_input": PROMPT, "max_tokens": 16, "return_log_probs": True}
    body |= {"model": "base"} if model == "blockzoo" else {}
    whole = server.post(model, {**body, "exclude_input_in_output": True})[1]
    events = server.stream(model, body)
    assert 1 < len(events) <= len(whole["token_ids"])
    assert listed(events, "token_ids") == whole["token_ids"]
    assert "".join(event["text_output"] for event in events) == whole["text_output"]
    assert listed(events, "output_log_probs") == near(whole["output_log_probs"])
    assert events[-1]["cum_log_probs"] == pytest.approx(sum(whole["output_log_probs"]), rel=1e-5)
    assert "finish_reason" not in events[0]
    assert events[-1]["finish_reason"] == whole["finish_reason"]


@pytest.mark.parametrize("model", ["base", "blockzoo"])
def test_a_grpc_stream_tells_tokens_as_they_come(server, model):
    extra = {"model": "base"} if model == "blockzoo" else {}
    inputs = tensors(tritonclient.grpc, text_input=PROMPT, max_tokens=16, stream=True, **extra)
    responses, error = grpc_stream(server, model, inputs)
    assert error is None
    whole = server.generate("base", PROMPT)
    assert [token for r in responses for token in r.as_numpy("token_ids")[0]] == whole["token_ids"]
    texts = [r.as_numpy("text_output")[0, 0].decode() for r in responses]
    assert "".join(texts) == whole["text_output"]


def test_plain_infer_over_http_and_grpc(server, grpc):
    whole = server.generate("base", PROMPT)["text_output"]
    values = {"text_input": PROMPT, "model": "base", "max_tokens": 16, "exclude_input_in_output": True}
    result = grpc.infer("blockzoo_unary", tensors(tritonclient.grpc, **values))
    assert result.as_numpy("text_output")[0, 0].decode() == whole
    with tritonclient.http.InferenceServerClient(f"127.0.0.1:{server.http_port}") as client:
        result = client.infer("blockzoo_unary", tensors(tritonclient.http, **values))
        assert result.as_numpy("text_output")[0, 0].decode() == whole
        with pytest.raises(InferenceServerException, match="no model 'bose'; did you mean 'base'") as caught:
            client.infer("blockzoo_unary", tensors(tritonclient.http, **{**values, "model": "bose"}))
        assert caught.value.status() == "404"


def num_threads(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


@pytest.mark.parametrize("way", ["generate", "gRPC"])
def test_bursts_of_plain_calls_are_all_answered(server, grpc, way):
    """200 at once: Triton's requests between models ended the process about every second time."""
    pid = server.model_pid("blockzoo_unary")
    values = {"text_input": PROMPT, "model": "base", "max_tokens": 2, "exclude_input_in_output": True}
    expected = server.generate("base", PROMPT, 2)["text_output"]

    def ask(_: int) -> str:
        if way == "generate":
            return server.post("blockzoo_unary", values)[1]["text_output"]
        result = grpc.infer("blockzoo_unary", tensors(tritonclient.grpc, **values), client_timeout=PATIENCE_S)
        return result.as_numpy("text_output")[0, 0].decode()

    with ThreadPoolExecutor(200) as pool:
        for _ in range(3):
            assert set(pool.map(ask, range(200))) == {expected}
            assert server.model_pid("blockzoo_unary") == pid
    assert num_threads(pid) < 40  # none for each call
    assert not any("restarting" in line for line in server.err), server.err


def test_a_client_of_the_tensorrt_llm_backend(server):
    """All inputs that its end-to-end client sends, [1, 1] each, old-style empty words included."""
    inputs = tensors(
        tritonclient.grpc,
        text_input=PROMPT,
        max_tokens=12,
        bad_words="",
        stop_words="",
        stream=True,
        beam_width=1,
        temperature=1.0,
        top_k=1,
        top_p=0.0,
        length_penalty=1.0,
        repetition_penalty=1.0,
        random_seed=0,
        return_log_probs=True,
        return_context_logits=False,
        return_generation_logits=False,
        num_return_sequences=1,
        end_id=-1,
        pad_id=0,
        min_length=1,
    )
    responses, error = grpc_stream(server, "base", inputs, request_id="42")
    assert error is None
    assert [r.as_numpy("token_ids")[0, 0] for r in responses] == server.generate("base", PROMPT, 12)[
        "token_ids"
    ]
    assert responses[-1].as_numpy("cum_log_probs").shape == (1, 1)
    assert responses[0].as_numpy("output_log_probs").shape == (1, 1, 1)


def test_stop_words_end_the_answer(server):
    whole = server.generate("base", PROMPT)["text_output"]
    stop = whole[4:8]
    cut = server.generate("base", PROMPT, stop_words=[stop, "never seen"])
    assert cut["text_output"] == whole[: whole.index(stop)]
    assert cut["finish_reason"] == "stop"


@pytest.mark.parametrize("more", [{}, {"skip_special_tokens": False}])
def test_a_special_token_as_a_stop_word_ends_the_answer(server, more):
    asked = "Q: 3+4\nA:"
    whole = server.generate("solver", asked)
    assert whole["finish_reason"] == "stop"
    parameters = json.dumps({"ignore_eos": True, **more})
    for model in ({"model": "solver"}, {}):
        cut = server.generate(
            "blockzoo" if model else "solver",
            asked,
            stop_words="</s>",
            sampling_parameters=parameters,
            **model,
        )
        assert {key: cut[key] for key in ("text_output", "token_ids", "finish_reason")} == {
            key: whole[key] for key in ("text_output", "token_ids", "finish_reason")
        }


def test_tenants_together_get_what_they_get_alone(server):
    jobs = [(tenant, f"{PROMPT} # {i}") for i in range(4) for tenant in TENANTS]
    alone = [server.generate(*job, 24)["token_ids"] for job in jobs]
    with ThreadPoolExecutor(len(jobs)) as pool:
        together = list(pool.map(lambda job: server.generate(*job, 24)["token_ids"], jobs))
    assert together == alone


def test_the_text_steps_serve_on_their_own(server):
    _, tokens = server.post("preprocessing", {"text_input@base": "x = 1"})
    _, text = server.post("postprocessing", {"model": "base", "token_ids": tokens["input_ids"]})
    assert text["text_output"] == "x = 1"


def test_kv_reuse_off_and_scopes_see_nothing_of_others(server):
    prompt = "# a prompt of its own that fills pages\n" + "x = [1, 2, 3]\n" * 30
    cached = [
        server.generate("base", prompt, 1, **extra)["num_cached_tokens"]
        for extra in (
            {},
            {},
            {"kv_reuse": "off"},
            {"kv_scope": "team"},
            {"kv_scope": "team"},
            {"kv_reuse": "exact"},
        )
    ]
    assert [tokens > 0 for tokens in cached] == [False, True, False, False, True, True]


def test_approximate_reuse_is_taken_where_it_is_asked_for(server):
    def taken():
        return server.metrics().get("blockzoo_approximate_tokens_total", 0)

    document = "".join(f"value_{i} = {i * 37 % 101}\n" for i in range(40))
    server.generate("base", "# first\n" + document + "print(", 1)
    server.generate("base", "# something else\n" + document + "print(", 1)
    time.sleep(0.3)  # metrics follow within a tenth of a second
    assert taken() == 0
    server.generate("base", "# a third beginning\n" + document + "print(", 1, kv_reuse="approx")
    server.wait_for(lambda: taken() > 100)


def test_a_text_step_takes_one_text_at_a_time(server):
    with tritonclient.http.InferenceServerClient(f"127.0.0.1:{server.http_port}") as client:
        pair = tritonclient.http.InferInput("text_input@base", [2, 1], "BYTES")
        pair.set_data_from_numpy(np.array([[b"a"], [b"b"]], object))
        with pytest.raises(InferenceServerException, match="batch-size must be <= 1"):
            client.infer("preprocessing", [pair])


def test_a_burst_of_tenant_requests_is_answered(server):
    """Far more at once than may wait: they get answers or refusals, and the server goes on."""
    body = json.dumps({"text_input": "x", "max_tokens": 4})
    head = f"POST /v2/models/base/generate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    clients = [socket.create_connection(("127.0.0.1", server.http_port), 60) for _ in range(1500)]
    try:
        for client in clients:
            client.sendall((head + body).encode())
        deadline, statuses = time.monotonic() + 60, []
        for client in clients:
            client.settimeout(max(0.01, deadline - time.monotonic()))
            with suppress(TimeoutError):  # Triton's HTTP endpoint loses some: docs/exposing.md, bursts
                statuses.append(client.recv(12))
    finally:
        for client in clients:
            client.close()
    assert set(statuses) <= {b"HTTP/1.1 200", b"HTTP/1.1 400"}
    assert statuses.count(b"HTTP/1.1 200") >= 500
    assert server.generate("base", PROMPT)["token_ids"]
    assert not any("restarting" in line for line in server.err), server.err


# ---- refusals

BAD_BODIES = [
    ({"text_input": ""}, "text_input is empty"),
    ({"text_input": "word " * 20_000}, "tokens"),
    ({"text_input": "x", "max_tokens": 0}, "max_tokens is 0; expected"),
    ({"text_input": "x", "max_tokens": -7}, "max_tokens is -7; expected"),
    ({"text_input": "x", "max_tokens": 2_000_000_000}, "max_tokens is 2000000000; expected"),
    ({"text_input": "x", "stop_words": ["w"] * 1000}, "stop_words has 1000 texts"),
    ({"text_input": "x", "top_p": 7.0}, "top_p is 7.0; expected"),
    ({"text_input": "x", "sampling_parameters": '{"temperature": NaN}'}, "temperature is nan"),
    ({"text_input": "x", "sampling_parameters": "{"}, "sampling_parameters is not JSON"),
    ({"text_input": "x", "temprature": 0.5}, "did you mean 'temperature'?"),
    ({"text_input": "x", "beam_width": 3}, "beam_width is 3"),
    ({"text_input": "x", "kv_reuse": "maybe"}, "kv_reuse is 'maybe'; expected off or exact or approx"),
    (b'{"text_input": "\xff\xfe", "max_tokens": 2}', "text_input is not UTF-8"),
]


@pytest.mark.parametrize("endpoint", ["generate", "generate_stream"])
@pytest.mark.parametrize("model", ["base", "blockzoo"])
@pytest.mark.parametrize(("body", "message"), BAD_BODIES)
def test_bad_requests_get_400_and_a_reason(server, endpoint, model, body, message):
    if model == "blockzoo":
        body = body[:-1] + b', "model": "base"}' if isinstance(body, bytes) else {**body, "model": "base"}
    connection = server.open(model, body, endpoint)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    assert (response.status, message in text) == (400, True), text


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"model": "base"}, "the prompt is missing; send text_input, or input_ids"),
        ({"text_input": "x"}, "model is missing; name one of base"),
        ({"text_input": "x", "model": "sovler"}, "no model 'sovler'; did you mean 'solver'?"),
        ({"input_ids": [-1, 5], "model": "base"}, "-1"),
        ({"input_ids": [2**31 - 1], "model": "base"}, "2147483647"),
        ({"input_ids": [5] * 100_000, "model": "base"}, "the prompt has 100000 tokens"),
    ],
)
def test_bad_requests_to_the_engine_model(server, inputs, message):
    status, answer = server.post("blockzoo", {"max_tokens": 4, **inputs})
    assert (status, message in answer["error"]) == (400, True), answer


def test_json_that_is_no_request_leaves_the_server_up(server):
    for body in (b"", b"{", b"[]", b'{"text_input": 5}', b'{"text_input": "x", "max_tokens": "many"}'):
        status, answer = server.post("base", body)
        assert status in (400, 500), answer
        assert answer["error"]
    assert server.post("nobody", {"text_input": "x"})[0] == 404


def test_nan_and_wrong_types_over_grpc(server):
    make = tritonclient.grpc
    base = {"text_input": "x", "max_tokens": 3}
    _, error = grpc_stream(server, "base", tensors(make, **base, temperature=float("nan")))
    assert "temperature is nan" in error
    wrong_type = make.InferInput("max_tokens", [1, 1], "UINT32")
    wrong_type.set_data_from_numpy(np.array([[3]], np.uint32))
    _, error = grpc_stream(server, "base", [*tensors(make, text_input="x"), wrong_type])
    assert "max_tokens" in error
    assert "INT32" in error
    _, error = grpc_stream(server, "base", tensors(make, text_input="x", max_tokens=[3, 4]))
    assert "max_tokens" in error
    invalid = tensors(make, **base, model="base")
    invalid[0].set_data_from_numpy(np.array([[b"\xff\x00\xfe"]], object))
    _, error = grpc_stream(server, "blockzoo", invalid)
    assert "text_input is not UTF-8 (byte 0xff at 0)" in error


# ---- ends


def test_a_timeout_ends_a_request(server):
    status, answer = server.post(
        "blockzoo", {"text_input": "x", "model": "base", "timeout": 20_000, **FOREVER}
    )
    assert status == 400
    assert answer["error"] == "the request took longer than its timeout of 0.02 s"


def num_aborted(server) -> float:
    time.sleep(0.3)  # metrics follow within a tenth of a second
    return server.metrics().get('blockzoo_requests_total{finish_reason="abort"}', 0)


STREAMED = pytest.mark.parametrize(("model", "more"), [("blockzoo", {"model": "base"}), ("base", {})])


@STREAMED
def test_a_closed_sse_connection_frees_its_request(server, model, more):
    before = num_aborted(server)
    connection = server.open(model, {"text_input": "x", "stream": True, **more, **FOREVER})
    response = connection.getresponse()
    response.read1(10)
    response.close()
    connection.close()
    server.wait_for(lambda: num_aborted(server) == before + 1)
    assert server.metrics()["blockzoo_requests_running"] == 0
    assert server.metrics()["blockzoo_pages_used"] == 0


@STREAMED
def test_a_cancelled_grpc_stream_frees_its_request(server, model, more):
    before = num_aborted(server)
    answers: queue.Queue = queue.Queue()
    with tritonclient.grpc.InferenceServerClient(server.grpc) as client:
        client.start_stream(lambda result, error: answers.put(result))
        inputs = tensors(tritonclient.grpc, text_input="x", stream=True, **more, **FOREVER)
        client.async_stream_infer(model, inputs)
        answers.get(timeout=PATIENCE_S)
        client.stop_stream(cancel_requests=True)
    server.wait_for(lambda: num_aborted(server) == before + 1)
    assert server.metrics()["blockzoo_pages_used"] == 0


def test_a_cancelled_plain_call_frees_its_request(server):
    before = num_aborted(server)
    with tritonclient.grpc.InferenceServerClient(server.grpc) as client:
        inputs = tensors(tritonclient.grpc, text_input="x", model="base", **FOREVER)
        call = client.async_infer("blockzoo_unary", inputs, lambda result, error: None)
        server.wait_for(lambda: server.metrics()["blockzoo_requests_running"] == 1)
        call.cancel()
        server.wait_for(lambda: num_aborted(server) == before + 1)
    assert server.metrics()["blockzoo_pages_used"] == 0


# ---- metrics


def test_metrics_count_what_was_served(server):
    def settled():
        """They are told one after the other, ten times a second where the machine is idle."""
        seen = server.metrics()
        time.sleep(1.0)
        return seen["blockzoo_requests_running"] == 0 and seen == server.metrics() and seen

    before = server.wait_for(settled)
    tokens = len(server.generate("solver", PROMPT, 12)["token_ids"])
    counts = {
        "blockzoo_generated_tokens_total": tokens,
        "blockzoo_ttft_seconds_count": 1,
        "blockzoo_inter_token_seconds_count": tokens - 1,
        "blockzoo_e2e_seconds_count": 1,
        'blockzoo_e2e_seconds_bucket{le="+Inf"}': 1,
    }

    def grown() -> dict[str, float]:
        now = server.metrics()
        return {name: now[name] - before.get(name, 0) for name in counts}

    server.wait_for(lambda: all(count >= counts[name] for name, count in grown().items()))
    assert grown() == counts
    after = server.wait_for(settled)
    assert after["blockzoo_steps_total"] >= before["blockzoo_steps_total"] + tokens
    assert after["blockzoo_mean_batch_per_block"] >= 1
    assert after["blockzoo_engine_calls_per_step"] >= 1
    total = after["blockzoo_pages_total"]
    assert total == sum(after[f"blockzoo_pages_{kind}"] for kind in ("free", "cached", "used"))
    text = server.metrics_text()
    assert "# TYPE blockzoo_ttft_seconds histogram" in text
    assert "# TYPE blockzoo_preemptions_total counter" in text
    assert 'blockzoo_prefix_hit_tokens_total{layers="' in text
