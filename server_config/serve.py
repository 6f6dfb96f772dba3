"""zoo-serve: a zoo on the network, through Triton Inference Server."""

from __future__ import annotations

import argparse
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from blockzoo.server_config.arguments import build_parser
from blockzoo.server_config.engine_settings import engine_settings
from blockzoo.zoo.console import command

if TYPE_CHECKING:
    from blockzoo.server_config.launcher import Endpoints
    from blockzoo.server_config.openai.process import OpenAIProcess


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
        zoo, engine_settings(args), args.drain_seconds, publish=_publish(args), grpc=endpoints.grpc
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

    engine, publish = engine_settings(args), _publish(args)
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
        if args.workers is not None and args.ray_address is None:
            engine["worker_folder"] = str(folder / "workers")  # the next engine goes on with them
            (folder / "workers").mkdir()
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

        return serve(args, engine_settings(args), _publish(args), make_front, on_ready)


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
