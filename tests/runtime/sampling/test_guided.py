"""Guides: whatever the logits say, answers have the form; what cannot be compiled is told, with its place."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from blockzoo.runtime.api.errors import InvalidRequestError, SamplingError
from blockzoo.runtime.api.request import MAX_GUIDE_CHARS, GuidedDecoding, SamplingParams
from blockzoo.runtime.sampling import guided as guided_module
from blockzoo.runtime.sampling.guided import Guides
from blockzoo.runtime.sampling.sampler import Sampler, SamplerState
from blockzoo.runtime.text.tokenizer import Tokenizer

WIDTH = 2080  # of the logits: more than the tokenizer has tokens
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer(demo_family: dict[str, Path]) -> Tokenizer:
    return Tokenizer.load(demo_family["base"])


@pytest.fixture(scope="module")
def end(tokenizer, demo_family):
    return json.loads((demo_family["base"] / "config.json").read_text())["eos_token_id"]


@pytest.fixture(scope="module")
def guides():
    return Guides()


def generate(guides, tokenizer, end, guided, seed, max_tokens=400):
    """Tokens of a model that wants anything, up to the end of the answer."""
    params = SamplingParams(max_tokens=max_tokens, seed=seed, temperature=1.0, guided=guided)
    guide = guides.guide(params.guided, tokenizer, WIDTH, (end,))
    state = SamplerState(params, [5], WIDTH, (end,), guide=guide)
    rng, tokens = np.random.default_rng(seed), []
    while len(tokens) < max_tokens:
        logits = rng.standard_normal((1, WIDTH)).astype(np.float32)
        (token,) = Sampler().sample(logits, [state])
        if token.token_id == end:
            return tokens
        tokens.append(token.token_id)
    raise AssertionError("no end")


@pytest.mark.parametrize("seed", range(8))
def test_answers_have_the_form_whatever_the_model_wants(guides, tokenizer, end, seed):
    text = tokenizer.decode(
        generate(guides, tokenizer, end, GuidedDecoding("json_schema", json.dumps(SCHEMA)), seed)
    )
    value = json.loads(text)
    assert value.keys() == {"name", "age", "tags"}
    assert len(value["name"]) <= 8
    assert type(value["age"]) is int
    assert 0 <= value["age"] <= 120
    assert set(value["tags"]) <= {"a", "b"}

    text = tokenizer.decode(
        generate(guides, tokenizer, end, {"kind": "regex", "guide": "(ab|[c-e]é){2,3}"}, seed)
    )
    assert re.fullmatch("(ab|[c-e]é){2,3}", text)
    lark = 'start: "<" word ("," word)? ">"\nword: /[a-f]{1,5}/'
    text = tokenizer.decode(generate(guides, tokenizer, end, GuidedDecoding("lark", lark), seed))
    assert re.fullmatch("<[a-f]{1,5}(,[a-f]{1,5})?>", text)


def test_any_object_is_one(guides, tokenizer, end):
    state = SamplerState(
        SamplingParams(temperature=0.0, guided=GuidedDecoding("json")),
        [5],
        WIDTH,
        (end,),
        guide=guides.guide(GuidedDecoding("json"), tokenizer, WIDTH, (end,)),
    )
    likes = tokenizer.encode('{"a": [1, null]}', add_special_tokens=False)
    for token in [*likes, end]:
        logits = np.full((1, WIDTH), -1.0, np.float32)
        logits[0, token] = 2.0
        assert Sampler().sample(logits, [state])[0].token_id == token


def test_a_state_made_anew_goes_on_as_the_old_one(guides, tokenizer, end):
    guided = GuidedDecoding("json_schema", json.dumps(SCHEMA))
    tokens = generate(guides, tokenizer, end, guided, 3)
    params = SamplingParams(guided=guided)
    for cut in (0, 1, len(tokens) // 2, len(tokens)):
        guide = guides.guide(guided, tokenizer, WIDTH, (end,))
        SamplerState(params, [5], WIDTH, (end,), generated_token_ids=tokens[:cut], guide=guide)
        following = [*tokens, end][cut]
        assert guide.allowed()[following]
        assert not guide.allowed()[tokenizer.vocab_size :].any()


def test_guides_of_one_text_do_not_touch_each_other(guides, tokenizer, end):
    guided = GuidedDecoding("regex", "abc")
    first, second = (guides.guide(guided, tokenizer, WIDTH, (end,)) for _ in range(2))
    for token in tokenizer.encode("abc", add_special_tokens=False):
        first.append(token)
    assert np.flatnonzero(first.allowed()).tolist() == [end]
    assert not second.allowed()[end]


def test_a_token_that_was_not_allowed_fails_the_row_alone(guides, tokenizer, end):
    guided = GuidedDecoding("regex", "abc")
    states = [
        SamplerState(
            SamplingParams(guided=guided),
            [5],
            WIDTH,
            (end,),
            guide=guides.guide(guided, tokenizer, WIDTH, (end,)),
        )
        for _ in range(2)
    ]
    states[0].append(tokenizer.encode("z", add_special_tokens=False)[0])
    failed, token = Sampler().sample(np.zeros((2, WIDTH), np.float32), states)
    assert isinstance(failed, SamplingError)
    assert "guide" in str(failed)
    assert tokenizer.decode([token.token_id])[0] == "a"


@pytest.mark.parametrize(
    ("kind", "guide", "message"),
    [
        ("json_schema", "{", "the JSON schema is not JSON"),
        ("json_schema", "[1]", "the JSON schema is a list; expected an object"),
        ("json_schema", '{"type": "objct"}', "at #: .*objct"),
        (
            "json_schema",
            '{"type": "object", "properties": {"a": {"type": "array", "items": {"type": "intger"}}}}',
            "at #/properties/a/items: .*intger",
        ),
        (
            "json_schema",
            '{"properties": {"a": {"unevaluatedProperties": false}}}',
            "at #/properties/a: Unimplemented",
        ),
        ("json_schema", '{"$ref": "#/$defs/x"}', "at #: Pointer '/.defs/x' does not exist"),
        ("json_schema", '{"$ref": "http://127.0.0.1:1/x"}', "at #: Resource"),
        (
            "json_schema",
            '{"anyOf": [{"type": "string"}, {"pattern": "(", "type": "string"}]}',
            "at #/anyOf/1: ",
        ),
        ("regex", "a{1,3}(", "unclosed group"),
        ("lark", 'start: "x" foo', 'unknown name: "foo"'),
        ("lark", "", "guide is ''; expected a text"),
        ("json", "x", 'expected a text, "" for json alone'),
        ("yaml", "x", "guided.kind is 'yaml'; expected one of json, json_schema, regex, lark"),
        ("regex", "a" * (MAX_GUIDE_CHARS + 1), "has 65537 characters"),
        ("regex", "\ud800", "lone surrogates"),
    ],
)
def test_what_cannot_be_used_is_told_with_its_place(guides, tokenizer, end, kind, guide, message):
    with pytest.raises(InvalidRequestError, match=message) as caught:
        guides.guide(GuidedDecoding(kind, guide), tokenizer, WIDTH, (end,))
    assert len(str(caught.value)) < 700


def test_too_much_work_is_refused(tokenizer, end, monkeypatch):
    guided = GuidedDecoding("regex", "(a|bc|[d-f]{1,20}){2,40}")
    Guides().guide(guided, tokenizer, WIDTH, (end,))
    monkeypatch.setitem(guided_module._LIMITS, "initial_lexer_fuel", 10)
    with pytest.raises(InvalidRequestError, match="guided: the regex cannot be used: "):
        Guides().guide(guided, tokenizer, WIDTH, (end,))


def test_guides_need_an_end_and_take_no_bounds_beyond(guides, tokenizer):
    with pytest.raises(InvalidRequestError, match="no token that ends an answer"):
        guides.guide(GuidedDecoding("json"), tokenizer, WIDTH, ())
    for beyond in ({"ignore_eos": True}, {"min_tokens": 1}):
        with pytest.raises(InvalidRequestError, match="guided cannot go with"):
            SamplingParams(guided={"kind": "json"}, **beyond)
    for wrong in ("json", {"guide": "x"}, {"kind": "json", "x": 1}):
        with pytest.raises(InvalidRequestError, match="guided is "):
            SamplingParams(guided=wrong)


@pytest.mark.parametrize("more", [{}, {"bad_words": True}, {"presence_penalty": 0.5}])
def test_the_likeliest_allowed_token_is_taken(guides, tokenizer, end, more):
    """Whether the likeliest of all is allowed or not, at every step, and with ties."""
    rng = np.random.default_rng(0)
    guided = GuidedDecoding("json_schema", json.dumps(SCHEMA))
    banned = [rng.integers(0, WIDTH, 1).tolist() for _ in range(20)] if more.pop("bad_words", False) else []
    params = SamplingParams(max_tokens=400, temperature=0.0, guided=guided, **more)
    judge = guides.guide(guided, tokenizer, WIDTH, (end,))
    state = SamplerState(
        params, [], WIDTH, (end,), banned, guide=guides.guide(guided, tokenizer, WIDTH, (end,))
    )
    sampler, taken = Sampler(), []
    for step in range(60):
        logits = rng.integers(-8, 8, (1, WIDTH)).astype(np.float32)
        allowed = np.flatnonzero(judge.allowed())
        if step % 2:
            logits[0, rng.choice(allowed, min(3, len(allowed)))] = 9.0
        expected = np.full(WIDTH, -np.inf, np.float32)
        expected[allowed] = logits[0, allowed]
        expected[[ids[0] for ids in banned]] = -np.inf
        for token in set(taken):
            expected[token] -= more.get("presence_penalty", 0.0)
        if not np.isfinite(expected.max()):
            break
        (found,) = sampler.sample(logits, [state])
        assert found.token_id == expected.argmax()
        judge.append(found.token_id)
        taken.append(found.token_id)
        if found.token_id == end:
            break
    assert len(taken) > 8


@pytest.mark.parametrize(
    ("style", "answer", "must_come", "text"),
    [
        (0, "", True, '{"name":"'),
        (0, '{"', True, 'name":"'),
        (1, "", True, '{"name": "'),
        (1, '{"name":', True, ' "'),
        (1, '{"name":"', False, ""),  # not in this style
        (0, '{"name":"', False, ""),  # a value begins
        (0, '{"name":"Kira', False, '","count":'),  # it may end here
        (1, '{"name": "Kira', False, '", "count": '),
        (0, '{"name":"Kira","count":4', False, ',"place":"'),
        (0, '{"name":"Kira","count":', False, ""),
        (0, '{"name":"Kira","count":4,"place":"', False, ""),
        (0, '{"name":"Kira","count":4,"place":"York', False, '"}'),
        (0, '{ "name":', False, ""),
    ],
)
def test_json_is_guessed_as_it_is_mostly_written(guides, tokenizer, end, style, answer, must_come, text):
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "count": {"type": "integer"},
            "place": {"type": ["string", "null"]},
        },
        "required": ["name", "count", "place"],
        "additionalProperties": False,
    }
    guide = guides.guide(
        GuidedDecoding("json_schema", json.dumps(schema)), tokenizer, tokenizer.vocab_size, (end,)
    )
    for token_id in tokenizer.encode(answer, add_special_tokens=False):
        guide.append(token_id)
    tokens, certain = guide.likely(style)
    assert tokenizer.decode(tokens).strip() == text.strip()
    assert certain == must_come
    assert guide.num_allowed(tokens) == len(tokens)
    assert guide.copy().likely(style) == (tokens, certain), "at the same place"
    assert guide.likely(style) == (tokens, certain), "the guide is where it was"
