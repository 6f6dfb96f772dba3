"""JSON bodies -> what is to be generated, every field checked.

Ranges of sampling parameters are those of `SamplingParams`, which says what is wrong with them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from blockzoo.runtime.api.errors import InvalidRequestError
from blockzoo.runtime.api.request import MAX_LOGPROBS, MAX_TOKENS_LIMIT, GuidedDecoding, SamplingParams
from blockzoo.runtime.text.prompt import MAX_DOCUMENTS
from blockzoo.server_config.openai.errors import invalid
from blockzoo.server_config.openai.fields import Fields
from blockzoo.server_config.openai.messages import Chat, read_messages, read_tools

MAX_CHOICES = 128
"""Answers that one request may ask for, over all its prompts."""
_COMPLETION_TOKENS = 16  # OpenAI's default; chats go on as long as the model's length allows

_SAMPLING = {  # field of the body -> field of SamplingParams
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "repetition_penalty": "repetition_penalty",
    "logit_bias": "logit_bias",
    "bad_words": "bad_words",
    "min_tokens": "min_tokens",
    "ignore_eos": "ignore_eos",
    "skip_special_tokens": "skip_special_tokens",
    "include_stop_str_in_output": "include_stop",
}
_BODY_NAMES = {field: name for name, field in _SAMPLING.items()}
# they say who asks, how to bill, what to keep: nothing here depends on them
_IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
_IGNORED_OF_CHAT = ("prompt_cache_retention",)
_NO_COMPLETION = {
    "suffix": "models here go on from a prompt, they fill no gaps",
}
_NO_CHAT = {
    "functions": "use tools",
    "function_call": "use tool_choice",
    "audio": "answers are text",
    "prediction": "nothing is predicted from it",
    "web_search_options": "nothing is searched",
    "reasoning_effort": "see the template's own switches, chat_template_kwargs",
    "verbosity": "say it in the messages",
    "moderation": "nothing is moderated",
}


@dataclass(frozen=True, slots=True)
class Generation:
    """What a request asks to be generated.

    Attributes:
        prompts: texts or token ids; of a chat, its rendered messages.
        n: answers to each prompt.
        params: of the first answer; see `params_of`.
        include_usage: end a stream with a chunk that counts tokens.
        echo: begin each text with its prompt.
        documents: texts set before each prompt.
        kv_scope: the client's own; None: not said.
        guide_field: of the body, that the guide of `params` comes from.
    """

    model: str
    prompts: tuple[str | list[int], ...]
    n: int
    params: SamplingParams
    stream: bool
    include_usage: bool
    echo: bool
    kv_reuse: str | None
    kv_scope: str | None
    documents: tuple[str, ...]
    guide_field: str = "response_format"

    def params_of(self, index: int) -> SamplingParams:
        """Of the answer `index` to a prompt: a seed gives each answer one of its own."""
        seed = self.params.seed
        return self.params if seed is None else replace(self.params, seed=(seed + index) % 2**64)


def model_name(fields: Fields) -> str:
    """The field `model`. Raises ApiError."""
    name = fields.take("model", str)
    if not name:
        raise fields.missing("model")
    return name


def read_completion(fields: Fields) -> Generation:
    """The body of /v1/completions. Raises ApiError."""
    model = model_name(fields)
    prompts = _prompts(fields)
    logprobs = fields.take("logprobs", int)
    limit = fields.take("max_tokens", int, _COMPLETION_TOKENS)
    echo = fields.take("echo", bool, False)
    if echo and logprobs is not None:
        raise invalid("echo", "echo with logprobs is not supported: prompts get no log-probabilities.")
    generation = _generation(fields, model, prompts, limit, "max_tokens", logprobs, "logprobs", echo)
    best_of = fields.take("best_of", int, generation.n)
    if best_of != generation.n:
        raise fields.wrong("best_of", best_of, f"n ({generation.n}), or nothing: answers are not ranked")
    fields.ignore(_IGNORED)
    fields.refuse(_NO_COMPLETION)
    fields.end()
    return generation


def read_chat(fields: Fields) -> tuple[Generation, Chat]:
    """The body of /v1/chat/completions; the generation's prompt is still to be rendered. Raises ApiError."""
    model = model_name(fields)
    chat = read_messages(fields)
    limits = [(name, fields.take(name, int)) for name in ("max_completion_tokens", "max_tokens")]
    given = [(name, value) for name, value in limits if value is not None]
    if len(given) > 1:
        raise invalid("max_tokens", "max_tokens and max_completion_tokens are both set; send one.")
    name, limit = given[0] if given else ("max_completion_tokens", MAX_TOKENS_LIMIT)
    wanted = fields.take("logprobs", bool, False)
    top = fields.take("top_logprobs", int)
    if top is not None and not wanted:
        raise invalid("top_logprobs", "top_logprobs needs logprobs to be true.")
    logprobs = (top or 0) if wanted else None
    generation = _generation(fields, model, ("",), limit, name, logprobs, "top_logprobs", False)
    modalities = fields.take("modalities", list, ["text"])
    if modalities != ["text"]:
        raise fields.wrong("modalities", modalities, '["text"]')
    tools = read_tools(fields)
    if tools is not None and generation.params.guided is not None:
        raise invalid(
            "response_format",
            "response_format with tools would keep the model from calling: send one of them.",
        )
    fields.ignore((*_IGNORED, *_IGNORED_OF_CHAT))
    fields.refuse(_NO_CHAT)
    fields.end()
    return generation, replace(chat, tools=tools)


