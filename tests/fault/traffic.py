"""Clients of every kind against a served zoo, each answer held against a quiet engine.

What became of each request is one of OUTCOMES. In a server that is well, only the first four happen.
"""

from __future__ import annotations

import http.client
import json
import queue
import random
import re
import socket
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tritonclient.grpc
from quiet import Live, Quiet, check_equal
from triton_tensors import tensors
from tritonclient.utils import InferenceServerException

OUTCOMES = (
    "right",  # the quiet engine's answer
    "refused",  # an error that fits what was asked
    "ended by us",  # cancelled, or its connection closed
    "absent",  # the error for a model that is not there, or comes and goes at that moment
    "error",  # any other error of the server
    "cut",  # no connection, or one that ended early
    "wrong",  # not the quiet engine's answer
    "hung",  # nothing within LIMIT_S
)
WELL = frozenset(OUTCOMES[:4])
LIMIT_S = 60.0
MAX_TOKENS = 32
_IGNORE_EOS = {"sampling_parameters": '{"ignore_eos": true}'}
DOCUMENTS = (
    "def parse(line):\n    key, value = line.split('=')\n    return key.strip(), int(value)\n\n" * 3,
    "Note. The baker Tessa owns the jade lamp. Note. The miller Oren owns the amber bowl.\n" * 4,
    "".join(f"value_{i} = {i * 37 % 101}\n" for i in range(30)),
)
_QUESTIONS = (
    "def main():\n    print(parse(",
    "Q: Who keeps the jade lamp?\nA:",
    "Q: 3+4\nA:",
    "Zażółć 🐢 gęślą = ",
    "import os\n\nfor name in sorted(os.listdir(",
)


class Prompt(NamedTuple):
    text: str
    documents: tuple[str, ...] = ()


def make_prompts(count: int, seed: int = 0) -> list[Prompt]:
    """Prompts of 5 to some 500 tokens, many of which begin alike."""
    draw = random.Random(seed)
    made = []
    for i in range(count):
        lines = "".join(f"x_{n} = {n * (i % 4 + 3) % 97}\n" for n in range(draw.choice([0, 0, 3, 12, 40])))
        documents = tuple(draw.sample(DOCUMENTS, draw.choice([0, 0, 1, 2])))
        made.append(Prompt(lines + f"# {i % 7}\n" + draw.choice(_QUESTIONS), documents))
    return made


class Answers:
    """The quiet answers of models to prompts, all computed before there is traffic."""

    def __init__(self, zoo: Path, models: Sequence[str], prompts: Sequence[Prompt]) -> None:
        quiet = Quiet(zoo)
        self.prompts = list(prompts)
        self._of = {
            (model, prompt): quiet.answer(Live(model, prompt.text, MAX_TOKENS, documents=prompt.documents))
            for model in models
            for prompt in prompts
        }

    def of(self, model: str, prompt: Prompt) -> Live:
        return self._of[model, prompt]

    def check(self, found: Live, model: str, prompt: Prompt, max_tokens: int) -> None:
        """Tokens, log-probabilities and text of an answer. Raises AssertionError."""
        whole = self._of[model, prompt]
        expected = Live(
            model, "", max_tokens, tokens=whole.tokens[:max_tokens], logprobs=whole.logprobs[:max_tokens]
        )
        check_equal(found, expected)
        if found.tokens == whole.tokens:
            assert found.text == whole.text
        elif found.tokens == expected.tokens:  # a character may have been cut in two
            assert whole.text.startswith(found.text.rstrip("\ufffd")), (found.text, whole.text)


class RefusedError(Exception):
    """The server answered with an error."""


class HungError(Exception):
    """Nothing came in time."""


class Sent(NamedTuple):
    """One request and what became of it."""

    kind: str
    tenant: str
    began: float
    ended: float
    outcome: str
    said: str


class Guest(NamedTuple):
    """A model that comes and goes, as it is now: `variant` names a model of the quiet engine; None: away."""

    variant: str | None
    settled: bool  # not in the middle of a change


