"""EngineThread: an LLMEngine stepped by one thread of its own, fed from any other."""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass

from blockzoo.runtime.api.errors import InvalidRequestError, OverloadedError, RequestError
from blockzoo.runtime.api.request import KVReuse, RequestOutput, SamplingParams
from blockzoo.runtime.serve.config import EngineConfig
from blockzoo.runtime.serve.document_publisher import PublishedDocument
from blockzoo.runtime.serve.llm_engine import LLMEngine, Request
from blockzoo.runtime.serve.metrics import Metrics
from blockzoo.runtime.serve.reload import Reloaded
from blockzoo.runtime.serve.tenants import check_queue
from blockzoo.runtime.text.prompt import Prompt

OnOutput = Callable[[RequestOutput], None]
_WATCH_EVERY_S = 1.0
Publication = tuple[str, str, Sequence[str] | None]  # arguments of LLMEngine.publish


@dataclass(slots=True, eq=False)
class _Pending:
    """A submitted request that has not had its last output."""

    request: Request
    on_output: OnOutput
    told: bool = False  # its last output was handed to it, whatever it made of that


class EngineThread:
    """Owns an engine and the thread that steps it.

    Every submitted request gets outputs through its callback, exactly one with `finished` set, the last,
    whatever happens: completion, error, abort, shutdown, or an engine that dies anywhere on the way. Which
    requests there are is known here and not asked of the engine. Callbacks run in the engine's thread and
    should return quickly; one that raises loses its request, nobody else's.

    Args: as `LLMEngine`, whose errors are raised.
    """

    def __init__(self, zoo_path: str | os.PathLike[str], config: EngineConfig | None = None) -> None:
        self.engine = LLMEngine(zoo_path, config)
        self.error: BaseException | None = None
        self._pending: dict[str, _Pending] = {}
        self._held: Counter[str] = Counter()  # of these, by tenant
        self._weights: dict[str, float] = {}  # of tenants that hold some, where requests said
        self._inbox: deque[Request] = deque()
        self._aborts: deque[str] = deque()
        self._publications: deque[tuple[Future[PublishedDocument], Publication]] = deque()
        self._wake = threading.Condition()
        self._accepting = True
        self._stop = False
        self._settling: threading.Thread | None = None
        self._placing: threading.Thread | None = None
        self._place_after = time.monotonic() + self.engine.config.move_spans_every_s
        self.last_progress = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="blockzoo-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models served."""
        return self.engine.models

    @property
    def left_out(self) -> Mapping[str, str]:
        """As `LLMEngine.left_out`."""
        return self.engine.left_out

    @property
    def end_ids(self) -> dict[str, tuple[int, ...]]:
        """End-of-sequence token ids by model name."""
        return self.engine.end_ids

    @property
    def max_prompt_bytes(self) -> dict[str, int]:
        """As `LLMEngine.max_prompt_bytes`."""
        return self.engine.max_prompt_bytes

    def submit(
        self,
        request_id: str,
        model: str,
        prompt: Prompt,
        params: SamplingParams,
        on_output: OnOutput,
        scope: str | None = None,
        kv_reuse: KVReuse | None = None,
        documents: Sequence[str] = (),
        tenant: str | None = None,
        weight: float | None = None,
    ) -> None:
        """Check a request in the calling thread, which tokenizes there, and hand it to the engine.

        Raises:
            RequestError: of the kind that fits; `on_output` is then never called.
        """
        request = self.engine.prepare(
            request_id, model, prompt, params, scope, kv_reuse, documents, tenant, weight
        )
        with self._wake:
            if self.error is not None:
                raise RequestError(f"the engine has stopped: {self.error}; restart it")
            if not self._accepting:
                raise OverloadedError("the server is shutting down; send the request elsewhere")
            if request_id in self._pending:
                raise InvalidRequestError(f"request id {request_id!r} is in use: give each request its own")
            if weight is not None:
                self._weights[request.seq.tenant] = weight
            self._check_queue(request)
            self._pending[request_id] = _Pending(request, on_output)
            self._held[request.seq.tenant] += 1
            self._inbox.append(request)
            self._wake.notify_all()

    def _check_queue(self, request: Request) -> None:
        """As the scheduler does, which sees at most these requests: what passes here passes there."""
        config = self.engine.config
        limit = config.max_num_seqs + config.max_waiting
        weights = {**config.tenant_weights, **self._weights}
        try:
            check_queue(request.seq.tenant, self._held, limit, weights, "waiting or running")
        except OverloadedError:
            self.engine.count_refusal(request)
            raise

    def abort(self, request_id: str) -> None:
        """Ask for the end of a request; its last output says "abort". Unknown ids are ignored."""
        with self._wake:
            self._aborts.append(request_id)
            self._wake.notify_all()

    def reload(self) -> Reloaded:
        """As `LLMEngine.reload`; in the calling thread, while the engine's goes on."""
        try:
            return self.engine.reload()
        finally:
            with self._wake:  # published documents follow in the engine's thread
                self._wake.notify_all()

    def publish(self, name: str, text: str, models: Sequence[str] | None = None) -> PublishedDocument:
        """Publish a document between two steps and wait for it; running requests pause meanwhile.

        Raises:
            RequestError: as `DocumentPublisher.publish`, or the engine has stopped.
        """
        done: Future[PublishedDocument] = Future()
        with self._wake:
            if self.error is not None or self._stop:
                raise RequestError(f"the engine has stopped: {self.error}; restart it")
            self._publications.append((done, (name, text, models)))
            self._wake.notify_all()
        return done.result()

    def metrics(self) -> Metrics:
        """A snapshot; from any thread."""
        return self.engine.metrics()

    def drain(self, timeout_s: float) -> bool:
        """Accept nothing more and wait until all requests have ended; False when time runs out."""
        deadline = time.monotonic() + timeout_s
        with self._wake:
            self._accepting = False
            return self._wake.wait_for(lambda: not self._pending, max(0.0, deadline - time.monotonic()))

    def close(self) -> None:
        """Stop the thread; requests that still run end with "abort"."""
        with self._wake:
            self._accepting = False
            self._stop = True
            self._wake.notify_all()
        self._thread.join()
        if self.engine.placement is not None:
            self.engine.placement.stop()
        for thread in (self._settling, self._placing):
            if thread is not None:
                thread.join()
        self.engine.close()

    # ---- the engine's thread

    def _run(self) -> None:
        try:
            while self._take_in():
                if self.engine.has_unfinished():
                    self._deliver(self.engine.step())
                    self.engine.rest()  # after the answers: what it finds wrong is no reason to lose them
                    self._settle()
                    self._place()
                else:
                    self.engine.watch()
                self.last_progress = time.monotonic()
            for request_id in list(self._pending):
                output = self.engine.abort(request_id)
                if output is not None:
                    self._deliver([output])
            self._end_all(RequestError("the engine was closed"))
        except BaseException as error:
            self._die(error)
            raise

    def _settle(self) -> None:
        """Have models let go that are gone, beside the steps."""
        if self.engine.may_settle and (self._settling is None or not self._settling.is_alive()):
            self._settling = threading.Thread(target=self._run_settling, name="blockzoo-settle", daemon=True)
            self._settling.start()

    def _run_settling(self) -> None:
        try:
            self.engine.settle()
        except Exception:  # the zoo cannot be read; what is loaded is served on
            traceback.print_exc()
        with self._wake:  # published documents follow in the engine's thread
            self._wake.notify_all()

    def _place(self) -> None:
        """Now and then, have spans follow the rates of models, beside the steps."""
        every_s, now = self.engine.config.move_spans_every_s, time.monotonic()
        if self.engine.placement is None or not every_s or now < self._place_after:
            return
        if self._placing is None or not self._placing.is_alive():
            self._place_after = now + every_s
            self._placing = threading.Thread(
                target=self.engine.placement.follow, name="blockzoo-place", daemon=True
            )
            self._placing.start()

    def _take_in(self) -> bool:
        """Move what came in to the engine; waits while there is nothing to do, but with workers, which are
        looked after, not for long. False: stop."""
        with self._wake:
            self._wake.wait_for(
                lambda: (
                    self._stop
                    or self._inbox
                    or self._aborts
                    or self._publications
                    or self.engine.has_unfinished()
                ),
                None if self.engine.config.workers is None else _WATCH_EVERY_S,
            )
            publications, self._publications = self._publications, deque()
            arrived, self._inbox = self._inbox, deque()
            aborts, self._aborts = self._aborts, deque()
            stop = self._stop
        for done, publication in publications:
            try:
                done.set_result(self.engine.publish(*publication))
            except BaseException as error:
                done.set_exception(error)
        for request in arrived:
            try:
                self.engine.enqueue(request)
            except RequestError as error:
                self._deliver([self.engine.refusal(request, error)])
        for request_id in aborts:
            output = self.engine.abort(request_id)
            if output is not None:
                self._deliver([output])
        return not stop

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            pending = self._pending.get(output.request_id)
            if pending is None or pending.told:
                continue
            pending.told = output.finished
            try:
                pending.on_output(output)
            except Exception as error:
                self.engine.abort(output.request_id)
                self._tell(pending, error)
            if pending.told:
                self._forget(output.request_id)

    def _tell(self, pending: _Pending, error: BaseException) -> None:
        """Hand a request its last output, made without the engine; its receiver may be broken."""
        if pending.told:
            return
        pending.told = True
        with suppress(BaseException):  # nobody is left to tell
            pending.on_output(self.engine.refusal(pending.request, error))

    def _forget(self, request_id: str) -> None:
        with self._wake:
            pending = self._pending.pop(request_id, None)
            if pending is not None:
                tenant = pending.request.seq.tenant
                self._held[tenant] -= 1
                if not self._held[tenant]:
                    del self._held[tenant]
                    self._weights.pop(tenant, None)
            if not self._pending:
                self._wake.notify_all()

    def _end_all(self, error: BaseException) -> None:
        for request_id, pending in list(self._pending.items()):
            self._tell(pending, error)
            self._forget(request_id)

    def _die(self, error: BaseException) -> None:
        """Tell every request, and who waits for a document, that the engine is gone."""
        with self._wake:
            self.error = error  # from here on nothing comes in
            publications, self._publications = self._publications, deque()
        for done, _ in publications:
            done.set_exception(RequestError(f"the engine has stopped: {error}"))
        self._end_all(RequestError(f"the engine failed: {error}"))
