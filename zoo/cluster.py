"""A zoo and some workers as a placement task: spans of blocks and what they take, workers and links.

Workers are what the user says of them (`--placement`): a count and a size, or a file.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from blockzoo.zoo.errors import ManifestError
from blockzoo.zoo.manifest import BlockRecord, Manifest
from blockzoo.zoo.placement import Chain, Span, Task, Worker
from blockzoo.zoo.strict_json import decode

_UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}
_MAX_WORKERS = 64  # for one search
_HOP_MS, _GBIT_S, _DISK_GBIT_S = 0.1, 10.0, 8.0
_BYTES_PER_S = 10e9  # that a block is thought to be read at where it was not timed
_BUSY = 0.5  # of the workers, by the rates taken where none are given
_LARGEST = 0.5  # of the smallest worker, that a span may take


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """A worker: `memory_gib` for blocks (KV comes on top), `speed` relative to where the zoo was timed."""

    name: str
    memory_gib: float
    speed: float = field(default=1.0, metadata={"added": True})


@dataclass(frozen=True, slots=True)
class ClusterRecord:
    """Workers, and what is known of links and rates.

    Matrices are [from][to]: milliseconds of a message, and Gbit/s, on whose diagonal stands the disk.
    """

    workers: tuple[WorkerRecord, ...]
    hop_ms: tuple[tuple[float, ...], ...] | None = field(default=None, metadata={"added": True})
    gbit_s: tuple[tuple[float, ...], ...] | None = field(default=None, metadata={"added": True})
    head: str | None = field(default=None, metadata={"added": True})
    """The worker beside the scheduler; None: the first."""
    rates: dict[str, float] | None = field(default=None, metadata={"added": True})
    """Tokens a second by model; models without one get none. None: all alike."""


@dataclass(frozen=True, slots=True)
class ZooTask:
    """A task, and what its names stand for.

    Attributes:
        blocks: by span, its block ids in order.
        timed: whether all blocks were timed; else times are from their bytes.
        even_rates: whether rates were taken, as none were given.
    """

    task: Task
    cluster: ClusterRecord
    blocks: Mapping[str, tuple[str, ...]]
    timed: bool
    even_rates: bool


def read_cluster(text: str) -> ClusterRecord:
    """What the user gave: "3x8GiB", or the name of a JSON file (`ClusterRecord`). Raises ManifestError."""
    short = re.fullmatch(r"(\d{1,3})x(\d+(?:\.\d+)?)(MB|GB|MiB|GiB)", text)
    if short:
        size = float(short[2]) * _UNITS[short[3]] / 2**30
        cluster = ClusterRecord(tuple(WorkerRecord(f"worker {i}", size) for i in range(int(short[1]))))
    else:
        try:
            found = json.loads(Path(text).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ManifestError(
                f"workers {text!r}: {error}; expected a number and a size (3x8GiB), or a file in JSON"
            ) from None
        cluster = decode(ClusterRecord, found, text)
    _check(cluster, text)
    return cluster


def _check(cluster: ClusterRecord, where: str) -> None:
    names = [worker.name for worker in cluster.workers]
    count = len(names)
    if not 1 <= count <= _MAX_WORKERS or len(set(names)) != count:
        raise ManifestError(f"{where}: {count} workers; expected 1 to {_MAX_WORKERS} of different names")
    for worker in cluster.workers:
        if not (worker.memory_gib > 0 and worker.speed > 0):
            raise ManifestError(f"{where}: {worker.name}: expected memory_gib and speed above 0")
    for name in ("hop_ms", "gbit_s"):
        matrix = getattr(cluster, name)
        if matrix is None:
            continue
        if len(matrix) != count or any(len(row) != count for row in matrix):
            raise ManifestError(f"{where}.{name}: expected {count} rows of {count} numbers, one a worker")
        if min(map(min, matrix)) < 0 or (name == "gbit_s" and min(map(min, matrix)) <= 0):
            raise ManifestError(f"{where}.{name}: expected {'above' if name == 'gbit_s' else 'at least'} 0")
    if cluster.head is not None and cluster.head not in names:
        raise ManifestError(f"{where}.head: there is no worker {cluster.head!r}")
    for model, rate in (cluster.rates or {}).items():
        if rate < 0:
            raise ManifestError(f"{where}.rates.{model}: {rate} is less than 0")


def zoo_task(manifest: Manifest, cluster: ClusterRecord) -> ZooTask:
    """The task of placing a zoo. Raises ManifestError where rates name a model that there is not."""
    unknown = (cluster.rates or {}).keys() - manifest.models.keys()
    if unknown:
        raise ManifestError(f"rates: there is no model {sorted(unknown)[0]!r} in the zoo")
    sizes = [int(worker.memory_gib * 2**30) for worker in cluster.workers]
    runs = _runs(manifest, int(_LARGEST * min(sizes)))
    names = _named(runs)
    spans = {name: _span(manifest, run) for run, name in names.items()}
    rates = cluster.rates
    if rates is None:
        work = sum(spans[names[run]].seconds for model in runs.values() for run in model)
        even = _BUSY * sum(worker.speed for worker in cluster.workers) / work if work else 0.0
        rates = dict.fromkeys(manifest.models, even)
    chains = {
        model: Chain(tuple(names[run] for run in parts), rates.get(model, 0.0))
        for model, parts in runs.items()
    }
    workers = [Worker(size, worker.speed) for size, worker in zip(sizes, cluster.workers, strict=True)]
    head = [worker.name for worker in cluster.workers].index(cluster.head) if cluster.head else 0
    task = Task(spans, chains, workers, *_links(manifest, cluster), head)
    timed = all(manifest.blocks[block].latency_us for run in names for block in run)
    return ZooTask(task, cluster, {name: run for run, name in names.items()}, timed, cluster.rates is None)


def _links(manifest: Manifest, cluster: ClusterRecord) -> tuple[list[list[float]], list[list[float]]]:
    """Seconds of a token's hidden states (in 16 bits), and of a byte of weights, [from][to]."""
    widths = [model.config.hidden_size for model in manifest.models.values()]
    places = range(len(cluster.workers))
    bytes_per_s = [
        [
            1e9 / 8 * (cluster.gbit_s[a][b] if cluster.gbit_s else _DISK_GBIT_S if a == b else _GBIT_S)
            for b in places
        ]
        for a in places
    ]
    hops = [
        [
            0.0
            if a == b
            else (cluster.hop_ms[a][b] if cluster.hop_ms else _HOP_MS) / 1e3
            + 2 * max(widths, default=0) / bytes_per_s[a][b]
            for b in places
        ]
        for a in places
    ]
    return hops, [[1 / rate for rate in row] for row in bytes_per_s]


