import dataclasses
import json
from threading import Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockzoo.engines.arrays import HostArrays
from blockzoo.runtime.exec.adapters import AdapterCache
from blockzoo.runtime.kv.prefix_cache import KVCache
from blockzoo.runtime.kv.sequence import Segment, TokenSequence
from blockzoo.runtime.serve.config import SchedulerConfig
from blockzoo.runtime.serve.metrics import Histogram, MetricsRecorder
from blockzoo.runtime.serve.scheduler import Scheduler


def snapshot(recorder, caches=(), scheduler=None):
    adapters = AdapterCache(lambda name: None, HostArrays("f32"), 0)
    return recorder.snapshot(scheduler or Scheduler(SchedulerConfig()), caches, adapters)


@given(values=st.lists(st.floats(0, 100)), bounds=st.sets(st.floats(0, 100), min_size=1).map(sorted))
def test_a_histogram_counts_what_is_at_most_each_bound(values, bounds):
    histogram = Histogram(bounds)
    for value in values:
        histogram.observe(value)
    taken = histogram.snapshot()
    assert taken.bounds == tuple(bounds)
    assert taken.cumulative_counts == tuple(sum(value <= bound for value in values) for bound in bounds)
    assert taken.count == len(values)
    assert taken.sum == pytest.approx(sum(values))


@pytest.mark.parametrize("bounds", [(), (1, 1), (2, 1)])
def test_bounds_that_do_not_ascend_are_refused(bounds):
    with pytest.raises(ValueError, match="ascending"):
        Histogram(bounds)


def test_a_new_recorder_is_all_zeros_and_goes_into_json():
    taken = snapshot(MetricsRecorder())
    assert taken.requests_total == {"stop": 0, "length": 0, "abort": 0, "error": 0}
    assert taken.engine_calls_per_step == taken.mean_batch_per_block == 0.0
    assert taken.ttft_seconds.count == 0
    assert json.loads(json.dumps(dataclasses.asdict(taken)))["pages_total"] == 0


def test_a_request_is_counted_from_arrival_to_end():
    recorder = MetricsRecorder()
    recorder.on_request_arrived("m")
    recorder.on_first_token(0.3)
    recorder.on_token(0.02)
    recorder.on_token(0.04)
    recorder.on_request_finished("length", 0.36, num_prompt_tokens=70, num_cached_tokens=64)
    taken = snapshot(recorder)
    assert taken.requests_arrived_total == 1
    assert taken.requests_total["length"] == 1
    assert (taken.prompt_tokens_total, taken.cached_tokens_total) == (70, 64)
    assert taken.generated_tokens_total == 3
    assert (taken.ttft_seconds.count, taken.inter_token_seconds.count, taken.e2e_seconds.count) == (1, 2, 1)
    assert taken.inter_token_seconds.sum == pytest.approx(0.06)


def test_batches_are_means_over_engine_calls():
    recorder = MetricsRecorder()
    recorder.on_step(engine_calls=2, call_rows=8 + 2)
    recorder.on_step(engine_calls=3, call_rows=5)
    taken = snapshot(recorder)
    assert (taken.steps_total, taken.engine_calls_total) == (2, 5)
    assert taken.engine_calls_per_step == 2.5
    assert taken.mean_batch_per_block == 3.0


def test_pages_and_hits_come_from_the_caches_by_layers():
    segments = (Segment(0, 2, "shared"), Segment(2, 3, "own"))
    cache, other = KVCache(num_pages=30), KVCache(num_pages=10)
    scheduler = Scheduler(SchedulerConfig())
    for name in ("first", "second"):
        seq = TokenSequence(name, "model", cache, segments, "", list(range(70)), 0.0)
        scheduler.add(seq)
        assert snapshot(MetricsRecorder(), [cache], scheduler).requests_waiting == 1
        scheduled = scheduler.schedule()
        running = snapshot(MetricsRecorder(), [cache, other], scheduler)
        assert (running.requests_running, running.requests_waiting) == (1, 0)
        scheduler.advance(scheduled)
        scheduler.finish(seq)
    recorder = MetricsRecorder()
    taken = snapshot(recorder, [cache, other], scheduler)
    assert taken.prefix_hit_tokens == {"0-1": 64, "2-2": 64}
    assert (taken.pages_total, taken.pages_cached, taken.pages_used) == (40, 6, 0)
    assert taken.pages_free + taken.pages_cached + taken.pages_used == taken.pages_total
    whole = Segment(0, 3, "own")
    parts = {whole: [(segments[0], slice(0, 2)), (segments[1], slice(0, 1))]}
    cache.reshape(parts, {segments: (whole,)}, [])
    assert snapshot(recorder, [cache], scheduler).prefix_hit_tokens == {"0-1": 64, "2-2": 64, "0-2": 0}
    recorder.on_cache_gone(cache)  # what was counted stays
    taken = snapshot(recorder, [other], scheduler)
    assert taken.prefix_hit_tokens == {"0-1": 64, "2-2": 64, "0-2": 0}
    assert (taken.pages_total, taken.pages_cached) == (10, 0)
    recorder.on_cache_gone(cache)  # one more that counted as much
    assert snapshot(recorder, [other], scheduler).prefix_hit_tokens == {"0-1": 128, "2-2": 128}


def test_nothing_is_lost_between_threads():
    recorder = MetricsRecorder()

    def work():
        for _ in range(2000):
            recorder.on_token(0.01)
            recorder.on_step(1, 2)

    threads = [Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        taken = snapshot(recorder)
        assert taken.inter_token_seconds.count == taken.generated_tokens_total
        assert taken.mean_batch_per_block in (0.0, 2.0)
    for thread in threads:
        thread.join()
    taken = snapshot(recorder)
    assert taken.generated_tokens_total == taken.steps_total == 8000


def test_waits_are_kept_by_share_of_the_prompt_spared() -> None:
    recorder = MetricsRecorder()
    for share, wait in ((0.0, 0.02), (0.01, 1.0), (0.5, 2.0), (0.89, 0.3), (0.9, 0.1), (1.0, 0.2)):
        recorder.on_started(wait, share)
    waits = snapshot(recorder).wait_seconds
    assert {label: histogram.count for label, histogram in waits.items()} == {
        "0": 1,
        "1-49": 1,
        "50-89": 2,
        "90-100": 2,
    }


def test_quantiles_are_bounds() -> None:
    histogram = Histogram((1, 2, 5))
    assert histogram.snapshot().quantile(0.99) == 0.0
    for value in (0.5, 0.6, 1.5, 9.0):
        histogram.observe(value)
    assert [histogram.snapshot().quantile(q) for q in (0.25, 0.5, 0.6, 0.75, 1.0)] == [
        1,
        1,
        2,
        2,
        float("inf"),
    ]
