"""What the engine counts: requests, tokens, steps, pages, and how long things took.

The engine loop calls a `MetricsRecorder` as things happen (about a microsecond each); anyone may take
a snapshot from any thread. Names and units follow Prometheus: `_total` only grows, `_seconds` is seconds.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from threading import Lock
from typing import get_args

from blockzoo.engines.base import PAGE_TOKENS
from blockzoo.runtime.api.request import FinishReason
from blockzoo.runtime.exec.adapters import AdapterCache
from blockzoo.runtime.kv.cache_stats import CacheStats
from blockzoo.runtime.kv.prefix_cache import KVCache
from blockzoo.runtime.kv.published_pages import PublishStats
from blockzoo.runtime.serve.scheduler import Scheduler

TTFT_BOUNDS = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
INTER_TOKEN_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5)
WAIT_BOUNDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
_HIT_SHARES = (
    (0.0, "0"),
    (0.5, "1-49"),
    (0.9, "50-89"),
    (float("inf"), "90-100"),
)  # below which share, label
_NOTHING_PUBLISHED = PublishStats()
E2E_BOUNDS = (0.05, 0.1, 0.25, 0.5, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 60, 120, 240, 480, 960)


@dataclass(frozen=True, slots=True)
class HistogramSnapshot:
    """Observations so far: cumulative_counts[i] of them are at most bounds[i]; `count` in all."""

    bounds: tuple[float, ...]
    cumulative_counts: tuple[int, ...]
    sum: float
    count: int

    def quantile(self, share: float) -> float:
        """The bound that `share` of the observations do not exceed; inf beyond the last, 0 without any."""
        needed = share * self.count
        if not self.count:
            return 0.0
        at_most = zip(self.bounds, self.cumulative_counts, strict=True)
        return next((bound for bound, count in at_most if count >= needed), float("inf"))


class Histogram:
    """Counts observations in fixed buckets. Not thread-safe.

    Args:
        bounds: upper bounds of the buckets, inclusive and ascending; what is larger is counted too.

    Raises:
        ValueError: the bounds are empty or do not ascend.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        if not bounds or any(low >= high for low, high in pairwise(bounds)):
            raise ValueError(
                f"histogram bounds are {tuple(bounds)}; expected ascending numbers, at least one"
            )
        self._bounds = tuple(float(bound) for bound in bounds)
        self._counts = [0] * (len(bounds) + 1)  # per bucket; the last is beyond all bounds
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Counts one observation."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def snapshot(self) -> HistogramSnapshot:
        """The state now."""
        *cumulative, count = accumulate(self._counts)
        return HistogramSnapshot(self._bounds, tuple(cumulative), self._sum, count)