def _runs(manifest: Manifest, most_bytes: int) -> dict[str, tuple[tuple[str, ...], ...]]:
    """By model, its chain without the embedding (a look-up beside the scheduler), cut where other models
    begin or cease to use it, and at layers where a run would be too large for a worker."""
    users: dict[str, set[str]] = defaultdict(set)
    for name, model in manifest.models.items():
        for block in model.chain:
            users[block].add(name)
    found = {}
    for name, model in manifest.models.items():
        runs: list[list[str]] = []
        size = 0
        body = model.chain[1:]
        for block, following in zip(body, (*body[1:], body[-1]), strict=True):
            begins = manifest.blocks[block].spec.kind == "attn"
            layer = _num_bytes(manifest, block) + _num_bytes(manifest, following)
            if not runs or users[runs[-1][-1]] != users[block] or (begins and size + layer > most_bytes):
                runs.append([])
                size = 0
            runs[-1].append(block)
            size += _num_bytes(manifest, block)
        found[name] = tuple(tuple(run) for run in runs)
    return found


def _named(runs: Mapping[str, tuple[tuple[str, ...], ...]]) -> dict[tuple[str, ...], str]:
    """Spans by their blocks: A, B, ..., Z, AA, ... in the order of the models."""
    names: dict[tuple[str, ...], str] = {}
    for parts in runs.values():
        for run in parts:
            if run not in names:
                number, name = len(names), ""
                while number >= 0:
                    number, letter = divmod(number, 26)
                    name = chr(ord("A") + letter) + name
                    number -= 1
                names[run] = name
    return names


def _span(manifest: Manifest, run: tuple[str, ...]) -> Span:
    times = [_times(manifest.blocks[block], _num_bytes(manifest, block)) for block in run]
    return Span(sum(_num_bytes(manifest, b) for b in run), sum(t for t, _ in times), sum(c for _, c in times))


def _times(block: BlockRecord, num_bytes: int) -> tuple[float, float]:
    """Seconds of a token, and of a call beside its tokens: the line through the times of one token and of the
    most that a step decodes; without times, of bytes that are read."""
    if not block.latency_us or len(block.latency_us) < 2:
        return 0.1 * num_bytes / _BYTES_PER_S, num_bytes / _BYTES_PER_S
    few, many, *_ = sorted(block.latency_us)
    token = max(0.0, (block.latency_us[many] - block.latency_us[few]) / (many - few))
    call = max(0.0, block.latency_us[few] - few * token)
    if math.isclose(token, 0.0, abs_tol=1e-3):  # within what timing tells
        token = block.latency_us[many] / many / 10
    return token * 1e-6, call * 1e-6


def _num_bytes(manifest: Manifest, block: str) -> int:
    """Of what a worker holds: a tied head needs the embedding's matrix."""
    record = manifest.blocks[block]
    tied = manifest.blocks[record.tied_to].num_bytes if record.tied_to else 0
    return record.num_bytes + tied
