"""zoo-serve --replicas: from its arguments to a server."""

from __future__ import annotations

import argparse
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockzoo.runtime import EngineConfig
from blockzoo.runtime.api.errors import InvalidRequestError
from blockzoo.server_config.replicas.host import ReplicaSettings
from blockzoo.server_config.replicas.launch import Plan, ReplicaServer
from blockzoo.server_config.replicas.local_ray import check_installed, joined_ray, local_ray

if TYPE_CHECKING:
    from blockzoo.server_config.openai.process import OpenAIProcess

_BUSY = 0.75  # of the requests that a replica runs at once, above which there are to be more replicas


def serve(
    args: argparse.Namespace,
    engine: Mapping[str, Any],
    publish: tuple[str, ...],
    make_front: Callable[[Mapping[str, object]], OpenAIProcess],
    on_ready: Callable[[tuple[str, ...]], None],
) -> int:
    """Serve until a signal comes; the exit status.

    Args:
        args: of zoo-serve.
        engine: fields of EngineConfig that they set.
        publish: files of documents.
        make_front: makes the endpoint's process; its argument are options that say where the replicas are.
        on_ready: called with the names of the models.

    Raises:
        ServerError, ZooError, InvalidRequestError: it cannot.
    """
    check_installed()
    if args.ray_address is not None and args.threads is None:
        raise InvalidRequestError("--ray-address needs --threads: how many CPUs of that Ray a replica takes")
    least, most = args.replicas
    threads = args.threads or max(1, len(os.sched_getaffinity(0)) // most)
    settings = {**engine, "num_threads": threads}
    if args.workers is not None:  # of a replica: they have its cores in turn
        settings["worker_cores"] = threads
    config = EngineConfig(**settings)
    plan = Plan(
        least,
        most,
        threads,
        _BUSY * config.max_num_seqs,
        args.drain_seconds,
        args.routing,
        config.kv_sharing == "scope",
    )
    # else texts wait for each other in the library's own pool of threads, whoever tokenizes them
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if args.ray_address is None:
        ray = local_ray(threads * most, args.verbose)
    else:
        ray = joined_ray(args.ray_address, args.verbose)
    name = f"blockzoo-{secrets.token_hex(4)}"
    zoo = str(Path(args.zoo).resolve())
    server = ReplicaServer(
        name,
        ReplicaSettings(zoo, settings, publish),
        plan,
        ray,
        lambda address: make_front({"replicas": name, "ray-address": address}),
    )
    return server.run(on_ready)
