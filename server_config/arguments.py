"""The arguments of zoo-serve; those about replicas are theirs (`replicas/arguments.py`)."""

from __future__ import annotations

import argparse

from blockzoo.server_config.replicas.arguments import add_replica_arguments
from blockzoo.zoo.console import add_backend_arguments


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="zoo-serve",
        description="Serve all models of a zoo over HTTP and gRPC with Triton Inference Server.",
        epilog="Exit status: 0; 1 where it could not serve, or requests did not end in time; 3 where it "
        "served, but left models of the zoo out, as something is wrong with them.",
    )
    parser.add_argument("zoo", help="a zoo directory, written by zoo-compile")
    _add_network(parser)
    add_replica_arguments(parser)
    _add_engine(parser)
    _add_reuse(parser)
    _add_workers(parser)
    parser.add_argument(
        "--drain-seconds",
        type=_amount,
        default=30.0,
        metavar="S",
        help="how long running requests may go on after SIGTERM or Ctrl-C (default %(default)s)",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        default=None,
        help="refuse to start where some model of the zoo cannot be served, instead of leaving it out",
    )
    parser.add_argument("--write-only", metavar="DIR", help="write the model repository to DIR and exit")
    parser.add_argument("--verbose", action="store_true", help="show the server's whole log")
    return parser


def _add_network(parser: argparse.ArgumentParser) -> None:
    network = parser.add_argument_group("network (port 0 of Triton takes a free one)")
    network.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    network.add_argument(
        "--insecure",
        action="store_true",
        help="let other machines reach the tritonserver of nvidia-pytriton, whose version has known holes, "
        "and the OpenAI endpoint without keys",
    )
    network.add_argument("--http-port", type=_port, default=8000, metavar="N", help="default %(default)s")
    network.add_argument("--grpc-port", type=_port, default=8001, metavar="N", help="default %(default)s")
    network.add_argument("--metrics-port", type=_port, default=8002, metavar="N", help="default %(default)s")
    network.add_argument(
        "--openai-port",
        type=_port,
        default=9000,
        metavar="N",
        help="of the OpenAI endpoint, default %(default)s; 0 leaves it out, as --no-openai does",
    )
    network.add_argument(
        "--no-openai", action="store_const", const=0, dest="openai_port", help="leave the OpenAI endpoint out"
    )
    network.add_argument(
        "--api-keys",
        metavar="FILE",
        help="keys that requests to the OpenAI endpoint must come with, see docs/openai.md; Triton, which "
        "asks for none, is then served to this machine alone",
    )
    network.add_argument(
        "--generation-config",
        choices=("auto", "none"),
        default="auto",
        help="how answers of the OpenAI endpoint are chosen where a request does not say: as the model's "
        "generation_config.json has it (auto, the default), or by OpenAI's defaults alone (none)",
    )


def _add_engine(parser: argparse.ArgumentParser) -> None:
    engine = parser.add_argument_group("engine")
    add_backend_arguments(engine)
    engine.add_argument("--kv-cache-gb", type=_amount, metavar="GB", help="size of the KV pool (default 2)")
    engine.add_argument(
        "--enable-lora",
        action="store_true",
        default=None,
        help="let all engines take LoRAs, so that those that are compiled later need no new engines",
    )
    engine.add_argument("--max-num-seqs", type=int, metavar="N", help="requests that run at once")
    engine.add_argument("--max-num-batched-tokens", type=int, metavar="N", help="new tokens per step")
    engine.add_argument(
        "--max-waiting",
        type=int,
        metavar="N",
        help="requests that may wait; beyond it each tenant has its share (default 1024)",
    )
    engine.add_argument(
        "--tenant-weight",
        type=_weight,
        action="append",
        default=[],
        metavar="NAME=W",
        help="how much more (or less) than 1 a model gets where others want the engine too; may be repeated",
    )
    engine.add_argument(
        "--max-step-seconds",
        type=_amount,
        metavar="S",
        help="most that a chunk of a prompt makes others wait, where 32 tokens take less (default 0.25)",
    )
    engine.add_argument("--max-model-len", type=int, metavar="N", help="longest prompt with its answer")
    engine.add_argument("--max-request-seconds", type=_amount, metavar="S", help="limit per request (600)")
    engine.add_argument(
        "--speculate",
        choices=("auto", "off"),
        help="auto: guess tokens ahead (from the prompt, earlier answers, the form of an answer) and check "
        "several in one step where that is hoped to be faster; answers are the same (default: off)",
    )
    engine.add_argument("--schedule", choices=("hit-first", "fair"), help="order of waiting requests")
    engine.add_argument(
        "--threads", type=int, metavar="N", help="compute threads (of each replica or worker)"
    )


