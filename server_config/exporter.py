"""The engine's figures as Triton metrics, beside Triton's own on /metrics.

Triton's compute times of a decoupled model cover `execute` alone, so time to first token and time between
tokens are measured here. Updating one metric is a round trip of about 0.03 ms.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from blockzoo.runtime.serve.metrics import E2E_BOUNDS, INTER_TOKEN_BOUNDS, TTFT_BOUNDS

if TYPE_CHECKING:
    from blockzoo.runtime import Metrics

GAUGES = {
    "requests_running": "Requests that hold pages now",
    "requests_waiting": "Requests that wait for pages",
    "pages_total": "Pages of the KV pools",
    "pages_free": "Pages that hold nothing",
    "pages_cached": "Pages in the prefix cache, in use or not",
    "pages_used": "Pages that one request owns",
    "documents": "Published documents",
    "document_pages": "Cached pages that are theirs",
    "models_left_out": "Models of the zoo that are not served, as something is wrong with them",
    "adapter_bytes": "Bytes of adapters kept ready",
    "mean_batch_per_block": "Mean rows of an engine call",
    "engine_calls_per_step": "Mean engine calls of a step",
}
COUNTERS = {
    "requests_arrived_total": "Requests queued",
    "prompt_tokens_total": "Prompt tokens of ended requests",
    "cached_tokens_total": "Those of them that the prefix cache spared",
    "copied_pages_total": "Pages of which a part was copied, as they begin alike",
    "approximate_tokens_total": "Prompt tokens whose KV was taken from equal words behind other ones",
    "approximate_declined_total": "Approximate requests computed exactly: no settings were near enough",
    "approximate_guarded_total": "Times that a guard looked how sure a first token was over approximate KV",
    "approximate_guard_fallbacks_total": "Those in which the prompt was computed in full before that token",
    "document_hit_tokens_total": "Prompt tokens whose KV was found in published documents",
    "document_loads_total": "Chains of published documents whose KV came from disk",
    "document_computes_total": "Those whose KV was computed",
    "document_rejects_total": "Files of KV that were damaged or not what they said",
    "generated_tokens_total": "Tokens generated",
    "preemptions_total": "Requests set back because pages ran out",
    "adapter_loads_total": "Adapters of blocks read from the zoo",
    "adapter_evictions_total": "Those dropped to stay within their budget",
    "adapter_reloads_total": "Those read again after that: many mean that the budget is too small",
    "steps_total": "Engine steps",
    "engine_calls_total": "Engine calls",
    "span_moves_total": "Times that a span of blocks went to another worker",
    "moved_pages_total": "Pages of KV sent along with them",
}
LABELLED = {  # field -> (metric, label, description)
    "requests_total": ("requests_total", "finish_reason", "Requests ended"),
    "prefix_hit_tokens": ("prefix_hit_tokens_total", "layers", "Prompt tokens reused, by layer range"),
    "model_requests_refused_total": ("model_requests_refused_total", "model", "Requests refused: too many"),
}
LABELLED_GAUGES = {
    "model_requests_running": ("model_requests_running", "model", "Requests that hold pages now, by model"),
    "model_requests_waiting": ("model_requests_waiting", "model", "Requests that wait, by model"),
}
BY_TWO = {  # field -> (kind, description, labels)
    "drafted_tokens_total": ("COUNTER", "Tokens guessed ahead that ran", ("model", "drafter")),
    "accepted_tokens_total": ("COUNTER", "Those of them that came true", ("model", "drafter")),
    "spans_held": ("GAUGE", "Which worker has which span of blocks: 1 where it is", ("span", "worker")),
}
WAIT_P99 = "wait_p99_seconds"


class MetricsExporter:
    """Metric families of one model process. One thread at a time.

    Args:
        pb: the `triton_python_backend_utils` module.
    """

    def __init__(self, pb: Any) -> None:
        kinds = pb.MetricFamily
        self._pb = pb
        self._families: list[Any] = []  # a metric lives as long as its family
        self._values: dict[tuple[str, str, str], float] = {}
        self._metrics: dict[tuple[str, str, str], Any] = {}
        for name, description in GAUGES.items():
            self._metrics[name, "", ""] = self._family(name, description, kinds.GAUGE).Metric(labels={})
        for name, description in COUNTERS.items():
            self._metrics[name, "", ""] = self._family(name, description, kinds.COUNTER).Metric(labels={})
        self._labelled = {
            field: self._family(name, description, kind)
            for fields, kind in ((LABELLED, kinds.COUNTER), (LABELLED_GAUGES, kinds.GAUGE))
            for field, (name, _, description) in fields.items()
        }
        self._labelled |= {
            field: self._family(field, description, getattr(kinds, kind))
            for field, (kind, description, _) in BY_TWO.items()
        }
        self._labelled[WAIT_P99] = self._family(
            WAIT_P99, "99th percentile of the wait to run, by percent of the prompt cached", kinds.GAUGE
        )
        self._ttft = self._histogram("ttft_seconds", "From arrival to the first token", TTFT_BOUNDS)
        self._gap = self._histogram(
            "inter_token_seconds", "Between two tokens of a request", INTER_TOKEN_BOUNDS
        )
        self._e2e = self._histogram("e2e_seconds", "From arrival to the end of a request", E2E_BOUNDS)

    def on_token(self, seconds: float, first: bool) -> None:
        """A token came out: time since the request's arrival (its first) or since the token before."""
        (self._ttft if first else self._gap).observe(seconds)

    def on_finished(self, seconds: float) -> None:
        """A request ended."""
        self._e2e.observe(seconds)

    def export(self, metrics: Metrics) -> None:
        """Bring gauges and counters up to date; only what has changed costs a round trip."""
        for name in GAUGES:
            self._update(name, "", getattr(metrics, name), counter=False)
        for name in COUNTERS:
            self._update(name, "", getattr(metrics, name), counter=True)
        for field in LABELLED | LABELLED_GAUGES:
            values: Mapping[str, int] = getattr(metrics, field)
            for label, value in values.items():
                self._update(field, label, value, counter=field in LABELLED)
            for key in self._gone(field, {(label, "") for label in values}):
                if field in LABELLED_GAUGES:
                    self._update(field, key[1], 0, counter=False)
                else:  # its count begins anew, Triton's goes on
                    self._values[key] = 0
        for field, (kind, _, _) in BY_TWO.items():
            pairs: Mapping[tuple[str, str], int] = getattr(metrics, field)
            for (label, other), value in pairs.items():
                self._update(field, label, value, counter=kind == "COUNTER", other=other)
            for key in self._gone(field, pairs.keys()):
                if kind == "GAUGE":
                    self._update(field, key[1], 0, counter=False, other=key[2])
                else:
                    self._values[key] = 0
        for label, waits in metrics.wait_seconds.items():
            self._update(WAIT_P99, label, waits.quantile(0.99), counter=False)

    def _gone(self, field: str, labels: Collection[tuple[str, str]]) -> list[tuple[str, str, str]]:
        """What was told of a field under labels that are no more: of models that are gone."""
        return [key for key in self._values if key[0] == field and key[1:] not in labels]

    def _update(self, name: str, label: str, value: float, counter: bool, other: str = "") -> None:
        key = (name, label, other)
        seen = self._values.get(key, 0)
        if value == seen:
            return
        if key not in self._metrics:
            labelled = LABELLED | LABELLED_GAUGES
            label_name = labelled[name][1] if name in labelled else "cached_percent"
            labels = {label_name: label}
            if other:
                labels = dict(zip(BY_TWO[name][2], (label, other), strict=True))
            self._metrics[key] = self._labelled[name].Metric(labels=labels)
        metric = self._metrics[key]
        if counter:
            metric.increment(value - seen if value > seen else value)
        else:
            metric.set(value)
        self._values[key] = value

    def _family(self, name: str, description: str, kind: Any) -> Any:
        family = self._pb.MetricFamily(name=f"blockzoo_{name}", description=description, kind=kind)
        self._families.append(family)
        return family

    def _histogram(self, name: str, description: str, bounds: Sequence[float]) -> Any:
        family = self._family(name, description, self._pb.MetricFamily.HISTOGRAM)
        return family.Metric(labels={}, buckets=list(bounds))
