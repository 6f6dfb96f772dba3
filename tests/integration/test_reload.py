"""Models added to and removed from a zoo while engines serve it."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from patience import PATIENCE_S

from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.runtime import LLM, EngineConfig, EngineThread, LLMEngine, RequestOutput, SamplingParams
from blockzoo.runtime.api.errors import UnknownModelError
from blockzoo.runtime.serve.reload import Reloaded
from blockzoo.zoo.errors import ZooError
from blockzoo.zoo.store import Zoo, block_path

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # of peft

GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
SETTINGS: dict[str, Any] = {"precision": "f32", "kv_cache_bytes": 32 << 20, "kv_sharing": "scope"}
FAST = CompileOptions(verify=False, profile=False)
LORAS: dict[str, dict[str, Any]] = {
    "qv": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "all": {"r": 8, "target_modules": ["k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]},
    "upper": {"r": 2, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [2]},
    "middle": {"r": 5, "target_modules": ["down_proj"], "layers_to_transform": [1]},
    "head": {"r": 4, "target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
}
PROMPT = np.random.default_rng(0).integers(2, 2048, 70).tolist()


@pytest.fixture(scope="module")
def folders(
    architectures: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    make_lora: Callable[[Path, Path, int, dict[str, Any]], None],
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("loras")
    base = architectures["llama-gqa-untied"]
    for seed, (name, settings) in enumerate(LORAS.items()):
        make_lora(base, root / name, seed, settings)
    return {"base": base, **{name: root / name for name in LORAS}}


@pytest.fixture(scope="module")
def expected(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[int, ...]]:
    """What each model answers, from a zoo that held all of them from the start."""
    zoo = tmp_path_factory.mktemp("all") / "zoo"
    compile_models(folders, zoo, FAST)
    names = list(folders)
    done = LLM(zoo, **SETTINGS).generate(names, [PROMPT] * len(names), GREEDY, progress=False)
    answers = {name: answer.token_ids for name, answer in zip(names, done, strict=True)}
    assert len(set(answers.values())) == len(answers)
    return answers


def add(zoo: Path, folders: dict[str, Path], *names: str, remove: tuple[str, ...] = ()) -> None:
    compile_models({name: folders[name] for name in names}, zoo, FAST, remove=remove)


def run(engine: LLMEngine, steps: int | None = None) -> dict[str, list[RequestOutput]]:
    outputs: dict[str, list[RequestOutput]] = {}
    while engine.has_unfinished() and steps != 0:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
        steps = None if steps is None else steps - 1
    return outputs


def tokens(*parts: list[RequestOutput]) -> tuple[int, ...]:
    return tuple(token for part in parts for output in part for token in output.token_ids)


def test_loras_come_and_go_under_running_requests(
    folders: dict[str, Path], expected: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    add(tmp_path, folders, "base", "upper")
    engine = LLMEngine(tmp_path, EngineConfig(**SETTINGS, enable_lora=True, adapter_cache_bytes=1))
    loaded = [id(e) for executor in engine._zoo.executors.values() for e in executor._engines.values()]
    for name in ("base", "upper"):
        engine.add_request(f"early {name}", name, PROMPT, GREEDY)
    before = run(engine, 5)
    add(tmp_path, folders, "qv", "all", "middle", remove=("upper",))
    found = engine.reload()
    assert (found.added, found.removed, found.replaced) == (("all", "middle", "qv"), ("upper",), ())
    assert not found.waiting
    assert engine.models == ("all", "base", "middle", "qv")
    with pytest.raises(UnknownModelError, match="upper"):
        engine.add_request("late", "upper", PROMPT, GREEDY)
    for name in ("qv", "all", "base", "middle"):  # together with those under way
        engine.add_request(name, name, PROMPT, GREEDY)
    after = run(engine)
    for name in ("qv", "all", "base", "middle"):
        assert tokens(after[name]) == expected[name], name
    assert tokens(before["early base"], after["early base"]) == expected["base"]
    # its file is gone: it is told so, alone, or was through
    assert after["early upper"][-1].finish_reason in ("error", "length")
    for name in ("qv", "all", "base", "middle"):  # and from what they have cached
        engine.add_request(name, name, PROMPT, GREEDY)
    again = run(engine)
    for name in ("qv", "all", "base", "middle"):
        assert tokens(again[name]) == expected[name], name
        assert again[name][-1].num_cached_tokens == 64
    after_engines = [id(e) for executor in engine._zoo.executors.values() for e in executor._engines.values()]
    assert after_engines == loaded
    assert engine.reload().added == ()


def test_a_removed_model_finishes_what_it_has_begun(
    folders: dict[str, Path], expected: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    add(tmp_path, folders, "base", "qv")
    engine = LLMEngine(tmp_path, EngineConfig(**SETTINGS))
    engine.add_request("qv", "qv", PROMPT, GREEDY)
    before = run(engine, 4)
    add(tmp_path, folders, remove=("qv",))
    assert engine.reload().removed == ("qv",)
    assert tokens(before["qv"], run(engine)["qv"]) == expected["qv"]
    add(tmp_path, folders, "qv")
    assert engine.reload().added == ("qv",)
    engine.add_request("again", "qv", PROMPT, GREEDY)
    assert tokens(run(engine)["again"]) == expected["qv"]


def test_replaced_adapters_serve_new_requests_only(
    folders: dict[str, Path], expected: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    add(tmp_path, {**folders, "tenant": folders["qv"]}, "base", "tenant")
    engine = LLMEngine(tmp_path, EngineConfig(**SETTINGS, enable_lora=True))
    engine.add_request("old", "tenant", PROMPT, GREEDY)
    before = run(engine, 4)
    replacing = CompileOptions(verify=False, profile=False, replace=True)
    compile_models({"tenant": folders["all"]}, tmp_path, replacing)
    assert engine.reload().replaced == ("tenant",)
    engine.add_request("new", "tenant", PROMPT, GREEDY)
    after = run(engine)
    assert tokens(before["old"], after["old"]) == expected["qv"]
    assert tokens(after["new"]) == expected["all"]


def test_engines_are_made_for_what_needs_them(
    folders: dict[str, Path], expected: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    """A head of its own, and LoRAs on projections that the base's engine has no inputs for."""
    add(tmp_path, folders, "base", "qv")
    engine = LLMEngine(tmp_path, EngineConfig(**SETTINGS))
    for name in ("base", "qv"):
        engine.add_request(f"early {name}", name, PROMPT, GREEDY)
    before = run(engine, 6)
    add(tmp_path, folders, "head", "all")
    found = engine.reload()
    assert (found.added, found.waiting) == (("all", "head"), {})
    for name in ("all", "head", "base", "qv"):
        engine.add_request(name, name, PROMPT, GREEDY)
    after = run(engine)
    for name in ("base", "qv"):
        assert tokens(before[f"early {name}"], after[f"early {name}"]) == expected[name]
    assert {name: tokens(after[name]) for name in ("all", "head", "base", "qv")} == {
        name: expected[name] for name in ("all", "head", "base", "qv")
    }
    engine.check_integrity()


