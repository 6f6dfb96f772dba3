"""zoo-serve --replicas up to where Ray would start, and the figures of replicas."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from blockzoo.runtime import Metrics
from blockzoo.runtime.kv.prefix_cache import KVCache
from blockzoo.runtime.serve.config import SchedulerConfig
from blockzoo.runtime.serve.metrics import MetricsRecorder
from blockzoo.runtime.serve.scheduler import Scheduler
from blockzoo.server_config.arguments import build_parser
from blockzoo.server_config.replicas import local_ray
from blockzoo.server_config.serve import main

SERVER = Path(local_ray.__file__).parents[1]


@pytest.mark.parametrize(("text", "span"), [("1", (1, 1)), ("3", (3, 3)), ("2-8", (2, 8))])
def test_how_many(text, span) -> None:
    assert build_parser().parse_args(["zoo", "--replicas", text]).replicas == span


@pytest.mark.parametrize("text", ["0", "-1", "2-1", "1-", "a", "1-2-3", "1001", "1.5"])
def test_what_is_no_number_of_replicas(text, capsys) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["zoo", f"--replicas={text}"])
    assert "expected N, or N-M as 2-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--write-only", "there"], "no --write-only"),
        (["--no-openai"], "the OpenAI endpoint alone"),
        (["--ray-address", "10.0.0.1:6379"], "--ray-address needs --threads"),
        (["--ray-address", "10.0.0.1:6379", "--workers=2"], "--ray-address needs --threads"),
        (["--workers=2", "--worker-interface=127.0.0.1"], "leave out --worker-interface"),
        ([], "manifest"),
    ],
)
def test_what_cannot_be(options, message, tmp_path, capsys) -> None:
    pytest.importorskip("ray", reason="the extra cluster is not installed")
    assert main([str(tmp_path), "--replicas=2", "--openai-port=9998", *options]) == 1
    assert message in capsys.readouterr().err


def test_without_the_extra(demo_zoo, monkeypatch, capsys) -> None:
    monkeypatch.setattr(local_ray, "find_spec", lambda name: None)
    assert main([str(demo_zoo), "--openai-port=9998", "--replicas=2"]) == 1
    assert "pip install 'blockzoo[cluster]'" in capsys.readouterr().err


def test_ray_is_imported_by_three_modules_alone() -> None:
    found = set()
    for path in SERVER.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] in ("ray", "prometheus_client") for name in names):
                found.add(path.name)
    assert found == {"client.py", "figures.py", "replica.py", "router.py"}


def some_metrics(requests: int, rows: int) -> Metrics:
    recorder = MetricsRecorder()
    for _ in range(requests):
        recorder.on_request_arrived("base")
        recorder.on_first_token(0.03)
        recorder.on_request_finished("stop", 0.2, num_prompt_tokens=10, num_cached_tokens=4)
        recorder.on_step(2, 2 * rows)
    adapters: Any = SimpleNamespace(num_bytes=5, num_loads=1, num_evictions=0, num_reloads=0)
    return recorder.snapshot(Scheduler(SchedulerConfig()), [KVCache(100)], adapters, models_left_out=1)


def test_figures_add_up() -> None:
    pytest.importorskip("prometheus_client", reason="the extra cluster is not installed")
    from blockzoo.server_config.openai.live_page import read_figures
    from blockzoo.server_config.replicas.figures import exposition

    text = exposition({"a": some_metrics(1, 3), "b": some_metrics(3, 7)}).decode()
    lines = text.splitlines()
    for line in (
        "blockzoo_replicas 2.0",
        "blockzoo_requests_arrived_total 4.0",
        'blockzoo_requests_total{finish_reason="stop"} 4.0',
        "blockzoo_pages_total 200.0",
        "blockzoo_models_left_out 1.0",
        "blockzoo_mean_batch_per_block 6.0",  # 2 calls of 3 rows, 6 of 7
        'blockzoo_ttft_seconds_bucket{le="0.04"} 4.0',
        'blockzoo_ttft_seconds_bucket{le="+Inf"} 4.0',
        'blockzoo_replica_cached_tokens_total{replica="b"} 12.0',
    ):
        assert line in lines, f"{line} is not in\n{text}"
    assert read_figures(text, ["base"])["cached_tokens_total"] == 16
