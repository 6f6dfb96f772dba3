"""zoo-serve: a zoo on the network, through Triton Inference Server."""

from __future__ import annotations

import argparse
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from blockzoo.server_config.replicas.arguments import add_replica_arguments
from blockzoo.zoo.console import command

if TYPE_CHECKING:
    from blockzoo.server_config.launcher import Endpoints
    from blockzoo.server_config.openai.process import OpenAIProcess


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="zoo-serve",
        description="Serve all models of a zoo over HTTP and gRPC with Triton Inference Server.",
        epilog="Exit status: 0; 1 where it could not serve, or requests did not end in time; 3 where it "
        "served, but left models of the zoo out, as something is wrong with them.",
    )
    parser.add_argument("zoo", help="a zoo directory, written by zoo-compile")
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
    add_replica_arguments(parser)
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--backend", choices=("openvino", "reference", "tensorrt"), help="what computes (default: openvino)"
    )
    engine.add_argument("--device", help="of the other backends: cpu, cuda or cuda:<n>")
    engine.add_argument("--precision", choices=("f32", "bf16"), help="default: bf16 where the CPU has it")
    engine.add_argument(
        "--int8-activations",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="round activations to 8 bits where weights are quantized (default: where that is faster)",
    )
    engine.add_argument(
        "--kv-precision",
        choices=("u8", "auto"),
        help="keep K and V in 8 bits; auto: where zoo-compile found no model to lose more by that than by "
        "bf16 (default: in the precision)",
    )
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
        "--kv-sharing",
        choices=("model", "scope"),
        help="share cached KV of a scope within each model (default) or between models too",
    )
    engine.add_argument(
        "--kv-reuse",
        choices=("off", "exact", "on-request", "approx"),
        help="what KV requests reuse: none, that of equal prefixes (default), or also that of equal words "
        "behind other ones (approximate: it changes answers a little, and lets other clients of the scope "
        "change them), for requests with kv_reuse approx or for all that do not say otherwise",
    )
    engine.add_argument(
        "--kv-recompute",
        type=float,
        metavar="X",
        help="of approximate reuse: share of the tokens behind other texts that is computed anew, 0 to 1, "
        "for all models (default: as zoo-calibrate found for each; without that 1, and only KV behind edits "
        "is reused)",
    )
    engine.add_argument(
        "--kv-guard",
        type=float,
        metavar="NATS",
        help="of approximate reuse: compute a prompt in full after all where the likeliest first token leads "
        "the second by less than that in log-probability, for all models (default: as for --kv-recompute; "
        "without a calibration 0, none)",
    )
    engine.add_argument(
        "--speculate",
        choices=("auto", "off"),
        help="auto: guess tokens ahead (from the prompt, earlier answers, the form of an answer) and check "
        "several in one step where that is hoped to be faster; answers are the same (default: off)",
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
    engine.add_argument(
        "--threads", type=int, metavar="N", help="compute threads (of each replica or worker)"
    )
    engine.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="spread the zoo's blocks over so many processes of this machine, or with --ray-address of the "
        "machines of a Ray (docs/cluster.md)",
    )
    engine.add_argument(
        "--worker-memory-gb",
        type=_amount,
        metavar="GB",
        help="that the weights in each and the KV pool may take (default: what is available)",
    )
    engine.add_argument(
        "--move-spans-every",
        type=float,
        metavar="S",
        help="how often to look whether blocks should move to other workers, as models are asked otherwise "
        "(default 30; 0: they stay)",
    )
    engine.add_argument(
        "--worker-interface",
        metavar="IP",
        help="address of this machine through which workers on others reach it (default: loopback)",
    )
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


def _weight(text: str) -> tuple[str, float]:
    name, equals, weight = text.rpartition("=")
    try:
        if name and equals:
            return name, float(weight)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no weight; expected a model and a number, as legal=2")


