"""LLM: prompts in, completions out, for scripts and notebooks."""

from __future__ import annotations

import os
from collections.abc import Sequence as AnySequence
from dataclasses import dataclass
from typing import Any

from blockzoo.runtime.config import EngineConfig
from blockzoo.runtime.engine_loop import LLMEngine
from blockzoo.runtime.errors import InvalidRequestError, RequestError
from blockzoo.runtime.publisher import PublishedDocument
from blockzoo.runtime.refresh import Refreshed
from blockzoo.runtime.request import FinishReason, KVReuse, RequestOutput, SamplingParams, TokenLogprob

Prompt = str | AnySequence[int]


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


class LLM:
    """All models of a zoo, offline.

    Args:
        zoo_path: a zoo directory.
        settings: fields of `EngineConfig`. All prompts come from one caller here, so that unlike there
            the default of `kv_sharing` is "scope".

    Raises: as `LLMEngine`.
    """

    def __init__(self, zoo_path: str | os.PathLike[str], **settings: Any) -> None:
        self.engine = LLMEngine(zoo_path, EngineConfig(**{"kv_sharing": "scope", **settings}))

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models served."""
        return self.engine.models

    def refresh(self) -> Refreshed:
        """As `LLMEngine.refresh`: serve the models that were added to the zoo, forget those removed."""
        return self.engine.refresh()

    def generate(
        self,
        model: str | AnySequence[str],
        prompts: Prompt | AnySequence[Prompt],
        params: SamplingParams | AnySequence[SamplingParams] | None = None,
        *,
        scope: str | None = None,
        kv_reuse: KVReuse | AnySequence[KVReuse] | None = None,
        documents: AnySequence[str] = (),
        progress: bool = True,
    ) -> list[Completion]:
        """Complete prompts, all in one batch.

        Args:
            model: one model for all prompts, or one per prompt.
            prompts: texts or lists of token ids; a single text is a list of one.
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
        models = _spread("model", model, all_prompts)
        all_params = _spread("params", params or SamplingParams(), all_prompts)
        reuse = _spread("kv_reuse", kv_reuse, all_prompts)
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
        return [_completion(prompt, parts) for prompt, parts in zip(all_prompts, outputs, strict=True)]

    def publish(self, name: str, text: str, models: AnySequence[str] | None = None) -> PublishedDocument:
        """Compute the KV of a document once, for every prompt of some models (all) that begins with it.

        Requests in every scope take it; with `kv_reuse="approx"` also where the document stands elsewhere.
        With `kv_cache_dir` it is loaded from there, or kept there for the next time.

        Raises: as `runtime.publisher.Publisher.publish`.
        """
        return self.engine.publish(name, text, models)

    def withdraw(self, name: str) -> None:
        """End the publication of a document. Raises InvalidRequestError where there is none."""
        self.engine.withdraw(name)


def _as_prompts(prompts: Prompt | AnySequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _spread(name: str, value: Any, prompts: AnySequence[Prompt]) -> list[Any]:
    if value is None or isinstance(value, (str, SamplingParams)):
        return [value] * len(prompts)
    if len(value) != len(prompts):
        raise InvalidRequestError(f"{name} has {len(value)} entries for {len(prompts)} prompts")
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
