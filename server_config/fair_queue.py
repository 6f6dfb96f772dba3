"""Work for a few threads, taken in turn from whoever brings it, so that nobody's flood holds the others.

Turns go round the models first and round the scopes of each model then: a scope is what a client says it is,
and many of them give no model more than its turn.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable

from blockzoo.runtime.api.errors import OverloadedError

Work = Callable[[], None]
_LEAST_COST = 1 << 16  # a small piece of work still takes a place


class FairQueue:
    """Threads with a queue in front.

    Args:
        name: of the threads.
        num_threads: pieces of work done at the same time.
        capacity: cost of what may wait.

    Of both, threads and capacity, a model may have as much as it leaves free: a flood gets half of them, and
    a newcomer always finds room.
    """

    def __init__(self, name: str, num_threads: int, capacity: int) -> None:
        self._capacity = capacity
        self._num_threads = num_threads
        self._waiting: OrderedDict[str, OrderedDict[str | None, deque[tuple[int, Work]]]] = OrderedDict()
        self._cost_of: dict[str, int] = {}
        self._running: Counter[str] = Counter()
        self._stopped = False
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{i}", daemon=True) for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, model: str, scope: str | None, cost: int, work: Work) -> None:
        """Queue `work`, which must not raise. Raises OverloadedError.

        Args:
            model, scope: whose it is.
            cost: how long it takes, in any unit, that of the capacity.
        """
        cost = max(cost, _LEAST_COST)
        with self._changed:
            if self._stopped:
                raise OverloadedError("the server is shutting down; send the request elsewhere")
            own, total = self._cost_of.get(model, 0), sum(self._cost_of.values())
            if total and own + cost > self._capacity - total:
                raise OverloadedError(
                    f"too many requests to {model} wait to be tokenized; send it again later"
                )
            self._cost_of[model] = own + cost
            scopes = self._waiting.setdefault(model, OrderedDict())
            scopes.setdefault(scope, deque()).append((cost, work))
            self._changed.notify_all()  # who drains waits there too

    def drain(self, timeout_s: float) -> bool:
        """Wait until nothing waits and all work is done; False when time runs out."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            return self._changed.wait_for(
                lambda: not self._waiting and not self._running, max(0.0, deadline - time.monotonic())
            )

    def close(self) -> None:
        """Take no more work, and forget what waits; what is being done goes on."""
        with self._changed:
            self._stopped = True
            self._waiting.clear()
            self._cost_of.clear()
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._next() is not None)
                model = self._next()
                if self._stopped or model is None:
                    return
                work = self._take(model)
                self._running[model] += 1
            try:
                work()
            finally:
                with self._changed:
                    self._running[model] -= 1
                    self._running += Counter()  # forgets those at zero
                    self._changed.notify_all()

    def _next(self) -> str | None:
        """The model whose turn it is."""
        free = self._num_threads - self._running.total()
        return next((model for model in self._waiting if self._running[model] < free), None)

    def _take(self, model: str) -> Work:
        """Its next piece of work; it, and its scope within it, go to the end of the round."""
        scopes = self._waiting[model]
        scope, works = next(iter(scopes.items()))
        cost, work = works.popleft()
        self._cost_of[model] -= cost
        scopes.move_to_end(scope)
        self._waiting.move_to_end(model)
        if not works:
            del scopes[scope]
        if not scopes:
            del self._waiting[model], self._cost_of[model]
        return work
