"""LLMEngine: requests in, tokens out, one step at a time.

    schedule -> execute -> advance -> sample -> report

One caller at a time for `enqueue`, `step` and `abort` (EngineThread sees to that); `prepare` may be
called from any thread.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence as AnySequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import get_args

from blockzoo.engines.choose import make_engines
from blockzoo.runtime.adapters import AdapterUnavailableError
from blockzoo.runtime.config import EngineConfig
from blockzoo.runtime.detokenizer import Detokenizer
from blockzoo.runtime.errors import (
    InvalidRequestError,
    PromptTooLongError,
    RequestError,
    UnknownModelError,
)
from blockzoo.runtime.executor import Executor, Rows, StepResult
from blockzoo.runtime.loading import LoadedModel, Progress, load_zoo
from blockzoo.runtime.metrics import Metrics, MetricsRecorder
from blockzoo.runtime.pool import PAGE_TOKENS
from blockzoo.runtime.prompt import assemble, max_prompt_bytes
from blockzoo.runtime.publisher import PublishedDocument, Publisher
from blockzoo.runtime.refresh import Refreshed, Refresher
from blockzoo.runtime.request import FinishReason, KVReuse, RequestOutput, SamplingParams, TokenLogprob
from blockzoo.runtime.reuse import ReuseConfig
from blockzoo.runtime.reuse_steps import ReuseSteps
from blockzoo.runtime.sampling import SampledToken, Sampler, SamplerState
from blockzoo.runtime.scheduler import Scheduled, Scheduler, SchedulerConfig
from blockzoo.runtime.sequence import Part, Sequence
from blockzoo.runtime.tokenizer import Tokenizer
from blockzoo.runtime.topology import ChainPlan, Family
from blockzoo.zoo.store import Zoo


@dataclass(slots=True)
class Request:
    """A checked request on its way through the engine."""

    seq: Sequence
    model: LoadedModel
    params: SamplingParams
    sampler: SamplerState
    detokenizer: Detokenizer
    max_tokens: int  # params.max_tokens, or what the model's length leaves
    arrival: float
    started: bool = False
    last_token_time: float | None = None
    num_generated: int = field(default=0)


class LLMEngine:
    """Serves all models of a zoo from one process and one KV pool per KV geometry.

    Args:
        zoo_path: a zoo directory.
        config: settings.
        progress: called with (engines compiled, engines in all) while loading.

    Raises:
        StoreError, ManifestError: the zoo is missing or damaged.
        EngineError: the backend cannot run here.
        InvalidRequestError: a setting does not fit the zoo or the machine.
    """

    def __init__(
        self,
        zoo_path: str | os.PathLike[str],
        config: EngineConfig | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.config = config or EngineConfig()
        scheduler_config = SchedulerConfig(
            max_num_seqs=self.config.max_num_seqs,
            max_num_batched_tokens=self.config.max_num_batched_tokens,
            # those that the next step will admit wait too, until it begins
            max_waiting=self.config.max_waiting + self.config.max_num_seqs,
            policy=self.config.schedule,
        )
        zoo = Zoo.open(zoo_path)
        maker = make_engines(
            self.config.backend,
            self.config.precision,
            device=self.config.device,
            num_threads=self.config.num_threads,
            zoo=zoo,
        )
        self._zoo = load_zoo(zoo, self.config, maker, progress)
        self._refresher = Refresher(zoo, self._zoo)
        self._scheduler = Scheduler(scheduler_config)
        self._requests: dict[str, Request] = {}
        self._sampler = Sampler()
        self._reuse = ReuseSteps(maker.arrays.rows_like)
        self._recorder = MetricsRecorder(s for chain in self._zoo.topology.chains for s in chain.segments)
        self._publisher = Publisher(lambda: self._zoo, self.config, self._model, self._run)

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models served."""
        return tuple(sorted(self._zoo.models))

    def tokenizer(self, model: str) -> Tokenizer:
        """A model's tokenizer. Raises UnknownModelError."""
        return self._model(model).tokenizer

    @property
    def end_ids(self) -> dict[str, tuple[int, ...]]:
        """End-of-sequence token ids by model name."""
        return {name: model.eos_token_ids for name, model in self._zoo.models.items()}

    def max_model_len(self, model: str) -> int:
        """Tokens of prompt and answer together that a request to `model` may have."""
        return self._model(model).max_len

    @property
    def max_prompt_bytes(self) -> dict[str, int]:
        """Bytes of text, by model name, beyond which a prompt with its documents is refused unread."""
        return {n: max_prompt_bytes(m.tokenizer, m.max_len - 1) for n, m in self._zoo.models.items()}

    @property
    def engine_facts(self) -> dict[str, object]:
        """Backend, version, precision and target."""
        return dict(self._zoo.engine_facts)

    # ---- in

    def prepare(
        self,
        request_id: str,
        model: str,
        prompt: str | AnySequence[int],
        params: SamplingParams,
        scope: str | None = None,
        kv_reuse: KVReuse | None = None,
        documents: AnySequence[str] = (),
    ) -> Request:
        """Check a request and make it ready to enqueue. Thread-safe.

        Args:
            prompt: text, or token ids.
            scope: requests share cached KV only with those of the same scope, and only within one model
                unless EngineConfig.kv_sharing says otherwise. None is one more scope: that of all
                requests without one.
            kv_reuse: "exact" uses the KV of equal prefixes and leaves its own; "off" does neither; "approx"
                takes also the KV of equal words behind other ones (see `runtime.reuse`), which changes
                answers a little. None: as EngineConfig.kv_reuse says.
            documents: texts put before the prompt as they are, each tokenized on its own: a published one of
                the same text then is found whole.

        Raises:
            UnknownModelError, InvalidRequestError, PromptTooLongError.
        """
        loaded = self._model(model)
        token_ids, spans = assemble(loaded.tokenizer, prompt, documents, loaded.max_len - 1)
        if not token_ids:
            raise InvalidRequestError("the prompt is empty; expected at least one token")
        if len(token_ids) >= loaded.max_len:
            raise PromptTooLongError(
                f"the prompt has {len(token_ids)} tokens; {model} takes at most {loaded.max_len - 1}, so "
                "that one can be generated: shorten it"
            )
        reuse = self._allowed_reuse(loaded, kv_reuse)
        bad_words = loaded.tokenizer.bad_word_ids(params.bad_words)
        vocab = loaded.chain.vocab_size
        sampler = SamplerState(params, token_ids, vocab, loaded.eos_token_ids, bad_words)
        arrival = time.monotonic()
        seq = Sequence(
            request_id,
            model,
            self._zoo.caches[loaded.chain.family],
            loaded.chain.segments,
            # unambiguous whatever a scope contains: it comes from the network
            json.dumps([model if self.config.kv_sharing == "model" else None, scope]),
            token_ids,
            arrival,
            reuse,
            spans,
            ends_line=loaded.tokenizer.ends_line if reuse == "approx" else None,
        )
        detokenizer = Detokenizer(loaded.tokenizer, params, token_ids)
        max_tokens = min(params.max_tokens, loaded.max_len - len(token_ids))
        return Request(seq, loaded, params, sampler, detokenizer, max_tokens, arrival)

    def _allowed_reuse(self, model: LoadedModel, asked: KVReuse | None) -> KVReuse:
        """What a request gets. Raises InvalidRequestError where it may not have what it asked for."""
        if asked is None:
            return (
                "exact" if self.config.kv_reuse == "approx" and not model.plain_rope else self.config.kv_reuse
            )
        if asked not in get_args(KVReuse):
            raise InvalidRequestError(f"kv_reuse is {asked!r}; expected {' or '.join(get_args(KVReuse))}")
        if self.config.kv_reuse == "off" and asked != "off":
            raise InvalidRequestError(f"kv_reuse is {asked!r}; this engine reuses no KV: use 'off'")
        if asked == "approx" and self.config.approximate is None:
            raise InvalidRequestError(
                "kv_reuse is 'approx', which this engine does not allow (EngineConfig.approximate is None; "
                "zoo-serve --kv-reuse allows it); use 'exact'"
            )
        if asked == "approx" and not model.plain_rope:
            raise InvalidRequestError(
                f"kv_reuse is 'approx'; {model.name} has a scaled rotary embedding, for which it is not "
                "supported: use 'exact'"
            )
        return asked

    def enqueue(self, request: Request) -> None:
        """Queue a prepared request. Raises OverloadedError, InvalidRequestError (id in use)."""
        self._scheduler.add(request.seq)
        self._requests[request.seq.request_id] = request
        self._recorder.on_request_arrived()

    def add_request(
        self,
        request_id: str,
        model: str,
        prompt: str | AnySequence[int],
        params: SamplingParams,
        scope: str | None = None,
        kv_reuse: KVReuse | None = None,
        documents: AnySequence[str] = (),
    ) -> None:
        """`prepare` and `enqueue` in one."""
        self.enqueue(self.prepare(request_id, model, prompt, params, scope, kv_reuse, documents))

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now, in whatever state: its last output, or None when there is none."""
        if request_id not in self._requests:
            return None
        self._scheduler.abort(request_id)
        return self._finish(self._requests[request_id], "abort")

    def refusal(self, request: Request, error: BaseException) -> RequestOutput:
        """The only output of a prepared request that could not be queued."""
        return self._output(request, "", (), None, "error", str(error))

    # ---- published documents

    def publish(self, name: str, text: str, models: AnySequence[str] | None = None) -> PublishedDocument:
        """Compute a document's KV, or load it, for some models (all), for every scope; see `Publisher`."""
        return self._publisher.publish(name, text, models)

    def withdraw(self, name: str) -> None:
        """End the publication of a document. Raises InvalidRequestError."""
        self._publisher.withdraw(name)

    @property
    def documents(self) -> tuple[PublishedDocument, ...]:
        """What is published."""
        return self._publisher.documents

    # ---- step

    @property
    def num_waiting(self) -> int:
        """Requests that hold no pages yet."""
        return self._scheduler.num_waiting

    def has_unfinished(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._requests)

    def step(self) -> list[RequestOutput]:
        """Run one step; what it added to each request, one output per request at most.

        An error in the engines ends the requests of this step with an error output; the others, and
        the engine, go on.
        """
        outputs = self._expired()
        scheduled = self._scheduler.schedule()
        outputs += [
            self._finish(self._requests[failed.seq.request_id], "error", failed.message)
            for failed in self._scheduler.take_failed()
        ]
        try:
            sampled = self._execute(scheduled)
        except Exception as error:
            return outputs + [self._fail(item.seq, f"the engine failed: {error}") for item in scheduled]
        for seq, result in sampled:
            request = self._requests[seq.request_id]
            if isinstance(result, RequestError):
                outputs.append(self._fail(seq, str(result)))
            else:
                outputs.append(self._take_token(request, result))
        return outputs

    def rest(self) -> None:
        """Between steps, once the outputs are handed out: where nothing is left to do, check that every page
        is accounted for and give memory back. Raises IntegrityError: a bug of ours."""
        if not self._requests:
            self.check_integrity()
            for executor in self._zoo.executors.values():
                executor.release_memory()

    def _execute(self, scheduled: list[Scheduled]) -> list[tuple[Sequence, SampledToken | RequestError]]:
        """Write the KV of the scheduled tokens; a token for each sequence that has come to its end."""
        results: list[tuple[Sequence, SampledToken | RequestError]] = []
        by_family: dict[Family, list[Scheduled]] = {}
        for item in scheduled:
            self._note_start(self._requests[item.seq.request_id])
            family = self._requests[item.seq.request_id].model.chain.family
            by_family.setdefault(family, []).append(item)
        for family, items in by_family.items():
            try:
                step = self._run(self._zoo.executors[family], items)
            except AdapterUnavailableError as error:  # the others run in the next step
                broken = [item.seq for item in items if self._chain_index(item.seq) == error.chain]
                results += [(seq, error) for seq in broken]
                continue
            self._recorder.on_step(step.num_calls, step.num_call_rows)
            for logits, indices in step.logits:
                seqs = [items[i].seq for i in indices]
                states = [self._requests[seq.request_id].sampler for seq in seqs]
                results += zip(seqs, self._sampler.sample(logits, states), strict=True)
        return results

    def _note_start(self, request: Request) -> None:
        if not request.started:
            request.started = True
            share = request.seq.num_spared / request.seq.prompt_len
            self._recorder.on_started(time.monotonic() - request.arrival, share)

    def _run(self, executor: Executor, items: list[Scheduled]) -> StepResult:
        """Run the scheduled tokens of one family; logits come with indices into `items`."""
        batch: list[Rows] = []
        owners: list[tuple[int, Part]] = []
        for index, (seq, num_tokens) in enumerate(items):
            refreshing = self._reuse.before(seq, self._chain_index(seq), executor.kv)
            for part in refreshing + seq.parts(seq.end_after(num_tokens)):
                batch.append(self._rows(seq, part))
                owners.append((index, part))
        step = executor.run(batch)
        for index, scores in step.scores.items():
            self._reuse.add_scores(items[owners[index][0]].seq, owners[index][1], scores)
        self._scheduler.advance(items)
        for index, entry, hidden in step.hidden:
            seq, part = items[owners[index][0]].seq, owners[index][1]
            if batch[index].exit is not None:
                self._reuse.keep_hidden(seq, part, hidden)
                continue
            segment = seq.segments[self._chain(seq).entries.index(entry)]
            self._zoo.boundaries.record(seq, segment.boundary, part.start, hidden)
        for seq, _ in items:
            self._reuse.after(seq, executor.kv)
        logits = [(rows, [owners[i][0] for i in indices]) for rows, indices in step.logits]
        return step._replace(logits=logits)

    def _rows(self, seq: Sequence, part: Part) -> Rows:
        chain, survey = self._chain(seq), seq.survey
        entry = chain.entries[part.level]
        hidden = self._zoo.boundaries.entering(seq, part) if part.level else None
        if survey is not None and survey.enters and part.end <= survey.matched.size:
            assert chain.check is not None, "the first pass left there"
            entry, hidden = chain.check, survey.rows_entering(part.start, part.end)
        return Rows(
            self._chain_index(seq),
            seq.token_ids[part.start : part.end],
            part.start,
            seq.page_table,
            wants_logits=part.end == seq.num_tokens and (survey is None or survey.done),
            entry=entry,
            hidden=hidden,
            # not of what stands behind approximate KV: others could not tell
            keeps_hidden=self._zoo.boundaries.max_bytes > 0
            and seq.reuse != "off"
            and seq.reused is None
            and part.start < seq.num_prompt_pages * PAGE_TOKENS,
            exit=chain.check if survey is not None and survey.exits else None,
            score_window=self._reuse.window(seq, part),
        )

    def _chain_index(self, seq: Sequence) -> int:
        return self._loaded(seq).chain_index

    def _chain(self, seq: Sequence) -> ChainPlan:
        return self._loaded(seq).chain

    def _loaded(self, seq: Sequence) -> LoadedModel:
        request = self._requests.get(seq.request_id)
        return request.model if request is not None and request.seq is seq else self._publisher.model

    def _take_token(self, request: Request, token: SampledToken) -> RequestOutput:
        request.num_generated += 1
        request.seq.append_token(token.token_id)
        self._record_token(request)
        reason: FinishReason | None = None
        text = ""
        if token.token_id in request.model.eos_token_ids and not request.params.ignore_eos:
            reason = "stop"
        else:
            text = request.detokenizer.push(token.token_id)
            if request.detokenizer.stopped:
                reason = "stop"
            elif request.num_generated >= request.max_tokens:
                reason = "length"
        logprobs = None
        if token.logprob is not None:
            logprobs = (TokenLogprob(token.token_id, token.logprob, token.top),)
        if reason is None:
            return self._output(request, text, (token.token_id,), logprobs)
        self._scheduler.finish(request.seq)
        return self._finish(request, reason, None, text, (token.token_id,), logprobs)

    def _record_token(self, request: Request) -> None:
        now = time.monotonic()
        if request.last_token_time is None:
            self._recorder.on_first_token(now - request.arrival)
        else:
            self._recorder.on_token(now - request.last_token_time)
        request.last_token_time = now

    def _expired(self) -> list[RequestOutput]:
        limit = self.config.max_request_seconds
        if limit is None:
            return []
        now = time.monotonic()
        late = [request for request in self._requests.values() if now - request.arrival > limit]
        message = f"the request took longer than max_request_seconds ({limit:g} s)"
        return [self._fail(request.seq, message) for request in late]

    # ---- out

    def _fail(self, seq: Sequence, message: str) -> RequestOutput:
        self._scheduler.abort(seq.request_id)
        return self._finish(self._requests[seq.request_id], "error", message)

    def _finish(
        self,
        request: Request,
        reason: FinishReason,
        error: str | None = None,
        text: str = "",
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] | None = None,
    ) -> RequestOutput:
        """The last output of a request that the scheduler has forgotten."""
        del self._requests[request.seq.request_id]
        self._recorder.on_request_finished(
            reason,
            time.monotonic() - request.arrival,
            num_prompt_tokens=request.seq.prompt_len,
            num_cached_tokens=request.seq.num_cached,
        )
        text += request.detokenizer.flush()
        return self._output(request, text, token_ids, logprobs, reason, error)

    @staticmethod
    def _output(
        request: Request,
        text: str,
        token_ids: tuple[int, ...],
        logprobs: tuple[TokenLogprob, ...] | None,
        reason: FinishReason | None = None,
        error: str | None = None,
    ) -> RequestOutput:
        return RequestOutput(
            request_id=request.seq.request_id,
            model=request.model.name,
            text=text,
            token_ids=token_ids,
            logprobs=logprobs,
            finished=reason is not None,
            finish_reason=reason,
            error=error,
            num_prompt_tokens=request.seq.prompt_len,
            num_cached_tokens=request.seq.num_cached,
            num_generated=request.num_generated,
        )

    def _model(self, name: str) -> LoadedModel:
        model = self._zoo.models.get(name)
        if model is None:
            close = get_close_matches(name, self._zoo.models, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"it serves {', '.join(self.models)}"
            raise UnknownModelError(f"no model {name!r} in this zoo; {hint}")
        return model

    def configure_reuse(self, reuse: ReuseConfig) -> None:
        """Change how approximate reuse works, from the next request on: all but `window` and `max_donors`.

        Raises:
            InvalidRequestError: the engine was made without approximate reuse, or for a selector that needs
                less of the engines.
        """
        made = self.config.approximate
        if made is None:
            raise InvalidRequestError("this engine has no approximate reuse: set EngineConfig.approximate")
        if reuse.uses_scores and not made.uses_scores:
            raise InvalidRequestError(
                f"this engine was made for selector {made.selector!r} and reads no attention scores, which "
                f"{reuse.selector!r} with refresh_order {reuse.refresh_order!r} needs: make it for that"
            )
        if reuse.uses_check and (not made.uses_check or reuse.check_layers != made.check_layers):
            raise InvalidRequestError(
                f"this engine was made for selector {made.selector!r} with check_layers {made.check_layers}, "
                f"not for {reuse.selector!r} with {reuse.check_layers}: make it for that"
            )
        for cache in self._zoo.caches.values():
            if cache.planner is not None:
                cache.planner.config = reuse

    def refresh(self) -> Refreshed:
        """Take over what has changed in the zoo on disk, without touching engines or requests; thread-safe.

        Raises:
            ManifestError, StoreError: the zoo cannot be read; nothing has changed.
        """
        self._zoo, refreshed = self._refresher.refresh(self._zoo)
        self._recorder.add_segments(s for chain in self._zoo.topology.chains for s in chain.segments)
        return refreshed

    # ---- looking in

    def check_integrity(self) -> None:
        """Check that every page is accounted for. Raises IntegrityError: a bug of ours."""
        for cache in self._zoo.caches.values():
            cache.check_integrity([seq for seq in self._scheduler.running if seq.cache is cache])

    def metrics(self) -> Metrics:
        """A snapshot of counters, gauges and histograms."""
        caches = list(self._zoo.caches.values())
        return self._recorder.snapshot(self._scheduler, caches, self._zoo.adapters, self._publisher.stats())
