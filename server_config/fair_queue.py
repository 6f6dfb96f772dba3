"""Work taken in turn from whoever brings it, so that nobody's flood holds the others; and threads for it.

Turns go round the models first and round the scopes of each model then: a scope is what a client says it is,
and many of them give no model more than its turn.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from typing import Generic, TypeVar

from blockzoo.runtime.api.errors import OverloadedError

Work = Callable[[], None]
T = TypeVar("T")
_LEAST_COST = 1 << 16  # a small piece of work still takes a place


class FairTurns(Generic[T]):
    """What waits, and how much of it is being done. Used by one thread at a time.

    Args:
        num_places: pieces of work done at the same time.
        capacity: cost of what may wait.

    Of both, places and capacity, a model may have as much as it leaves free: a flood gets half of them, and
    a newcomer always finds room.
    """

    def __init__(self, num_places: int, capacity: int) -> None:
        self._num_places, self._capacity = num_places, capacity
        self._waiting: OrderedDict[str, OrderedDict[str | None, deque[tuple[int, T]]]] = OrderedDict()
        self._cost_of: dict[str, int] = {}
        self._running: Counter[str] = Counter()

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing is being done."""
        return not self._waiting and not self._running

    def put(self, model: str, scope: str | None, cost: int, work: T) -> None:
        """Let work wait for its turn. Raises OverloadedError.

        Args:
            model, scope: whose it is.
            cost: how long it takes, in any unit, that of the capacity.
        """
        cost = max(cost, _LEAST_COST)
        own, total = self._cost_of.get(model, 0), sum(self._cost_of.values())
        if total and own + cost > self._capacity - total:
            raise OverloadedError(f"too many requests to {model} wait; send it again later")
        self._cost_of[model] = own + cost
        scopes = self._waiting.setdefault(model, OrderedDict())
        scopes.setdefault(scope, deque()).append((cost, work))

    def take(self) -> tuple[str, T] | None:
        """The work whose turn it is, with its model; None where none waits that may be done now.

        It counts as being done until `done`. Its model, and its scope within it, go to the end of the round.
        """
        free = self._num_places - self._running.total()
        model = next((model for model in self._waiting if self._running[model] < free), None)
        if model is None:
            return None
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
        self._running[model] += 1
        return model, work

    def done(self, model: str) -> None:
        """Work of the model that was taken is done."""
        self._running[model] -= 1
        self._running += Counter()  # forgets those at zero

    def forget(self) -> None:
        """Drop what waits."""
        self._waiting.clear()
        self._cost_of.clear()


class FairQueue:
    """Threads with turns in front.

    Args:
        name: of the threads.
        num_threads: pieces of work done at the same time.
        capacity: cost of what may wait.
    """

    def __init__(self, name: str, num_threads: int, capacity: int) -> None:
        self._turns: FairTurns[Work] = FairTurns(num_threads, capacity)
        self._stopped = False
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{i}", daemon=True) for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, model: str, scope: str | None, cost: int, work: Work) -> None:
        """Queue `work`, which must not raise; as `FairTurns.put`. Raises OverloadedError."""
        with self._changed:
            if self._stopped:
                raise OverloadedError("the server is shutting down; send the request elsewhere")
            self._turns.put(model, scope, cost, work)
            self._changed.notify_all()  # who drains waits there too

    def drain(self, timeout_s: float) -> bool:
        """Wait until nothing waits and all work is done; False when time runs out."""
        with self._changed:
            return self._changed.wait_for(lambda: self._turns.idle, max(0.0, timeout_s))

    def close(self) -> None:
        """Take no more work, and forget what waits; what is being done goes on."""
        with self._changed:
            self._stopped = True
            self._turns.forget()
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                while (taken := self._turns.take()) is None:
                    if self._stopped:
                        return
                    self._changed.wait()
            model, work = taken
            try:
                work()
            finally:
                with self._changed:
                    self._turns.done(model)
                    self._changed.notify_all()
