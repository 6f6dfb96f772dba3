"""A running server kept in line with its zoo: what zoo-compile adds or removes appears or goes.

The engine takes the change over first (a `reload` request, which takes as long as it compiles engines), then
the ensembles of the models that it serves are written to the model repository, which Triton looks through
every second. Only `preprocessing`, whose inputs name the tenants, is loaded again; requests under way finish.
"""

from __future__ import annotations

import compileall
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from blockzoo.server_config.repository import ServerSettings, check_name, update_repository
from blockzoo.server_config.watchdog import UnhealthyError
from blockzoo.zoo.errors import ZooError
from blockzoo.zoo.store import Zoo, manifest_stamp

_PATIENCE_S = 1.0  # the server is looked after meanwhile
T = TypeVar("T")
_RETRY_S = 30.0  # models for which there is no memory are tried again


@dataclass(frozen=True, slots=True)
class Change:
    """What a change of the zoo came to: the tenants served now, and what to tell whoever runs the server."""

    tenants: tuple[str, ...]
    messages: tuple[str, ...]


class Follower:
    """Watches the manifest of the zoo that a server serves.

    Args:
        settings: of the models in the repository.
        repository: folder of the running server; `prepare` fills it.
        reload: asks the engine model to reload; raises OSError where it cannot be asked, UnhealthyError
            where it refuses.
    """

    def __init__(
        self, settings: ServerSettings, repository: Path, reload: Callable[[], Mapping[str, Any]]
    ) -> None:
        self._settings, self._repository, self._reload = settings, repository, reload
        self._zoo = Path(settings.zoo)
        self._seen = manifest_stamp(self._zoo)
        self.tenants: tuple[str, ...] = ()
        """Models served."""
        self.left_out: Mapping[str, str] = {}
        """Models of the zoo that cannot be served as they are, and why."""
        self._inputs: tuple[str, ...] = ()  # a tenant's input stays: its ensemble may outlive it by a moment
        self._waiting: Mapping[str, str] = {}
        self._retry_at = 0.0
        self._asked: tuple[Any, Future[Mapping[str, Any]]] | None = None  # with the stamp then

    def prepare(self) -> tuple[str, ...]:
        """Bring the repository in line for a server that is about to start; the tenants.

        Models whose names Triton cannot serve stay out, and are named in `left_out`; which others do is known
        once the engine has read them: `settle`.

        Raises:
            ZooError: the zoo cannot be read, or no name suits Triton; with `strict`: some name does not.
        """
        self._seen, self._waiting, self._asked = manifest_stamp(self._zoo), {}, None
        fit, problems = _fit_names(sorted(Zoo.open(self._zoo).manifest.models))
        if problems and (not fit or self._settings.engine.get("strict")):
            raise ZooError("\n".join(problems.values()))
        self.left_out = problems
        self.tenants = self._inputs = update_repository(self._repository, self._settings, fit or None)
        # else Python writes its bytecode there as it starts, and Triton takes that for a change of the models
        compileall.compile_dir(self._repository, quiet=1)
        return self.tenants

    def settle(self) -> None:
        """Once the server serves: keep the ensembles of those models alone that the engine has loaded.

        Raises:
            OSError, UnhealthyError: the engine cannot be asked, or the repository not be written.
        """
        self._take(self._reload())

    def follow(self) -> Change | None:
        """Take over a change of the zoo; None while there is none, or while the engine is at it or cannot be
        asked.

        Raises:
            OSError: the repository cannot be written; the next call tries again.
        """
        if self._asked is None:
            seen = manifest_stamp(self._zoo)
            retries = bool(self._waiting) and time.monotonic() >= self._retry_at
            if seen is None or (seen == self._seen and not retries):
                return None
            self._asked = seen, in_thread(self._reload)
        seen, asked = self._asked
        if not wait([asked], _PATIENCE_S).done:
            return None
        self._asked = None
        try:
            answer = asked.result()
        except UnhealthyError as error:
            self._seen = seen
            return Change(self.tenants, (str(error),))
        except OSError:  # it is asked again; if it is dead, the watchdog sees to it
            return None
        known = self.left_out
        self._take(answer)
        problems = [f"left out: {why}" for name, why in self.left_out.items() if known.get(name) != why]
        changes = [
            f"{key} {', '.join(answer[key])}" for key in ("added", "replaced", "removed") if answer[key]
        ]
        waiting = [
            f"{name} is not served yet: {why}"
            for name, why in answer["waiting"].items()
            if self._waiting.get(name) != why
        ]
        self._waiting, self._retry_at = answer["waiting"], time.monotonic() + _RETRY_S
        self._seen = seen
        return Change(self.tenants, (*changes, *problems, *waiting))

    def _take(self, answer: Mapping[str, Any]) -> None:
        """Bring the repository in line with what the engine says of a reload."""
        tenants, problems = _fit_names(answer["serving"])
        inputs = tuple(sorted({*self._inputs, *tenants}))
        update_repository(self._repository, self._settings, tenants, inputs)
        broken = {name: f"model {name}: {why}" for name, why in answer["left_out"].items()}
        self.tenants, self._inputs, self.left_out = tenants, inputs, problems | broken


def in_thread(work: Callable[[], T]) -> Future[T]:
    """Do something that may take long in a thread that nobody waits for at the end."""
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="blockzoo-reload", daemon=True).start()
    return done


def _fit_names(names: Sequence[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Those that Triton can serve, and why it cannot the others."""
    fit, problems = [], {}
    for name in names:
        try:
            check_name(name)
            fit.append(name)
        except ZooError as error:
            problems[name] = str(error)
    return tuple(fit), problems
