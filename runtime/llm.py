"""LLM: prompts in, completions out, for scripts and notebooks."""

from __future__ import annotations

import numbers
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from blockzoo.runtime.api.errors import InvalidRequestError, RequestError
from blockzoo.runtime.api.request import (
    CHAT_TOKENS,
    FinishReason,
    KVReuse,
    PromptLogprobs,
    RequestOutput,
    SamplingParams,
    TokenLogprob,
    shown,
)
from blockzoo.runtime.serve.config import EngineConfig
from blockzoo.runtime.serve.document_publisher import PublishedDocument
from blockzoo.runtime.serve.llm_engine import LLMEngine
from blockzoo.runtime.serve.reload import Reloaded
from blockzoo.runtime.text.prompt import Prompt

Messages = Sequence[Mapping[str, Any]]
"""A conversation."""


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to one prompt."""

    model: str
    prompt: Prompt
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_cached_tokens: int
    prompt_logprobs: PromptLogprobs | None = None


class LLM:
    """All models of a zoo, offline.

    Args:
        zoo_path: a zoo directory.
        settings: fields of `EngineConfig`. All prompts come from one caller here, so that unlike there
            the default of `kv_sharing` is "scope" and that of `max_step_seconds` None.

    Raises: as `LLMEngine`.
    """

    def __init__(self, zoo_path: str | os.PathLike[str], **settings: Any) -> None:
        defaults = {"kv_sharing": "scope", "max_step_seconds": None}
        self.engine = LLMEngine(zoo_path, EngineConfig(**{**defaults, **settings}))

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models served."""
        return self.engine.models

    @property
    def left_out(self) -> Mapping[str, str]:
        """Models of the zoo that are not served, and why."""
        return self.engine.left_out

    def reload(self) -> Reloaded:
        """As `LLMEngine.reload`: serve the models that were added to the zoo, forget those removed.

        Another thread may generate meanwhile.
        """
        return self.engine.reload()

    def generate(
        self,
        model: str | Sequence[str],
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        scope: str | None = None,
        kv_reuse: KVReuse | Sequence[KVReuse] | None = None,
        documents: Sequence[str] = (),
        progress: bool = True,
    ) -> list[Completion]:
        """Complete prompts, all in one batch.

        Args:
            model: one model for all prompts, or one per prompt.
            prompts: texts, or lists or 1-D arrays of token ids; a single one is a list of one.
            params: one for all prompts, or one per prompt; None: the defaults.
            scope, documents: of all prompts; see `LLMEngine.prepare`.
            kv_reuse: "off", "exact" or "approx" for all prompts, or one per prompt; see `LLMEngine.prepare`.
            progress: show a bar on a terminal.

        Returns:
            One completion per prompt, in order.

        Raises:
            RequestError: a prompt was refused or failed; nothing is left running.
        """
        all_prompts = _as_prompts(prompts)
        models = _spread("model", model, str, all_prompts)
        default = SamplingParams() if params is None else params
        all_params = _spread("params", default, SamplingParams, all_prompts)
        reuse = (
            [None] * len(all_prompts) if kv_reuse is None else _spread("kv_reuse", kv_reuse, str, all_prompts)
        )
        requests = [
            self.engine.prepare(str(i), *job, documents=documents)
            for i, job in enumerate(
                zip(models, all_prompts, all_params, [scope] * len(all_prompts), reuse, strict=True)
            )
        ]
        outputs: list[list[RequestOutput]] = [[] for _ in requests]
        try:
            with _Bar(len(requests), progress) as bar:
                pending = requests[::-1]
                while pending or self.engine.has_unfinished():
                    while pending and self.engine.num_waiting < self.engine.config.max_waiting:
                        self.engine.enqueue(pending.pop())
                    for output in self.engine.step():
                        outputs[int(output.request_id)].append(output)
                        if output.finish_reason == "error":
                            raise RequestError(f"prompt {output.request_id}: {output.error}")
                        bar.advance(output)
                self.engine.rest()
        finally:
            for request in requests:
                self.engine.abort(request.seq.request_id)
            self.engine.rest()
            if self.engine.may_settle:
                self.engine.settle()
        return [_completion(prompt, parts) for prompt, parts in zip(all_prompts, outputs, strict=True)]

    def chat(
        self,
        model: str | Sequence[str],
        messages: Messages | Sequence[Messages],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
        scope: str | None = None,
        kv_reuse: KVReuse | Sequence[KVReuse] | None = None,
        documents: Sequence[str] = (),
        progress: bool = True,
    ) -> list[Completion]:
        """Answer conversations, all in one batch.

        Args:
            model: one model for all conversations, or one per conversation.
            messages: a conversation, [{"role": ..., "content": ...}, ...], or a list of them.
            params: one for all, or one per conversation; None: as each model's generation_config.json has it,
                and at most 1024 tokens where it has no max_new_tokens.
            tools, chat_template_kwargs: of all conversations; see `ChatTemplate.render`.
            continue_final_message: go on within the last message instead of answering it.
            scope, kv_reuse, documents, progress: as in `generate`.

        Returns:
            One completion per conversation, in order; its prompt is the text that the template made.

        Raises:
            RequestError: a conversation was refused or failed, or a model has no chat template.
        """
        conversations = _as_conversations(messages)
        models = _spread("model", model, str, conversations)
        prompts = [
            self.engine.tokenizer(name)
            .chat_template_of(name)
            .render(
                conversation,
                tools=tools,
                kwargs=chat_template_kwargs,
                add_generation_prompt=not continue_final_message,
                continue_final_message=continue_final_message,
            )
            for name, conversation in zip(models, conversations, strict=True)
        ]
        if params is None:
            defaults = [self.engine.generation_defaults(name) for name in models]
            params = [_chat_params(each) for each in defaults]
        return self.generate(
            models,
            prompts,
            params,
            scope=scope,
            kv_reuse=kv_reuse,
            documents=documents,
            progress=progress,
        )

    def publish(self, name: str, text: str, models: Sequence[str] | None = None) -> PublishedDocument:
        """Compute the KV of a document once, for every prompt of some models (all) that begins with it.

        Requests in every scope take it; with `kv_reuse="approx"` also where the document stands elsewhere.
        With `kv_cache_dir` it is loaded from there, or kept there for the next time.

        Raises: as `DocumentPublisher.publish`.
        """
        return self.engine.publish(name, text, models)

    def withdraw(self, name: str) -> None:
        """End the publication of a document. Raises InvalidRequestError where there is none."""
        self.engine.withdraw(name)


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Any]:
    """A list of prompts, which are checked one by one later."""
    if isinstance(prompts, np.ndarray):  # of texts, or one prompt of token ids
        return prompts.tolist() if prompts.ndim == 1 and prompts.dtype.kind in "UO" else [prompts]
    if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Sequence):
        return [prompts]
    is_ids = bool(prompts) and isinstance(prompts[0], (numbers.Number, np.generic))
    return [prompts] if is_ids and not isinstance(prompts[0], str) else list(prompts)