@dataclass(frozen=True, slots=True)
class Metrics:
    """One snapshot of an engine; totals count from its start.

    Attributes:
        requests_running: requests that hold pages.
        requests_waiting: requests that do not yet, or were preempted.
        requests_arrived_total: requests queued.
        model_requests_running, model_requests_waiting: the same by model, of all that were ever asked.
        model_requests_refused_total: requests refused as too many waited, by model.
        requests_total: requests ended, by finish reason (all four are always present).
        prompt_tokens_total: prompt tokens of ended requests.
        cached_tokens_total: those of them that the prefix cache spared.
        copied_pages_total: pages of which a part was copied, as they begin alike.
        approximate_tokens_total: tokens whose KV was taken from equal words behind other ones, in whole pages
            of each request.
        approximate_declined_total: requests for approximate reuse that were computed exactly, as no settings
            were near enough for their model when it was calibrated.
        approximate_guarded_total: times that a guard looked how sure a first token was over approximate KV.
        approximate_guard_fallbacks_total: those of them in which all was computed in full before that token.
        generated_tokens_total: tokens generated, also of requests that still run.
        drafted_tokens_total: tokens that were guessed and run, by model and drafter.
        accepted_tokens_total: those of them that came true.
        preemptions_total: times a request lost its pages to others and had to wait again.
        pages_total, pages_free, pages_cached, pages_used: pages of all KV pools; the last three add up to
            the first, cached pages being those in the prefix tree whether in use or not.
        documents: published ones.
        document_pages: the cached pages that are theirs, and never evicted.
        document_hit_tokens_total: tokens whose KV was found among them, at the start of prompts.
        document_loads_total: chains of published documents whose KV came from disk.
        document_computes_total: those whose KV was computed.
        document_rejects_total: files of KV that were damaged or not what they said.
        adapter_bytes: adapters kept ready within their budget, copies in use not counted.
        adapter_loads_total: times that the adapter of a block was read from the zoo.
        adapter_evictions_total: times that one was dropped to stay within the budget.
        adapter_reloads_total: loads of one that had been dropped. Where most are, the adapters that come and
            go do not fit in `adapter_cache_bytes`; those of running requests stay where they are.
        models_left_out: models of the zoo that are not served, as something is wrong with them.
        spans_held: 1 by (span, worker), over workers.
        span_moves_total: times that a span went to another worker.
        moved_pages_total: pages of KV that were sent along.
        prefix_hit_tokens: tokens whose KV was found in the cache, by layers ("0-9": layers 0 to 9).
        steps_total: executor runs.
        engine_calls_total: calls of engines in them.
        engine_calls_per_step: their ratio, 0 before the first step.
        mean_batch_per_block: mean rows of an engine call: how far tenants share batches.
        wait_seconds: from arrival to the first step with the request, by the share of its prompt's work, in
            percent, that the cache spared: "0", "1-49", "50-89" or "90-100". Who has nothing cached must not
            starve behind those who do.
        ttft_seconds: from arrival to the first token.
        inter_token_seconds: between two tokens of one request.
        e2e_seconds: from arrival to the end.
    """

    requests_running: int
    requests_waiting: int
    model_requests_running: Mapping[str, int]
    model_requests_waiting: Mapping[str, int]
    model_requests_refused_total: Mapping[str, int]
    requests_arrived_total: int
    requests_total: Mapping[FinishReason, int]
    prompt_tokens_total: int
    cached_tokens_total: int
    copied_pages_total: int
    approximate_tokens_total: int
    approximate_declined_total: int
    approximate_guarded_total: int
    approximate_guard_fallbacks_total: int
    generated_tokens_total: int
    drafted_tokens_total: Mapping[tuple[str, str], int]
    accepted_tokens_total: Mapping[tuple[str, str], int]
    preemptions_total: int
    pages_total: int
    pages_free: int
    pages_cached: int
    pages_used: int
    documents: int
    document_pages: int
    document_hit_tokens_total: int
    document_loads_total: int
    document_computes_total: int
    document_rejects_total: int
    adapter_bytes: int
    adapter_loads_total: int
    adapter_evictions_total: int
    adapter_reloads_total: int
    models_left_out: int
    spans_held: Mapping[tuple[str, str], int]
    span_moves_total: int
    moved_pages_total: int
    prefix_hit_tokens: Mapping[str, int]
    steps_total: int
    engine_calls_total: int
    engine_calls_per_step: float
    mean_batch_per_block: float
    wait_seconds: Mapping[str, HistogramSnapshot]
    ttft_seconds: HistogramSnapshot
    inter_token_seconds: HistogramSnapshot
    e2e_seconds: HistogramSnapshot


