"""A smaller model of the zoo guesses for another: it follows texts in pages of its own, which come back."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from quiet import ask, words

from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.runtime import EngineConfig, LLMEngine, SamplingParams
from blockzoo.runtime.draft.balance import Balances
from blockzoo.runtime.draft.row_choice import Option, RowChoice
from blockzoo.zoo.manifest import Manifest, SurrogateRecord

GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def zoo(
    demo_family: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The demo base, a fine-tune of it, and a smaller model of another shape, of random weights."""
    import torch
    from transformers import AutoConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("models")
    config = AutoConfig.from_pretrained(demo_family["base"])
    config.hidden_size, config.num_hidden_layers, config.intermediate_size = 64, 2, 96
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 2, 1, 32
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(root / "small")
    for file in demo_family["base"].glob("*token*"):
        shutil.copyfile(file, root / "small" / file.name)
    for name in ("generation_config.json", "chat_template.jinja"):
        if (demo_family["base"] / name).exists():
            shutil.copyfile(demo_family["base"] / name, root / "small" / name)
    models = {"base": demo_family["base"], "notes": demo_family["notes"], "small": root / "small"}
    compile_models(models, root / "zoo", CompileOptions(verify=False, profile=False))
    return root / "zoo"


def guessed_by(zoo: Path, folder: Path, drafters: dict[str, str]) -> Path:
    manifest = Manifest.load(zoo / "manifest.json")
    for name, drafter in drafters.items():
        found = SurrogateRecord(drafter, drafter, {}, (0.9,), 0.3, 1.5, 1, "built-in")
        manifest.models[name] = replace(manifest.models[name], surrogate=found)
    shutil.copytree(zoo, folder)  # what is compiled into it removes files
    (folder / "manifest.json").write_text(Manifest.from_text(manifest.to_text()).to_text())
    return folder


def engine_of(zoo: Path, **settings: Any) -> LLMEngine:
    settings = {"kv_cache_bytes": 16 << 20, **settings}
    return LLMEngine(zoo, EngineConfig(precision="f32", speculate="auto", num_threads=1, **settings))


def drafted(engine: LLMEngine) -> tuple[int, int]:
    metrics = engine.metrics()
    tried = sum(n for (_, who), n in metrics.drafted_tokens_total.items() if who == "surrogate")
    return tried, sum(n for (_, who), n in metrics.accepted_tokens_total.items() if who == "surrogate")


def test_a_model_that_guesses_for_its_twin_is_never_wrong(
    zoo: Path, tmp_path: Path, dice: random.Random
) -> None:
    """Only where it has followed every token, right guesses and wrong, in the right places."""
    path = guessed_by(zoo, tmp_path / "zoo", {"notes": "base"})
    manifest = Manifest.load(path / "manifest.json")
    twin = replace(manifest.models["base"], surrogate=manifest.models["notes"].surrogate)
    twins = {"one": twin, "base": manifest.models["base"]}
    (path / "manifest.json").write_text(replace(manifest, models=twins).to_text())
    engine = engine_of(path)
    for number, length in enumerate((5, 40, 64)):
        engine.add_request(f"{number}", "one", words(length, number), replace(GREEDY, max_tokens=50))
    while engine.has_unfinished():
        engine.step()
        engine.check_integrity()
    tried, true = drafted(engine)
    assert tried > 60
    assert true >= tried - 8 * 3, "guesses behind the last token of an answer alone are wasted"
    assert engine.metrics().pages_used == 0


@pytest.mark.parametrize(
    "pages", [pytest.param(16 << 20, marks=pytest.mark.slow), 3 << 20], ids=["roomy", "tight"]
)
def test_answers_are_those_without_and_all_pages_come_back(
    zoo: Path, tmp_path: Path, dice: random.Random, pages: int
) -> None:
    path = guessed_by(zoo, tmp_path / "zoo", {"base": "small", "notes": "base"})
    engine = engine_of(path, kv_cache_bytes=pages, max_num_seqs=5)
    alone = LLMEngine(zoo, EngineConfig(precision="f32", num_threads=1, kv_cache_bytes=16 << 20))
    asked = {
        f"{n}": (("base", "notes")[n % 2], words(dice.randint(3, 90), n), dice.randint(1, 60))
        for n in range(12)
    }
    expected = {
        name: ask(alone, model, prompt, replace(GREEDY, max_tokens=count))[0]
        for name, (model, prompt, count) in asked.items()
    }
    waiting, found = list(asked), {name: list[int]() for name in asked}
    while waiting or engine.has_unfinished():
        for name in [waiting.pop() for _ in range(min(len(waiting), dice.randint(0, 2)))]:
            model, prompt, count = asked[name]
            engine.add_request(name, model, prompt, replace(GREEDY, max_tokens=count))
            engine.add_request(f"gone {name}", model, prompt, replace(GREEDY, max_tokens=count))
        for output in engine.step():
            if output.request_id in found:
                found[output.request_id] += output.token_ids
        engine.check_integrity()
        for name in [name for name in engine._requests if name.startswith("gone") and dice.random() < 0.1]:
            engine.abort(name)
    assert found == expected
    metrics = engine.metrics()
    assert metrics.pages_used == 0
    assert not engine._draft_models._followers
    assert not engine._draft_models._barred
    tried, true = drafted(engine)
    assert 0 < true < tried
    if pages == 3 << 20:
        assert metrics.preemptions_total > 0