class Traffic:
    """Clients in threads of their own, each sending a request, waiting for its end, and pausing.

    Args:
        answers: to all `tenants` and to the variants of guests.
        pause_s: mean seconds between two requests of a client.
        guests: names that may be asked too, whose state changes as the test goes on.
        variants: what a guest may be while it changes.
    """

    def __init__(
        self,
        server: Any,
        answers: Answers,
        tenants: Sequence[str],
        *,
        clients: int = 8,
        pause_s: float = 0.6,
        guests: dict[str, Guest] | None = None,
        variants: Sequence[str] = (),
        limit_s: float = LIMIT_S,
        seed: int = 0,
    ) -> None:
        self.server, self.answers, self.tenants = server, answers, list(tenants)
        self.guests, self.variants = guests or {}, list(variants)
        self.pause_s, self.limit_s = pause_s, limit_s
        self.sent: list[Sent] = []
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(random.Random(seed * 1000 + i),), daemon=True)
            for i in range(clients)
        ]
        self._kinds: dict[str, tuple[int, Callable[..., str]]] = {
            "generate": (6, lambda d: self._valid(d, self._generate)),
            "generate_stream": (6, lambda d: self._valid(d, self._generate_stream)),
            "grpc infer": (4, lambda d: self._valid(d, self._grpc_infer)),
            "http infer": (3, lambda d: self._valid(d, self._http_infer)),
            "grpc stream": (5, lambda d: self._valid(d, self._grpc_stream)),
            "invalid": (5, self._invalid),
            "own time limit": (1, self._time_limit),
            "cancelled grpc stream": (2, self._cancelled_stream),
            "cancelled grpc infer": (2, self._cancelled_infer),
            "disconnected stream": (3, self._disconnected),
            "half a request": (1, self._half),
        }

    # ---- running

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Send no more, and wait for what is under way."""
        self._stop.set()
        deadline = time.monotonic() + self.limit_s + 30
        for thread in self._threads:
            thread.join(max(0.1, deadline - time.monotonic()))
            assert not thread.is_alive(), "a client hangs beyond its own time limit"

    def burst(self, count: int, seed: int) -> None:
        """Valid requests of `count` clients at once."""
        draws = [random.Random(seed * 100_000 + i) for i in range(count)]
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(lambda draw: self.once(draw, "generate"), draws))

    def outcomes(self, since: float = 0.0) -> Counter[str]:
        return Counter(sent.outcome for sent in self.sent if sent.began >= since)

    def table(self) -> dict[str, dict[str, int]]:
        """How often each kind of request came to what."""
        counts = Counter((sent.kind, sent.outcome) for sent in self.sent)
        kinds = sorted({kind for kind, _ in counts})
        return {kind: {o: counts[kind, o] for o in OUTCOMES if counts[kind, o]} for kind in kinds}

    def not_well(self, since: float = 0.0) -> list[Sent]:
        return [sent for sent in self.sent if sent.outcome not in WELL and sent.began >= since]

    def _run(self, draw: random.Random) -> None:
        while not self._stop.is_set():
            self.once(draw)
            self._stop.wait(draw.uniform(0, 2 * self.pause_s))

    def once(self, draw: random.Random, kind: str | None = None) -> Sent:
        """One request, of a kind by chance if none is given."""
        weights = [weight for weight, _ in self._kinds.values()]
        kind = kind or draw.choices(list(self._kinds), weights)[0]
        tenant = draw.choice([*self.tenants, *self.guests])
        began, said = time.monotonic(), ""
        draw.tenant = tenant
        before = self.guests.get(tenant)
        try:
            outcome = self._kinds[kind][1](draw)
        except RefusedError as error:
            outcome, said = "error", str(error)
            if before is not None and _is_absence(said):
                gone = before.variant is None or not before.settled
                outcome = "absent" if gone or self.guests[tenant] is not before else "error"
        except (TimeoutError, HungError) as error:
            outcome, said = "hung", repr(error)
        except AssertionError as error:
            outcome, said = "wrong", str(error)[:2000]
        except InferenceServerException as error:  # a stream that ended while it was asked
            outcome, said = "cut", repr(error)
        except (OSError, http.client.HTTPException) as error:
            outcome, said = "cut", repr(error)
        except Exception:  # a bug of a client must not end its thread unseen
            outcome, said = "wrong", traceback.format_exc()
        sent = Sent(kind, tenant, began, time.monotonic(), outcome, said)
        self.sent.append(sent)
        return sent

    # ---- requests that get an answer

    def _valid(self, draw: random.Random, send: Callable[..., Live]) -> str:
        prompt, max_tokens = draw.choice(self.answers.prompts), draw.choice([1, 4, 12, MAX_TOKENS])
        values: dict[str, Any] = {
            "text_input": prompt.text,
            "max_tokens": max_tokens,
            "exclude_input_in_output": True,
            "return_log_probs": True,
            **_IGNORE_EOS,
        }
        if prompt.documents:
            values["documents"] = list(prompt.documents)
        if (scope := draw.choice([None, None, "red", "blue"])) is not None:
            values["kv_scope"] = scope
        if (reuse := draw.choice([None, None, None, "off", "exact"])) is not None:
            values["kv_reuse"] = reuse
        tenant = draw.tenant
        before = self.guests.get(tenant)
        model = draw.choice([tenant, "blockzoo"])
        found = send(model, tenant, values)
        if before is None:
            self.answers.check(found, tenant, prompt, max_tokens)
        else:
            self._check_guest(found, tenant, before, prompt, max_tokens)
        return "right"

    def _check_guest(self, found: Live, name: str, before: Guest, prompt: Prompt, max_tokens: int) -> None:
        """The answer of what it was all the time; while it changed, of one of the variants."""
        if before.settled and self.guests[name] is before:
            assert before.variant is not None, f"{name} answered {found.tokens} after it was removed"
            return self.answers.check(found, before.variant, prompt, max_tokens)
        for variant in self.variants:
            try:
                return self.answers.check(found, variant, prompt, max_tokens)
            except AssertionError:
                continue
        raise AssertionError(f"{name} answered {found.tokens}, as none of {self.variants} does")

    def _generate(self, model: str, tenant: str, values: dict[str, Any]) -> Live:
        return _live([self._post(model, "generate", _named(model, tenant, values))])

    def _generate_stream(self, model: str, tenant: str, values: dict[str, Any]) -> Live:
        text = self._read(model, "generate_stream", _named(model, tenant, values | {"stream": True}))
        events = [event for event in text.split("\n\n") if event.strip()]
        return _live([json.loads(event.removeprefix("data: ")) for event in events])

    def _grpc_infer(self, model: str, tenant: str, values: dict[str, Any]) -> Live:
        given = tensors(tritonclient.grpc, **(values | {"model": tenant}))
        with tritonclient.grpc.InferenceServerClient(self.server.grpc) as client:
            try:
                result = client.infer("blockzoo_unary", given, client_timeout=self.limit_s)
            except InferenceServerException as error:
                raise _of_grpc(error) from None
        return _live([_outputs(result)])

    def _http_infer(self, model: str, tenant: str, values: dict[str, Any]) -> Live:
        inputs = []
        for tensor in tensors(tritonclient.grpc, **(values | {"model": tenant})):
            value = values.get(tensor.name(), tenant)
            data = value if isinstance(value, list) else [value]
            described = {"name": tensor.name(), "shape": list(tensor.shape()), "datatype": tensor.datatype()}
            inputs.append(described | {"data": data})
        answer = self._post("blockzoo_unary", "infer", {"inputs": inputs})
        return _live([{output["name"]: output["data"] for output in answer["outputs"]}])

    def _grpc_stream(self, model: str, tenant: str, values: dict[str, Any]) -> Live:
        given = tensors(tritonclient.grpc, **_named(model, tenant, values | {"stream": True}))
        answers: queue.SimpleQueue = queue.SimpleQueue()
        found: list[dict[str, Any]] = []
        deadline = time.monotonic() + self.limit_s
        with tritonclient.grpc.InferenceServerClient(self.server.grpc) as client:
            client.start_stream(lambda result, error: answers.put((result, error)))
            client.async_stream_infer(model, given, enable_empty_final_response=True)
            while True:
                try:
                    result, error = answers.get(timeout=max(0.01, deadline - time.monotonic()))
                except queue.Empty:
                    client.stop_stream(cancel_requests=True)
                    raise HungError(f"{len(found)} answers of a stream") from None
                if error is not None:
                    raise _of_grpc(error)
                if result.as_numpy("token_ids") is not None:
                    found.append(_outputs(result))
                if result.get_response().parameters["triton_final_response"].bool_param:
                    return _live(found)

    def _post(self, model: str, endpoint: str, body: Any) -> Any:
        return json.loads(self._read(model, endpoint, body))

    def _read(self, model: str, endpoint: str, body: Any) -> str:
        """All that is answered. Raises RefusedError."""
        connection = self.server.open(model, body, endpoint, self.limit_s)
        try:
            response = connection.getresponse()
            text = response.read().decode()
        finally:
            connection.close()
        if response.status != 200:
            raise RefusedError(f"{response.status}: {text}")
        return text

    # ---- those that are refused, and those that we end

    def _invalid(self, draw: random.Random) -> str:
        """Refused over HTTP or a gRPC stream, each with its reason."""
        number = draw.randint(-100, 0)
        change, reason = draw.choice(
            [
                ({"max_tokens": number}, f"max_tokens is {number}; expected"),
                ({"text_input": ""}, "text_input is empty"),
                ({"text_input": "word " * draw.randint(9_000, 30_000)}, "tokens"),
                ({"stop_words": ["w"] * 999}, "stop_words has 999 texts"),
                ({"top_p": 7.0}, "top_p is 7.0; expected"),
                ({"sampling_parameters": "{" * draw.randint(1, 2000)}, "sampling_parameters is not JSON"),
                ({"beam_width": 3}, "beam_width is 3"),
                ({"kv_reuse": "maybe"}, "kv_reuse is 'maybe'; expected"),
                ({"model": "nobody"}, "no model 'nobody'"),
            ]
        )
        tenant = draw.choice(self.tenants)
        model = "blockzoo" if "model" in change else draw.choice([tenant, "blockzoo"])
        values = {"text_input": "x = ", "max_tokens": 4, "model": tenant, **change}
        if model != "blockzoo":
            del values["model"]
        try:
            if draw.random() < 0.3:
                self._grpc_stream(model, values.get("model", tenant), values)
            else:
                self._read(model, draw.choice(["generate", "generate_stream"]), values)
        except RefusedError as error:
            if reason in str(error).replace('\\"', '"'):
                return "refused"
            raise
        raise AssertionError(f"{change!r:.200} was answered")

    def _time_limit(self, draw: random.Random) -> str:
        values = {"text_input": "x", "model": draw.choice(self.tenants), "timeout": 20_000, "max_tokens": 400}
        try:
            self._post("blockzoo", "generate", values | _IGNORE_EOS)
        except RefusedError as error:
            if "longer than its timeout of 0.02 s" in str(error):
                return "refused"
            raise
        raise AssertionError("400 tokens within 0.02 s")

    def _long(self, draw: random.Random) -> tuple[str, dict[str, Any]]:
        """A request that would run for a while, of a length that no other has."""
        tenant = draw.choice(self.tenants)
        model = draw.choice([tenant, "blockzoo"])
        text = "y = " + " ".join(str(draw.randint(0, 999)) for _ in range(draw.randint(1, 120)))
        values = {"text_input": text, "max_tokens": draw.randint(20, 120), "stream": True, **_IGNORE_EOS}
        return model, _named(model, tenant, values)

    def _cancelled_stream(self, draw: random.Random) -> str:
        model, values = self._long(draw)
        answers: queue.SimpleQueue = queue.SimpleQueue()
        with tritonclient.grpc.InferenceServerClient(self.server.grpc) as client:
            client.start_stream(lambda result, error: answers.put((result, error)))
            client.async_stream_infer(model, tensors(tritonclient.grpc, **values))
            if draw.random() < 0.7:
                try:
                    _, error = answers.get(timeout=self.limit_s)
                except queue.Empty:
                    client.stop_stream(cancel_requests=True)
                    raise HungError("no first answer of a stream") from None
                if error is not None:
                    raise _of_grpc(error)
            client.stop_stream(cancel_requests=True)
        return "ended by us"

    def _cancelled_infer(self, draw: random.Random) -> str:
        _, values = self._long(draw)
        values = {k: v for k, v in values.items() if k != "stream"} | {"model": draw.choice(self.tenants)}
        ended: queue.SimpleQueue = queue.SimpleQueue()
        with tritonclient.grpc.InferenceServerClient(self.server.grpc) as client:
            call = client.async_infer(
                "blockzoo_unary",
                tensors(tritonclient.grpc, **values),
                lambda result, error: ended.put(error),
                client_timeout=self.limit_s,
            )
            time.sleep(draw.uniform(0, 0.1))
            call.cancel()
            try:
                error = ended.get(timeout=self.limit_s)
            except queue.Empty:
                raise HungError("a cancelled call does not end") from None
        if error is not None and "cancel" not in str(error).lower():
            raise _of_grpc(error)
        return "ended by us"

    def _disconnected(self, draw: random.Random) -> str:
        model, values = self._long(draw)
        connection = self.server.open(model, values, timeout=self.limit_s)
        try:
            if draw.random() < 0.6:
                response = connection.getresponse()
                response.read1(10)
                response.close()
        finally:
            connection.close()
        return "ended by us"

    def _half(self, draw: random.Random) -> str:
        head = "POST /v2/models/base/generate HTTP/1.1\r\nHost: x\r\nContent-Length: 400\r\n\r\n"
        sent = (head + '{"text_input": "' + "x" * 100).encode()
        with socket.create_connection(("127.0.0.1", self.server.http_port), self.limit_s) as client:
            client.sendall(sent[: draw.randint(1, len(sent))])
        return "ended by us"


def _named(model: str, tenant: str, values: dict[str, Any]) -> dict[str, Any]:
    return values | {"model": tenant} if model == "blockzoo" else values


def _live(parts: list[dict[str, Any]]) -> Live:
    """An answer of one part or of many. Raises RefusedError where it says why it ended before its time."""
    found = Live("", "", 0)
    for part in parts:
        if part.get("error"):
            raise RefusedError(str(_flat(part["error"])[0]))
        found.tokens += _flat(part["token_ids"])
        found.logprobs += _flat(part["output_log_probs"])
        found.text += _flat(part["text_output"])[0]
    assert parts, "no part of an answer"
    assert _flat(parts[-1].get("finish_reason", [""]))[0] == "length", parts[-1]
    return found


def _outputs(result: Any) -> dict[str, Any]:
    names = (output.name for output in result.get_response().outputs)
    arrays = {name: result.as_numpy(name) for name in names}
    return {
        name: [v.decode() for v in array.reshape(-1)]
        if array.dtype == np.object_
        else array.reshape(-1).tolist()
        for name, array in arrays.items()
    }


def _flat(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _of_grpc(error: InferenceServerException) -> Exception:
    status, said = str(error.status()), str(error.message())
    if "DEADLINE_EXCEEDED" in status or "Deadline Exceeded" in said:
        return HungError(said)
    if re.search(r"connect|Socket closed|GOAWAY|Connection reset|recvmsg|end of TCP", said):
        return ConnectionError(said)
    return RefusedError(f"{status}: {said}")


def _is_absence(said: str) -> bool:
    return (
        re.search(r"no model 'guest|unknown model: 'guest|'guest[-\w]*' (is not|has no available)", said)
        is not None
    )
