"""The engine behind a decoupled Triton model: `handle` takes requests in, one thread sends answers out.

    execute() --handle--> fair queue --a thread of it--> EngineThread.submit      (tokenizes)
    engine thread --on_output--> outbox --front thread--> response_sender.send

Triton calls `execute` from one thread, behind which health requests wait too, so `handle` only reads what a
client sends. Texts are tokenized in turns of the models, short ones beside the long.

Sending crosses a process border and costs about 0.15 ms, so the engine's thread only fills the outbox. The
front thread owns everything that talks to Triton after `handle`: responses, cancellation, client time
limits, metrics. So no response sender is ever used from two threads, nor after its final flag. It also owns
the registry of requests: whatever dies behind it, each of them ends with one last response.

Knows Triton's Python API only as the `pb` module it is given.
"""

from __future__ import annotations

import json
import queue
import threading
import time
import traceback
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockzoo.runtime.api.errors import (
    OverloadedError,
    PromptTooLongError,
    RequestError,
    UnknownModelError,
)
from blockzoo.runtime.api.request import RequestOutput
from blockzoo.server_config.answer import Answer, Response, TellingSender, send, strings
from blockzoo.server_config.control import Control
from blockzoo.server_config.exporter import MetricsExporter
from blockzoo.server_config.fair_queue import FairQueue
from blockzoo.server_config.schema import ParsedRequest, num_bytes, parse_request
from blockzoo.server_config.tensors import REQUEST_ID

if TYPE_CHECKING:
    from blockzoo.runtime import EngineThread

DRAIN_FILE = "drain"  # the launcher writes the seconds into it that running requests have left
_POLL_S = 0.1
_CANCEL_CHECKS = 64  # per poll: each is a round trip of about 0.05 ms
_STALL_S = 120.0  # longest step or send before the process counts as hung
_SHORT_BYTES = 1 << 16  # tokenized within about 50 ms
_SHORT_WAITING, _LONG_WAITING = 64 << 20, 128 << 20  # bytes of text
_OTHER_BYTES = 2 << 20  # of all inputs but the texts
_STATUS = {OverloadedError: "UNAVAILABLE", UnknownModelError: "NOT_FOUND"}


@dataclass(slots=True, eq=False)
class _Stream:
    """One request that runs or waits."""

    request_id: str
    sender: Any
    answer: Answer
    arrival: float
    deadline: float | None
    is_step: bool = False  # of a tenant's ensemble
    submitted: float | None = None  # when the engine got it
    last_token: float | None = None
    cancelled: bool = False
    problem: str | None = None