class MetricsRecorder:
    """Collects what happens in one engine. Thread-safe."""

    def __init__(self) -> None:
        self._gone: CacheStats | None = None  # what caches counted that are no more
        self._lock = Lock()
        self._arrived = 0
        self._refused = Counter[str]()  # by model
        self._declined = 0
        self._asked: set[str] = set()  # models
        self._finished: dict[FinishReason, int] = dict.fromkeys(get_args(FinishReason), 0)
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._generated_tokens = 0
        self._drafted = Counter[tuple[str, str]]()  # by model and drafter
        self._accepted = Counter[tuple[str, str]]()
        self._steps = 0
        self._span_moves = 0
        self._moved_pages = 0
        self._engine_calls = 0
        self._call_rows = 0
        self._waits = {label: Histogram(WAIT_BOUNDS) for _, label in _HIT_SHARES}
        self._ttft = Histogram(TTFT_BOUNDS)
        self._inter_token = Histogram(INTER_TOKEN_BOUNDS)
        self._e2e = Histogram(E2E_BOUNDS)

    def on_cache_gone(self, cache: KVCache) -> None:
        """No model uses a cache any more: its pages go, what it counted stays."""
        counted = cache.stats().without_pages()
        self._gone = counted if self._gone is None else self._gone.plus(counted)

    def keep(self, models: Collection[str]) -> None:
        """Forget what was counted for any other model by its name: those that are gone would pile up."""
        with self._lock:
            self._asked.intersection_update(models)
            self._refused = Counter({name: n for name, n in self._refused.items() if name in models})
            for counts in (self._drafted, self._accepted):
                for key in [key for key in counts if key[0] not in models]:
                    del counts[key]

    def on_request_arrived(self, model: str, declined: bool = False) -> None:
        """A request to a model of the zoo was queued; `declined`: for approximate reuse, in vain."""
        with self._lock:
            self._arrived += 1
            self._declined += declined
            self._asked.add(model)

    def on_request_refused(self, model: str) -> None:
        """A request to a model of the zoo was not queued, as too many were."""
        with self._lock:
            self._refused[model] += 1

    def on_started(self, wait_s: float, spared_share: float) -> None:
        """A request runs for the first time, so many seconds after its arrival; 0 to 1 of its prompt's work
        was spared."""
        label = next(
            label for bound, label in _HIT_SHARES if spared_share < bound or spared_share == bound == 0
        )
        with self._lock:
            self._waits[label].observe(wait_s)

    def on_first_token(self, ttft_s: float) -> None:
        """A request has its first token, so many seconds after its arrival."""
        with self._lock:
            self._generated_tokens += 1
            self._ttft.observe(ttft_s)

    def on_token(self, inter_token_s: float) -> None:
        """A request has its next token, so many seconds after the one before."""
        with self._lock:
            self._generated_tokens += 1
            self._inter_token.observe(inter_token_s)

    def on_drafted(self, model: str, drafter: str, drafted: int, accepted: int) -> None:
        """Guesses of a drafter ran for a request, and so many came true."""
        with self._lock:
            self._drafted[model, drafter] += drafted
            self._accepted[model, drafter] += accepted

    def on_request_finished(
        self, reason: FinishReason, e2e_s: float, *, num_prompt_tokens: int, num_cached_tokens: int
    ) -> None:
        """A request has ended, in whatever way, so many seconds after its arrival."""
        with self._lock:
            self._finished[reason] += 1
            self._prompt_tokens += num_prompt_tokens
            self._cached_tokens += num_cached_tokens
            self._e2e.observe(e2e_s)

    def on_step(self, engine_calls: int, call_rows: int) -> None:
        """An executor has run: engine calls made, and the sum of the rows of each."""
        with self._lock:
            self._steps += 1
            self._engine_calls += engine_calls
            self._call_rows += call_rows

    def on_spans_moved(self, spans: int, pages: int) -> None:
        """Spans went to other workers, and pages of KV along."""
        with self._lock:
            self._span_moves += spans
            self._moved_pages += pages

    def snapshot(
        self,
        scheduler: Scheduler,
        caches: Iterable[KVCache],
        adapters: AdapterCache,
        published: PublishStats = _NOTHING_PUBLISHED,
        models_left_out: int = 0,
        spans_held: Mapping[tuple[str, str], int] | None = None,
    ) -> Metrics:
        """The state now. What scheduler and caches count is read while they may be at work."""
        stats = [cache.stats() for cache in caches]
        if self._gone is not None:
            stats.append(self._gone)
        hits = Counter[str]()
        for each in stats:
            hits.update(each.layer_hit_tokens)
        running, waiting = scheduler.by_model()
        with self._lock:
            return Metrics(
                requests_running=scheduler.num_running,
                requests_waiting=scheduler.num_waiting,
                model_requests_running=dict.fromkeys(self._asked, 0) | running,
                model_requests_waiting=dict.fromkeys(self._asked, 0) | waiting,
                model_requests_refused_total=dict(self._refused),
                requests_arrived_total=self._arrived,
                requests_total=dict(self._finished),
                prompt_tokens_total=self._prompt_tokens,
                cached_tokens_total=self._cached_tokens,
                copied_pages_total=sum(s.copied_pages for s in stats),
                approximate_tokens_total=PAGE_TOKENS * sum(s.approximate_pages for s in stats),
                approximate_declined_total=self._declined,
                approximate_guarded_total=sum(s.approximate_guarded for s in stats),
                approximate_guard_fallbacks_total=sum(s.approximate_guard_fallbacks for s in stats),
                generated_tokens_total=self._generated_tokens,
                drafted_tokens_total=dict(self._drafted),
                accepted_tokens_total=dict(self._accepted),
                preemptions_total=scheduler.num_preemptions,
                pages_total=sum(s.pages_total for s in stats),
                pages_free=sum(s.pages_free for s in stats),
                pages_cached=sum(s.pages_cached for s in stats),
                pages_used=sum(s.pages_owned for s in stats),
                documents=published.documents,
                document_pages=sum(s.published_pages for s in stats),
                document_hit_tokens_total=sum(s.published_hit_tokens for s in stats),
                document_loads_total=published.loaded,
                document_computes_total=published.computed,
                document_rejects_total=published.rejected_files,
                adapter_bytes=adapters.num_bytes,
                adapter_loads_total=adapters.num_loads,
                adapter_evictions_total=adapters.num_evictions,
                adapter_reloads_total=adapters.num_reloads,
                models_left_out=models_left_out,
                spans_held=spans_held or {},
                span_moves_total=self._span_moves,
                moved_pages_total=self._moved_pages,
                prefix_hit_tokens=dict(hits),
                steps_total=self._steps,
                engine_calls_total=self._engine_calls,
                engine_calls_per_step=self._engine_calls / max(1, self._steps),
                mean_batch_per_block=self._call_rows / max(1, self._engine_calls),
                wait_seconds={label: waits.snapshot() for label, waits in self._waits.items()},
                ttft_seconds=self._ttft.snapshot(),
                inter_token_seconds=self._inter_token.snapshot(),
                e2e_seconds=self._e2e.snapshot(),
            )