def _read_format(fields: Fields) -> GuidedDecoding | None:
    """The form that `response_format` asks for."""
    given = fields.take("response_format", dict)
    if given is None:
        return None
    form = Fields(given, "response_format.")
    kind = form.one_of("type", ("text", "json_object", "json_schema", "grammar"))
    guided: GuidedDecoding | None = None
    try:
        if kind is None:
            raise form.missing("type")
        if kind == "json_object":
            guided = GuidedDecoding("json")
        elif kind == "json_schema":
            schema = Fields(form.take("json_schema", dict, {}), "response_format.json_schema.")
            body = schema.take("schema", dict)
            if body is None:
                raise schema.missing("schema")
            schema.ignore(("name", "description", "strict"))
            schema.end()
            guided = GuidedDecoding("json_schema", json.dumps(body))
        elif kind == "grammar":
            syntax = form.one_of("syntax", ("lark", "regex"))
            definition = form.take("definition", str)
            if syntax is None or not definition:
                raise form.missing("definition" if syntax else "syntax")
            guided = GuidedDecoding("regex" if syntax == "regex" else "lark", definition)
    except InvalidRequestError as error:
        raise invalid("response_format", str(error), "invalid_value") from None
    form.end()
    return guided


def _prompts(fields: Fields) -> tuple[str | list[int], ...]:
    prompt = fields.any("prompt")
    if prompt is None:
        raise fields.missing("prompt")
    if isinstance(prompt, str):
        return (prompt,)
    expected = "a text, a list of token ids, or a list of either"
    if not isinstance(prompt, list) or not prompt:
        raise fields.wrong("prompt", prompt, expected)
    if type(prompt[0]) is int:
        prompt = [prompt]
    if len(prompt) > MAX_CHOICES:
        raise invalid("prompt", f"prompt has {len(prompt)} prompts; expected at most {MAX_CHOICES}.")
    for index, item in enumerate(prompt):
        if isinstance(item, str):
            continue
        if not isinstance(item, list) or not item:
            raise fields.wrong(f"prompt[{index}]", item, expected)
        for token in item:
            if type(token) is not int or not 0 <= token < 2**31:
                raise fields.wrong(f"prompt[{index}]", token, "token ids")
    return tuple(prompt)


def _generation(
    fields: Fields,
    model: str,
    prompts: tuple[str | list[int], ...],
    max_tokens: int,
    limit_name: str,
    logprobs: int | None,
    logprobs_name: str,
    echo: bool,
) -> Generation:
    n = fields.take("n", int, 1)
    if not 1 <= n <= MAX_CHOICES // len(prompts):
        raise fields.wrong("n", n, f"a whole number from 1 to {MAX_CHOICES // len(prompts)}")
    if logprobs is not None and not 0 <= logprobs <= MAX_LOGPROBS:
        raise fields.wrong(logprobs_name, logprobs, f"a whole number from 0 to {MAX_LOGPROBS}")
    stream = fields.take("stream", bool, False)
    options = Fields(fields.take("stream_options", dict, {}), "stream_options.")
    include_usage = options.take("include_usage", bool, False)
    options.ignore(("include_obfuscation",))  # only ever asked to be left out
    options.end()
    if include_usage and not stream:
        raise invalid("stream_options", "stream_options needs stream to be true.")
    documents = fields.take("documents", list, [])
    if len(documents) > MAX_DOCUMENTS:
        raise fields.wrong("documents", f"{len(documents)} texts", f"at most {MAX_DOCUMENTS}")
    for index, text in enumerate(documents):
        if not isinstance(text, str) or not text:
            raise fields.wrong(f"documents[{index}]", text, "a text that is not empty")
    return Generation(
        model,
        prompts,
        n,
        _sampling(fields, max_tokens, limit_name, logprobs),
        stream,
        include_usage,
        echo,
        fields.one_of("kv_reuse", ("off", "exact", "approx")),
        fields.take("kv_scope", str),
        tuple(documents),
    )


def _sampling(fields: Fields, max_tokens: int, limit_name: str, logprobs: int | None) -> SamplingParams:
    given: dict[str, Any] = {"max_tokens": max_tokens, "logprobs": logprobs, "guided": _read_format(fields)}
    for name, field in _SAMPLING.items():
        value = fields.any(name)
        if value is not None:
            given[field] = value
    stop = fields.any("stop")
    if stop is not None:
        given["stop"] = [stop] if isinstance(stop, str) else stop
    seed = fields.take("seed", int)
    if seed is not None:
        if not -(2**63) <= seed < 2**64:
            raise fields.wrong("seed", seed, "a whole number of 64 bits")
        given["seed"] = seed % 2**64
    try:
        return SamplingParams(**given)
    except InvalidRequestError as error:
        message = str(error)
        field = message.split(" ", 1)[0].split("[", 1)[0]
        name = limit_name if field == "max_tokens" else _BODY_NAMES.get(field, field)
        raise invalid(name, name + message[len(field) :], "invalid_value") from None
