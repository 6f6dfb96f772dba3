"""The routes of the OpenAI endpoint."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from blockzoo.runtime.api.errors import InvalidRequestError, OverloadedError, RequestError
from blockzoo.runtime.api.request import GuidedDecoding
from blockzoo.server_config.openai.answers import Answer, ChatAnswer, TextAnswer
from blockzoo.server_config.openai.catalog import Catalog, ServedModel, TokenTexts
from blockzoo.server_config.openai.engine import Delta, Engine, EngineRequest
from blockzoo.server_config.openai.errors import ApiError, full, invalid
from blockzoo.server_config.openai.fields import Fields
from blockzoo.server_config.openai.generate import deltas
from blockzoo.server_config.openai.http import Endpoint, Exchange
from blockzoo.server_config.openai.keys import Keyring, Lease, Quotas
from blockzoo.server_config.openai.live_page import LivePage
from blockzoo.server_config.openai.messages import Chat, read_messages
from blockzoo.server_config.openai.requests import Generation, model_name, read_chat, read_completion
from blockzoo.server_config.openai.response_answers import ResponseAnswer
from blockzoo.server_config.openai.responses import read_response
from blockzoo.server_config.openai.status import Status
from blockzoo.server_config.openai.tools import PROMPT_OF_CALL, CallParser, Format, Tools, no_tools
from blockzoo.server_config.schema import MAX_TEXT_BYTES

MAX_STREAMS = 1024
"""Answers that are generated at the same time."""
_THREADS = 8  # that tokenize, render and read files
Body = dict[str, Any]


class OpenAIApp:
    """Handlers and what they share.

    Args:
        zoo: path of the zoo that is served.
        connect: gives the engine, in the event loop that serves.
        keys: that requests must come with; None: none is asked for.
        defaults: whether answers are chosen as generation_config.json says where a request does not.
    """

    def __init__(
        self,
        zoo: Path,
        connect: Callable[[], Engine],
        keys: Keyring | None = None,
        defaults: bool = True,
    ) -> None:
        self._zoo, self._connect, self._defaults = zoo, connect, defaults
        self._keys, self._quotas = keys, Quotas()
        self._streams = 0

    def application(self) -> Starlette:
        """The ASGI application."""
        post, get = partial(self._route, "POST"), partial(self._route, "GET")
        routes = [
            post("/v1/chat/completions", self._chat),
            post("/v1/completions", self._completion),
            post("/v1/responses", self._respond),
            get("/v1/models", self._list_models),
            get("/v1/models/{name:path}", self._show_model),
            post("/tokenize", self._tokenize),
            post("/detokenize", self._detokenize),
            get("/metrics", self._show_metrics),
            get("/page/zoo", self._show_zoo),
            get("/page/figures", self._show_figures),
            Route("/", Endpoint(self._show_page, _anyone), methods=["GET"]),
            Route("/health", Endpoint(self._show_health, _anyone), methods=["GET"]),
        ]
        errors = {405: _wrong_method}
        app = Starlette(routes=routes, lifespan=self._lifespan, exception_handlers=errors)
        app.router.redirect_slashes = False
        app.router.default = _NoRoute()
        return app

    def _route(self, method: str, path: str, handler: Callable[[Exchange, Body], Awaitable[None]]) -> Route:
        return Route(path, Endpoint(handler, self._guard, has_body=method == "POST"), methods=[method])

    def _guard(self, exchange: Exchange) -> None:
        if self._keys is not None:
            exchange.key = self._keys.find(exchange.request.headers.get("authorization"))

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """The engine belongs to the loop that serves."""
        self._engine = self._connect()
        self._pool = ThreadPoolExecutor(_THREADS, "blockzoo-openai")
        self._catalog = Catalog(self._zoo, self._engine, self._pool, self._defaults)
        self._status = Status(self._engine)
        self._page = LivePage(self._zoo.resolve().name, self._catalog, self._status, self._keys is not None)
        yield
        await self._engine.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    # ---- generation

    async def _chat(self, exchange: Exchange, body: Body) -> None:
        fields = Fields(body)
        model = await self._find(exchange, model_name(fields))
        generation, chat = read_chat(fields, model)
        generation, parsers = await self._prepare(model, generation, chat)
        await self._generate(
            exchange, generation, ChatAnswer(generation, await self._texts(model, generation), parsers)
        )

    async def _respond(self, exchange: Exchange, body: Body) -> None:
        fields = Fields(body)
        model = await self._find(exchange, model_name(fields))
        generation, chat, asked = read_response(fields, model)
        generation, parsers = await self._prepare(model, generation, chat)
        texts = await self._texts(model, generation)
        await self._generate(
            exchange, generation, ResponseAnswer(generation, texts, asked, parsers[0] if parsers else None)
        )

    async def _prepare(
        self, model: ServedModel, generation: Generation, chat: Chat
    ) -> tuple[Generation, list[CallParser]]:
        """With the prompt, and the form of a call that must be one; parsers for answers that may be calls."""
        prompt = await self._render(model, chat)
        if chat.tools is None:
            return replace(generation, prompts=(prompt,)), []
        kind = await self._catalog.call_format(model)
        if kind is None:
            raise no_tools(model.name)
        if chat.tools.forced:
            generation = _forced(generation, chat.tools, kind)
            prompt += PROMPT_OF_CALL[kind]
        parsers = [CallParser(kind, chat.tools) for _ in range(generation.n)]
        return replace(generation, prompts=(prompt,)), parsers

    async def _texts(self, model: ServedModel, generation: Generation) -> TokenTexts | None:
        return None if generation.params.logprobs is None else await self._catalog.token_texts(model)

    async def _completion(self, exchange: Exchange, body: Body) -> None:
        fields = Fields(body)
        model = await self._find(exchange, model_name(fields))
        generation = read_completion(fields, model)
        shown: tuple[str, ...] = ()
        if generation.echo:
            tokenizer = await self._catalog.tokenizer(model)
            prompts = generation.prompts
            shown = await self._catalog.run(
                lambda: tuple(p if isinstance(p, str) else tokenizer.decode(p) for p in prompts)
            )
        texts = await self._texts(model, generation)
        await self._generate(exchange, generation, TextAnswer(generation, texts, shown))

    async def _generate(self, exchange: Exchange, generation: Generation, answer: Answer) -> None:
        scope, key = _scope(exchange, generation), exchange.key
        requests = [
            EngineRequest(
                generation.model,
                prompt,
                generation.params_of(index),
                generation.stream,
                scope,
                generation.kv_reuse,
                generation.documents,
                None if key is None else key.tenant,
                1.0 if key is None else key.weight,
            )
            for prompt in generation.prompts
            for index in range(generation.n)
        ]
        if self._streams + len(requests) > MAX_STREAMS:
            raise full(f"{MAX_STREAMS} answers are being generated, the most at once; send it again later.")
        lease = self._quotas.enter(key, len(requests), sum(map(_estimate, requests)))
        self._streams += len(requests)
        try:
            async with aclosing(self._counted(requests, exchange.id, answer, lease)) as found:
                if generation.stream:
                    async with aclosing(_events(found, answer)) as events:
                        await exchange.events(events, answer.failed)
                else:
                    whole = dict([item async for item in found])
                    await exchange.json(answer.whole([whole[index] for index in range(len(requests))]))
        except ApiError as error:
            if error.param is None and error.message.startswith("guided: "):
                error.param = generation.guide_field
            raise
        finally:
            self._streams -= len(requests)
            lease.end()

    async def _counted(
        self, requests: list[EngineRequest], request_id: str, answer: Answer, lease: Lease
    ) -> AsyncGenerator[tuple[int, Delta], None]:
        async with aclosing(deltas(self._engine, requests, request_id)) as found:
            async for index, delta in found:
                answer.count(index, delta)
                lease.spend(len(delta.token_ids), delta.num_prompt_tokens)
                yield index, delta

    async def _find(self, exchange: Exchange, name: str) -> ServedModel:
        if exchange.key is not None:
            exchange.key.check_model(name)
        return await self._catalog.find(name)

    async def _render(self, model: ServedModel, chat: Chat) -> str:
        template = await self._catalog.template(model, chat.field)
        try:
            return await self._catalog.run(
                lambda: template.render(
                    chat.messages,
                    tools=None if chat.tools is None else chat.tools.tools,
                    add_generation_prompt=chat.add_generation_prompt,
                    continue_final_message=chat.continue_final_message,
                    kwargs=chat.template_kwargs,
                )
            )
        except OverloadedError as error:
            raise full(str(error)) from None
        except RequestError as error:
            raise invalid(chat.field, str(error)) from None

    # ---- models and tokens

    async def _list_models(self, exchange: Exchange, body: Body) -> None:
        models = (await self._catalog.models()).values()
        allowed = None if exchange.key is None else exchange.key.models
        shown = [_model_json(model) for model in models if allowed is None or model.name in allowed]
        await exchange.json({"object": "list", "data": shown})

    async def _show_model(self, exchange: Exchange, body: Body) -> None:
        model = await self._find(exchange, exchange.request.path_params["name"])
        await exchange.json(_model_json(model))

    async def _tokenize(self, exchange: Exchange, body: Body) -> None:
        fields = Fields(body)
        name = model_name(fields)
        special = fields.take("add_special_tokens", bool, True)
        prompt = fields.take("prompt", str)
        if prompt is not None and len(prompt) > MAX_TEXT_BYTES:
            raise fields.wrong("prompt", f"{len(prompt)} characters", f"at most {MAX_TEXT_BYTES}")
        chat = None if prompt is not None else read_messages(fields)
        fields.end()
        model = await self._find(exchange, name)
        text = prompt if chat is None else await self._render(model, chat)
        tokenizer = await self._catalog.tokenizer(model)
        try:
            tokens = await self._catalog.run(lambda: tokenizer.encode(text or "", special))
        except RequestError as error:
            raise invalid("prompt", str(error)) from None
        await exchange.json({"count": len(tokens), "tokens": tokens})

    async def _detokenize(self, exchange: Exchange, body: Body) -> None:
        fields = Fields(body)
        name = model_name(fields)
        tokens = fields.take("tokens", list)
        if tokens is None:
            raise fields.missing("tokens")
        if len(tokens) > MAX_TEXT_BYTES:
            raise fields.wrong("tokens", f"{len(tokens)} tokens", f"at most {MAX_TEXT_BYTES}")
        for token in tokens:
            if type(token) is not int or not 0 <= token < 2**31:
                raise fields.wrong("tokens", token, "token ids")
        fields.end()
        tokenizer = await self._catalog.tokenizer(await self._find(exchange, name))
        text = await self._catalog.run(lambda: tokenizer.decode(tokens, skip_special_tokens=False))
        await exchange.json({"prompt": text})

    # ---- the server itself

    async def _show_health(self, exchange: Exchange, body: Body) -> None:
        await self._status.check()
        await exchange.json({"status": "ok"})

    async def _show_page(self, exchange: Exchange, body: Body) -> None:
        await self._page.show(exchange)

    async def _show_zoo(self, exchange: Exchange, body: Body) -> None:
        await self._page.show_zoo(exchange)

    async def _show_figures(self, exchange: Exchange, body: Body) -> None:
        await self._page.show_figures(exchange)

    async def _show_metrics(self, exchange: Exchange, body: Body) -> None:
        await exchange.data(await self._status.metrics(), "text/plain; version=0.0.4; charset=utf-8")


class _NoRoute:
    """Answers what no route is for."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = f"{scope['method']} {scope['path']}"
            await Exchange(scope, receive, send).error(ApiError(404, f"There is no {path:.200}."))


