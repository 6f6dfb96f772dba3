"""How `postprocessing` tells the engine's model that the client of a tenant's stream has gone.

Triton passes a cancellation on to the steps of an ensemble that begin after it, not to the engine's, which is
under way and would compute on to its end. `postprocessing` begins with every token, so it hears of it.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from blockzoo.runtime.workers.socket_names import short_name

_NAME = "abandoned"
_ID_BYTES = 64


class AbandonedListener:
    """Hears of requests whose client has gone, on a socket in the folder shared with the launcher.

    Args:
        on_abandoned: called with the id of each, perhaps more than once, from a thread of its own.
    """

    def __init__(self, control_dir: Path, on_abandoned: Callable[[str], None]) -> None:
        path = control_dir / _NAME
        path.unlink(missing_ok=True)  # of a process that died
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        with short_name(path) as name:
            self._socket.bind(name)
        self._on_abandoned = on_abandoned
        threading.Thread(target=self._run, name="blockzoo-abandoned", daemon=True).start()

    def _run(self) -> None:
        while True:
            self._on_abandoned(self._socket.recv(_ID_BYTES).decode("ascii", "replace"))


class AbandonedTeller:
    """Tells it; one who does not listen, or not fast enough, is told again with the next token.

    Args:
        control_dir: None: nobody is told.
    """

    def __init__(self, control_dir: str | None) -> None:
        self._path = None if control_dir is None else Path(control_dir) / _NAME

    def tell(self, request_id: str) -> None:
        """The client of this request has gone."""
        if self._path is None:
            return
        told = request_id.encode("ascii", "replace")[:_ID_BYTES]
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as own:
            own.setblocking(False)
            with short_name(self._path) as name:
                own.sendto(told, name)
