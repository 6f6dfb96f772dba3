"""How answers are chosen where a request does not say: generation_config.json, of a model or its base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.server_config.openai.catalog import ServedModel
from blockzoo.server_config.openai.fields import Fields
from blockzoo.server_config.openai.requests import read_chat, read_completion
from blockzoo.server_config.openai.responses import read_response
from blockzoo.zoo.generation_defaults import sampling_defaults

TEMPLATES = Path(__file__).parents[2] / "runtime/text/chat_templates"
CONFIG = {"do_sample": True, "temperature": 0.3, "top_p": 0.8, "top_k": 3, "repetition_penalty": 1.3}
GREEDY = {"do_sample": False, "temperature": 0.9, "top_k": 5, "max_new_tokens": 7}
PROMPT = "def parse(line):\n    key, value = line."
MESSAGES = [{"role": "user", "content": PROMPT}]


def served(config) -> ServedModel:
    return ServedModel("m", None, 0, Path(), sampling_defaults(config))


def params(read, config, body):
    return (found[0] if isinstance(found := read(Fields(body), served(config)), tuple) else found).params


@pytest.mark.parametrize(
    ("read", "body", "limit", "tokens"),
    [
        (read_completion, {"prompt": "x"}, "max_tokens", 16),
        (read_chat, {"messages": MESSAGES}, "max_completion_tokens", 1_000_000),
        (read_response, {"input": "x"}, "max_output_tokens", 1_000_000),
    ],
)
def test_what_a_request_does_not_say_the_model_does(read, body, limit, tokens):
    def seen(config, **said):
        found = params(read, config, {**body, **said})
        return found.temperature, found.top_p, found.top_k, found.repetition_penalty, found.max_tokens

    chat = read is not read_completion  # clients count on the 16 tokens of a completion
    assert seen(None) == (1.0, 1.0, 0, 1.0, tokens)
    assert seen(CONFIG) == (0.3, 0.8, 3, 1.3, tokens)
    assert seen(CONFIG, temperature=1, top_p=1, top_k=0) == (1.0, 1.0, 0, 1.3, tokens)
    assert seen(GREEDY) == (0.0, 1.0, 0, 1.0, 7 if chat else 16)
    assert seen(GREEDY, temperature=0.5, **{limit: 9}) == (0.5, 1.0, 0, 1.0, 9)
    assert seen({"max_new_tokens": 10**12})[-1] == tokens


@pytest.fixture(scope="module")
def zoo(demo_family, tmp_path_factory) -> Path:
    """`calm` and `greedy` have a generation_config.json; of calm's adapters one has its own; `plain` none."""
    folder = tmp_path_factory.mktemp("defaults")
    for name, config in (("calm", CONFIG), ("greedy", GREEDY), ("plain", None)):
        shutil.copytree(demo_family["base"], folder / name)
        shutil.copy(TEMPLATES / "qwen2.5.jinja", folder / name / "chat_template.jinja")
        (folder / name / "generation_config.json").unlink(missing_ok=True)
        if config is not None:
            (folder / name / "generation_config.json").write_text(json.dumps(config))
    for name in ("heir", "own"):
        shutil.copytree(demo_family["notes"], folder / name)
    (folder / "own/generation_config.json").write_text(json.dumps({"temperature": 0.0}))
    sources = {name: folder / name for name in ("calm", "greedy", "plain")}
    sources |= {name: f"{folder / name}@calm" for name in ("heir", "own")}
    compile_models(sources, folder / "zoo", CompileOptions(verify=False, profile=False))
    return folder / "zoo"


def ask(endpoint, model, **said):
    asked = {"model": model, "prompt": PROMPT, "max_tokens": 12, "seed": 5, **said}
    extra = {name: asked.pop(name) for name in ("top_k", "repetition_penalty") if name in asked}
    return endpoint.client.completions.create(**asked, extra_body=extra).choices[0].text


def test_a_model_an_adapter_and_its_base(serve_openai, zoo):
    endpoint = serve_openai(zoo, "--precision", "f32")
    said = {name: value for name, value in CONFIG.items() if name != "do_sample"}
    assert ask(endpoint, "calm") == ask(endpoint, "plain", **said) != ask(endpoint, "plain")
    assert ask(endpoint, "heir") == ask(endpoint, "heir", **said)
    assert ask(endpoint, "own") == ask(endpoint, "own", **{**said, "temperature": 0})
    assert ask(endpoint, "greedy") == ask(endpoint, "plain", temperature=0)
    chat = endpoint.client.chat.completions.create(
        model="greedy", messages=MESSAGES, extra_body={"ignore_eos": True}
    )
    assert (chat.usage.completion_tokens, chat.choices[0].finish_reason) == (7, "length")
    response = endpoint.client.responses.create(model="calm", input=PROMPT, max_output_tokens=4)
    assert (response.temperature, response.top_p) == (0.3, 0.8)


def test_they_can_be_turned_off(serve_openai, zoo):
    endpoint = serve_openai(zoo, "--precision", "f32", "--generation-config", "none")
    plain = ask(endpoint, "plain")
    assert ask(endpoint, "calm") == ask(endpoint, "greedy") == plain
    assert ask(endpoint, "plain", temperature=1, top_p=1) == plain
