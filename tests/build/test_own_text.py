"""What a model is looked at over and judged by: chats where it has a template, its own text else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blockzoo.build import calibration
from blockzoo.build.chats.questions import CALIBRATION, JUDGED, chats
from blockzoo.build.own_text import OwnText
from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.build.sources import Source, open_sources
from blockzoo.engines.openvino import OpenVINOEngines
from blockzoo.engines.probe import ProbeChain
from blockzoo.zoo.store import Zoo

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"


@pytest.fixture
def model(make_model: Callable[..., Any], save: Callable[..., Path], tmp_path: Path) -> Path:
    save(make_model("llama", 3), tmp_path / "m")
    return tmp_path / "m"


def own_text(folder: Path, tmp_path: Path) -> tuple[OwnText, Zoo, Source]:
    compile_models({"m": folder}, tmp_path / "z", CompileOptions(verify=False, profile=False))
    zoo, source = Zoo.open(tmp_path / "z"), open_sources({"m": folder}, None)[0]
    maker = OpenVINOEngines("f32", 1)
    text = OwnText(source, zoo.manifest.models["m"], zoo, 8, "built-in", (), lambda _: maker, lambda *_: None)
    return text, zoo, source


def test_no_question_is_both_looked_at_and_judged() -> None:
    assert not {*CALIBRATION} & {*JUDGED}
    assert len({*JUDGED}) == len(JUDGED)


def test_a_model_with_a_template_is_judged_by_its_greedy_answers(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "NUM_TOKENS", 96)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    text, zoo, source = own_text(model, tmp_path)
    asked = chats(source.tokenizer, JUDGED, source.config.vocab_size)
    record = zoo.manifest.models["m"]
    chain = ProbeChain(
        OpenVINOEngines("f32", 1), [zoo.read_block(k) for k in record.chain], record.config, 256
    )
    texts = text.judged()
    assert len(texts) == len(JUDGED)
    for prompt, (tokens, start) in zip(asked, texts, strict=True):
        assert list(tokens[: start + 1]) == prompt
        assert not {*tokens[start + 1 :]} & {*source.end_ids}
        best = chain.forward(tokens, 0)[start:].argmax(axis=1)
        assert best[:-1].tolist() == list(tokens[start + 1 :])
        assert len(best) == 48 or best[-1] in source.end_ids  # the whole answer
    looked_at = chats(source.tokenizer, CALIBRATION, source.config.vocab_size)
    begun = [tuple(tokens[:24]) for tokens in text.calibration()]
    assert {tuple(prompt[:24]) for prompt in looked_at} & {*begun}


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no') }}", "{% if %}"])
def test_others_are_judged_by_text_that_was_not_looked_at(
    template: str | None, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "NUM_TOKENS", 32)
    if template is not None:
        (model / "chat_template.jinja").write_text(template)
    text, _, source = own_text(model, tmp_path)
    assert chats(source.tokenizer, JUDGED, source.config.vocab_size) == []
    judged, looked_at = text.judged(), text.calibration()
    assert [start for _, start in judged] == [0, 0]
    assert len(looked_at) == 6
    assert not {tuple(tokens) for tokens, _ in judged} & set(map(tuple, looked_at))


def test_tokens_that_the_model_has_not_are_not_asked(model: Path) -> None:
    (model / "chat_template.jinja").write_text(TEMPLATE)
    source = open_sources({"m": model}, None)[0]
    assert len(chats(source.tokenizer, JUDGED, source.config.vocab_size)) == len(JUDGED)
    assert chats(source.tokenizer, JUDGED, 64) == []
