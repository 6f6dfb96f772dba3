"""EngineThread: an LLMEngine stepped by one thread of its own, fed from any other."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future

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
Publication = tuple[str, str, Sequence[str] | None]  # arguments of LLMEngine.publish


class EngineThread:
    """Owns an engine and the thread that steps it.

    Every submitted request gets outputs through its callback, the last one with `finished` set,
    whatever happens: completion, error, abort, shutdown. Callbacks run in the engine's thread and
    should return quickly; one that raises loses its request, nobody else's.

    Args: as `LLMEngine`, whose errors are raised.
    """

    def __init__(self, zoo_path: str | os.PathLike[str], config: EngineConfig | None = None) -> None:
        self.engine = LLMEngine(zoo_path, config)
        self.error: BaseException | None = None
        self._callbacks: dict[str, OnOutput] = {}
        self._tenant_of: dict[str, str] = {}  # by id of each request with a callback
        self._held: Counter[str] = Counter()  # of these, by tenant
        self._inbox: deque[Request] = deque()
        self._aborts: deque[str] = deque()
        self._publications: deque[tuple[Future[PublishedDocument], Publication]] = deque()
        self._wake = threading.Condition()
        self._accepting = True
        self._stop = False
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
    def end_ids(self) -> dict[str, tuple[int, ...]]:
        """End-of-sequence token ids by model name."""
        return self.engine.end_ids

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
    ) -> None:
        """Check a request in the calling thread and hand it to the engine.

        Raises:
            RequestError: of the kind that fits; `on_output` is then never called.
        """
        request = self.engine.prepare(request_id, model, prompt, params, scope, kv_reuse, documents, tenant)
        with self._wake:
            if self.error is not None:
                raise RequestError(f"the engine has stopped: {self.error}; restart it")
            if not self._accepting:
                raise OverloadedError("the server is shutting down; send the request elsewhere")
            if request_id in self._callbacks:
                raise InvalidRequestError(f"request id {request_id!r} is in use: give each request its own")
            self._check_queue(request)
            self._callbacks[request_id] = on_output
            self._tenant_of[request_id] = request.seq.tenant
            self._held[request.seq.tenant] += 1
            self._inbox.append(request)
            self._wake.notify()

    def _check_queue(self, request: Request) -> None:
        """As the scheduler does, which sees at most these requests: what passes here passes there."""
        config = self.engine.config
        limit = config.max_num_seqs + config.max_waiting
        try:
            check_queue(request.seq.tenant, self._held, limit, config.tenant_weights, "waiting or running")
        except OverloadedError:
            self.engine.count_refusal(request)
            raise

    def abort(self, request_id: str) -> None:
        """Ask for the end of a request; its last output says "abort". Unknown ids are ignored."""
        with self._wake:
            self._aborts.append(request_id)
            self._wake.notify()

    def reload(self) -> Reloaded:
        """As `LLMEngine.reload`; in the calling thread, while the engine's goes on."""
        try:
            return self.engine.reload()
        finally:
            with self._wake:  # published documents follow in the engine's thread
                self._wake.notify()

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
            self._wake.notify()
        return done.result()

    def metrics(self) -> Metrics:
        """A snapshot; from any thread."""
        return self.engine.metrics()

    def drain(self, timeout_s: float) -> bool:
        """Accept nothing more and wait until all requests have ended; False when time runs out."""
        deadline = time.monotonic() + timeout_s
        with self._wake:
            self._accepting = False
            return self._wake.wait_for(lambda: not self._callbacks, max(0.0, deadline - time.monotonic()))

    def close(self) -> None:
        """Stop the thread; requests that still run end with "abort"."""
        with self._wake:
            self._accepting = False
            self._stop = True
            self._wake.notify_all()
        self._thread.join()

    # ---- the engine's thread

    def _run(self) -> None:
        try:
            while self._take_in():
                if self.engine.has_unfinished():
                    self._deliver(self.engine.step())
                    if not self.engine.has_unfinished():
                        self.engine.rest()
                self.last_progress = time.monotonic()
        except BaseException as error:
            self._die(error)
            raise
        for request_id in list(self._callbacks):
            output = self.engine.abort(request_id)
            if output is not None:
                self._deliver([output])

    def _take_in(self) -> bool:
        """Move what came in to the engine; waits while there is nothing to do. False: stop."""
        with self._wake:
            self._wake.wait_for(
                lambda: (
                    self._stop
                    or self._inbox
                    or self._aborts
                    or self._publications
                    or self.engine.has_unfinished()
                )
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
            on_output = self._callbacks.get(output.request_id)
            if on_output is None:  # its callback has raised
                continue
            try:
                on_output(output)
            except Exception:  # the receiver is broken: nobody is left to tell
                self.engine.abort(output.request_id)
                self._forget(output.request_id)
                continue
            if output.finished:
                self._forget(output.request_id)

    def _forget(self, request_id: str) -> None:
        with self._wake:
            if self._callbacks.pop(request_id, None) is not None:
                tenant = self._tenant_of.pop(request_id)
                self._held[tenant] -= 1
                if not self._held[tenant]:
                    del self._held[tenant]
            if not self._callbacks:
                self._wake.notify_all()

    def _die(self, error: BaseException) -> None:
        """Tell every request that the engine is gone."""
        with self._wake:
            self.error = error
            publications, self._publications = self._publications, deque()
        for done, _ in publications:
            done.set_exception(RequestError(f"the engine has stopped: {error}"))
        for request in list(self._inbox):
            self._deliver([self.engine.refusal(request, error)])
        for request_id in list(self._callbacks):
            output = self.engine.abort(request_id)
            if output is not None:
                self._deliver([output])