def _as_conversations(messages: Any) -> list[Any]:
    """A list of conversations, which are checked when they are rendered."""
    if isinstance(messages, Sequence) and messages and isinstance(messages[0], Sequence):
        return list(messages) if not isinstance(messages[0], (str, bytes)) else [messages]
    return [messages]


def _chat_params(defaults: Mapping[str, float | int]) -> SamplingParams:
    settings: dict[str, Any] = {"max_tokens": CHAT_TOKENS, **defaults}
    return SamplingParams(**settings)


def _spread(name: str, value: Any, kind: type, prompts: Sequence[Any]) -> list[Any]:
    """A list of one value per prompt."""
    if isinstance(value, kind):
        return [value] * len(prompts)
    if not isinstance(value, (Sequence, np.ndarray)):
        raise InvalidRequestError(f"{name} is {shown(value)}; expected {kind.__name__}, or a list of them")
    if len(value) != len(prompts):
        raise InvalidRequestError(f"{name} has {len(value)} entries for {len(prompts)} prompts")
    for index, each in enumerate(value):
        if not isinstance(each, kind):
            raise InvalidRequestError(f"{name}[{index}] is {shown(each)}; expected {kind.__name__}")
    return list(value)


def _completion(prompt: Prompt, parts: list[RequestOutput]) -> Completion:
    last = parts[-1]
    logprobs = tuple(entry for part in parts for entry in part.logprobs or ())
    return Completion(
        model=last.model,
        prompt=prompt,
        text="".join(part.text for part in parts),
        token_ids=tuple(token for part in parts for token in part.token_ids),
        logprobs=logprobs or None,
        finish_reason=last.finish_reason or "error",
        num_prompt_tokens=last.num_prompt_tokens,
        num_cached_tokens=last.num_cached_tokens,
        prompt_logprobs=next((part.prompt_logprobs for part in parts if part.prompt_logprobs), None),
    )


class _Bar:
    """Finished prompts and tokens, on a terminal only."""

    def __init__(self, total: int, wanted: bool) -> None:
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        self._progress = Progress(console=console, disable=not (wanted and console.is_terminal))
        self._task = self._progress.add_task("generating", total=total)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, output: RequestOutput) -> None:
        if output.finished:
            self._progress.advance(self._task)
