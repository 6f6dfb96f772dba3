"""The arguments of zoo-serve that are about replicas."""

from __future__ import annotations

import argparse
import re


def add_replica_arguments(parser: argparse.ArgumentParser) -> None:
    """Add them, in a group."""
    replicas = parser.add_argument_group(
        "replicas, on Ray Serve (docs/cluster.md); only the OpenAI endpoint is served"
    )
    replicas.add_argument(
        "--replicas",
        type=_span,
        metavar="N",
        help="serve so many replicas of the zoo behind the endpoint; N-M: as many as there are requests for",
    )
    replicas.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="join the Ray there, whose machines see the zoo under the same path (default: start one here); "
        "each replica takes --threads of its CPUs; with --workers: run these there",
    )
    replicas.add_argument(
        "--routing",
        choices=("held", "round-robin"),
        default="held",
        help="where a request goes: where what is cached and what waits make it cheapest (the default), or "
        "to the replicas in turn",
    )


def _span(text: str) -> tuple[int, int]:
    if re.fullmatch("[0-9]{1,4}(-[0-9]{1,4})?", text):
        least, _, most = text.partition("-")
        if 1 <= int(least) <= int(most or least) <= 1000:
            return int(least), int(most or least)
    raise argparse.ArgumentTypeError(f"{text!r} is no number of replicas; expected N, or N-M as 2-8")