@command
def main(argv: list[str] | None = None) -> int:
    """Run zoo-serve; the exit status."""
    args = build_parser().parse_args(argv)
    from blockzoo.runtime.api.errors import RequestError  # after parsing: --help answers at once
    from blockzoo.zoo.errors import ZooError

    try:
        if args.replicas is not None:
            return _serve_replicas(args)
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
        "int8_activations": args.int8_activations,
        "kv_precision": args.kv_precision,
        "kv_cache_bytes": None if args.kv_cache_gb is None else int(args.kv_cache_gb * 2**30),
        "enable_lora": args.enable_lora,
        "max_num_seqs": args.max_num_seqs,
        "max_num_batched_tokens": args.max_num_batched_tokens,
        "max_waiting": args.max_waiting,
        "tenant_weights": dict(args.tenant_weight) or None,
        "max_step_seconds": args.max_step_seconds,
        "max_model_len": args.max_model_len,
        # an ensemble's cancelled requests run on unnoticed: something must bound them
        "max_request_seconds": 600.0 if args.max_request_seconds is None else args.max_request_seconds,
        "kv_sharing": args.kv_sharing,
        "kv_reuse": None if args.kv_reuse == "on-request" else args.kv_reuse,
        "approximate": _approximate(args),
        "published_kv_share": args.published_kv_share,
        "kv_cache_dir": None if args.kv_cache_dir is None else str(Path(args.kv_cache_dir).resolve()),
        "kv_cache_dir_bytes": None if args.kv_cache_dir_gb is None else int(args.kv_cache_dir_gb * 2**30),
        "schedule": args.schedule,
        "speculate": args.speculate,
        "num_threads": args.threads,
        "strict": args.strict,
        "workers": args.workers,
        "move_spans_every_s": args.move_spans_every,
        "worker_memory_bytes": None if args.worker_memory_gb is None else int(args.worker_memory_gb * 2**30),
        "worker_interface": args.worker_interface,
        "ray_address": None if args.workers is None or args.replicas else args.ray_address,
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    EngineConfig(**settings)
    return settings


def _approximate(args: argparse.Namespace) -> dict[str, float] | None:
    """Settings of approximate reuse, None: of `EngineConfig` itself. Raises InvalidRequestError."""
    from blockzoo.runtime.api.errors import InvalidRequestError

    settings = {"recompute": args.kv_recompute, "guard": args.kv_guard}
    settings = {name: value for name, value in settings.items() if value is not None}
    if not settings:
        return {} if args.kv_reuse == "on-request" else None
    if args.kv_reuse not in ("on-request", "approx"):
        raise InvalidRequestError(
            "--kv-recompute and --kv-guard are about --kv-reuse on-request or approx: add one of them"
        )
    return settings


def _check_weights(args: argparse.Namespace, tenants: tuple[str, ...]) -> None:
    """Name weights of models that are not there (yet: it may come later), or count for few."""
    from blockzoo.server_config.supervisor import say

    if args.tenant_weight and args.api_keys is not None:
        say("--tenant-weight is for Triton's clients: requests with an API key have the key's weight")
    for name, _ in args.tenant_weight:
        if name not in tenants:
            say(f"--tenant-weight {name}: {args.zoo} has no such model now; it has {', '.join(tenants)}")


def _publish(args: argparse.Namespace) -> tuple[str, ...]:
    """Absolute paths of the files of documents, read once. Raises InvalidRequestError."""
    from blockzoo.server_config.documents import read_documents

    paths = [Path(path).resolve() for path in args.publish]
    read_documents(paths)
    return tuple(map(str, paths))


def _write_only(args: argparse.Namespace) -> int:
    from blockzoo.runtime.api.errors import InvalidRequestError
    from blockzoo.server_config.launcher import Endpoints, server_arguments
    from blockzoo.server_config.repository import ServerSettings, write_repository

    folder = Path(args.write_only).resolve()
    zoo = str(Path(args.zoo).resolve())
    endpoints = Endpoints(args.host, args.http_port, args.grpc_port, args.metrics_port)
    if not endpoints.grpc_port:
        raise InvalidRequestError("--grpc-port is 0; --write-only needs the port that the server will have")
    settings = ServerSettings(
        zoo, _engine_settings(args), args.drain_seconds, publish=_publish(args), grpc=endpoints.grpc
    )
    tenants = write_repository(folder, settings)
    command = ["tritonserver", *server_arguments(folder, endpoints, args.drain_seconds)]
    _check_weights(args, tenants)
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
    _check_ray(args)
    _check_keys(args)
    triton_host = args.host if args.api_keys is None else "127.0.0.1"
    ports = free_ports(
        triton_host,
        {"--http-port": args.http_port, "--grpc-port": args.grpc_port, "--metrics-port": args.metrics_port},
    )
    endpoints = Endpoints(triton_host, *ports.values())
    if args.openai_port:
        free_ports(_openai_host(args), {"--openai-port (0 leaves it out)": args.openai_port})
    with TemporaryDirectory(prefix="blockzoo-serve-") as temporary:
        folder = Path(temporary)
        repository, control_dir = folder / "models", folder / "control"
        control_dir.mkdir()
        zoo = str(Path(args.zoo).resolve())
        settings = ServerSettings(zoo, engine, args.drain_seconds, str(control_dir), publish, endpoints.grpc)
        secret = secrets.token_urlsafe(32)
        watchdog = Watchdog(endpoints.http, "", secret, control_dir)
        follower = Follower(settings, repository, watchdog.reload)
        server = find_tritonserver(folder)
        check_host(triton_host, server, args.insecure)
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
        openai = _openai_process(args, endpoints, folder, secret)

        def on_ready() -> None:
            if openai is not None:
                openai.start()
            version = f"{watchdog.version()}{' of nvidia-pytriton' if server.bundled else ''}"
            _print_endpoints(args, follower.tenants, endpoints, version)
            _check_weights(args, follower.tenants)

        try:
            return supervisor.run(on_ready)
        finally:
            if openai is not None:
                openai.stop()