def test_pages_are_given_back_before_anybody_is_preempted(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RowChoice, "choose", lambda *_: Option(3, 3))
    monkeypatch.setattr(Balances, "at_stake", lambda *_: 1.0)
    engine = engine_of(guessed_by(zoo, tmp_path / "zoo", {"notes": "base"}))
    cache = engine._zoo.caches[engine._zoo.models["base"].chain.family]
    long = replace(GREEDY, max_tokens=400)
    engine.add_request("first", "notes", words(64, 1), long)
    while not engine._draft_models.sequences(cache):
        engine.step()
        assert engine.has_unfinished(), "it would have ended"
    held = engine._draft_models.sequences(cache)
    assert [seq.request_id for seq in held] == ["first"]
    cache.resize(engine.metrics().pages_used + 6)
    engine.add_request("second", "base", words(30, 2), replace(GREEDY, max_tokens=2))
    while "second" in engine._requests:
        engine.step()
        engine.check_integrity()
    assert not engine._draft_models.sequences(cache)
    assert engine.metrics().preemptions_total == 0
    before = drafted(engine)[0]
    engine.step()
    assert drafted(engine)[0] == before, "what others needed is not asked for again"
    engine.abort("first")
    engine.check_integrity()
    assert engine.metrics().pages_used == 0


def test_long_texts_are_followed_once_answers_are_long(
    zoo: Path, tmp_path: Path, dice: random.Random
) -> None:
    engine = engine_of(guessed_by(zoo, tmp_path / "zoo", {"base": "small"}))
    engine.add_request("r", "base", words(300, 1), replace(GREEDY, max_tokens=60))
    counts = []
    while engine.has_unfinished():
        before = drafted(engine)[0]
        for output in engine.step():
            if drafted(engine)[0] > before:
                counts.append(output.num_generated)
    assert counts
    assert min(counts) > 18, "300 tokens are worth an answer of 19 at least"


def test_models_that_go_guess_no_more(zoo: Path, tmp_path: Path, dice: random.Random) -> None:
    path = guessed_by(zoo, tmp_path / "zoo", {"base": "small"})
    engine, prompt = engine_of(path), words(20, 1)
    expected = ask(engine, "base", prompt, replace(GREEDY, speculate=False))[0]
    engine.add_request("r", "base", prompt, GREEDY)
    tokens: list[int] = []
    for _ in range(4):
        for output in engine.step():
            tokens += output.token_ids
    compile_models({}, path, CompileOptions(verify=False, profile=False), remove=["small"])
    assert Manifest.load(path / "manifest.json").models["base"].surrogate is None
    assert "small" in engine.reload().removed
    while engine.has_unfinished():
        for output in engine.step():
            tokens += output.token_ids
        engine.check_integrity()
    assert tokens == expected
    before = drafted(engine)[0]
    assert ask(engine, "base", prompt, GREEDY)[0] == expected
    assert drafted(engine)[0] == before


def test_zoo_compile_tries_models_by_name(
    zoo: Path, demo_family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from blockzoo.build import draft_trial, surrogates
    from blockzoo.zoo.errors import ZooError

    monkeypatch.setattr(draft_trial, "_NUM_TEXTS", 4)
    monkeypatch.setattr(draft_trial, "_NUM_TOKENS", 64)
    monkeypatch.setattr(surrogates, "LEAST_SPEEDUP", 0.0)
    path = Path(shutil.copytree(zoo, tmp_path / "zoo"))
    fast = CompileOptions(verify=False, profile=False)
    for kind, who in (("small", "small"), ("notes", "notes")):
        compile_models({"base": demo_family["base"]}, path, replace(fast, surrogate=kind))
        found = Manifest.load(path / "manifest.json").models["base"].surrogate
        assert found is not None
        assert (found.model, found.blocks) == (who, {})
    manifest = Manifest.load(path / "manifest.json")
    assert surrogates._drafters(manifest, "base", "auto") == ["small"], "none of the own size"
    assert surrogates._drafters(manifest, "small", "auto") == []
    assert found.acceptance[0] > 0.5, "a fine-tune often says what its base says"
    with pytest.raises(ZooError, match="--surrogate nobody: no other model"):
        compile_models({"base": demo_family["base"]}, path, replace(fast, surrogate="nobody"))
