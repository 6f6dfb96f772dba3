"""The figures of all replicas as one server's, as Prometheus reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TypeVar

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from blockzoo.runtime import Metrics
from blockzoo.runtime.serve.metrics import HistogramSnapshot
from blockzoo.server_config.exporter import BY_TWO, COUNTERS, GAUGES, LABELLED, LABELLED_GAUGES, WAIT_P99

T = TypeVar("T")
_SAME_EVERYWHERE = ("documents", "models_left_out")
_RATIOS = {"mean_batch_per_block": "engine_calls_total", "engine_calls_per_step": "steps_total"}
_BY_REPLICA = ("requests_running", "requests_waiting", "prompt_tokens_total", "cached_tokens_total")
_HISTOGRAMS = {
    "ttft_seconds": "From arrival to the first token",
    "inter_token_seconds": "Between two tokens of a request",
    "e2e_seconds": "From arrival to the end of a request",
}


def exposition(replicas: Mapping[str, Metrics]) -> bytes:
    """Figures of one engine, by replica, in Prometheus' text format: sums where they add up. Counters fall
    back where a replica goes, as those of a server do that starts again."""
    registry = CollectorRegistry()
    registry.register(_Families(replicas))
    return generate_latest(registry)


class _Families(Collector):
    def __init__(self, replicas: Mapping[str, Metrics]) -> None:
        self._by_id, self._all = replicas, list(replicas.values())

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("blockzoo_replicas", "Replicas that answer", len(self._all))
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(f"blockzoo_{name}", text, self._together(name))
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"blockzoo_{name}", text, self._together(name))
        for field, (name, label, text) in (LABELLED | LABELLED_GAUGES).items():
            kind = CounterMetricFamily if field in LABELLED else GaugeMetricFamily
            family = kind(f"blockzoo_{name}", text, labels=[label])
            for value, count in _sums([getattr(one, field) for one in self._all]).items():
                family.add_metric([value], count)
            yield family
        for field, (kind_name, text, names) in BY_TWO.items():
            kind = CounterMetricFamily if kind_name == "COUNTER" else GaugeMetricFamily
            family = kind(f"blockzoo_{field}", text, labels=names)
            for labels, count in _sums([getattr(one, field) for one in self._all]).items():
                family.add_metric(labels, count)
            yield family
        yield self._waits()
        for name, text in _HISTOGRAMS.items():
            yield _histogram(f"blockzoo_{name}", text, [getattr(one, name) for one in self._all])
        for name in _BY_REPLICA:
            kind = CounterMetricFamily if name in COUNTERS else GaugeMetricFamily
            text = f"{(COUNTERS | GAUGES)[name]}, by replica"
            family = kind(f"blockzoo_replica_{name}", text, labels=["replica"])
            for replica, metrics in self._by_id.items():
                family.add_metric([replica], getattr(metrics, name))
            yield family

    def _together(self, name: str) -> float:
        values = [float(getattr(one, name)) for one in self._all]
        if name in _SAME_EVERYWHERE:
            return max(values, default=0.0)
        if name in _RATIOS:
            weights = [getattr(one, _RATIOS[name]) for one in self._all]
            return sum(v * w for v, w in zip(values, weights, strict=True)) / max(1, sum(weights))
        return sum(values)

    def _waits(self) -> Metric:
        text = "99th percentile of the wait to run, by percent of the prompt cached; of the slowest replica"
        family = GaugeMetricFamily(f"blockzoo_{WAIT_P99}", text, labels=["cached_percent"])
        for label in sorted({label for one in self._all for label in one.wait_seconds}):
            waits = [one.wait_seconds[label] for one in self._all if label in one.wait_seconds]
            family.add_metric([label], max(each.quantile(0.99) for each in waits))
        return family


def _sums(counts: Sequence[Mapping[T, int]]) -> Counter[T]:
    found = Counter[T]()
    for each in counts:
        found.update(each)
    return found


def _histogram(name: str, text: str, parts: Sequence[HistogramSnapshot]) -> Metric:
    family = HistogramMetricFamily(name, text)
    if parts:
        counts = [sum(column) for column in zip(*(part.cumulative_counts for part in parts), strict=True)]
        assert all(low <= high for low, high in pairwise(counts)), "they are cumulative"
        bounds = [(str(bound), count) for bound, count in zip(parts[0].bounds, counts, strict=True)]
        family.add_metric(
            [], [*bounds, ("+Inf", sum(part.count for part in parts))], sum(part.sum for part in parts)
        )
    return family
