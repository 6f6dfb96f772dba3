"""Published documents over workers: for every scope, from disk, and again after a worker is lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from over_workers import SETTINGS, group_of
from test_published import DOCUMENT, QUESTION, ask, size_of

from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.runtime import EngineConfig, LLMEngine
from blockzoo.runtime.approx.config import ReuseConfig
from blockzoo.runtime.serve.kv_moves import MOST_STILL_S

REUSE = ReuseConfig(recompute=0.0, refresh=0, head=0, window=8, min_share=0.1)


def serve(zoo: Path, folder: Path | None, workers: int | None = 2) -> LLMEngine:
    kv_cache_dir = None if folder is None else str(folder)
    config = EngineConfig(workers=workers, approximate=REUSE, kv_cache_dir=kv_cache_dir, **SETTINGS)
    return LLMEngine(zoo, config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kv")


@pytest.fixture(scope="module")
def local(demo_zoo: Path) -> LLMEngine:
    return serve(demo_zoo, None, None)


@pytest.fixture(scope="module")
def shared(demo_zoo: Path, folder: Path) -> Iterator[LLMEngine]:
    engine = serve(demo_zoo, folder)
    yield engine
    engine.close()


@pytest.fixture
def spread(shared: LLMEngine) -> Iterator[LLMEngine]:
    yield shared
    for document in shared.documents:
        shared.withdraw(document.name)
    shared.check_integrity()
    assert shared.metrics().document_pages == 0


def check_answers(spread: LLMEngine, local: LLMEngine, cached: int) -> None:
    """Of all models, each in a scope of its own, behind the document."""
    for model in ("base", "solver", "notes"):
        _, expected, logprobs = ask(local, QUESTION, model, documents=[DOCUMENT], kv_reuse="off")
        found = ask(spread, QUESTION, model, f"of {model} {cached}", documents=[DOCUMENT])
        assert found[:2] == (cached, expected)
        assert found[2] == pytest.approx(logprobs, abs=1e-3)
    spread.check_integrity()


def test_every_scope_starts_behind_a_document(spread: LLMEngine, local: LLMEngine) -> None:
    document = spread.publish("doc", DOCUMENT)
    assert document.num_pages
    check_answers(spread, local, size_of(spread, DOCUMENT))
    elsewhere = []
    local.publish("doc", DOCUMENT)
    for engine in (spread, local):
        how = {"documents": ["# more words\n", DOCUMENT], "kv_reuse": "approx", "scope": "red"}
        elsewhere.append(ask(engine, QUESTION, **how))
        assert sum(cache.stats().approximate_tokens for cache in engine._zoo.caches.values())
    local.withdraw("doc")
    assert elsewhere[0][:2] == elsewhere[1][:2]
    assert elsewhere[0][2] == pytest.approx(elsewhere[1][2], abs=1e-3)


@pytest.mark.slow
def test_what_is_on_disk_serves_one_process_and_many(
    spread: LLMEngine, local: LLMEngine, demo_zoo: Path, folder: Path
) -> None:
    """What workers computed is loaded by one process; and back again, with other pages, by them."""
    spread.publish("doc", DOCUMENT)
    spread.withdraw("doc")
    here = serve(demo_zoo, folder, None)
    assert here.publish("doc", DOCUMENT).num_loaded
    assert ask(here, QUESTION, documents=[DOCUMENT])[1] == ask(local, QUESTION, documents=[DOCUMENT])[1]
    spread._zoo.caches[next(iter(spread._zoo.caches))].forget_all()
    loaded = spread.publish("doc", DOCUMENT).num_loaded
    assert loaded
    check_answers(spread, local, size_of(spread, DOCUMENT))


@pytest.mark.parametrize("disk", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_documents_come_again_after_a_worker(
    spread: LLMEngine, local: LLMEngine, folder: Path, disk: bool
) -> None:
    spread.publish("doc", DOCUMENT)
    spread.publish("other", QUESTION * 9)
    loaded = spread._publisher.stats().loaded
    if not disk:
        for file in folder.iterdir():
            file.unlink()
    pid = group_of(spread).pids[0]
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    expected = ask(local, QUESTION, documents=[DOCUMENT], kv_reuse="off")[1]
    assert ask(spread, QUESTION, scope="first", documents=[DOCUMENT])[1] == expected
    while spread.has_unfinished():
        spread.step()
    assert not spread._publisher.is_behind
    assert (spread._publisher.stats().loaded > loaded) == disk
    assert [document.name for document in spread.documents] == ["doc", "other"]
    assert spread.metrics().document_pages > 0
    found, tokens, _ = ask(spread, QUESTION, scope="second", documents=[DOCUMENT])
    assert (found, tokens) == (size_of(spread, DOCUMENT), expected)


@pytest.mark.slow
def test_a_worker_that_is_lost_while_a_document_is_published(spread: LLMEngine, local: LLMEngine) -> None:
    pid = group_of(spread).pids[1]
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    spread.publish("doc", DOCUMENT)
    check_answers(spread, local, size_of(spread, DOCUMENT))


def test_documents_go_with_the_spans(
    spread: LLMEngine, local: LLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where that is too dear for what is only cached."""
    spread.publish("doc", DOCUMENT)
    assert spread.placement is not None
    assert spread._zoo.workers is not None
    links = spread._zoo.workers.link_byte_s
    for row in links:
        row[:] = [10 * MOST_STILL_S] * len(row)
    homes = group_of(spread).plan.homes
    moved = spread.placement.move({span: 1 - home for span, home in enumerate(homes)})
    assert moved.pages == spread.metrics().document_pages
    check_answers(spread, local, size_of(spread, DOCUMENT))


