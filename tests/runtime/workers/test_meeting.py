"""What a head learns of workers before it places blocks."""

from __future__ import annotations

from itertools import combinations

import pytest

from blockzoo.runtime.workers import processes
from blockzoo.runtime.workers.group import WorkerGroup
from blockzoo.runtime.workers.meeting import MachineFacts, _rounds
from blockzoo.runtime.workers.processes import LocalProcesses, WorkerStartError
from blockzoo.runtime.workers.sockets import LOOPBACK, own_address


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8])
def test_rounds_have_each_pair_once_and_nobody_twice(count: int) -> None:
    rounds = _rounds(count)
    assert sorted(pair for pairs in rounds for pair in pairs) == list(combinations(range(count), 2))
    for pairs in rounds:
        members = [index for pair in pairs for index in pair]
        assert len(members) == len(set(members))


def test_three_meet() -> None:
    group = WorkerGroup(LocalProcesses(), (0.0, 0.0, 0.03))
    try:
        here, facts, links = MachineFacts.here(), group.facts, group.links
        assert [(each.machine, each.cores) for each in facts] == [(here.machine, here.cores)] * 3
        assert all(each.memory > 0 for each in facts)
        assert links.hop_s[0][1] < 0.03 <= min(links.hop_s[0][2], links.hop_s[1][2])
        assert links.head_s[2] >= 0.03 > max(links.head_s[:2])
        assert [links.hop_s[index][index] for index in range(3)] == [0, 0, 0]
    finally:
        group.close()


def test_one_that_does_not_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_MODULE", "blockzoo.no_such_module")
    with pytest.raises(WorkerStartError, match="worker 0 ended with 1"):
        WorkerGroup(LocalProcesses(), (0.0,))


def test_workers_listen_where_the_head_is_reached() -> None:
    assert own_address(f"tcp://{LOOPBACK}:5") == LOOPBACK
