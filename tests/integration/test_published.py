"""Published documents end to end: exact in every scope, from disk too, and no way into other scopes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
from patience import PATIENCE_S

from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.runtime import LLM, EngineConfig, EngineThread, LLMEngine, RequestOutput, SamplingParams
from blockzoo.runtime.api.errors import (
    InvalidRequestError,
    OverloadedError,
    PromptTooLongError,
    RequestError,
    UnknownModelError,
)
from blockzoo.runtime.approx.config import ReuseConfig
from blockzoo.runtime.serve.document_files import kv_identity

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=0)
DOCUMENT = "def parse(line):\n    key, value = line.split('=')\n    return key.strip(), int(value)\n\n" * 3
QUESTION = "def main():\n    print(parse("
SECRET = "The safe opens with 4711, and nobody else may know that it does. " * 2


def serve(zoo: Path, **settings: Any) -> LLMEngine:
    return LLMEngine(zoo, EngineConfig(**{"precision": "f32", "kv_cache_bytes": 32 << 20} | settings))


def ask(
    engine: LLMEngine, prompt: str, model: str = "base", scope: str | None = None, **how: Any
) -> tuple[int, list[int], list[float]]:
    """Prompt tokens found in the cache, the answer's tokens, their log-probabilities."""
    engine.add_request("r", model, prompt, GREEDY, scope, **how)
    seq = engine._requests["r"].seq
    tokens, logprobs = [], []
    last: RequestOutput | None = None
    while engine.has_unfinished():
        for last in engine.step():
            assert last.error is None
            tokens += last.token_ids
            logprobs += [entry.logprob for entry in last.logprobs or ()]
    assert last is not None
    assert last.num_cached_tokens == seq.num_cached // 32 * 32  # others are told whole pages
    return seq.num_cached, tokens, logprobs


def approximated(engine: LLMEngine) -> int:
    return sum(cache.stats().approximate_tokens for cache in engine._zoo.caches.values())


def size_of(engine: LLMEngine, text: str) -> int:
    return len(engine.tokenizer("base").encode(text))


def published_kv(engine: LLMEngine) -> list[np.ndarray]:
    publication = next(iter(engine._publisher._published["doc"].places.values())).publication
    (executor,) = engine._zoo.executors.values()
    return [kv for node in publication.nodes for kv in executor.kv.read(node.pages)]


@pytest.fixture(scope="module")
def shared_engine(demo_zoo: Path) -> LLMEngine:
    return serve(demo_zoo, approximate=ReuseConfig(recompute=0.0, refresh=0, head=0, window=8, min_share=0.1))


@pytest.fixture
def engine(shared_engine: LLMEngine) -> Iterator[LLMEngine]:
    yield shared_engine
    for document in shared_engine.documents:
        shared_engine.withdraw(document.name)
    shared_engine.check_integrity()
    assert shared_engine.metrics().document_pages == 0


@pytest.fixture(scope="module")
def cold_engine(demo_zoo: Path) -> LLMEngine:
    return serve(demo_zoo, prefix_caching=False)


# ---- what it is for


@pytest.mark.parametrize("model", ["base", "solver", "notes"])
def test_every_scope_starts_behind_a_document(engine: LLMEngine, cold_engine: LLMEngine, model: str) -> None:
    engine.publish("doc", DOCUMENT)
    size = size_of(engine, DOCUMENT)
    assert size % 32, "a document that does not fill its last page"
    _, expected, expected_logprobs = ask(cold_engine, QUESTION, model, documents=[DOCUMENT])
    for scope in ("red", "blue", None):
        found, tokens, logprobs = ask(engine, QUESTION, model, scope, documents=[DOCUMENT])
        assert (found, tokens) == (size, expected)
        assert logprobs == pytest.approx(expected_logprobs, abs=1e-4)


def test_marked_documents_are_the_texts_put_together(engine: LLMEngine, cold_engine: LLMEngine) -> None:
    tokenizer = engine.tokenizer("base")
    parts = [tokenizer.encode(text, add_special_tokens=False) for text in (DOCUMENT, SECRET, QUESTION)]
    ids = list(tokenizer.around[0]) + [token for part in parts for token in part]
    expected = ask(cold_engine, ids)[1]
    assert ask(engine, QUESTION, documents=[DOCUMENT, SECRET], kv_reuse="off")[1] == expected
    asked = tokenizer.encode(QUESTION)  # as the tenants' ensembles send it
    assert ask(engine, asked, documents=[DOCUMENT, SECRET], kv_reuse="off")[1] == expected


