"""From tries to settings, and from settings to what requests get."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blockzoo.build.calibrate import NothingKnownError, calibrate
from blockzoo.build.calibrate.cli import main
from blockzoo.build.calibrate.follower import Follower, Run
from blockzoo.build.calibrate.search import CANDIDATES, Tried, choose
from blockzoo.runtime import LLM, SamplingParams
from blockzoo.zoo.demo.corpus import standard_library_texts
from blockzoo.zoo.errors import ManifestError
from blockzoo.zoo.manifest import Manifest, ReusePoint, ReuseRecord
from blockzoo.zoo.writer import ZooWriter

pytestmark = pytest.mark.usefixtures("steady_pace")
GREEDY = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
TEXTS = [
    text[500:900] for text, _ in zip(standard_library_texts(10**6, held_out=True), range(4), strict=False)
]
KNOWN = "first words\n" + "\n".join(TEXTS) + "\nand the last ones of all, which are in nobody's whole page"
PROMPT = "other words than before\n" + "\n".join(TEXTS[::-1]) + "\nQ:"


@pytest.fixture
def zoo(demo_zoo: Path, tmp_path: Path) -> Path:
    """Of two models, which load sooner than all."""
    path = Path(shutil.copytree(demo_zoo, tmp_path / "zoo"))
    with ZooWriter(path) as writer:
        models = {name: writer.manifest.models[name] for name in ("base", "solver")}
        writer.commit(replace(writer.manifest, models=models))
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": EDITED, "known": [KNOWN]}, {"prompt": KNOWN}, {"prompt": PROMPT}]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


EDITED = "first words\n" + "\n".join(TEXTS).replace(TEXTS[0][:8], "Changed:", 1) + "\nQ:"


@pytest.fixture
def seconds_by_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first token takes as long as what of its prompt is computed, however busy this machine is."""
    real = Follower.run

    def run(self: Follower, model: str, runs: Sequence[Run], *more: Any) -> None:
        real(self, model, runs, *more)
        for each in runs:
            each.first_s = each.recomputed

    monkeypatch.setattr(Follower, "run", run)


def point(index: int, agreement: float, speedup: float, computed: float) -> ReusePoint:
    return ReusePoint(CANDIDATES[index], computed, speedup, agreement, 0.01)


def test_the_cheapest_that_is_near_enough() -> None:
    curve = [point(0, 0.90, 6.0, 0.1), point(1, 0.97, 4.0, 0.2)]
    curve += [point(2, 0.98, 9.0, 0.3), point(3, 1.0, 1.2, 0.9)]
    assert choose(curve, 0.97, 1.5) == CANDIDATES[1]
    assert choose(curve, 0.975, 1.5) == CANDIDATES[2]
    assert choose(curve, 0.99, 1.5) is None  # near enough, but hardly faster
    assert choose(curve, 0.99, 1.1) == CANDIDATES[3]


def tried(*prompts: tuple[float | None, float]) -> Tried:
    """Of (margin, share of ten tokens that agree): a fifth is computed, in a quarter of the time."""
    found = Tried()
    for lead, agreement in prompts:
        found.agrees.append(np.arange(10) < 10 * agreement)
        found.kl.append(np.full(10, 1 - agreement))
        found.computed.append(0.2)
        found.costs.append(0.25)
        found.margins.append(lead)
    return found


def test_a_guard_is_chosen_on_every_other_prompt_and_judged_on_the_rest() -> None:
    fit = [(9.0, 1.0), (0.1, 0.5), (5.0, 1.0), (2.0, 0.8), (None, 1.0), (4.0, 0.9)]
    rest = [(3.0, 0.0), (4.0, 0.6), (9.0, 1.0), (7.0, 1.0), (None, 1.0), (5.0, 1.0)]
    both = tried(*(prompt for pair in zip(fit, rest, strict=True) for prompt in pair))
    point = both.guarded(CANDIDATES[0], 0.98)  # without 0.1 and 2.0
    assert point is not None
    assert point.settings == replace(CANDIDATES[0], guard=4.0)
    assert point.agreement == pytest.approx(5.6 / 6, abs=1e-3)  # of the rest, 3.0 alone is held back
    assert point.kl == pytest.approx(0.4 / 6, abs=1e-3)
    assert point.computed == pytest.approx(0.2 + 1 / 6, abs=1e-3)
    assert point.speedup == pytest.approx(1 / (0.25 + 1 / 6), abs=1e-2)
    assert choose([point], 0.93, 1.5) == point.settings
    assert choose([point], 0.95, 1.5) is None
    assert tried((None, 0.5), (0.3, 1.0)).guarded(CANDIDATES[0], 0.98) is None  # nothing is taken over there
    assert tried((0.3, 1.0)).guarded(CANDIDATES[0], 0.98) is None  # nothing to judge it on


