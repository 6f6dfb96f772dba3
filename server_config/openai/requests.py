"""JSON bodies -> what is to be generated, every field checked.

Ranges of sampling parameters are those of `SamplingParams`, which says what is wrong with them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from blockzoo.runtime.api.errors import InvalidRequestError
from blockzoo.runtime.api.request import MAX_LOGPROBS, MAX_TOKENS_LIMIT, GuidedDecoding, SamplingParams
from blockzoo.runtime.text.prompt import MAX_DOCUMENTS
from blockzoo.server_config.openai.catalog import ServedModel
from blockzoo.server_config.openai.errors import invalid
from blockzoo.server_config.openai.fields import Fields
from blockzoo.server_config.openai.messages import Chat, read_messages, read_tools
from blockzoo.server_config.openai.tools import Tools

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
    "speculate": "speculate",
}
_BODY_NAMES = {field: name for name, field in _SAMPLING.items()}
IGNORED = ("user", "service_tier", "safety_identifier", "prompt_cache_key")
"""Fields that say who asks and how to bill: nothing here depends on them."""
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
        params: of the first answer; see `params_of`.
        kv_scope: the client's own; None: not said.
        documents: texts set before each prompt.
        n: answers to each prompt.
        include_usage: end a stream with a chunk that counts tokens.
        echo: begin each text with its prompt.
        guide_field: of the body, that the guide of `params` comes from.
    """

    model: str
    prompts: tuple[str | list[int], ...]
    params: SamplingParams
    stream: bool
    kv_reuse: str | None
    kv_scope: str | None
    documents: tuple[str, ...]
    n: int = 1
    include_usage: bool = False
    echo: bool = False
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


def read_completion(fields: Fields, model: ServedModel) -> Generation:
    """The body of /v1/completions, but for `model`. Raises ApiError."""
    prompts = _prompts(fields)
    echo = fields.take("echo", bool, False)
    logprobs = num_top(fields, "logprobs")
    # how long an answer is by default is OpenAI's to say here, as clients count on it
    defaults = {**model.defaults, "max_tokens": _COMPLETION_TOKENS}
    guided = read_form(fields, "response_format")
    params = read_sampling(fields, defaults, "max_tokens", logprobs, guided, prompts_too=echo)
    n, stream, include_usage = _how_many(fields, len(prompts))
    generation = read_rest(fields, model, prompts, params, stream)
    generation = replace(generation, n=n, include_usage=include_usage, echo=echo)
    if generation.documents and params.prompt_logprobs is not None:
        raise invalid("documents", "documents cannot go with echo and logprobs: leave them out.")
    best_of = fields.take("best_of", int, generation.n)
    if best_of != generation.n:
        raise fields.wrong("best_of", best_of, f"n ({generation.n}), or nothing: answers are not ranked")
    fields.ignore((*IGNORED, "metadata", "store"))
    fields.refuse(_NO_COMPLETION)
    fields.end()
    return generation


def read_chat(fields: Fields, model: ServedModel) -> tuple[Generation, Chat]:
    """The body of /v1/chat/completions, but for `model`; the generation's prompt is still to be rendered.

    Raises ApiError.
    """
    chat = read_messages(fields)
    limit = "max_completion_tokens"
    if fields.has("max_tokens"):
        if fields.has(limit):
            raise invalid("max_tokens", "max_tokens and max_completion_tokens are both set; send one.")
        limit = "max_tokens"
    top = num_top(fields, "top_logprobs")
    wanted = fields.take("logprobs", bool, False)
    if top is not None and not wanted:
        raise invalid("top_logprobs", "top_logprobs needs logprobs to be true.")
    guided = read_form(fields, "response_format")
    params = read_sampling(fields, model.defaults, limit, (top or 0) if wanted else None, guided)
    n, stream, include_usage = _how_many(fields, 1)
    generation = replace(read_rest(fields, model, ("",), params, stream), n=n, include_usage=include_usage)
    modalities = fields.take("modalities", list, ["text"])
    if modalities != ["text"]:
        raise fields.wrong("modalities", modalities, '["text"]')
    tools = read_tools(fields)
    check_tools(tools, params, "response_format")
    fields.ignore((*IGNORED, "metadata", "store", "prompt_cache_retention"))
    fields.refuse(_NO_CHAT)
    fields.end()
    return generation, replace(chat, tools=tools)