@pytest.mark.slow
def test_models_that_come_get_the_documents(
    demo_family: dict[str, Path], tmp_path: Path, local: LLMEngine
) -> None:
    zoo, options = tmp_path / "zoo", CompileOptions(verify=False, profile=False)
    compile_models({name: demo_family[name] for name in ("base", "notes")}, zoo, options)
    engine = serve(zoo, tmp_path / "kv")
    try:
        engine.publish("doc", DOCUMENT)
        compile_models({"solver": demo_family["solver"]}, zoo, options)
        assert engine.reload().added == ("solver",)
        while engine.has_unfinished():
            engine.step()
        (document,) = engine.documents
        assert sorted(document.models) == ["base", "notes", "solver"]
        check_answers(engine, local, size_of(engine, DOCUMENT))
        compile_models({}, zoo, options, remove=("notes",))
        assert engine.reload().removed == ("notes",)
        while engine.has_unfinished():
            engine.step()
        found, tokens, _ = ask(engine, QUESTION, scope="last", documents=[DOCUMENT])
        assert found == size_of(engine, DOCUMENT)
        assert tokens == ask(local, QUESTION, documents=[DOCUMENT], kv_reuse="off")[1]
    finally:
        engine.close()


@pytest.mark.slow
def test_documents_come_again_where_spans_get_copies(spread: LLMEngine, local: LLMEngine) -> None:
    spread.publish("doc", DOCUMENT)
    topology, homes = spread._zoo.topology, group_of(spread).plan.homes
    span = topology.chains[topology.chain_of_model["base"]].uses[1].span
    expected = ask(local, QUESTION, documents=[DOCUMENT], kv_reuse="off")[1]
    assert spread.placement is not None
    for number, worker in enumerate((1 - homes[span], homes[span])):
        spread.placement.route({"solver": {span: worker}})
        assert ask(spread, QUESTION, scope=f"first {number}", documents=[DOCUMENT])[1] == expected
        while spread.has_unfinished():
            spread.step()
        assert not spread._publisher.is_behind
        found, tokens, _ = ask(spread, QUESTION, scope=f"then {number}", documents=[DOCUMENT])
        assert (found, tokens) == (size_of(spread, DOCUMENT), expected)
        how = {"documents": ["# more words\n", DOCUMENT], "kv_reuse": "approx", "scope": f"red {number}"}
        assert ask(spread, QUESTION, "solver", **how)[1]
        spread.check_integrity()
    assert spread._zoo.topology == topology