@pytest.mark.slow
@pytest.mark.usefixtures("seconds_by_tokens")
def test_where_only_a_guard_keeps_a_model_near_that_is_shown(zoo: Path, tmp_path: Path) -> None:
    lines = [{"prompt": f"{i} {PROMPT}", "known": [KNOWN]} for i in range(2)]
    path = tmp_path / "two.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    record = calibrate(zoo, ["base"], path, agreement=1.0, speedup=1.0)["base"]
    guarded = [each for each in record.curve if each.settings.guard]
    unguarded = {replace(each.settings, guard=0.0) for each in guarded}
    assert unguarded <= set(CANDIDATES)
    for each in record.curve[: len(CANDIDATES)]:
        if each.agreement >= record.bf16_agreement:
            assert each.settings not in unguarded
    assert Manifest.load(zoo / "manifest.json").models["base"].reuse == record


@pytest.mark.usefixtures("seconds_by_tokens")
def test_the_command_writes_what_requests_then_get(
    zoo: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "curve.png"
    told = [str(zoo), "base", "--prompts", str(prompts), "--agreement", "0.01", "--speedup", "1"]
    assert main([*told, "--plot", str(picture)]) == 0
    assert "equal top tokens" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    record = Manifest.load(zoo / "manifest.json").models["base"].reuse
    assert record is not None
    assert record.settings in CANDIDATES
    assert record.num_prompts == 2  # of the line in between, nothing is known
    assert record.bf16_agreement > 0.5
    assert all(0 < each.computed < 1 and each.speedup > 0 for each in record.curve)
    assert (
        record.curve[len(CANDIDATES) - 1].computed > 0.5
    )  # of the texts in another order it takes nothing over
    assert record.settings == min(record.curve, key=lambda each: each.computed).settings
    assert [each.settings for each in record.curve] == list(CANDIDATES)  # all agree, so none has a guard
    llm = LLM(zoo, precision="f32", kv_cache_bytes=64 << 20, kv_reuse="approx")
    llm.generate("base", KNOWN, GREEDY)
    request = llm.engine.prepare("r", "base", PROMPT, GREEDY)
    assert request.seq.approximate is not None
    assert request.seq.approximate.recompute == record.settings.recompute
    assert llm.engine.prepare("s", "solver", PROMPT, GREEDY).seq.approximate is None  # was not asked


def test_where_nothing_is_near_enough_requests_are_computed_exactly(
    zoo: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(zoo), "base", "--prompts", str(prompts), "--speedup", "1000"]) == 0
    assert "computed exactly" in " ".join(capsys.readouterr().out.split())
    llm = LLM(zoo, precision="f32", kv_cache_bytes=64 << 20, kv_reuse="approx")
    answers = llm.generate("base", [KNOWN, PROMPT], GREEDY)
    assert llm.engine.metrics().approximate_tokens_total == 0
    assert llm.engine.metrics().approximate_declined_total == 2
    exact = LLM(zoo, precision="f32", kv_cache_bytes=64 << 20, prefix_caching=False)
    assert [a.token_ids for a in answers] == [
        a.token_ids for a in exact.generate("base", [KNOWN, PROMPT], GREEDY)
    ]
    own = LLM(zoo, precision="f32", kv_cache_bytes=64 << 20, approximate={"recompute": 0.1})  # the operator's
    own.generate("base", KNOWN, GREEDY)
    own.generate("base", PROMPT, GREEDY, kv_reuse="approx")
    assert own.engine.metrics().approximate_tokens_total > 0


def test_what_cannot_be_calibrated(zoo: Path, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no model 'bass'"):
        calibrate(zoo, ["bass"])
    with pytest.raises(ValueError, match="agreement is 99"):
        calibrate(zoo, ["base"], agreement=99)
    apart = tmp_path / "apart.jsonl"
    apart.write_text('{"prompt": "nothing of this is known"}\n')
    before = (zoo / "manifest.json").read_bytes()
    with pytest.raises(NothingKnownError, match="none of 1 prompts"):
        calibrate(zoo, ["base"], apart)
    assert main([str(zoo), "base", "--prompts", str(tmp_path / "none")]) == 2
    assert (zoo / "manifest.json").read_bytes() == before


def test_settings_out_of_range_are_refused(zoo: Path) -> None:
    manifest = Manifest.load(zoo / "manifest.json")
    for wrong in ({"recompute": 7.0}, {"guard": -1.0}):
        bad = replace(CANDIDATES[0], **wrong)
        record = ReuseRecord(bad, 0.99, 1.5, 1.0, 0.0, (), 1, 1, "built-in")
        models = manifest.models | {"base": replace(manifest.models["base"], reuse=record)}
        with pytest.raises(ManifestError, match="out of range"), ZooWriter(zoo) as writer:
            writer.commit(replace(manifest, models=models))
