"""Surrogates guess over the model's own K and V: answers stay as they are, and nothing of a guess is left."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quiet import Live, Quiet, ask, check_equal, note, words

from blockzoo.runtime import EngineConfig, LLMEngine, SamplingParams
from blockzoo.zoo.manifest import Manifest, ModelRecord, SurrogateRecord

GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, logprobs=0)


def with_surrogates(zoo: Path, folder: Path, surrogates: Mapping[str, Mapping[int, str]]) -> Path:
    """The zoo with other surrogates, by model."""
    manifest = Manifest.load(zoo / "manifest.json")
    for name, blocks in surrogates.items():
        found = SurrogateRecord("layers", None, dict(blocks), (0.9, 0.8), 0.5, 1.5, 1, "built-in")
        manifest.models[name] = replace(manifest.models[name], surrogate=found)
    folder.mkdir()
    for part in ("blocks", "tokenizers"):
        (folder / part).symlink_to(zoo / part)
    (folder / "manifest.json").write_text(Manifest.from_text(manifest.to_text()).to_text())
    return folder


def without(model: ModelRecord, *positions: int) -> dict[int, str]:
    return {at: key for at, key in enumerate(model.chain) if at not in positions}


def surrogates_of(models: Mapping[str, ModelRecord]) -> dict[str, dict[int, str]]:
    """Of the demo's models: two leave layers out, one has another model's blocks."""
    last = len(models["base"].chain) - 1
    borrowed = {
        at: key if at >= last - 2 else models["base"].chain[at]
        for at, key in enumerate(models["solver"].chain)
    }
    return {
        "base": without(models["base"], 3, 4),
        "notes": without(models["notes"], 3, 4, 6),
        "solver": borrowed,
    }


@pytest.fixture(scope="module")
def zoo(demo_zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Surrogates that leave layers out, parts of layers, and that have another model's blocks."""
    models = Manifest.load(demo_zoo / "manifest.json").models
    surrogates = surrogates_of(models) | {"notes-merged": without(models["notes-merged"], 5, 8)}
    return with_surrogates(demo_zoo, tmp_path_factory.mktemp("surrogates") / "zoo", surrogates)


def config(**settings: Any) -> EngineConfig:
    return EngineConfig(
        precision="f32", speculate="auto", num_threads=1, **{"kv_cache_bytes": 16 << 20, **settings}
    )


def drafted(engine: LLMEngine) -> tuple[int, int]:
    metrics = engine.metrics()
    tried = sum(n for (_, who), n in metrics.drafted_tokens_total.items() if who == "surrogate")
    return tried, sum(n for (_, who), n in metrics.accepted_tokens_total.items() if who == "surrogate")


@pytest.mark.parametrize(
    "pages", [pytest.param(16 << 20, marks=pytest.mark.slow), 2 << 20], ids=["roomy", "tight"]
)
def test_answers_are_those_without(demo_zoo: Path, zoo: Path, dice: random.Random, pages: int) -> None:
    engine, quiet = LLMEngine(zoo, config(kv_cache_bytes=pages, max_num_seqs=6)), Quiet(demo_zoo)
    shared, found, aborted = words(40, 1), dict[str, Live](), set[str]()
    waiting = [f"{number}" for number in range(14)]
    models = ("base", "notes", "notes-merged", "solver", "base-sharded")
    while waiting or engine.has_unfinished():
        for name in [waiting.pop() for _ in range(min(len(waiting), dice.randint(0, 2)))]:
            prompt = shared[: dice.choice([0, 33, 40])] + words(dice.randint(3, 30), int(name) + 10)
            live = found[name] = Live(models[int(name) % 5], prompt, dice.randint(1, 50))
            params = SamplingParams(max_tokens=live.max_tokens, temperature=0.0, ignore_eos=True, logprobs=0)
            engine.add_request(name, live.model, prompt, params)
            engine.add_request(f"gone {name}", live.model, prompt, params)
        for output in engine.step():
            if output.request_id in found:
                note(found[output.request_id], output)
        engine.check_integrity()
        for name in [name for name in engine._requests if name.startswith("gone") and dice.random() < 0.1]:
            engine.abort(name)
            aborted.add(name)
    for live in found.values():
        check_equal(live, quiet.answer(live))
    assert aborted
    metrics = engine.metrics()
    assert metrics.pages_used == 0
    assert metrics.pages_free + metrics.pages_cached == metrics.pages_total
    tried, true = drafted(engine)
    assert 0.1 * tried < true < tried, "wrong guesses and right ones were tried"
    if pages == 2 << 20:
        assert metrics.preemptions_total > 0