def test_a_document_elsewhere_in_a_prompt_is_taken_approximately(engine: LLMEngine) -> None:
    engine.publish("doc", DOCUMENT)
    before = approximated(engine)
    ask(engine, QUESTION, scope="red", kv_reuse="approx", documents=[SECRET, DOCUMENT])
    lead = len(engine.tokenizer("base").around[0])
    assert approximated(engine) - before == size_of(engine, DOCUMENT) - lead
    ask(engine, QUESTION, scope="red", documents=["# more\n", DOCUMENT])  # who does not ask for it
    assert approximated(engine) - before == size_of(engine, DOCUMENT) - lead


def test_documents_are_for_the_models_named(engine: LLMEngine) -> None:
    engine.publish("doc", DOCUMENT, ["solver"])
    for model, found in (("solver", size_of(engine, DOCUMENT)), ("base", 0), ("notes", 0)):
        assert ask(engine, QUESTION, model, f"red {model}", documents=[DOCUMENT])[0] == found


def test_equal_chains_share_a_document(engine: LLMEngine) -> None:
    document = engine.publish("doc", DOCUMENT, ["base"])
    assert document.num_pages == engine.metrics().document_pages
    assert ask(engine, QUESTION, "base-sharded", "red", documents=[DOCUMENT])[0] == document.num_tokens
    assert engine.publish("again", DOCUMENT, ["base-sharded", "base"]).num_pages == 0


def test_the_python_api(demo_zoo: Path) -> None:
    llm = LLM(demo_zoo, kv_cache_bytes=32 << 20)
    document = llm.publish("doc", DOCUMENT, ["base"])
    assert (document.num_loaded, document.models) == (0, ("base",))
    (answer,) = llm.generate("base", QUESTION, GREEDY, documents=[DOCUMENT], progress=False)
    assert answer.num_cached_tokens == document.num_tokens // 32 * 32
    llm.withdraw("doc")
    assert llm.engine.documents == ()


def test_a_document_is_published_between_the_steps_of_others(demo_zoo: Path, cold_engine: LLMEngine) -> None:
    thread = EngineThread(demo_zoo, EngineConfig(precision="f32", kv_cache_bytes=32 << 20))
    try:
        done, tokens = Event(), []

        def on_output(output: RequestOutput) -> None:
            tokens.extend(output.token_ids)
            if output.finished:
                done.set()

        params = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)
        thread.submit("r", "base", QUESTION, params, on_output)
        thread.publish("doc", DOCUMENT)
        with pytest.raises(InvalidRequestError, match="published already"):
            thread.publish("doc", DOCUMENT)
        assert done.wait(PATIENCE_S)
        cold_engine.add_request("r", "base", QUESTION, params)
        expected = []
        while cold_engine.has_unfinished():
            expected += [token for output in cold_engine.step() for token in output.token_ids]
        assert tokens == expected
        assert thread.metrics().documents == 1
    finally:
        thread.close()
    with pytest.raises(RequestError, match="has stopped"):
        thread.publish("more", DOCUMENT)


# ---- scopes


def test_a_tenant_cannot_read_what_another_asked_behind_a_document(engine: LLMEngine) -> None:
    document = f"# read\n{DOCUMENT}"
    engine.publish("doc", document)
    size = size_of(engine, document)
    ask(engine, SECRET + QUESTION, scope="victim", documents=[document])
    for scope in ("attacker", None, "", "published", "victim "):
        assert ask(engine, SECRET + QUESTION, scope=scope, documents=[document])[0] == size
    assert ask(engine, SECRET[:20], scope="half", documents=[document])[0] == size
    assert ask(engine, SECRET + QUESTION, scope="victim", documents=[document])[0] > size


def test_what_a_tenant_asks_is_no_document(engine: LLMEngine, cold_engine: LLMEngine) -> None:
    """The very text of a document, asked before it is published, while it is, and after."""
    document = f"# asked\n{DOCUMENT}"
    expected = ask(cold_engine, QUESTION, documents=[document])[1]
    for scope in ("one", "two"):
        assert ask(engine, QUESTION, scope=scope, documents=[document])[0] == 0
    engine.publish("doc", document)
    assert ask(engine, QUESTION, scope="three", documents=[document])[0] == size_of(engine, document)
    engine.withdraw("doc")
    for scope in ("four", "published", "", None):
        found, tokens, _ = ask(engine, QUESTION, scope=scope, documents=[document])
        assert (found, tokens) == (0, expected)


