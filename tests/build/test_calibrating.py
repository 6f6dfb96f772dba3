"""From tries to settings, and from settings to what requests get."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from blockzoo.build.calibrate import NothingKnownError, calibrate
from blockzoo.build.calibrate.cli import main
from blockzoo.build.calibrate.search import CANDIDATES, choose
from blockzoo.runtime import LLM, SamplingParams
from blockzoo.zoo.demo.corpus import standard_library_texts
from blockzoo.zoo.errors import ManifestError
from blockzoo.zoo.manifest import Manifest, ReusePoint, ReuseRecord
from blockzoo.zoo.writer import ZooWriter

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


def point(index: int, agreement: float, speedup: float, computed: float) -> ReusePoint:
    return ReusePoint(CANDIDATES[index], computed, speedup, agreement, 0.01)


def test_the_cheapest_that_is_near_enough() -> None:
    curve = [point(0, 0.90, 6.0, 0.1), point(1, 0.97, 4.0, 0.2)]
    curve += [point(2, 0.98, 9.0, 0.3), point(3, 1.0, 1.2, 0.9)]
    assert choose(curve, 0.97, 1.5) == CANDIDATES[1]
    assert choose(curve, 0.975, 1.5) == CANDIDATES[2]
    assert choose(curve, 0.99, 1.5) is None  # near enough, but hardly faster
    assert choose(curve, 0.99, 1.1) == CANDIDATES[3]


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
    assert record.curve[-1].computed > 0.5  # of the texts in another order it takes nothing over
    assert record.settings == min(record.curve, key=lambda each: each.computed).settings
    assert [each.settings for each in record.curve] == list(CANDIDATES)
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
    bad = replace(CANDIDATES[0], recompute=7.0)
    record = ReuseRecord(bad, 0.99, 1.5, 1.0, 0.0, (), 1, 1, "built-in")
    models = manifest.models | {"base": replace(manifest.models["base"], reuse=record)}
    with pytest.raises(ManifestError, match="out of range"), ZooWriter(zoo) as writer:
        writer.commit(replace(manifest, models=models))
