"""All that workers can do at once, in any order, while they are killed and spans move."""

from __future__ import annotations

import os
import random
import signal
from contextlib import suppress
from itertools import chain
from pathlib import Path

import pytest
from over_workers import SETTINGS, group_of
from quiet import Live, Quiet, check_equal, note, params, words
from test_surrogates import drafted
from test_workers_drafts import zoo  # noqa: F401

from blockzoo.runtime import EngineConfig, LLMEngine
from blockzoo.runtime.api.errors import OverloadedError
from blockzoo.runtime.approx.config import ReuseConfig
from blockzoo.runtime.serve.span_groups import leaders
from blockzoo.runtime.serve.span_loading import MoveError
from blockzoo.runtime.workers import distributed

pytestmark = pytest.mark.slow

TEXTS = ["The river runs past the mill. " * 9, "def parse(line):\n    return line.split()\n" * 7]
PIECES = [words(length, seed) for seed, length in enumerate((70, 33, 90, 64))]
MODELS = ("base", "notes", "solver", "twin")
QUIET = {"twin": "base"}  # an engine without it has the same


@pytest.mark.parametrize("seed", [1, 2])
def test_answers_are_those_of_a_quiet_process(
    demo_zoo: Path,
    zoo: Path,  # noqa: F811
    tmp_path: Path,
    dice: random.Random,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    monkeypatch.setattr(distributed, "LEAST_ROWS", 24)
    source, quiet = random.Random(seed), Quiet(demo_zoo)
    reuse = ReuseConfig(selector="importance*deviation", recompute=0.3, min_share=0.1, negligible=1e-3)
    settings = SETTINGS | {"kv_cache_bytes": 9 << 20, "max_num_seqs": 5, "published_kv_share": 0.5}
    engine = LLMEngine(
        zoo,
        EngineConfig(workers=2, speculate="auto", approximate=reuse, kv_cache_dir=str(tmp_path), **settings),
    )
    found: dict[str, Live] = {}
    killed = moved = published = 0
    first = leaders(group_of(engine).plan.topology)
    try:
        for step in range(400):
            if len(found) < 40 and source.random() < 0.3:
                pieces = [*source.sample(PIECES, 2), words(source.randint(1, 30), 100 + step)]
                how = source.choice(["exact", "approx", "approx", "off"])
                model = source.choice(MODELS)
                live = Live(QUIET.get(model, model), list(chain(*pieces)), source.randint(1, 30), how)
                if source.random() < 0.4:
                    live.documents, live.prompt = (source.choice(TEXTS),), "And then?"
                name = f"{len(found)}"
                found[name] = live
                scope = f"scope {source.randint(0, 1)}"
                how_so = {"kv_reuse": how, "documents": live.documents}
                engine.add_request(name, model, live.prompt, params(live.max_tokens), scope, **how_so)
            if source.random() < 0.03:
                names = {document.name for document in engine.documents}
                name = source.choice("ab")
                if name in names:
                    engine.withdraw(name)
                else:
                    with suppress(OverloadedError):  # requests hold the pages
                        engine.publish(name, TEXTS["ab".index(name)])
                        published += 1
            if source.random() < 0.03:
                span = source.randrange(len(first))
                assert engine.placement is not None
                with suppress(MoveError):  # a worker was lost just now
                    engine.placement.move({span: 1 - group_of(engine).plan.homes[span]})
                    moved += 1
            if step % 80 == 50:
                pid = source.choice(group_of(engine).pids)
                os.kill(pid, signal.SIGKILL)
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
                killed += 1
            if not engine.has_unfinished():
                engine.watch()
            for output in engine.step():
                note(found[output.request_id], output)
            if step % 3 == 0:
                engine.check_integrity()
        while engine.has_unfinished():
            for output in engine.step():
                note(found[output.request_id], output)
        engine.check_integrity()
        assert group_of(engine).num_restarts == killed == 5
        assert moved
        assert published
        assert drafted(engine)[1] > 0
        assert sum(cache.stats().approximate_tokens for cache in engine._zoo.caches.values())
        for live in found.values():
            if live.kv_reuse == "approx":
                assert len(live.tokens) == live.max_tokens
            else:
                check_equal(live, quiet.answer(live))
    finally:
        engine.close()
