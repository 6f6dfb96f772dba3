"""zoo-serve: a zoo on the network, through Triton Inference Server."""

from __future__ import annotations

import argparse
import secrets
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from blockzoo.zoo.console import command

if TYPE_CHECKING:
    from blockzoo.server_config.launcher import Endpoints


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="zoo-serve",
        description="Serve all models of a zoo over HTTP and gRPC with Triton Inference Server.",
        epilog="Exit status: 0; 1 where it could not serve, or requests did not end in time; 3 where it "
        "served, but left models of the zoo out, as something is wrong with them.",
    )
    parser.add_argument("zoo", help="a zoo directory, written by zoo-compile")
    network = parser.add_argument_group("network (port 0 takes a free one)")
    network.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    network.add_argument(
        "--insecure",
        action="store_true",
        help="let other machines reach the tritonserver of nvidia-pytriton, whose version has known holes",
    )
    network.add_argument("--http-port", type=_port, default=8000, metavar="N", help="default %(default)s")
    network.add_argument("--grpc-port", type=_port, default=8001, metavar="N", help="default %(default)s")
    network.add_argument("--metrics-port", type=_port, default=8002, metavar="N", help="default %(default)s")
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--backend", choices=("openvino", "reference", "tensorrt"), help="what computes (default: openvino)"
    )
    engine.add_argument("--device", help="of the other backends: cpu, cuda or cuda:<n>")
    engine.add_argument("--precision", choices=("f32", "bf16"), help="default: bf16 where the CPU has it")
    engine.add_argument("--kv-cache-gb", type=_amount, metavar="GB", help="size of the KV pool (default 2)")
    engine.add_argument(
        "--enable-lora",
        action="store_true",
        default=None,
        help="let all engines take LoRAs, so that any that is compiled later is served without a restart",
    )
    engine.add_argument("--max-num-seqs", type=int, metavar="N", help="requests that run at once")
    engine.add_argument("--max-num-batched-tokens", type=int, metavar="N", help="new tokens per step")
    engine.add_argument("--max-waiting", type=int, metavar="N", help="requests that may wait")
    engine.add_argument("--max-model-len", type=int, metavar="N", help="longest prompt with its answer")
    engine.add_argument("--max-request-seconds", type=_amount, metavar="S", help="limit per request (600)")
    engine.add_argument(
        "--kv-sharing",
        choices=("model", "scope"),
        help="share cached KV of a scope within each model (default) or between models too",
    )
    engine.add_argument(
        "--kv-reuse",
        choices=("off", "exact", "on-request", "approx"),
        help="what KV requests reuse: none, that of equal prefixes (default), or also that of equal words "
        "behind other ones (approximate: it changes answers a little), for requests with kv_reuse approx or "
        "for all that do not say otherwise",
    )
    engine.add_argument(
        "--publish",
        action="append",
        default=[],
        metavar="FILE",
        help="publish documents, whose KV is computed once for the prompts of every scope: a text file, or a "
        ".jsonl file with name, text and perhaps models in each line; may be repeated",
    )
    engine.add_argument(
        "--published-kv-share",
        type=float,
        metavar="S",
        help="of the KV pool that they may hold (default 0.5)",
    )
    engine.add_argument(
        "--kv-cache-dir", metavar="DIR", help="keep the KV of published documents there for the next start"
    )
    engine.add_argument(
        "--kv-cache-dir-gb", type=_amount, metavar="GB", help="the most it may hold (default 4)"
    )
    engine.add_argument("--schedule", choices=("hit-first", "fair"), help="order of waiting requests")
    engine.add_argument("--threads", type=int, metavar="N", help="compute threads")
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


@command
def main(argv: list[str] | None = None) -> int:
    """Run zoo-serve; the exit status."""
    args = build_parser().parse_args(argv)
    from blockzoo.runtime.api.errors import RequestError  # after parsing: --help answers at once
    from blockzoo.zoo.errors import ZooError

    try:
        return _write_only(args) if args.write_only else _serve(args)
    except (ZooError, RequestError) as error:
        print(f"zoo-serve: {error}", file=sys.stderr)
        return 1