def test_a_broken_zoo_changes_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    add(tmp_path, folders, "base")
    llm = LLM(tmp_path, **SETTINGS)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ZooError):
        llm.reload()
    assert llm.models == ("base",)
    assert len(llm.generate("base", [PROMPT], GREEDY, progress=False)[0].token_ids) == 24


def test_a_damaged_adapter_ends_its_own_requests_alone(
    folders: dict[str, Path], expected: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    add(tmp_path, folders, "base", "qv", "all")
    engine = LLMEngine(tmp_path, EngineConfig(**SETTINGS, adapter_cache_bytes=1))
    for adapter_id in Zoo.open(tmp_path).manifest.models["all"].adapters.values():
        block_path(tmp_path, adapter_id).unlink()
    for name in ("base", "all", "qv"):
        engine.add_request(name, name, PROMPT, GREEDY)
    outputs = run(engine)
    assert tokens(outputs["base"]) == expected["base"]
    assert tokens(outputs["qv"]) == expected["qv"]
    assert outputs["all"][-1].finish_reason == "error"
    assert "missing" in str(outputs["all"][-1].error)
    engine.check_integrity()


def test_reload_beside_the_engine_thread(
    folders: dict[str, Path], expected: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    add(tmp_path, folders, "base")
    thread = EngineThread(tmp_path, EngineConfig(**SETTINGS, enable_lora=True))
    outputs: dict[str, list[RequestOutput]] = {"base": [], "qv": []}
    try:
        thread.submit("base", "base", PROMPT, GREEDY, outputs["base"].append)
        add(tmp_path, folders, "qv")
        assert thread.reload().added == ("qv",)
        thread.submit("qv", "qv", PROMPT, GREEDY, outputs["qv"].append)
        assert thread.drain(60)
    finally:
        thread.close()
    assert {name: tokens(parts) for name, parts in outputs.items()} == {n: expected[n] for n in outputs}


def test_a_zoo_that_has_lost_its_folder_is_told(folders: dict[str, Path], tmp_path: Path) -> None:
    zoo = tmp_path / "zoo"
    add(zoo, folders, "base")
    llm = LLM(zoo, **SETTINGS)
    shutil.rmtree(zoo)
    with pytest.raises(ZooError, match="is not a directory"):
        llm.reload()


def test_overlapping_reloads_serve_every_model_its_own_adapters(
    folders: dict[str, Path],
    expected: dict[str, tuple[int, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    add(tmp_path, folders, "base")
    engine = LLMEngine(tmp_path, EngineConfig(**SETTINGS, enable_lora=True))
    add(tmp_path, folders, "qv")
    real, reading, slow = Zoo.open, threading.Event(), threading.Event()

    def read(path: Any) -> Zoo:
        zoo = real(path)
        if not reading.is_set():  # the first one has seen the zoo as it is now, and is late
            reading.set()
            assert slow.wait(PATIENCE_S)
        return zoo

    monkeypatch.setattr("blockzoo.runtime.serve.reload.Zoo.open", read)
    found: list[Reloaded] = []
    threads = [threading.Thread(target=lambda: found.append(engine.reload())) for _ in range(4)]
    threads[0].start()
    assert reading.wait(PATIENCE_S)
    add(tmp_path, folders, "all", "middle", remove=("base",))
    for thread in threads[1:]:
        thread.start()
    time.sleep(0.1)  # they wait for the first
    slow.set()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert found[0] == Reloaded(added=("qv",))
    assert found[1:] == [Reloaded(added=("all", "middle"), removed=("base",))] * 3  # one for all who waited
    assert engine.models == ("all", "middle", "qv")
    for name in engine.models:
        engine.add_request(name, name, PROMPT, GREEDY)
    answers = {name: tokens(parts) for name, parts in run(engine).items()}
    assert answers == {name: expected[name] for name in engine.models}
    for executor in engine._zoo.executors.values():
        assert tuple(executor.chains) == engine._zoo.topology.chains


TEXT = "The quick brown fox jumps over the lazy dog, and the dog barks. " * 12


def cached(engine: LLMEngine, model: str) -> int:
    engine.add_request("q", model, "And so", SamplingParams(max_tokens=1), documents=[TEXT])
    return run(engine)["q"][-1].num_cached_tokens


def test_published_documents_follow_the_models(folders: dict[str, Path], tmp_path: Path) -> None:
    add(tmp_path, folders, "base", "qv")
    engine = LLMEngine(tmp_path, EngineConfig(**SETTINGS | {"kv_sharing": "model"}, enable_lora=True))
    document = engine.publish("for all", TEXT)
    whole = document.num_tokens // 32 * 32
    assert (whole > 100, document.models) == (True, ("base", "qv"))
    pages = engine.metrics().document_pages
    add(tmp_path, folders, "all", remove=("qv",))
    engine.reload()
    assert engine.has_unfinished()  # there is something to do, even without requests
    assert cached(engine, "all") == whole
    assert set(engine.documents[0].models) == {"all", "base"}
    assert engine.metrics().document_pages == pages  # those of qv went, as many came
    add(tmp_path, folders, remove=("all",))
    engine.reload()
    run(engine)
    assert engine.metrics().document_pages < pages
    engine.withdraw("for all")
    assert engine.metrics().document_pages == 0
    engine.check_integrity()


def test_a_document_that_does_not_fit_later_models_says_so(folders: dict[str, Path], tmp_path: Path) -> None:
    add(tmp_path, folders, "base")
    engine = LLMEngine(tmp_path, EngineConfig(**SETTINGS | {"published_kv_share": 0.05}, enable_lora=True))
    pages = engine.publish("doc", TEXT).num_pages
    share = 1.5 * pages / engine.metrics().pages_total
    engine = LLMEngine(tmp_path, EngineConfig(**SETTINGS | {"published_kv_share": share}, enable_lora=True))
    engine.publish("doc", TEXT)
    engine.publish("its own", "# other\n" * 8, ["base"])
    add(tmp_path, folders, "all")
    engine.reload()
    run(engine)
    document, own = engine.documents
    assert (document.models, own.models, own.missing) == (("base",), ("base",), {})
    assert "published_kv_share" in document.missing["all"]
    assert cached(engine, "all") == 0
