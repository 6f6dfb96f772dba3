"""zoo-serve --workers --ray-address: streams go on when an actor is killed, and none outlives the server."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from over_workers import SERVED, check_streams_outlive
from patience import wait_for
from running_ray import ENVIRONMENT, RunningRay, is_there

from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.server_config.replicas import local_ray
from blockzoo.server_config.serve import main


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningRay]:
    pytest.importorskip("ray", reason="the extra cluster is not installed")
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    started = RunningRay(2)
    yield started
    started.stop()


@pytest.mark.slow
def test_a_zoo_over_workers_of_a_ray(serve_zoo, demo_zoo, demo_family, tmp_path, running) -> None:
    zoo = tmp_path / "zoo"
    shutil.copytree(demo_zoo, zoo)
    server = serve_zoo(zoo, *SERVED, "--ray-address", running.address)
    first = running.workers()
    assert len(first) == 2
    check_streams_outlive(server, first[0])
    second = running.workers()
    assert len(set(second) & set(first)) == 1

    compile_models({"late": demo_family["base-sharded"]}, zoo, CompileOptions(verify=False, profile=False))
    server.wait_for(lambda: server.post("late", {"text_input": "The", "max_tokens": 1})[0] == 200)
    assert (
        server.generate("late", "The river")["text_output"]
        == server.generate("base", "The river")["text_output"]
    )
    third = running.workers()
    assert not set(third) & set(second)

    assert server.stop() == 0
    wait_for(lambda: not any(map(is_there, third)))


def test_what_is_missing_is_said(demo_zoo, capsys, monkeypatch) -> None:
    assert main([str(demo_zoo), "--workers", "2", "--ray-address", "127.0.0.1:1"]) == 1
    assert "ray_address needs num_threads" in capsys.readouterr().err
    assert main([str(demo_zoo), "--worker-interface", "127.0.0.1"]) == 1
    assert "workers is not" in capsys.readouterr().err
    assert main([str(demo_zoo), "--ray-address", "127.0.0.1:1"]) == 1
    assert "--ray-address is for" in capsys.readouterr().err
    monkeypatch.setattr(local_ray, "find_spec", lambda name: None)
    assert main([str(demo_zoo), "--workers=2", "--threads=1", "--ray-address", "127.0.0.1:1"]) == 1
    assert "pip install 'blockzoo[cluster]'" in capsys.readouterr().err
