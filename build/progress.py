"""Progress of long work on stderr: a bar on a terminal, plain lines elsewhere, nothing for short work."""

import sys
import time
from typing import Any, Protocol, TextIO

_QUIET_S = 1.0  # work that is done sooner is not worth a line
_LINE_EVERY_S = 10.0


class Progress(Protocol):
    """Hears of long work."""

    def __call__(self, what: str, done: int, total: int, detail: str = "") -> None:
        """What is being done, steps done, steps in all; what exactly the step that runs is at."""


def no_progress(what: str, done: int, total: int, detail: str = "") -> None:
    """For those who do not want to hear."""


class ProgressPrinter:
    """A `Progress` that shows it."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._what = ""
        self._started = self._last_line = 0.0
        self._bar: Any = None  # rich.progress.Progress, imported when first shown
        self._task: Any = None

    def __call__(self, what: str, done: int, total: int, detail: str = "") -> None:
        """Take note of a step."""
        now = time.monotonic()
        if what != self._what:
            self.close()
            self._what, self._started, self._last_line = what, now, now
        elapsed = now - self._started
        if self._stream.isatty():
            if self._bar is None and elapsed > _QUIET_S and done < total:
                self._open_bar(total)
            if self._bar is not None:
                said = f"{what} ({detail})" if detail else what
                self._bar.update(self._task, completed=done, total=total, description=said)
        elif done >= total > 0 and elapsed > _QUIET_S:
            print(f"{what}: done in {elapsed:.1f} s", file=self._stream, flush=True)
            self._last_line = now
        elif done < total and now - self._last_line > _LINE_EVERY_S:
            said = f" ({detail})" if detail else ""
            print(f"{what}: {done} of {total}{said}", file=self._stream, flush=True)
            self._last_line = now

    def _open_bar(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=Console(file=self._stream), transient=True)
        self._bar.start()
        self._task = self._bar.add_task(self._what, total=total)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
        self._bar, self._what = None, ""
