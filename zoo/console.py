"""What the console commands have in common."""

import functools
import os
import select
import sys
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")
READER_GONE = 141  # as the shell reports a process that SIGPIPE ended


def command(main: Callable[P, int]) -> Callable[P, int]:
    """A `main` that ends quietly when whoever reads its output has seen enough (`| head -1`)."""

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            try:
                return main(*args, **kwargs)
            finally:
                if sys.stdout is not None:  # as it is where it was closed before the start
                    sys.stdout.flush()  # here, not when Python ends
        except BrokenPipeError:
            ours = [file for file in (sys.stdout, sys.stderr) if file is not None]
            gone = [file for file in ours if _reader_is_gone(file.fileno())]
            if not gone:
                raise  # another pipe
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for file in gone:
                os.dup2(nowhere, file.fileno())  # for what is in the buffer still
            os.close(nowhere)
            return READER_GONE

    return run


def _reader_is_gone(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
