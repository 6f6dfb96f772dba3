"""The engine's figures as Triton metrics: names, labels, and that only changes are sent."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

from blockzoo.runtime.kv.prefix_cache import KVCache
from blockzoo.runtime.kv.sequence import Segment, TokenSequence
from blockzoo.runtime.serve.config import SchedulerConfig
from blockzoo.runtime.serve.metrics import MetricsRecorder
from blockzoo.runtime.serve.scheduler import Scheduler
from blockzoo.server_config.exporter import MetricsExporter


class Board:
    """Triton's metrics as a dict of (name, labels) -> value."""

    GAUGE, COUNTER, HISTOGRAM = range(3)

    def __init__(self) -> None:
        self.values: dict[tuple[Any, ...], float] = {}
        self.updates = Counter[tuple[Any, ...]]()

    def MetricFamily(self, name: str, description: str, kind: int) -> Any:  # noqa: N802
        def metric(labels: dict[str, str], buckets: Any = None) -> Any:
            key = (name, *labels.items())

            def change(value: float) -> None:
                self.values[key] = value + (self.values.get(key, 0) if kind == self.COUNTER else 0)
                self.updates[key] += 1

            return SimpleNamespace(set=change, increment=change, observe=change)

        return SimpleNamespace(Metric=metric)


def board() -> tuple[Board, MetricsExporter]:
    seen = Board()
    kinds = SimpleNamespace(GAUGE=seen.GAUGE, COUNTER=seen.COUNTER, HISTOGRAM=seen.HISTOGRAM)

    class Family:
        GAUGE, COUNTER, HISTOGRAM = kinds.GAUGE, kinds.COUNTER, kinds.HISTOGRAM

        def __new__(cls, **kwargs: Any) -> Any:
            return seen.MetricFamily(**kwargs)

    return seen, MetricsExporter(SimpleNamespace(MetricFamily=Family))


def test_who_runs_waits_and_is_refused_by_model() -> None:
    seen, exporter = board()
    recorder, scheduler, cache = MetricsRecorder(), Scheduler(SchedulerConfig(max_num_seqs=2)), KVCache(100)
    adapters: Any = SimpleNamespace(num_bytes=0, num_loads=0, num_evictions=0, num_reloads=0)
    for number, model in enumerate(["a", "a", "b", "a"]):
        seq = TokenSequence(str(number), model, cache, [Segment(0, 1, "k")], "s", [5, 6], float(number))
        scheduler.add(seq)
        recorder.on_request_arrived(model)
    recorder.on_request_refused("a")
    scheduler.schedule()
    exporter.export(recorder.snapshot(scheduler, [cache], adapters))

    def values(name: str) -> dict[str, float]:
        return {key[1][1]: value for key, value in seen.values.items() if key[0] == f"blockzoo_{name}"}

    assert values("model_requests_running") == {"a": 1, "b": 1}
    assert values("model_requests_waiting") == {"a": 2}
    assert values("model_requests_refused_total") == {"a": 1}
    recorder.on_drafted("a", "prompt", 7, 3)
    recorder.on_drafted("a", "grammar", 2, 2)
    recorder.on_drafted("a", "prompt", 3, 0)
    for number in range(4):
        scheduler.abort(str(number))
    recorder.on_request_refused("a")
    exporter.export(recorder.snapshot(scheduler, [cache], adapters))
    assert values("model_requests_running") == {"a": 0, "b": 0}
    assert values("model_requests_waiting") == {"a": 0}
    assert values("model_requests_refused_total") == {"a": 2}
    labels = (("model", "a"), ("drafter", "prompt"))
    assert seen.values[("blockzoo_drafted_tokens_total", *labels)] == 10
    assert seen.values[("blockzoo_accepted_tokens_total", *labels)] == 3
    before = seen.updates.copy()
    exporter.export(recorder.snapshot(scheduler, [cache], adapters))
    assert seen.updates == before
    recorder.on_request_arrived("c")
    scheduler.add(TokenSequence("4", "c", cache, [Segment(0, 1, "k")], "s", [5, 6], 4.0))
    exporter.export(recorder.snapshot(scheduler, [cache], adapters))
    assert values("model_requests_waiting") == {"a": 0, "c": 1}
    scheduler.abort("4")
    recorder.keep(["b"])  # the others were removed
    exporter.export(recorder.snapshot(scheduler, [cache], adapters))
    assert values("model_requests_waiting") == {"a": 0, "c": 0}
    recorder.on_request_refused("a")  # it came back
    exporter.export(recorder.snapshot(scheduler, [cache], adapters))
    assert values("model_requests_refused_total") == {"a": 3}