def test_sampled_answers_are_those_without(zoo: Path, dice: random.Random) -> None:
    """Each token is drawn as without, with the same draw: so answers are equal, not only distributions."""
    engine = LLMEngine(zoo, config())
    for seed in range(6):
        params = replace(GREEDY, temperature=0.8, top_p=0.9, repetition_penalty=1.2, seed=seed)
        prompt = words(20, seed)
        tokens = ask(engine, "base", prompt, params)[0]
        assert tokens == ask(engine, "base", prompt, replace(params, speculate=False))[0]
    assert drafted(engine)[1] > 0


def test_a_surrogate_of_all_its_models_blocks_is_never_wrong(
    demo_zoo: Path, tmp_path: Path, dice: random.Random
) -> None:
    """Only where it reads the K and V of the model, LoRA and all, and writes in the right places."""
    models = Manifest.load(demo_zoo / "manifest.json").models
    names = ("base", "notes", "solver")
    zoo = with_surrogates(demo_zoo, tmp_path / "zoo", {name: without(models[name]) for name in names})
    engine = LLMEngine(zoo, config())
    for name in names:
        engine.add_request(name, name, words(40, 3), replace(GREEDY, max_tokens=60))
    while engine.has_unfinished():
        engine.step()
    tried, true = drafted(engine)
    assert tried > 60
    assert true >= tried - 8 * len(names), "guesses behind the last token of an answer alone are wasted"


def test_it_takes_no_engines_where_its_blocks_are_the_models(demo_zoo: Path, zoo: Path) -> None:
    for path in (demo_zoo, zoo):
        engine = LLMEngine(path, replace(config(), speculate="off"))
        assert not engine._zoo.topology.surrogate_of_model
    engine = LLMEngine(zoo, config())
    used = {i for chain in engine._zoo.topology.chains[:4] for i in engine._zoo.topology.chain_ids(chain)}
    assert {i for chain in engine._zoo.topology.chains for i in engine._zoo.topology.chain_ids(chain)} == used
    blocks = [i for span in engine._zoo.topology.spans for i in span.block_ids]
    assert len(blocks) == len(set(blocks)), "no block is in two engines"


def test_models_come_and_go_with_their_surrogates(
    demo_zoo: Path, tmp_path: Path, dice: random.Random
) -> None:
    models = Manifest.load(demo_zoo / "manifest.json").models
    zoo = with_surrogates(demo_zoo, tmp_path / "zoo", {"base": without(models["base"], 5, 6)})
    engine, prompt = LLMEngine(zoo, config()), words(30, 4)
    expected = ask(engine, "base", prompt, replace(GREEDY, speculate=False))[0]
    engine.add_request("r", "base", prompt, GREEDY)
    tokens: list[int] = []
    after = with_surrogates(
        demo_zoo,
        tmp_path / "after",
        {"base": without(models["base"], 3), "notes": without(models["notes"], 8)},
    )
    for output in engine.step():
        tokens += output.token_ids
    (after / "manifest.json").replace(zoo / "manifest.json")
    assert engine.reload().replaced == ("base", "notes")
    while engine.has_unfinished():
        for output in engine.step():
            tokens += output.token_ids
    assert tokens == expected
    before = drafted(engine)[0]
    assert ask(engine, "notes", prompt, GREEDY)[0]
    assert drafted(engine)[0] > before
    engine.check_integrity()


def test_one_that_fails_harms_nobody(
    zoo: Path, dice: random.Random, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    engine, prompt = LLMEngine(zoo, config()), words(20, 9)
    expected = ask(engine, "base", prompt, replace(GREEDY, speculate=False))[0]

    def broken(*_: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr("blockzoo.runtime.serve.speculation.greedy_drafts", broken)
    assert ask(engine, "base", prompt, GREEDY)[0] == expected
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_without_a_form_alone(zoo: Path, dice: random.Random) -> None:
    from blockzoo.runtime.api.request import GuidedDecoding

    engine = LLMEngine(zoo, config())
    guided = GuidedDecoding("regex", "[a-z]{1,20}")
    ask(engine, "base", words(20, 2), replace(GREEDY, ignore_eos=False, guided=guided))
    assert drafted(engine)[0] == 0
    assert np.isfinite(ask(engine, "base", words(20, 2), GREEDY)[1]).all()
    assert drafted(engine)[0] > 0