class EngineFront:
    """Serves the requests of one decoupled model from one engine.

    Args:
        engine: started; closed by `close`.
        pb: the `triton_python_backend_utils` module.
        control_dir: where the launcher's drain file appears; None without a launcher.
        secret: of the launcher, who alone may ask for details and `reload`; None: nobody may.
    """

    def __init__(
        self,
        engine: EngineThread,
        pb: Any,
        control_dir: Path | None = None,
        secret: str | None = None,
    ) -> None:
        self._engine = engine
        self._pb = pb
        self._control = Control(pb, secret, self._problem, self._reload, lambda: len(self._streams))
        self._learn_models()
        self._drain_file = None if control_dir is None else control_dir / DRAIN_FILE
        self._exporter = MetricsExporter(pb)
        self._lock = threading.Lock()
        self._streams: dict[str, _Stream] = {}
        self._outbox: queue.SimpleQueue[tuple[_Stream, RequestOutput | BaseException, float]]
        self._outbox = queue.SimpleQueue()
        self._short = FairQueue("blockzoo-short", 2, _SHORT_WAITING)
        self._long = FairQueue("blockzoo-long", 1, _LONG_WAITING)
        self._drain_deadline: float | None = None
        self._abandoned: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._next_check = 0
        self._closing = False
        self._ended = False
        self._heartbeat = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="blockzoo-front", daemon=True)
        self._thread.start()

    def handle(self, request: Any) -> None:
        """Take one request; whatever happens, its sender gets exactly one final flag, here or later."""
        sender = request.get_response_sender()
        try:
            inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            if "tell_errors" in inputs and inputs["tell_errors"].any():
                sender = TellingSender(sender)
            parameters = json.loads(request.parameters() or "{}")
            if not self._control.answer(sender, inputs, parameters):
                self._start(request, inputs, parameters, sender)
        except Exception as error:
            send(self._pb, sender, self._refusal(error))

    def abandon(self, request_id: str) -> None:
        """The client of a request has gone, as another step of its ensemble has seen; from any thread."""
        self._abandoned.put(request_id)

    def close(self, timeout_s: float) -> None:
        """Let requests finish for up to `timeout_s`, end the others, stop all threads."""
        deadline = time.monotonic() + timeout_s
        for waiting in (self._short, self._long):
            waiting.drain(deadline - time.monotonic())
        self._engine.drain(max(0.0, deadline - time.monotonic()))
        for waiting in (self._short, self._long):
            waiting.close()
        self._engine.close()
        self._closing = True
        self._thread.join(timeout=10)

    def _reload(self) -> dict[str, Any]:
        found = self._engine.reload()
        self._learn_models()
        return {**asdict(found), "serving": sorted(self._end_ids)}

    def _learn_models(self) -> None:
        self._end_ids, self._left_out = self._engine.end_ids, self._engine.left_out
        self._max_bytes = max(self._engine.max_prompt_bytes.values(), default=0) + _OTHER_BYTES

    def _start(self, request: Any, inputs: dict[str, Any], parameters: dict[str, Any], sender: Any) -> None:
        if self._drain_deadline is not None:
            raise OverloadedError("the server is shutting down; send the request elsewhere")
        size = sum(map(num_bytes, inputs.values()))
        if size > self._max_bytes:
            raise PromptTooLongError(
                f"the request has {size} bytes; no model here takes more than {self._max_bytes}: shorten it"
            )
        if request.timeout():  # of the infer protocols; generate puts it among the parameters
            parameters["timeout"] = request.timeout()
        tenant, weight = self._control.take_tenant(parameters)
        parsed = parse_request(inputs, parameters, self._end_ids, self._left_out)
        now = time.monotonic()
        deadline = None if parsed.timeout_s is None else now + parsed.timeout_s
        is_step = {"input_ids", "text_input"} <= inputs.keys()  # clients send one of them
        stream = _Stream(uuid.uuid4().hex, sender, Answer(parsed), now, deadline, is_step)
        waiting = self._short if size <= _SHORT_BYTES else self._long
        with self._lock:  # the front thread sees it once it cannot be refused here any more
            if self._ended:
                raise OverloadedError("the server is about to start again; send the request later")
            submit = partial(self._submit, stream, parsed, tenant, weight)
            waiting.put(tenant or parsed.model, parsed.kv_scope, size, submit)
            self._streams[stream.request_id] = stream

    def _submit(
        self, stream: _Stream, parsed: ParsedRequest, tenant: str | None, weight: float | None
    ) -> None:
        """A thread of the queue: tokenize, unless the request was given up while it waited."""
        with self._lock:
            if stream.request_id not in self._streams:
                return
        try:
            self._engine.submit(
                stream.request_id,
                parsed.model,
                parsed.prompt,
                parsed.params,
                partial(self._on_output, stream),
                parsed.kv_scope,
                parsed.kv_reuse,
                parsed.documents,
                tenant,
                weight,
            )
        except BaseException as error:  # a tokenizer that panics raises no Exception
            self._outbox.put((stream, error, time.monotonic()))
            return
        stream.submitted = time.monotonic()
        if stream.request_id not in self._streams:  # given up meanwhile
            self._engine.abort(stream.request_id)

    def _on_output(self, stream: _Stream, output: RequestOutput) -> None:
        """Engine thread."""
        self._outbox.put((stream, output, time.monotonic()))

    def _problem(self) -> str | None:
        """Why this process should be replaced; None while it is well."""
        now = time.monotonic()
        if self._engine.error is not None or not self._engine.alive:
            return f"the engine has stopped: {self._engine.error}"
        if not self._thread.is_alive() or now - self._heartbeat > _STALL_S:
            return "the thread that sends responses has stopped"
        oldest = min((s.submitted for s in self._live() if s.submitted is not None), default=now)
        if now - max(self._engine.last_progress, oldest) > _STALL_S:
            return f"the engine has made no step for {_STALL_S:.0f} s"
        return None

    # ---- the front thread

    def _run(self) -> None:
        try:
            self._serve()
        finally:
            with self._lock:
                self._ended = True  # from here on `handle` refuses
                left, self._streams = list(self._streams.values()), {}
            why = "the server is shutting down" if self._closing else "the server failed: it starts again"
            for stream in left:
                self._engine.abort(stream.request_id)
                with suppress(Exception):
                    self._answer(stream, Response(error=why, final=True, status="UNAVAILABLE"))

    def _serve(self) -> None:
        next_poll = 0.0
        while not (self._closing and not self._streams):
            self._heartbeat = time.monotonic()
            try:
                stream, output, when = self._outbox.get(timeout=_POLL_S)
            except queue.Empty:
                if self._closing:  # the engine is closed: nothing more will come
                    return
            else:
                self._deliver(stream, output, when)
            if time.monotonic() >= next_poll:
                self._poll()
                next_poll = time.monotonic() + _POLL_S

    def _deliver(self, stream: _Stream, output: RequestOutput | BaseException, when: float) -> None:
        if stream.request_id not in self._streams:  # given up
            return
        try:
            if isinstance(output, BaseException):
                self._refuse(stream, output)
            else:
                self._pass_on(stream, output, when)
        except Exception as error:  # a bug of ours: this request ends, the server goes on
            self._log(traceback.format_exc())
            self._streams.pop(stream.request_id, None)
            self._engine.abort(stream.request_id)
            with suppress(Exception):
                self._answer(stream, Response(error=f"internal error: {error}", final=True))

    def _refuse(self, stream: _Stream, error: BaseException) -> None:
        """The engine did not take it."""
        del self._streams[stream.request_id]
        self._answer(stream, self._refusal(error))

    def _refusal(self, error: BaseException) -> Response:
        if isinstance(error, RequestError):
            return Response(error=str(error), final=True, status=_STATUS.get(type(error), "INVALID_ARG"))
        # a bug of ours: this request ends, the server goes on
        self._log("".join(traceback.format_exception(error)))
        return Response(error=f"internal error: {error}", final=True)

    def _give_up(self, stream: _Stream) -> None:
        """End a request before its time: through the engine, or at once where it has not got there."""
        self._engine.abort(stream.request_id)
        if stream.submitted is None:  # should it get there at this moment, it is aborted there
            self._streams.pop(stream.request_id, None)
            problem = None if stream.cancelled else stream.problem
            self._answer(stream, Response(error=problem, final=True, status="UNAVAILABLE"))

    def _pass_on(self, stream: _Stream, output: RequestOutput, when: float) -> None:
        if output.token_ids:
            self._exporter.on_token(when - (stream.last_token or stream.arrival), stream.last_token is None)
            stream.last_token = when
        problem = stream.problem
        if output.finished:
            del self._streams[stream.request_id]
            self._exporter.on_finished(when - stream.arrival)
            if output.finish_reason == "abort" and problem is None:
                error = self._engine.error
                problem = "the server is shutting down" if error is None else f"the engine failed: {error}"
        if stream.cancelled:  # nobody listens
            response = Response(final=True) if output.finished else None
        else:
            response = stream.answer.push(output, problem)
        if response is not None:
            if problem is not None:  # not of its own: the same request may succeed elsewhere, or later
                response = replace(response, status="UNAVAILABLE")
            self._answer(stream, response)

    def _poll(self) -> None:
        now = time.monotonic()
        try:
            if self._drain_deadline is None and self._drain_file is not None and self._drain_file.exists():
                self._drain_deadline = now + float(self._drain_file.read_text())
            self._check_deadlines(now)
            self._check_cancellations()
            self._exporter.export(self._engine.metrics())
        except Exception:
            self._log(traceback.format_exc())

    def _check_deadlines(self, now: float) -> None:
        for stream in self._live():
            if stream.deadline is not None and now > stream.deadline:
                limit = stream.deadline - stream.arrival
                stream.problem = f"the request took longer than its timeout of {limit:g} s"
            elif self._drain_deadline is not None and now > self._drain_deadline:
                stream.problem = "the server is shutting down"
            if stream.problem is not None:
                self._give_up(stream)

    def _check_cancellations(self) -> None:
        """Take in who has gone, and ask Triton about some of the other streams, in turn."""
        while not self._abandoned.empty():
            self._cancel(self._streams.get(self._abandoned.get()))
        streams = self._live()
        for _ in range(min(len(streams), _CANCEL_CHECKS)):
            self._next_check = (self._next_check + 1) % len(streams)
            stream = streams[self._next_check]
            if not stream.cancelled and stream.sender.is_cancelled():
                self._cancel(stream)

    def _cancel(self, stream: _Stream | None) -> None:
        if stream is not None and not stream.cancelled:
            stream.cancelled = True
            self._give_up(stream)

    def _live(self) -> list[_Stream]:
        with self._lock:
            return list(self._streams.values())

    # ---- both threads

    def _answer(self, stream: _Stream, response: Response) -> None:
        if stream.is_step and response.tensors:
            response.tensors[REQUEST_ID.name] = strings(stream.request_id)
        send(self._pb, stream.sender, response)

    def _log(self, message: str) -> None:
        self._pb.Logger.log_error(message)