def _forced(generation: Generation, tools: Tools, kind: Format) -> Generation:
    """The generation of a call of one of the tools, and of nothing else."""
    try:
        guided = GuidedDecoding("json_schema", tools.schema(kind))
        params = replace(generation.params, guided=guided)
    except InvalidRequestError as error:
        raise invalid("tools", str(error)) from None
    return replace(generation, params=params, guide_field="tools")


def _scope(exchange: Exchange, generation: Generation) -> str | None:
    if exchange.key is None:
        return generation.kv_scope
    if generation.kv_scope is not None:
        raise invalid("kv_scope", "kv_scope comes from the API key here: leave it out.")
    return exchange.key.kv_scope


def _estimate(request: EngineRequest) -> int:
    """About how many tokens a prompt has."""
    prompt = request.prompt
    texts = sum(map(len, request.documents)) + (len(prompt) if isinstance(prompt, str) else 0)
    return texts // 4 + (0 if isinstance(prompt, str) else len(prompt))


def _anyone(exchange: Exchange) -> None:
    pass


def _wrong_method(request: Request, error: Exception) -> JSONResponse:
    answer = ApiError(405, f"{request.url.path:.200} does not take {request.method}.")
    return JSONResponse(answer.body(), answer.status, getattr(error, "headers", None))


async def _events(found: AsyncIterator[tuple[int, Delta]], answer: Answer) -> AsyncGenerator[bytes, None]:
    """The events of a stream; the first come with the engine's first word, so that what it refuses is
    answered with a status."""
    opened = False
    async for index, delta in found:
        opening = b"" if opened else answer.opening()
        opened = True
        yield opening + answer.events(index, delta)
    yield answer.closing()


def _model_json(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "blockzoo",
        "root": model.parent or model.name,
        "parent": model.parent,
    }
