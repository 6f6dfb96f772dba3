"""How a model process shows the launcher that it takes requests, past Triton's own queue.

A health request waits behind what Triton has queued for the model, so under a flood of large requests it may
come too late without anything being broken. A count of requests taken, in a file beside, tells the two apart:
a server that is busy goes on counting.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

_EVERY_S = 0.5


class Beacon:
    """Writes the count, from a thread of its own.

    Args:
        control_dir: folder shared with the launcher; None: nobody looks.
        model: name of the served model.
    """

    def __init__(self, control_dir: str | None, model: str) -> None:
        self.taken = 0
        if control_dir is None:
            return
        self._file = _file(Path(control_dir), model)
        threading.Thread(target=self._run, name="blockzoo-beacon", daemon=True).start()

    def _run(self) -> None:
        written, pause = None, threading.Event()
        while True:
            if self.taken != written:
                written = self.taken
                try:
                    _write(self._file, written)
                except OSError:  # the disk is full, for now: meanwhile it is as if hung
                    written = None
            pause.wait(_EVERY_S)


class BeaconReader:
    """Looks at the counts of the models."""

    def __init__(self, control_dir: Path) -> None:
        self._control_dir = control_dir
        self._seen: dict[str, int] = {}

    def moved(self, model: str) -> bool:
        """Whether it has taken requests since this was last asked; False the first time."""
        try:
            taken = int(_file(self._control_dir, model).read_text())
        except (OSError, ValueError):
            return False
        before = self._seen.get(model)
        self._seen[model] = taken
        return before is not None and taken != before


def _file(control_dir: Path, model: str) -> Path:
    return control_dir / f"{model}.taken"


def _write(file: Path, taken: int) -> None:
    unfinished = file.with_suffix(f".{os.getpid()}")
    unfinished.write_text(str(taken))
    unfinished.rename(file)