def test_a_tenant_cannot_plant_kv_behind_words_of_its_own(engine: LLMEngine) -> None:
    """The published attack: the document's text, computed behind an attacker's, as a donor for others."""
    document = f"# plant\n{DOCUMENT}"
    ask(engine, QUESTION, scope="planter", documents=[SECRET, document])
    before = approximated(engine)
    ask(engine, QUESTION, scope="planted", kv_reuse="approx", documents=["# mine\n", document])
    assert approximated(engine) == before  # nothing of the attacker's
    engine.publish("doc", document)
    ask(engine, QUESTION, scope="planter", documents=[SECRET, document])
    # all that another scope now takes are pages of the operator's
    engine.add_request("v", "base", QUESTION, GREEDY, "other", "approx", ["# mine\n", document])
    scheduled = engine._scheduler.schedule()
    (seq,) = [item.seq for item in scheduled]
    assert seq.approx is not None
    borrowed = seq.approx.borrowed
    cache = seq.cache
    publications = [p.publication for p in engine._publisher._published["doc"].places.values()]
    (nodes,) = (p.nodes for p in publications if p.segments == seq.segments)
    assert set(borrowed.pages.ravel().tolist()) <= {int(p) for node in nodes for p in node.pages}
    assert borrowed.positions.size == size_of(engine, document) - len(engine.tokenizer("base").around[0])
    engine.abort("v")
    cache.check_integrity([])


def test_approximate_reuse_of_a_document_ends_with_it(engine: LLMEngine) -> None:
    """A victim's words behind a document are no one's to take, approximately neither."""
    document = f"# end\n{DOCUMENT}"
    engine.publish("doc", document)
    ask(engine, SECRET + QUESTION, scope="asker", documents=[document])
    before = approximated(engine)
    ask(engine, QUESTION, scope="taker", kv_reuse="approx", documents=["# 1\n", document, SECRET])
    size = size_of(engine, document) - len(engine.tokenizer("base").around[0])
    assert approximated(engine) - before == size
    engine.withdraw("doc")
    ask(engine, QUESTION, scope="late taker", kv_reuse="approx", documents=["# 2\n", document, SECRET])
    assert approximated(engine) - before == size


def test_requests_without_reuse_take_nothing(engine: LLMEngine) -> None:
    engine.publish("doc", DOCUMENT)
    pages = engine.metrics().pages_cached
    assert ask(engine, QUESTION, kv_reuse="off", documents=[DOCUMENT])[0] == 0
    assert engine.metrics().pages_cached == pages


# ---- on disk


def test_kv_from_disk_is_what_was_computed(demo_zoo: Path, tmp_path: Path) -> None:
    first = serve(demo_zoo, kv_cache_dir=str(tmp_path), precision=None)
    assert first.publish("doc", DOCUMENT, ["base", "solver"]).num_loaded == 0
    second = serve(demo_zoo, kv_cache_dir=str(tmp_path), precision=None)
    assert second.publish("doc", DOCUMENT, ["base", "solver"]).num_loaded == 2
    for computed, loaded in zip(published_kv(first), published_kv(second), strict=True):
        np.testing.assert_array_equal(computed, loaded)
    assert ask(first, QUESTION, "solver", documents=[DOCUMENT]) == ask(
        second, QUESTION, "solver", documents=[DOCUMENT]
    )
    assert second.metrics().document_loads_total == 2
    other = serve(demo_zoo, kv_cache_dir=str(tmp_path), precision=None)
    assert other.publish("doc", DOCUMENT, ["notes"]).num_loaded == 0  # other blocks


def test_a_damaged_file_is_computed_anew(demo_zoo: Path, tmp_path: Path, caplog: Any) -> None:
    first = serve(demo_zoo, kv_cache_dir=str(tmp_path))
    first.publish("doc", DOCUMENT, ["base"])
    for file in tmp_path.iterdir():
        data = bytearray(file.read_bytes())
        data[-100] ^= 1
        file.write_bytes(data)
    second = serve(demo_zoo, kv_cache_dir=str(tmp_path))
    assert second.publish("doc", DOCUMENT, ["base"]).num_loaded == 0
    assert "checksum" in caplog.text
    assert second.metrics().document_rejects_total == 1
    for computed, again in zip(published_kv(first), published_kv(second), strict=True):
        np.testing.assert_array_equal(computed, again)
    third = serve(demo_zoo, kv_cache_dir=str(tmp_path))
    assert third.publish("doc", DOCUMENT, ["base"]).num_loaded == 1  # replaced


# ---- limits


def test_what_cannot_be_published_is_said(engine: LLMEngine, cold_engine: LLMEngine) -> None:
    engine.publish("doc", DOCUMENT, ["base"])
    for error, match, name, text, models in (
        (InvalidRequestError, "published already", "doc", DOCUMENT, None),
        (InvalidRequestError, "no name", "", DOCUMENT, None),
        (InvalidRequestError, "empty", "empty", "", None),
        (InvalidRequestError, "for no model", "none", DOCUMENT, []),
        (UnknownModelError, "did you mean 'solver'", "typo", DOCUMENT, ["base", "solverr"]),
        (PromptTooLongError, "shorten it", "long", DOCUMENT * 100, None),
    ):
        with pytest.raises(error, match=match):
            engine.publish(name, text, models)
    with pytest.raises(InvalidRequestError, match="did you mean 'doc'"):
        engine.withdraw("dox")
    with pytest.raises(InvalidRequestError, match="prefix_caching is off"):
        cold_engine.publish("doc", DOCUMENT)
    for documents, match in (("a text", "a list"), ([""], "empty"), (["a"] * 257, "at most 256")):
        with pytest.raises(InvalidRequestError, match=match):
            engine.prepare("r", "base", QUESTION, GREEDY, documents=documents)
    assert [document.name for document in engine.documents] == ["doc"]