def _add_reuse(parser: argparse.ArgumentParser) -> None:
    reuse = parser.add_argument_group("reuse of KV (docs/serving.md)")
    reuse.add_argument(
        "--kv-sharing",
        choices=("model", "scope"),
        help="share cached KV of a scope within each model (default) or between models too",
    )
    reuse.add_argument(
        "--kv-reuse",
        choices=("off", "exact", "on-request", "approx"),
        help="what KV requests reuse: none, that of equal prefixes (default), or also that of equal words "
        "behind other ones (approximate: it changes answers a little, and lets other clients of the scope "
        "change them), for requests with kv_reuse approx or for all that do not say otherwise",
    )
    reuse.add_argument(
        "--kv-recompute",
        type=float,
        metavar="X",
        help="of approximate reuse: share of the tokens behind other texts that is computed anew, 0 to 1, "
        "for all models (default: as zoo-calibrate found for each; without that 1, and only KV behind edits "
        "is reused)",
    )
    reuse.add_argument(
        "--kv-guard",
        type=float,
        metavar="NATS",
        help="of approximate reuse: compute a prompt in full after all where the likeliest first token leads "
        "the second by less than that in log-probability, for all models (default: as for --kv-recompute; "
        "without a calibration 0, none)",
    )
    reuse.add_argument(
        "--publish",
        action="append",
        default=[],
        metavar="FILE",
        help="publish documents, whose KV is computed once for the prompts of every scope: a text file, or a "
        ".jsonl file with name, text and perhaps models in each line; may be repeated",
    )
    reuse.add_argument(
        "--published-kv-share",
        type=float,
        metavar="S",
        help="of the KV pool that they may hold (default 0.5)",
    )
    reuse.add_argument(
        "--kv-cache-dir", metavar="DIR", help="keep the KV of published documents there for the next start"
    )
    reuse.add_argument(
        "--kv-cache-dir-gb", type=_amount, metavar="GB", help="the most it may hold (default 4)"
    )


def _add_workers(parser: argparse.ArgumentParser) -> None:
    workers = parser.add_argument_group("workers (docs/cluster.md)")
    workers.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="spread the zoo's blocks over so many processes of this machine, or with --ray-address of the "
        "machines of a Ray (docs/cluster.md)",
    )
    workers.add_argument(
        "--worker-memory-gb",
        type=_amount,
        metavar="GB",
        help="that the weights in each and the KV pool may take (default: what is available)",
    )
    workers.add_argument(
        "--move-spans-every",
        type=float,
        metavar="S",
        help="how often to look whether blocks should move to other workers, as models are asked otherwise "
        "(default 30; 0: they stay)",
    )
    workers.add_argument(
        "--worker-interface",
        metavar="IP",
        help="address of this machine through which workers on others reach it (default: loopback)",
    )


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{port} is no port; expected 0 to 65535")
    return port


def _amount(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e9:  # also refuses NaN
        raise argparse.ArgumentTypeError(f"{text} is out of range; expected a number above 0")
    return value


def _weight(text: str) -> tuple[str, float]:
    name, equals, weight = text.rpartition("=")
    try:
        if name and equals:
            return name, float(weight)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no weight; expected a model and a number, as legal=2")
