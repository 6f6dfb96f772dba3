"""The engine behind a decoupled Triton model: `handle` takes requests in, one thread sends answers out.

    execute() --handle--> EngineThread.submit          (validated in Triton's thread, then queued)
    engine thread --on_output--> outbox --front thread--> response_sender.send

Sending crosses a process border and costs about 0.15 ms, so the engine's thread only fills the outbox. The
front thread owns everything that talks to Triton after `handle`: responses, cancellation, client time
limits, metrics. So no response sender is ever used from two threads, nor after its final flag.

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
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockzoo.runtime.api.errors import OverloadedError, RequestError, UnknownModelError
from blockzoo.runtime.api.request import RequestOutput
from blockzoo.server_config.answer import Answer, Response, integers, strings
from blockzoo.server_config.exporter import MetricsExporter
from blockzoo.server_config.schema import parse_request

if TYPE_CHECKING:
    from blockzoo.runtime import EngineThread

DRAIN_FILE = "drain"  # the launcher writes the seconds into it that running requests have left
_POLL_S = 0.1
_CANCEL_CHECKS = 64  # per poll: each is a round trip of about 0.05 ms
_STALL_S = 120.0  # longest step or send before the process counts as hung
_STATUS = {OverloadedError: "UNAVAILABLE", UnknownModelError: "NOT_FOUND"}


@dataclass(slots=True, eq=False)
class _Stream:
    """One request that runs or waits."""

    request_id: str
    sender: Any
    answer: Answer
    arrival: float
    deadline: float | None
    submitted: bool = False  # until then Triton's thread may still refuse it
    last_token: float | None = None
    cancelled: bool = False
    problem: str | None = None


class EngineFront:
    """Serves the requests of one decoupled model from one engine.

    Args:
        engine: started; closed by `close`.
        pb: the `triton_python_backend_utils` module.
        control_dir: where the launcher's drain file appears; None without a launcher.
    """

    def __init__(
        self,
        engine: EngineThread,
        pb: Any,
        control_dir: Path | None = None,
    ) -> None:
        self._engine = engine
        self._pb = pb
        self._end_ids = engine.end_ids
        self._drain_file = None if control_dir is None else control_dir / DRAIN_FILE
        self._exporter = MetricsExporter(pb)
        self._streams: dict[str, _Stream] = {}
        self._outbox: queue.SimpleQueue[tuple[_Stream, RequestOutput, float]] = queue.SimpleQueue()
        self._drain_deadline: float | None = None
        self._next_check = 0
        self._closing = False
        self._heartbeat = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="blockzoo-front", daemon=True)
        self._thread.start()

    def handle(self, request: Any) -> None:
        """Take one request; whatever happens, its sender gets exactly one final flag, here or later."""
        sender = request.get_response_sender()
        try:
            inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            if "health" in inputs and inputs["health"].any():
                self._answer_health(sender, inputs)
            elif "refresh" in inputs and inputs["refresh"].any():
                threading.Thread(target=self._refresh, args=(sender,), daemon=True).start()
            else:
                self._start(request, inputs, sender)
        except RequestError as error:
            status = _STATUS.get(type(error), "INVALID_ARG")
            self._send(sender, Response(error=str(error), final=True), status)
        except Exception as error:  # a bug of ours: this request ends, the server goes on
            self._log(traceback.format_exc())
            self._send(sender, Response(error=f"internal error: {error}", final=True), "INTERNAL")

    def close(self, timeout_s: float) -> None:
        """Let running requests finish for up to `timeout_s`, end the others, stop both threads."""
        self._engine.drain(timeout_s)
        self._engine.close()
        self._closing = True
        self._thread.join(timeout=10)

    def _start(self, request: Any, inputs: dict[str, Any], sender: Any) -> None:
        if self._drain_deadline is not None:
            raise OverloadedError("the server is shutting down; send the request elsewhere")
        parameters = json.loads(request.parameters() or "{}")
        if request.timeout():  # of the infer protocols; generate puts it among the parameters
            parameters["timeout"] = request.timeout()
        parsed = parse_request(inputs, parameters, self._end_ids)
        now = time.monotonic()
        deadline = None if parsed.timeout_s is None else now + parsed.timeout_s
        stream = _Stream(uuid.uuid4().hex, sender, Answer(parsed), now, deadline)
        self._streams[stream.request_id] = stream
        try:
            on_output = partial(self._on_output, stream)
            self._engine.submit(
                stream.request_id,
                parsed.model,
                parsed.prompt,
                parsed.params,
                on_output,
                parsed.kv_scope,
                parsed.kv_reuse,
                parsed.documents,
            )
        except BaseException:
            del self._streams[stream.request_id]
            raise
        stream.submitted = True

    def _on_output(self, stream: _Stream, output: RequestOutput) -> None:
        """Engine thread."""
        self._outbox.put((stream, output, time.monotonic()))

    def _answer_health(self, sender: Any, inputs: dict[str, Any]) -> None:
        """Say how the process is, beside any queue; give back what was sent, so that the caller can check
        that tensors come through whole (numpy 2 reads them wrongly)."""
        problem = self._problem()
        if problem is not None:
            self._send(sender, Response(error=problem, final=True), "UNAVAILABLE")
            return
        echo = {name: array.reshape(-1).tolist() for name, array in inputs.items()}
        for name, values in echo.items():
            echo[name] = [v.decode(errors="replace") if isinstance(v, bytes) else v for v in values]
        status = {"unfinished": len(self._streams), "echo": echo}
        tensors = {"text_output": strings(json.dumps(status)), "token_ids": integers([])}
        self._send(sender, Response(tensors, final=True))

    def _refresh(self, sender: Any) -> None:
        """A thread of its own: reading the zoo takes a while, and other requests come in."""
        try:
            found = self._engine.reload()
            self._end_ids = self._engine.end_ids
            said = json.dumps({**asdict(found), "serving": sorted(self._end_ids)})
            tensors = {"text_output": strings(said), "token_ids": integers([])}
            self._send(sender, Response(tensors, final=True))
        except Exception as error:  # the zoo cannot be read; or a bug of ours
            self._log(traceback.format_exc())
            self._send(sender, Response(error=f"the zoo was not refreshed: {error}", final=True))

    def _problem(self) -> str | None:
        """Why this process should be replaced; None while it is well."""
        now = time.monotonic()
        if self._engine.error is not None or not self._engine.alive:
            return f"the engine has stopped: {self._engine.error}"
        if not self._thread.is_alive() or now - self._heartbeat > _STALL_S:
            return "the thread that sends responses has stopped"
        oldest = min((stream.arrival for stream in list(self._streams.values())), default=now)
        if now - max(self._engine.last_progress, oldest) > _STALL_S:
            return f"the engine has made no step for {_STALL_S:.0f} s"
        return None

    # ---- the front thread

    def _run(self) -> None:
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

    def _deliver(self, stream: _Stream, output: RequestOutput, when: float) -> None:
        if stream.request_id not in self._streams:  # given up
            return
        try:
            self._pass_on(stream, output, when)
        except Exception as error:  # a bug of ours: this request ends, the server goes on
            self._log(traceback.format_exc())
            self._streams.pop(stream.request_id, None)
            self._engine.abort(stream.request_id)
            with suppress(Exception):
                self._send(stream.sender, Response(error=f"internal error: {error}", final=True))

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
            self._send(stream.sender, response)

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
        for stream in self._submitted():
            if stream.deadline is not None and now > stream.deadline:
                limit = stream.deadline - stream.arrival
                stream.problem = f"the request took longer than its timeout of {limit:g} s"
            elif self._drain_deadline is not None and now > self._drain_deadline:
                stream.problem = "the server is shutting down"
            if stream.problem is not None:
                self._engine.abort(stream.request_id)

    def _check_cancellations(self) -> None:
        """Ask Triton about some of the streams, in turn."""
        streams = self._submitted()
        for _ in range(min(len(streams), _CANCEL_CHECKS)):
            self._next_check = (self._next_check + 1) % len(streams)
            stream = streams[self._next_check]
            if not stream.cancelled and stream.sender.is_cancelled():
                stream.cancelled = True
                self._engine.abort(stream.request_id)

    def _submitted(self) -> list[_Stream]:
        return [stream for stream in list(self._streams.values()) if stream.submitted]

    # ---- both threads

    def _send(self, sender: Any, response: Response, status: str = "INTERNAL") -> None:
        pb = self._pb
        flags = pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL if response.final else 0
        if response.error is not None:
            error = pb.TritonError(response.error, getattr(pb.TritonError, status))
            sender.send(pb.InferenceResponse([], error=error), flags=flags)
        elif response.tensors:
            tensors = [pb.Tensor(name, array) for name, array in response.tensors.items()]
            sender.send(pb.InferenceResponse(tensors), flags=flags)
        else:
            sender.send(flags=flags)

    def _log(self, message: str) -> None:
        self._pb.Logger.log_error(message)
