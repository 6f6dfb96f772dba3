"""A Ray of this machine alone, or one that runs already.

A Ray that is started here listens on loopback, asks each connection for a token that only the processes of
this server know, reports to nobody, and ends with the process that started it. (Of Ray Serve's own, each
replica has one gRPC port on all interfaces, which asks for the token, too.)
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from tempfile import TemporaryDirectory

from blockzoo.server_config.environment import ServerError

TOKEN_VARIABLE = "RAY_AUTH_TOKEN"
_OBJECT_STORE_BYTES = 128 << 20  # answers go past it
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    # Ray's own name for "this machine alone": its processes then listen on loopback
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # 0.1 s, and machines that have other work are slower
    "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "1",
}


def check_installed() -> None:
    """Raises ServerError where the extra is not installed."""
    if find_spec("ray") is None:
        raise ServerError("--replicas and --ray-address need Ray: pip install 'blockzoo[cluster]'")


@contextmanager
def local_ray(num_cpus: int, verbose: bool = False) -> Iterator[str]:
    """Start a Ray for a while and connect to it; its address. To be called before anything imports ray.

    Args:
        num_cpus: that replicas may ask for.
        verbose: pass on what replicas print.

    Raises:
        ServerError: it does not start.
    """
    os.environ.update(_SETTINGS)
    os.environ[TOKEN_VARIABLE] = secrets.token_hex(32)
    # sockets are in it, whose paths have at most 107 bytes
    with TemporaryDirectory(prefix="bz-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        _init(
            verbose,
            num_cpus=num_cpus,
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
            _temp_dir=folder,
        )
        import ray

        try:
            yield ray.get_runtime_context().gcs_address
        finally:
            ray.shutdown()


@contextmanager
def joined_ray(address: str, verbose: bool = False) -> Iterator[str]:
    """Connect to a Ray that runs, for a while; its address. Raises ServerError where there is none."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    _init(verbose, address=address)
    import ray

    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()


def connect(address: str) -> None:
    """Connect this process to a Ray. Raises ServerError where there is none."""
    _init(False, address=address)


def _init(verbose: bool, **options: object) -> None:
    import ray
    import ray.serve

    if not verbose:  # what matters is said by whoever asks
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        ray.init(log_to_driver=verbose, logging_level=logging.WARNING, **options)
    except Exception as error:  # of many kinds, from its processes
        where = options.get("address", "this machine")
        raise ServerError(f"Ray on {where} cannot be used: {error}") from None