def _serve_replicas(args: argparse.Namespace) -> int:
    from blockzoo.runtime.api.errors import InvalidRequestError
    from blockzoo.server_config.environment import free_ports
    from blockzoo.server_config.replicas.command import serve

    if args.worker_interface is not None:
        raise InvalidRequestError("workers of replicas run beside them: leave out --worker-interface")
    if args.write_only or not args.openai_port:
        raise InvalidRequestError(
            "--replicas serves the OpenAI endpoint alone: it needs that, and no --write-only"
        )
    _check_keys(args)
    free_ports(_openai_host(args), {"--openai-port": args.openai_port})
    with TemporaryDirectory(prefix="blockzoo-serve-") as temporary:

        def make_front(options: Mapping[str, object]) -> OpenAIProcess:
            return _front(args, Path(temporary), "", options)

        def on_ready(models: tuple[str, ...]) -> None:
            url = f"http://{_openai_host(args)}:{args.openai_port}"
            print(
                f"serving {len(models)} models of {args.zoo}: {', '.join(models)}\n"
                f"  page     {url}/\n  OpenAI   {url}/v1\n  metrics  {url}/metrics\ntry\n"
                f"  curl -s {url}/v1/completions -H 'Content-Type: application/json' "
                f'-d \'{{"model": "{models[0]}", "prompt": "Hello", "max_tokens": 16}}\'',
                flush=True,
            )
            _check_weights(args, models)

        return serve(args, _engine_settings(args), _publish(args), make_front, on_ready)


def _check_ray(args: argparse.Namespace) -> None:
    if args.ray_address is None:
        return
    from blockzoo.runtime.api.errors import InvalidRequestError
    from blockzoo.server_config.replicas.local_ray import check_installed

    if args.workers is None:
        raise InvalidRequestError("--ray-address is for --replicas or --workers: add one of them")
    check_installed()


def _openai_host(args: argparse.Namespace) -> str:
    """Where the OpenAI endpoint listens: without keys on this machine alone, unless it is asked for."""
    from blockzoo.server_config.environment import is_loopback

    seen = args.api_keys is not None or args.insecure or is_loopback(args.host)
    return args.host if seen else "127.0.0.1"


def _check_keys(args: argparse.Namespace) -> None:
    if args.api_keys is None:
        return
    from blockzoo.server_config.openai.keys import KeysError, read_keys

    if not args.openai_port:
        raise KeysError("--api-keys is for the OpenAI endpoint, which is left out: give it a port")
    read_keys(Path(args.api_keys))


def _openai_process(
    args: argparse.Namespace, endpoints: Endpoints, folder: Path, secret: str
) -> OpenAIProcess | None:
    if not args.openai_port:
        return None
    metrics = f"http://{endpoints.client_host}:{endpoints.metrics_port}/metrics"
    return _front(args, folder, secret, {"grpc": endpoints.grpc, "metrics": metrics})


def _front(
    args: argparse.Namespace, folder: Path, secret: str, engine: Mapping[str, object]
) -> OpenAIProcess:
    """The endpoint's process; `engine`: options that say where that is."""
    from blockzoo.server_config.openai.process import OpenAIProcess
    from blockzoo.server_config.supervisor import say

    options = {
        **engine,
        "zoo": Path(args.zoo).resolve(),
        "host": _openai_host(args),
        "port": args.openai_port,
        "generation-config": args.generation_config,
    }
    if args.api_keys is not None:
        options["api-keys"] = Path(args.api_keys).resolve()
    arguments = [f"--{name}={value}" for name, value in options.items()]
    return OpenAIProcess(arguments, folder, say, secret)


def _print_endpoints(
    args: argparse.Namespace, tenants: tuple[str, ...], endpoints: Endpoints, version: str
) -> None:
    host = endpoints.client_host
    address = f"http://{_openai_host(args)}:{args.openai_port}"
    openai = f"  page     {address}/\n  OpenAI   {address}/v1\n" if args.openai_port else ""
    print(
        f"serving {len(tenants)} models of {args.zoo}: {', '.join(tenants)}\n{openai}"
        f"  HTTP     {endpoints.http}\n"
        f"  gRPC     {endpoints.grpc}\n"
        f"  metrics  http://{host}:{endpoints.metrics_port}/metrics\n"
        f"  server   tritonserver {version}\n"
        "try\n"
        f"  curl -s {endpoints.http}/v2/models/{tenants[0]}/generate "
        '-d \'{"text_input": "Hello", "max_tokens": 16}\'',
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
