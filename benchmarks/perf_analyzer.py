"""Finds perf_analyzer, which the tritonclient wheel carries, and the two libraries it wants."""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_LIBRARIES = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}


def perf_analyzer_command() -> tuple[list[str], dict[str, str]]:
    """The command and the environment it needs.

    The binary links to libb64 and libcudart by their plain names; the nvidia-pytriton wheel has both
    under mangled ones, to which links in a cache folder of the environment point.

    Raises:
        SystemExit: the binary or a library is missing; the message says what to install.
    """
    binary = Path(sys.executable).parent / "perf_analyzer"
    if not binary.exists():
        raise SystemExit(f"{binary} is missing: pip install tritonclient==2.51.0 (its Linux wheel has it)")
    links = Path(sysconfig.get_path("purelib")) / "blockzoo_perf_analyzer_libs"
    spec = find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise SystemExit("perf_analyzer needs libb64 and libcudart: pip install nvidia-pytriton==0.7.0")
    carried = Path(spec.origin).parents[1] / "nvidia_pytriton.libs"
    links.mkdir(exist_ok=True)
    for name, pattern in _LIBRARIES.items():
        found = sorted(carried.glob(pattern))
        if not found:
            raise SystemExit(
                f"perf_analyzer needs {name}; nvidia-pytriton has none (apt-get install libb64-0d)"
            )
        if not (links / name).exists():
            (links / name).symlink_to(found[0])
    return [str(binary)], {"LD_LIBRARY_PATH": f"{links}:{carried}"}


OPERATOR_KEY = secrets.token_urlsafe(32)
"""Servers that are measured are started with it in BLOCKZOO_OPERATOR_KEY: perf_analyzer reads statistics."""


def stream(
    grpc_port: int, requests: Sequence[dict[str, list[Any]]], concurrency: int, seconds: float
) -> tuple[str, str]:
    """Stream `requests` to the model blockzoo over gRPC in a closed loop.

    Args:
        grpc_port: on loopback.
        requests: tensors by name, sent in turn.
        concurrency: requests under way at once.
        seconds: length of a measurement window.

    Returns:
        What perf_analyzer printed, and the JSON profile it exported: every request with the times of its
        responses (`request_times`).

    Raises:
        SystemExit: perf_analyzer failed; the message is its output.
    """
    options = ["-m", "blockzoo", "-u", f"127.0.0.1:{grpc_port}", "-i", "grpc", "--streaming"]
    options += ["-H", f"triton-grpc-protocol-locked:{OPERATOR_KEY}"]
    return _run(options, requests, concurrency, seconds)


def stream_openai(
    port: int, endpoint: str, bodies: Sequence[dict[str, Any]], concurrency: int, seconds: float
) -> tuple[str, str]:
    """The same for bodies of an endpoint ("v1/completions") of the OpenAI front.

    All have `stream`: perf_analyzer 2.51 reads events, but takes its own `--streaming` for gRPC alone.
    """
    options = ["-m", "blockzoo", "-u", f"127.0.0.1:{port}"]
    options += ["--service-kind", "openai", "--endpoint", endpoint]
    return _run(options, [{"payload": [body]} for body in bodies], concurrency, seconds)


def request_times(profile: str) -> list[tuple[int, list[int]]]:
    """When each request of a profile was sent and its responses came, in ns.

    Read by patterns: the inputs and outputs that perf_analyzer 2.51 repeats there are no valid JSON.
    """
    found = re.finditer(
        r'"timestamp":(\d+)(?:(?!"timestamp":).)*?"response_timestamps":\[([\d,]*)\]', profile, re.S
    )
    return [
        (int(sent), [int(time) for time in times.split(",") if time])
        for sent, times in (m.groups() for m in found)
    ]


def _run(
    options: Sequence[str], requests: Sequence[dict[str, list[Any]]], concurrency: int, seconds: float
) -> tuple[str, str]:
    command, env = perf_analyzer_command()
    with tempfile.TemporaryDirectory() as folder:
        data, export = Path(folder) / "requests.json", Path(folder) / "export.json"
        data.write_text(json.dumps({"data": list(requests)}))
        command += [*options, "--async", "--input-data", str(data)]
        command += ["--concurrency-range", str(concurrency), "-p", str(int(seconds * 1000))]
        command += ["-s", "500", "-r", "3", "--profile-export-file", str(export)]
        done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=600)
        if done.returncode:
            raise SystemExit(f"perf_analyzer failed ({done.returncode}):\n{done.stdout}{done.stderr}")
        return done.stdout, export.read_text()
