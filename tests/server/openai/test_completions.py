"""/v1/completions and what is about models and tokens, on a real server, by OpenAI's own client."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest
import torch
from quiet import near
from transformers import AutoModelForCausalLM

from blockzoo.runtime import LLM, SamplingParams

PROMPT = "def parse(line):\n    key, value = line."
FOREVER = {"max_tokens": 4000, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def endpoint(serve_openai, demo_zoo):
    options = ("--kv-reuse", "on-request", "--max-num-seqs", "96", "--precision", "f32")
    return serve_openai(demo_zoo, *options)


@pytest.fixture(scope="module")
def client(endpoint):
    return endpoint.client


@pytest.fixture(scope="module")
def llm(demo_zoo):
    return LLM(demo_zoo, precision="f32")


def test_models_and_what_they_are_adapters_of(client):
    models = {model.id: model for model in client.models.list()}
    assert set(models) >= {"base", "notes", "solver"}
    assert (models["notes"].parent, models["base"].parent, models["solver"].parent) == ("base", None, None)
    assert client.models.retrieve("notes") == models["notes"]
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("nobody")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("model", ["base", "notes", "solver"])
@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0},
        {"temperature": 0.8, "top_p": 0.9, "seed": 7, "presence_penalty": 0.5, "frequency_penalty": 0.25},
        {"seed": 2**63 + 5, "extra": {"top_k": 20, "min_p": 0.05, "repetition_penalty": 1.2}},
    ],
)
def test_answers_are_those_of_the_library(client, llm, model, sampling):
    extra = sampling.get("extra", {})
    plain = {name: value for name, value in sampling.items() if name != "extra"}
    params = SamplingParams(max_tokens=24, **plain, **extra)
    (expected,) = llm.generate(model, [PROMPT], params, progress=False)
    asked = {"model": model, "prompt": PROMPT, "max_tokens": 24, **plain, "extra_body": extra}
    answer = client.completions.create(**asked)
    assert answer.choices[0].text == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert answer.usage.completion_tokens == len(expected.token_ids)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == expected.text
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + [
        expected.finish_reason
    ]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == answer.usage.total_tokens
    assert {chunk.usage for chunk in chunks[:-1]} == {None}


def test_the_default_is_sampled_and_of_16_tokens(client):
    asked = {"model": "base", "prompt": PROMPT, "extra_body": {"ignore_eos": True}}
    answers = [client.completions.create(**asked) for _ in range(4)]
    assert {answer.usage.completion_tokens for answer in answers} == {16}
    assert len({answer.choices[0].text for answer in answers}) > 1


def test_log_probabilities_are_those_of_the_library(client, llm):
    params = SamplingParams(max_tokens=12, temperature=0.0, logprobs=3)
    (expected,) = llm.generate("base", [PROMPT], params, progress=False)
    asked = {"model": "base", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "logprobs": 3}
    whole = client.completions.create(**asked).choices[0]
    assert "".join(whole.logprobs.tokens) == whole.text
    assert whole.logprobs.token_logprobs == pytest.approx([t.logprob for t in expected.logprobs], abs=2e-2)
    for tops, token in zip(whole.logprobs.top_logprobs, expected.logprobs, strict=True):
        assert list(tops.values()) == pytest.approx([value for _, value in token.top], abs=2e-2)
    for offset, token in zip(whole.logprobs.text_offset, whole.logprobs.tokens, strict=True):
        assert whole.text[offset : offset + len(token)] == token
    parts = [c.choices[0].logprobs for c in client.completions.create(**asked, stream=True)]
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        joined = [item for part in parts for item in getattr(part, name) or []]
        assert joined == near(getattr(whole.logprobs, name))


def test_prompts_are_echoed_with_their_log_probabilities(endpoint, client, demo_family):
    """As lm-evaluation-harness asks for them, to judge continuations: in token ids, against transformers."""
    texts = [PROMPT, "Größe = 🐢\n" * 30]
    asked = [endpoint.ask("POST", "/tokenize", {"model": "base", "prompt": text}) for text in texts]
    ids = [json.loads(text)["tokens"] for _, _, text in asked]
    model = AutoModelForCausalLM.from_pretrained(demo_family["base"], dtype=torch.float32)
    asked = {"model": "base", "prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    choices = client.completions.create(**asked).choices
    for choice, tokens, text in zip(choices, ids, texts, strict=True):
        with torch.no_grad():
            oracle = torch.log_softmax(model(torch.tensor([tokens])).logits[0], -1)[:-1]
        told = choice.logprobs
        assert choice.text.startswith(text)
        assert (told.token_logprobs[0], told.top_logprobs[0]) == (None, None)
        expected = oracle[range(len(oracle)), tokens[1:]].tolist()
        assert told.token_logprobs[1:-1] == pytest.approx(expected, abs=1e-3)
        for value, top, row in zip(told.token_logprobs[1:-1], told.top_logprobs[1:-1], oracle, strict=True):
            assert value in top.values()
            assert max(top.values()) == pytest.approx(row.max().item(), abs=1e-3)
        assert len(told.tokens) == len(tokens) + 1
        for offset, token in zip(told.text_offset, told.tokens, strict=True):
            if not token.startswith("bytes:\\x"):
                assert choice.text[offset : offset + len(token)] == token
    whole = [choice.to_dict() for choice in choices]
    parts = list(client.completions.create(**asked, stream=True))
    for index, choice in enumerate(whole):
        mine = [part.choices[0] for part in parts if part.choices[0].index == index]
        assert "".join(part.text for part in mine) == choice["text"]
        for name, values in choice["logprobs"].items():
            assert [x for part in mine if part.logprobs for x in getattr(part.logprobs, name)] == near(values)


def test_a_prompt_alone_is_judged(client):
    asked = {"model": "notes", "prompt": PROMPT, "logprobs": 3, "echo": True, "temperature": 0}
    alone = client.completions.create(**asked, max_tokens=0)
    longer = client.completions.create(**asked, max_tokens=2)
    (choice,), (other,) = alone.choices, longer.choices
    assert (choice.text, choice.finish_reason, alone.usage.completion_tokens) == (PROMPT, "length", 0)
    assert choice.logprobs.tokens == other.logprobs.tokens[:-2]
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(other.logprobs.token_logprobs[1:-2], abs=2e-2)
    (streamed,) = client.completions.create(**asked, max_tokens=0, stream=True)
    assert streamed.choices[0].logprobs.to_dict() == near(choice.logprobs.to_dict())
    assert streamed.choices[0].finish_reason == "length"


def test_the_token_told_is_among_the_likeliest_told(client):
    asked = {"model": "base", "prompt": PROMPT, "max_tokens": 24, "seed": 1, "logprobs": 1}
    told = client.completions.create(**asked, temperature=0).choices[0].logprobs
    assert {len(top) for top in told.top_logprobs} == {1}
    told = client.completions.create(**asked, temperature=2).choices[0].logprobs
    assert max(len(top) for top in told.top_logprobs) == 2
    for token, value, top in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
        assert top[token] >= value
        assert max(top.values()) == next(iter(top.values()))


def test_each_of_n_answers_has_a_seed_of_its_own(client):
    asked = {"model": "notes", "prompt": PROMPT, "max_tokens": 12}
    single = [client.completions.create(**asked, seed=5 + i).choices[0].text for i in range(3)]
    several = client.completions.create(**asked, seed=5, n=3)
    assert [choice.text for choice in several.choices] == single
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert several.usage.completion_tokens == 36
    texts = ["", "", ""]
    for chunk in client.completions.create(**asked, seed=5, n=3, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == single


def test_prompts_may_be_several_and_token_ids_and_echoed(endpoint, client):
    _, _, text = endpoint.ask("POST", "/tokenize", {"model": "base", "prompt": PROMPT})
    ids = json.loads(text)["tokens"]
    asked = {"model": "base", "max_tokens": 8, "temperature": 0}
    one = client.completions.create(**asked, prompt=PROMPT)
    assert client.completions.create(**asked, prompt=ids).choices[0].text == one.choices[0].text
    both = client.completions.create(**asked, prompt=[PROMPT, "x = ["], echo=True, n=2)
    assert [choice.text[: len(PROMPT)] for choice in both.choices[:2]] == [PROMPT] * 2
    assert both.choices[0].text == PROMPT + one.choices[0].text
    assert both.choices[3].text.startswith("x = [")
    assert both.usage.prompt_tokens > one.usage.prompt_tokens == len(ids)
    (echoed,) = client.completions.create(**asked, prompt=[ids], echo=True).choices
    assert echoed.text == both.choices[0].text
    streamed = client.completions.create(**asked, prompt=[ids], echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == echoed.text


def test_tokens_there_and_back(endpoint):
    for text in ("héllo  wörld\n", "", "🐢"):
        _, _, said = endpoint.ask("POST", "/tokenize", {"model": "base", "prompt": text})
        tokens = json.loads(said)["tokens"]
        assert json.loads(said)["count"] == len(tokens)
        _, _, said = endpoint.ask("POST", "/detokenize", {"model": "base", "tokens": tokens})
        assert json.loads(said) == {"prompt": text}


def test_stop_words_and_biases(client):
    asked = {"model": "base", "prompt": PROMPT, "max_tokens": 16, "temperature": 0}
    whole = client.completions.create(**asked, logprobs=0).choices[0]
    word = whole.text[4:8]
    stopped = client.completions.create(**asked, stop=word).choices[0]
    assert (stopped.text, stopped.finish_reason) == (whole.text[: whole.text.index(word)], "stop")
    biased = client.completions.create(**asked, logit_bias={"65": 100}, logprobs=0).choices[0]
    assert len(set(biased.logprobs.tokens)) == 1


def test_cached_tokens_are_counted_in_whole_pages(client):
    prompt = PROMPT * 40
    asked = {"model": "solver", "prompt": prompt, "max_tokens": 1}
    first, second = (client.completions.create(**asked).usage for _ in range(2))
    assert first.prompt_tokens_details.cached_tokens == 0
    cached = second.prompt_tokens_details.cached_tokens
    assert 0 < cached < second.prompt_tokens
    assert cached % 16 == 0
    again = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert again[-1].usage.prompt_tokens_details.cached_tokens == cached


def test_documents_and_kv_reuse_reach_the_engine(client):
    asked = {"model": "base", "prompt": PROMPT, "max_tokens": 4, "temperature": 0}
    extra = {"documents": ["a = 1\n", "b = 2\n"], "kv_reuse": "approx"}
    plain = client.completions.create(**asked).usage.prompt_tokens
    assert client.completions.create(**asked, extra_body=extra).usage.prompt_tokens > plain


def test_the_events_of_a_stream_are_openais(endpoint):
    body = {"model": "base", "prompt": PROMPT, "max_tokens": 3, "temperature": 0, "stream": True}
    status, headers, text = endpoint.ask("POST", "/v1/completions", body)
    assert status == 200
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert all("usage" not in chunk for chunk in chunks)


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        ({"model": "nobody"}, 404, "model", "model_not_found"),
        ({"model": None}, 400, "model", "missing_required_parameter"),
        ({"prompt": None}, 400, "prompt", "missing_required_parameter"),
        ({"prompt": []}, 400, "prompt", "invalid_value"),
        ({"prompt": [1, "a"]}, 400, "prompt[0]", "invalid_value"),
        ({"prompt": ""}, 400, None, None),
        ({"prompt": "x " * 20_000}, 400, None, "context_length_exceeded"),
        ({"prompt": [4_000_000]}, 400, None, None),
        ({"temprature": 1}, 400, "temprature", "unknown_parameter"),
        ({"temperature": 101}, 400, "temperature", "invalid_value"),
        ({"max_tokens": 0}, 400, "max_tokens", "invalid_value"),
        ({"max_tokens": "5"}, 400, "max_tokens", "invalid_value"),
        ({"n": 129}, 400, "n", "invalid_value"),
        ({"n": 65, "prompt": ["a", "b"]}, 400, "n", "invalid_value"),
        ({"n": True}, 400, "n", "invalid_value"),
        ({"seed": 2**64}, 400, "seed", "invalid_value"),
        ({"stop": 5}, 400, "stop", "invalid_value"),
        ({"logprobs": 21}, 400, "logprobs", "invalid_value"),
        ({"echo": True, "logprobs": 1, "documents": ["a"]}, 400, "documents", None),
        ({"echo": True, "max_tokens": 0}, 400, "max_tokens", "invalid_value"),
        ({"logit_bias": {"a": 1}}, 400, "logit_bias", "invalid_value"),
        ({"logit_bias": {"99999999": 1}}, 400, None, None),
        ({"suffix": "x"}, 400, "suffix", "unsupported_parameter"),
        ({"best_of": 4}, 400, "best_of", "invalid_value"),
        ({"stream": False, "stream_options": {"include_usage": True}}, 400, "stream_options", None),
        ({"stream_options": {"x": 1}}, 400, "stream_options.x", "unknown_parameter"),
        ({"kv_reuse": "all"}, 400, "kv_reuse", "invalid_value"),
        ({"documents": [""]}, 400, "documents[0]", "invalid_value"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests_say_what_is_wrong(endpoint, body, status, param, code, stream):
    body = {"model": "base", "prompt": "x", "max_tokens": 2, "stream": stream, **body}
    seen, _, text = endpoint.ask("POST", "/v1/completions", body)
    error = json.loads(text)["error"]
    assert (seen, error["param"], error["code"]) == (status, param, code), error
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    assert error["message"]


def test_fields_that_change_nothing_are_ignored(client):
    asked = {"model": "base", "prompt": PROMPT, "max_tokens": 2, "temperature": 0, "user": "me", "best_of": 1}
    client.completions.create(**asked, suffix=None, extra_body={"metadata": {"a": "b"}, "store": False})


def test_a_client_that_goes_away_frees_its_request(endpoint, client):
    before = endpoint.aborted()
    stream = client.completions.create(model="base", prompt="x", stream=True, n=3, **FOREVER)
    next(iter(stream))
    stream.close()
    endpoint.served.wait_for(lambda: endpoint.aborted() == before + 3)
    endpoint.wait_until_idle()

    body = {"model": "base", "prompt": "x", "max_tokens": 4000, "ignore_eos": True}
    connection = endpoint.open("POST", "/v1/completions", body)
    endpoint.served.wait_for(lambda: endpoint.served.metrics()["blockzoo_requests_running"] == 1)
    connection.close()
    endpoint.served.wait_for(lambda: endpoint.aborted() == before + 4)
    endpoint.wait_until_idle()


def test_many_streams_at_once_get_each_their_own(endpoint, llm):
    prompts = [f"{PROMPT}{number}" for number in range(64)]
    params = SamplingParams(max_tokens=8, temperature=0.0)
    models = [("base", "notes", "solver")[number % 3] for number in range(64)]
    expected = {}
    for model in set(models):
        mine = [prompt for prompt, other in zip(prompts, models, strict=True) if other == model]
        for prompt, answer in zip(mine, llm.generate(model, mine, params, progress=False), strict=True):
            expected[prompt] = answer.text

    async def one(client, model, prompt):
        stream = await client.completions.create(
            model=model, prompt=prompt, max_tokens=8, temperature=0, stream=True
        )
        return prompt, "".join([chunk.choices[0].text async for chunk in stream])

    async def main():
        async with endpoint.async_client() as client:
            return dict(
                await asyncio.gather(*(one(client, *pair) for pair in zip(models, prompts, strict=True)))
            )

    assert asyncio.run(main()) == expected


def test_health_metrics_and_routes_that_are_none(endpoint):
    assert endpoint.ask("GET", "/health")[::2] == (200, '{"status":"ok"}')
    status, headers, text = endpoint.ask("GET", "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "# TYPE blockzoo_ttft_seconds histogram" in text
    assert "nv_inference" not in text
    for method, path, expected in (
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/models", 405),
        ("GET", "/v1", 404),
        ("POST", "/v1/embeddings", 404),
    ):
        status, _, text = endpoint.ask(method, path)
        assert (status, set(json.loads(text)["error"])) == (expected, {"message", "type", "param", "code"})


def test_texts_and_tokens_are_bounded(endpoint):
    for path, field, value in (
        ("/tokenize", "prompt", "x" * (2 << 20)),
        ("/detokenize", "tokens", [1] * (2 << 20)),
    ):
        status, _, text = endpoint.ask("POST", path, {"model": "base", field: value})
        error = json.loads(text)["error"]
        assert (status, error["param"]) == (400, field)
        assert "at most 1048576" in error["message"]
    body = {"model": "base", "prompt": "x" * (2 << 20)}
    assert endpoint.ask("POST", "/v1/completions", body)[0] == 400