def test_documents_leave_requests_their_share_of_the_pool(demo_zoo: Path) -> None:
    engine = serve(demo_zoo, kv_cache_bytes=1 << 20, published_kv_share=0.6)
    engine.publish("doc", DOCUMENT, ["base"])
    pages = engine.metrics().document_pages
    with pytest.raises(InvalidRequestError, match=rf"hold {pages} of the .* raise published_kv_share"):
        engine.publish("more", f"# more\n{DOCUMENT}", ["base"])
    total = engine.metrics().pages_total
    assert engine.metrics().document_pages == pages <= 0.6 * total
    # what would fit without them does not wait for ever
    layers = engine._zoo.models["base"].chain.num_layers
    free = (total - engine.metrics().document_pages) // layers * 32
    engine.add_request("r", "base", list(range(2, 2 + free + 1)), GREEDY)
    (output,) = engine.step()
    assert "of published documents" in (output.error or "")
    assert ask(engine, QUESTION)[1]
    engine.check_integrity()


def test_a_document_does_not_take_pages_from_running_requests(demo_zoo: Path) -> None:
    engine = serve(demo_zoo, kv_cache_bytes=1 << 20, published_kv_share=1.0)
    layers, total = engine._zoo.models["base"].chain.num_layers, engine.metrics().pages_total
    engine.add_request("r", "base", list(range(2, 2 + (total // layers - 2) * 32)), GREEDY)
    engine.step()
    with pytest.raises(OverloadedError, match="running requests hold them"):
        engine.publish("doc", DOCUMENT, ["base"])
    engine.abort("r")
    engine.check_integrity()
    engine.publish("doc", DOCUMENT, ["base"])


def test_a_failure_publishes_nothing(
    engine: LLMEngine, cold_engine: LLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    (executor,) = engine._zoo.executors.values()
    calls, run = [], executor.run

    def failing(batch: Any) -> Any:
        calls.append(batch)
        if len(calls) == 2:  # of the second chain
            raise RuntimeError("broken")
        return run(batch)

    monkeypatch.setattr(executor, "run", failing)
    with pytest.raises(RuntimeError, match="broken"):
        engine.publish("doc", SECRET)
    monkeypatch.undo()
    engine.check_integrity()
    assert engine.documents == ()
    assert engine.metrics().document_pages == 0
    found, tokens, _ = ask(engine, QUESTION, scope="red", documents=[SECRET])
    assert (found, tokens) == (0, ask(cold_engine, QUESTION, documents=[SECRET])[1])
    engine.publish("doc", SECRET)


def test_kv_on_disk_is_named_after_all_that_computes_it(engine: LLMEngine) -> None:
    """Layer by layer, models have one name for KV where it is the same, and only there."""
    topology = engine._zoo.topology
    chains = {name: engine._zoo.models[name].chain for name in ("base", "base-sharded", "solver", "notes")}
    layers = range(chains["base"].num_layers)
    names = {name: [kv_identity(topology, chain, i) for i in layers] for name, chain in chains.items()}
    assert names["base"] == names["base-sharded"]
    assert len({key for keys in names.values() for key in keys}) > len(layers)
    for one, other in combinations(chains.values(), 2):
        shared = {s.key for s in one.segments} & {s.key for s in other.segments}
        for layer in layers:
            key = next(s.key for s in one.segments if s.first_layer <= layer < s.end_layer)
            same = kv_identity(topology, one, layer) == kv_identity(topology, other, layer)
            assert same == (key in shared)


def test_tokens_that_the_model_has_no_row_for_are_refused(
    demo_family: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(demo_family["base"], tmp_path / "base"))
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    compile_models({"base": folder}, tmp_path / "zoo", CompileOptions(verify=False, profile=False))
    engine = serve(tmp_path / "zoo")
    assert engine.tokenizer("base").encode("<pad>") == [2048]
    for prompt, documents in (("a <pad>", []), ("a", ["a <pad>"])):
        with pytest.raises(InvalidRequestError, match="to 2048; the model's are 0 to 2047"):
            engine.prepare("r", "base", prompt, GREEDY, documents=documents)
    with pytest.raises(InvalidRequestError, match="'doc' holds token id 2048; those of base are 0 to 2047"):
        engine.publish("doc", DOCUMENT + "<pad>" + DOCUMENT)
    engine.check_integrity()
    assert ask(engine, QUESTION)[1]