def _engine_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of EngineConfig that the command line sets. Raises InvalidRequestError."""
    from blockzoo.runtime import EngineConfig

    settings = {
        "backend": args.backend,
        "device": args.device,
        "precision": args.precision,
        "kv_cache_bytes": None if args.kv_cache_gb is None else int(args.kv_cache_gb * 2**30),
        "enable_lora": args.enable_lora,
        "max_num_seqs": args.max_num_seqs,
        "max_num_batched_tokens": args.max_num_batched_tokens,
        "max_waiting": args.max_waiting,
        "max_model_len": args.max_model_len,
        # an ensemble's cancelled requests run on unnoticed: something must bound them
        "max_request_seconds": 600.0 if args.max_request_seconds is None else args.max_request_seconds,
        "kv_sharing": args.kv_sharing,
        "kv_reuse": None if args.kv_reuse == "on-request" else args.kv_reuse,
        "approximate": {} if args.kv_reuse == "on-request" else None,
        "published_kv_share": args.published_kv_share,
        "kv_cache_dir": None if args.kv_cache_dir is None else str(Path(args.kv_cache_dir).resolve()),
        "kv_cache_dir_bytes": None if args.kv_cache_dir_gb is None else int(args.kv_cache_dir_gb * 2**30),
        "schedule": args.schedule,
        "num_threads": args.threads,
        "strict": args.strict,
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    EngineConfig(**settings)
    return settings


def _publish(args: argparse.Namespace) -> tuple[str, ...]:
    """Absolute paths of the files of documents, read once. Raises InvalidRequestError."""
    from blockzoo.server_config.documents import read_documents

    paths = [Path(path).resolve() for path in args.publish]
    read_documents(paths)
    return tuple(map(str, paths))


def _write_only(args: argparse.Namespace) -> int:
    from blockzoo.server_config.launcher import Endpoints, server_arguments
    from blockzoo.server_config.repository import ServerSettings, write_repository

    folder = Path(args.write_only).resolve()
    zoo = str(Path(args.zoo).resolve())
    settings = ServerSettings(zoo, _engine_settings(args), args.drain_seconds, publish=_publish(args))
    tenants = write_repository(folder, settings)
    endpoints = Endpoints(args.host, args.http_port, args.grpc_port, args.metrics_port)
    command = ["tritonserver", *server_arguments(folder, endpoints, args.drain_seconds)]
    print(f"wrote {folder} for {', '.join(tenants)}; serve it with\n\n  " + " \\\n    ".join(command))
    return 0


def _serve(args: argparse.Namespace) -> int:
    from blockzoo.server_config.control import SECRET_VARIABLE
    from blockzoo.server_config.environment import check_host, find_tritonserver, free_ports
    from blockzoo.server_config.follow import Follower
    from blockzoo.server_config.launcher import Endpoints, TritonProcess, server_arguments
    from blockzoo.server_config.repository import ServerSettings
    from blockzoo.server_config.supervisor import Supervisor, say
    from blockzoo.server_config.watchdog import Watchdog

    engine, publish = _engine_settings(args), _publish(args)
    ports = free_ports(
        args.host,
        {"--http-port": args.http_port, "--grpc-port": args.grpc_port, "--metrics-port": args.metrics_port},
    )
    endpoints = Endpoints(args.host, *ports.values())
    with TemporaryDirectory(prefix="blockzoo-serve-") as temporary:
        folder = Path(temporary)
        repository, control_dir = folder / "models", folder / "control"
        control_dir.mkdir()
        zoo = str(Path(args.zoo).resolve())
        settings = ServerSettings(zoo, engine, args.drain_seconds, str(control_dir), publish)
        secret = secrets.token_urlsafe(32)
        watchdog = Watchdog(endpoints.http, "", secret, control_dir)
        follower = Follower(settings, repository, watchdog.reload)
        server = find_tritonserver(folder)
        check_host(args.host, server, args.insecure)
        server.environment[SECRET_VARIABLE] = secret  # for the models, whose processes inherit it
        # else texts wait for each other in the library's own pool of threads, whoever tokenizes them
        server.environment["TOKENIZERS_PARALLELISM"] = "false"
        arguments = server_arguments(repository, endpoints, args.drain_seconds, follows=True)

        def start() -> TritonProcess:
            follower.prepare()
            for why in follower.left_out.values():  # the engine model says what else is
                say(f"left out: {why}")
            return TritonProcess(server, arguments, control_dir, args.verbose)

        supervisor = Supervisor(start, watchdog, follower, args.drain_seconds)

        def on_ready() -> None:
            version = f"{watchdog.version()}{' of nvidia-pytriton' if server.bundled else ''}"
            _print_endpoints(args.zoo, follower.tenants, endpoints, version)

        return supervisor.run(on_ready)


def _print_endpoints(zoo: str, tenants: tuple[str, ...], endpoints: Endpoints, version: str) -> None:
    host = endpoints.client_host
    print(
        f"serving {len(tenants)} models of {zoo}: {', '.join(tenants)}\n"
        f"  HTTP     {endpoints.http}\n"
        f"  gRPC     {host}:{endpoints.grpc_port}\n"
        f"  metrics  http://{host}:{endpoints.metrics_port}/metrics\n"
        f"  server   tritonserver {version}\n"
        "try\n"
        f"  curl -s {endpoints.http}/v2/models/{tenants[0]}/generate "
        '-d \'{"text_input": "Hello", "max_tokens": 16}\'',
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
