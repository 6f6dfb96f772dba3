"""Lanes against the segments that the engine itself shares KV by."""

from __future__ import annotations

import shutil

import pytest

from blockzoo.runtime.exec.topology import plan_topology
from blockzoo.server_config.replicas.lanes import Lanes, lanes_of
from blockzoo.zoo.store import Zoo


def test_lanes_are_the_engines_segments(demo_zoo) -> None:
    manifest = Zoo.open(demo_zoo).manifest
    topology = plan_topology(manifest)
    for name, lanes in lanes_of(manifest).items():
        chain = topology.chains[topology.chain_of_model[name]]
        assert [lane.key for lane in lanes] == [segment.key for segment in chain.segments]
        assert sum(lane.share for lane in lanes) == pytest.approx(1)
    lanes = lanes_of(manifest)
    assert lanes["base"] == lanes["base-sharded"]
    assert lanes["solver"] != lanes["base"]


def test_models_that_share_nothing_and_a_zoo_that_changes(demo_zoo, tmp_path) -> None:
    assert Lanes(None).of("base") != Lanes(None).of("base-sharded")
    lanes = Lanes(str(tmp_path))
    lanes.read()  # there is none yet
    assert [lane.share for lane in lanes.of("base")] == [1.0]
    shutil.copy(demo_zoo / "manifest.json", tmp_path)
    lanes.read()
    assert lanes.of("base") == lanes_of(Zoo.open(demo_zoo).manifest)["base"]
