"""What the console commands have in common."""

import argparse
import functools
import os
import select
import sys
from collections.abc import Callable
from typing import ParamSpec, TextIO

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
        except (BrokenPipeError, SystemExit) as ended:
            ours = [file for file in (sys.stdout, sys.stderr) if file is not None]
            if isinstance(ended, SystemExit):  # argparse keeps to itself that nobody reads its help
                ours = [] if ended.code else ours[:1]
            gone = [file for file in ours if _reader_is_gone(file)]
            if not gone:
                raise  # another pipe, or none
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for file in gone:
                os.dup2(nowhere, file.fileno())  # for what is in the buffer still
            os.close(nowhere)
            return READER_GONE

    return run


def _reader_is_gone(file: TextIO) -> bool:
    try:
        descriptor = file.fileno()
    except OSError:  # it is no file of the system's
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def add_backend_arguments(parser: argparse._ActionsContainer) -> None:
    """--backend, --device, --precision, --int8-activations, --kv-precision, to a parser or a group."""
    parser.add_argument(
        "--backend", choices=("openvino", "reference", "tensorrt"), help="what computes (default: openvino)"
    )
    parser.add_argument("--device", help="of the other backends: cpu, cuda or cuda:<n>")
    parser.add_argument("--precision", choices=("f32", "bf16"), help="default: bf16 where the CPU has it")
    parser.add_argument(
        "--int8-activations",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="round activations to 8 bits where weights are quantized (default: where that is faster)",
    )
    parser.add_argument(
        "--kv-precision",
        choices=("f32", "bf16", "f16", "u8", "auto"),
        help="of K and V; u8: 8 bits; auto: u8 where zoo-compile found no model to lose more by that than by "
        "bf16 (default: f16 beside int8 activations, else the precision)",
    )