def check_tools(tools: Tools | None, params: SamplingParams, field: str) -> None:
    """Raises ApiError where tools are offered for an answer whose form `field` says."""
    if tools is not None and params.guided is not None:
        raise invalid(field, f"{field} with tools would keep the model from calling: send one of them.")


def read_form(fields: Fields, name: str, flat: bool = False) -> GuidedDecoding | None:
    """The form of the answer that a field asks for. Raises ApiError.

    `flat`: a schema's fields stand beside `type`, as in /v1/responses, and not in an object `json_schema`.
    """
    given = fields.take(name, dict)
    if given is None:
        return None
    path = fields.where + name
    form = Fields(given, f"{path}.")
    kind = form.one_of("type", ("text", "json_object", "json_schema", "grammar"))
    guided: GuidedDecoding | None = None
    try:
        if kind is None:
            raise form.missing("type")
        if kind == "json_object":
            guided = GuidedDecoding("json")
        elif kind == "json_schema":
            schema = form if flat else Fields(form.take("json_schema", dict, {}), f"{path}.json_schema.")
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
        raise invalid(path, str(error), "invalid_value") from None
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


def _how_many(fields: Fields, num_prompts: int) -> tuple[int, bool, bool]:
    """Answers to each prompt, whether they are streamed, and whether with usage."""
    n = fields.take("n", int, 1)
    if not 1 <= n <= MAX_CHOICES // num_prompts:
        raise fields.wrong("n", n, f"a whole number from 1 to {MAX_CHOICES // num_prompts}")
    stream = fields.take("stream", bool, False)
    options = Fields(fields.take("stream_options", dict, {}), "stream_options.")
    include_usage = options.take("include_usage", bool, False)
    options.ignore(("include_obfuscation",))  # only ever asked to be left out
    options.end()
    if include_usage and not stream:
        raise invalid("stream_options", "stream_options needs stream to be true.")
    return n, stream, include_usage


def num_top(fields: Fields, name: str) -> int | None:
    """How many likely tokens are told in each token's place. Raises ApiError."""
    value = fields.take(name, int)
    if value is not None and not 0 <= value <= MAX_LOGPROBS:
        raise fields.wrong(name, value, f"a whole number from 0 to {MAX_LOGPROBS}")
    return value


def read_rest(
    fields: Fields,
    model: ServedModel,
    prompts: tuple[str | list[int], ...],
    params: SamplingParams,
    stream: bool,
) -> Generation:
    """A generation with the fields that are ours alone. Raises ApiError."""
    documents = fields.take("documents", list, [])
    if len(documents) > MAX_DOCUMENTS:
        raise fields.wrong("documents", f"{len(documents)} texts", f"at most {MAX_DOCUMENTS}")
    for index, text in enumerate(documents):
        if not isinstance(text, str) or not text:
            raise fields.wrong(f"documents[{index}]", text, "a text that is not empty")
    kv_reuse = fields.one_of("kv_reuse", ("off", "exact", "approx"))
    kv_scope = fields.take("kv_scope", str)
    return Generation(model.name, prompts, params, stream, kv_reuse, kv_scope, tuple(documents))


def read_sampling(
    fields: Fields,
    defaults: Mapping[str, Any],
    limit: str,
    logprobs: int | None,
    guided: GuidedDecoding | None,
    prompts_too: bool = False,
) -> SamplingParams:
    """How tokens are chosen. Raises ApiError.

    Args:
        defaults: of fields that the body does not say.
        limit: the field that bounds the tokens of an answer.
        prompts_too: log-probabilities of the prompt's tokens, too.
    """
    given: dict[str, Any] = {
        "max_tokens": MAX_TOKENS_LIMIT,
        **defaults,
        "logprobs": logprobs,
        "guided": guided,
    }
    if prompts_too:
        given["prompt_logprobs"] = logprobs
    for name, field in {**_SAMPLING, limit: "max_tokens"}.items():
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
        name = limit if field == "max_tokens" else _BODY_NAMES.get(field, field)
        raise invalid(name, name + message[len(field) :], "invalid_value") from None
