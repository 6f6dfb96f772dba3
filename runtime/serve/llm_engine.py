"""LLMEngine: requests in, tokens out, one step at a time.

    schedule -> execute -> advance -> sample -> report

One caller at a time for `enqueue`, `step` and `abort` (EngineThread sees to that); `prepare`, `reload` and
`settle` may be called from any thread.
"""

from __future__ import annotations

import logging
import os
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

from blockzoo.engines.base import PAGE_TOKENS
from blockzoo.engines.choose import make_engines
from blockzoo.runtime.api.errors import (
    InvalidRequestError,
    OverloadedError,
    RequestError,
    SamplingError,
    UnknownModelError,
)
from blockzoo.runtime.api.request import FinishReason, KVReuse, RequestOutput, SamplingParams, TokenLogprob
from blockzoo.runtime.approx.config import ReuseConfig
from blockzoo.runtime.exec.interface import KVLostError
from blockzoo.runtime.exec.topology import Family
from blockzoo.runtime.kv.prefix_cache import KVCache
from blockzoo.runtime.kv.sequence import TokenSequence
from blockzoo.runtime.sampling.sampler import SampledToken, Sampler
from blockzoo.runtime.serve.between_steps import BetweenSteps
from blockzoo.runtime.serve.change_over import StillUsedError, bring_up_to_date, change_over
from blockzoo.runtime.serve.config import MAX_PROMPT_LOGITS, EngineConfig
from blockzoo.runtime.serve.document_publisher import DocumentPublisher, PublishedDocument
from blockzoo.runtime.serve.draft_models import DraftModels
from blockzoo.runtime.serve.loaded import LoadedZoo
from blockzoo.runtime.serve.loading import load_zoo, making
from blockzoo.runtime.serve.making import Progress
from blockzoo.runtime.serve.metrics import Metrics, MetricsRecorder
from blockzoo.runtime.serve.reload import Reloaded, ServedZoo
from blockzoo.runtime.serve.request_builder import Request, RequestBuilder
from blockzoo.runtime.serve.reuse_steps import ReuseSteps
from blockzoo.runtime.serve.scheduler import Scheduled, Scheduler
from blockzoo.runtime.serve.sparing import Sparing
from blockzoo.runtime.serve.speculation import Speculation
from blockzoo.runtime.serve.step_pace import StepPace, measured_pace
from blockzoo.runtime.serve.step_runner import StepOutcome, StepRunner
from blockzoo.runtime.text.prompt import Prompt, max_prompt_bytes
from blockzoo.runtime.text.tokenizer import Tokenizer
from blockzoo.zoo.store import Zoo

if TYPE_CHECKING:
    from blockzoo.runtime.serve.live_placement import LivePlacement

Result = Iterator[SampledToken | SamplingError] | RequestError | None
"""What a step gave a sequence: tokens, chosen as they are taken; why it failed; nothing, as it wants none."""

_LOG = logging.getLogger(__name__)
_RETRY_S = 30.0  # after workers did not start
_CHECK_SHARE = 0.01  # of the time may go into checks at rest


class LLMEngine:
    """Serves all models of a zoo from one process and one KV pool per KV geometry.

    Args:
        zoo_path: a zoo directory.
        config: settings.
        progress: called with (engines compiled, engines in all) while loading.

    Raises:
        StoreError, ManifestError: the zoo is missing, or no model of it is whole.
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
        # those that the next step will admit wait too, until it begins
        waiting = self.config.max_waiting + self.config.max_num_seqs
        zoo = Zoo.open(zoo_path)
        self._pace = StepPace(lambda model: measured_pace(self._zoo.manifest, model))
        scheduling = replace(self.config.scheduler(), max_waiting=waiting)
        self._scheduler = Scheduler(scheduling, pace=self._pace, give_back=self._give_back)
        maker = make_engines(
            self.config.backend,
            self.config.precision,
            device=self.config.device,
            num_threads=self.config.num_threads,
            zoo=zoo,
            int8_activations=self.config.int8_activations,
            kv_precision=self.config.kv_precision,
        )
        self._between = BetweenSteps()
        self._make = making(zoo, self.config, maker)
        loaded = load_zoo(zoo, self._make, progress)
        self._served = ServedZoo(
            zoo, self._make, loaded, self._change, lambda: self._between.run(self._chains_in_use)
        )
        self._builder = RequestBuilder(lambda: self._zoo, self.config)
        self._requests: dict[str, Request] = {}
        self._sampler = Sampler()
        self._runner = StepRunner(
            self._zoo.boundaries,
            ReuseSteps(maker.arrays.rows_like),
            shares_models=self.config.kv_sharing == "scope",
        )
        self._recorder = MetricsRecorder()
        self._draft_models = DraftModels(lambda: self._zoo, self._runner)
        self._speculation: Speculation | None = None
        if self.config.speculate == "auto":
            self._speculation = Speculation(
                self._recorder.on_drafted, maker.arrays.records, models=self._draft_models
            )
            if not maker.arrays.records:  # there each shape is dear, and sequences alone speculate
                self._learn_costs(self._speculation)
        self._check = Sparing(lambda: self.check_integrity(), _CHECK_SHARE)
        self._watch_after = 0.0
        self._due: list[RequestOutput] = []  # that no step has given yet
        self._publisher = DocumentPublisher(lambda: self._zoo, self.config, self._runner)
        self.placement = None if self.config.workers is None else self._live_placement()

    def _learn_costs(self, speculation: Speculation) -> None:
        """See what steps cost here, each family's by one of its models."""
        topology, config = self._zoo.topology, self.config
        max_rows = min(config.max_num_batched_tokens, config.max_num_seqs + MAX_PROMPT_LOGITS)
        of_models = set(topology.chain_of_model.values())
        for family, executor in self._zoo.local_executors.items():
            own = [index for index in of_models if topology.chains[index].family == family]
            chain = min(own, key=lambda index: len(topology.chains[index].adapters))
            run = partial(executor.run_padding, chain)
            speculation.learn_costs(family, run, config.max_num_seqs, max_rows)

    @property
    def _zoo(self) -> LoadedZoo:
        return self._served.current

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models served."""
        return tuple(sorted(self._zoo.models))

    @property
    def left_out(self) -> Mapping[str, str]:
        """Models of the zoo that are not served, and why."""
        return self._zoo.left_out

    def tokenizer(self, model: str) -> Tokenizer:
        """A model's tokenizer. Raises UnknownModelError."""
        return self._builder.model(model).tokenizer

    @property
    def end_ids(self) -> dict[str, tuple[int, ...]]:
        """End-of-sequence token ids by model name."""
        return {name: model.eos_token_ids for name, model in self._zoo.models.items()}

    def generation_defaults(self, model: str) -> dict[str, float | int]:
        """What the model's maker set in generation_config.json, as fields of `SamplingParams`.

        Raises UnknownModelError.
        """
        return dict(self._builder.model(model).generation_defaults)

    def max_model_len(self, model: str) -> int:
        """Tokens of prompt and answer together that a request to `model` may have."""
        return self._builder.model(model).max_len

    @property
    def max_prompt_bytes(self) -> dict[str, int]:
        """Bytes of text, by model name, beyond which a prompt with its documents is refused unread."""
        return {n: max_prompt_bytes(m.tokenizer, m.max_len - 1) for n, m in self._zoo.models.items()}

    @property
    def warm_models(self) -> tuple[str, ...]:
        """Those of `models` all of whose adapters are in memory; models without any are."""
        zoo = self._zoo
        warm = (
            name
            for name, model in zoo.models.items()
            if all(zoo.adapters.has(adapter_id) for _, adapter_id in model.chain.adapters)
        )
        return tuple(sorted(warm))

    @property
    def kv_tokens(self) -> int:
        """About how many tokens' KV the pools hold, all layers of each."""
        zoo = self._zoo
        layers = {chain.family: chain.num_layers for chain in zoo.topology.chains}
        return sum(
            PAGE_TOKENS * cache.pool.num_pages // layers[family]
            for family, cache in zoo.caches.items()
            if family in layers
        )

    @property
    def engine_facts(self) -> dict[str, object]:
        """Backend, version, precision and target."""
        return dict(self._zoo.engine_facts)

    # ---- in

    def prepare(
        self,
        request_id: str,
        model: str,
        prompt: Prompt,
        params: SamplingParams,
        scope: str | None = None,
        kv_reuse: KVReuse | None = None,
        documents: Sequence[str] = (),
        tenant: str | None = None,
        weight: float | None = None,
    ) -> Request:
        """Check a request and make it ready to enqueue. Thread-safe.

        Args:
            prompt: text, or token ids as a list or 1-D array of integers.
            scope: requests share cached KV only with those of the same scope, and only within one model
                unless EngineConfig.kv_sharing says otherwise. None is one more scope: that of all
                requests without one.
            kv_reuse: "exact" uses the KV of equal prefixes and leaves its own; "off" does neither; "approx"
                takes also the KV of equal words behind other ones (see `runtime.approx`), which changes
                answers a little, and lets others of its scope change them. None: as EngineConfig says.
            documents: texts put before the prompt as they are, each tokenized on its own: a published one of
                the same text then is found whole.
            tenant: whose share of the engine the request takes; None: the model's.
            weight: of the tenant, 0.001 to 1000, from now on; None: as it is, at first as
                EngineConfig.tenant_weights has it.

        Raises:
            UnknownModelError, InvalidRequestError, PromptTooLongError.
        """
        return self._builder.build(
            request_id, model, prompt, params, scope, kv_reuse, documents, tenant, weight
        )

    def enqueue(self, request: Request) -> None:
        """Queue a prepared request.

        Raises:
            OverloadedError, InvalidRequestError (id in use).
            UnknownModelError: its model is gone since it was prepared.
        """
        with self._between.held():
            try:
                bring_up_to_date(request, self._zoo)
                self._scheduler.add(request.seq)
            except OverloadedError:
                self.count_refusal(request)
                raise
            except StillUsedError:
                raise UnknownModelError(
                    f"model {request.model.name!r} was removed or replaced while the request was on its way: "
                    "send it again"
                ) from None
            self._requests[request.seq.request_id] = request
            self._recorder.on_request_arrived(request.model.name, request.declined)

    def add_request(
        self,
        request_id: str,
        model: str,
        prompt: Prompt,
        params: SamplingParams,
        scope: str | None = None,
        kv_reuse: KVReuse | None = None,
        documents: Sequence[str] = (),
        tenant: str | None = None,
        weight: float | None = None,
    ) -> None:
        """`prepare` and `enqueue` in one."""
        self.enqueue(
            self.prepare(request_id, model, prompt, params, scope, kv_reuse, documents, tenant, weight)
        )

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now, in whatever state: its last output, or None when there is none."""
        with self._between.held():
            if request_id not in self._requests:
                return None
            self._scheduler.abort(request_id)
            return self._finish(self._requests[request_id], "abort")

    def count_refusal(self, request: Request) -> None:
        """Note that a prepared request was refused as too many wait. Thread-safe."""
        self._recorder.on_request_refused(request.model.name)

    def refusal(self, request: Request, error: BaseException) -> RequestOutput:
        """The only output of a prepared request that could not be queued."""
        return request.output("", (), None, "error", str(error))

    # ---- published documents

    def publish(self, name: str, text: str, models: Sequence[str] | None = None) -> PublishedDocument:
        """Compute or load a document's KV, for some models (all), for every scope: `DocumentPublisher`.

        Where a worker is lost meanwhile, it begins anew, once. Raises RequestError: one is lost again.
        """
        with self._between.held():
            self._draft_models.forget_all()
            try:
                try:
                    return self._publisher.publish(name, text, models)
                except KVLostError as error:
                    self._due += self._begin_anew(error)
                return self._publisher.publish(name, text, models)
            except KVLostError as error:
                raise RequestError(f"document {name!r} is not published: {error}") from error

    def withdraw(self, name: str) -> None:
        """End the publication of a document. Raises InvalidRequestError."""
        with self._between.held():
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
        return bool(self._requests or self._due) or self._documents_wait

    @property
    def _documents_wait(self) -> bool:
        """Whether some are to be computed for models that came, or anew; not at once where workers, in which
        all KV is, did not start."""
        return self._publisher.is_behind and time.monotonic() >= self._watch_after

    def step(self) -> list[RequestOutput]:
        """Run one step; what it added to each request, one output per request at most.

        An error in the engines ends the requests that it concerns with an error output; the others, and the
        engine, go on. Models that came with a reload get the published documents here, one a step.
        """
        with self._between.held():
            return self._step()

    def _step(self) -> list[RequestOutput]:
        outputs, self._due = [*self._due, *self._expired()], []
        if self._documents_wait:
            self._draft_models.forget_all()
            try:
                self._publisher.follow()
            except KVLostError as error:
                return outputs + self._begin_anew(error)
        scheduled = self._scheduler.schedule()
        outputs += [
            self._finish(self._requests[failed.seq.request_id], "error", failed.message)
            for failed in self._scheduler.take_failed()
        ]
        by_family: dict[Family, list[Scheduled]] = {}
        for item in scheduled:
            request = self._requests[item.seq.request_id]
            self._note_start(request)
            by_family.setdefault(request.model.chain.family, []).append(item)
        try:
            for family, items in by_family.items():
                for seq, result in self._execute(family, items):
                    outputs.append(self._take_result(self._requests[seq.request_id], result))
        except KVLostError as error:
            outputs += self._begin_anew(error)
        return outputs

    def _begin_anew(self, error: KVLostError) -> list[RequestOutput]:
        """A worker is lost: forget all KV, start it again, and let all that runs be computed from its tokens.

        Where it does not start, the requests that ran end with an error.
        """
        workers, start = self._zoo.workers, time.monotonic()
        assert workers is not None, "only workers are lost"
        _LOG.warning("%s: it is started again, and what runs is computed anew", error)
        running = self._scheduler.running
        for seq in running:
            self._scheduler.put_back(seq)
        self._draft_models.forget_all()
        self._publisher.forget_all()
        for cache in self._zoo.caches.values():
            cache.forget_all()
        try:
            workers.recover()
        except Exception as problem:
            traceback.print_exc()
            self._watch_after = time.monotonic() + _RETRY_S
            return [self._fail(seq, f"the engine failed: {problem}") for seq in running]
        _LOG.warning("serving again after %.1f s", time.monotonic() - start)
        return []

    def rest(self) -> None:
        """Between steps, once the outputs are handed out: where nothing is left to do, give scratch back, and
        now and then check that every page is accounted for: with many cached, that would keep the next
        request waiting.

        Raises:
            IntegrityError: one is not: a bug of ours.
        """
        with self._between.held():
            if not self.has_unfinished():
                self._check.offer()
                for executor in self._zoo.executors.values():
                    executor.release_memory()

    def _give_back(self, cache: KVCache) -> bool:
        """Free pages that nobody's answer needs."""
        return self._draft_models.give_back(cache)

    def _execute(self, family: Family, items: list[Scheduled]) -> list[tuple[TokenSequence, Result]]:
        """Write the KV of the scheduled tokens; tokens for each sequence that has come to its end, or None
        where it is to have none."""
        executor = self._zoo.executors[family]
        try:
            if self._speculation is not None:
                self._speculation.plan(family, items, self._requests, self._scheduler, executor)
            start = time.monotonic()
            done = self._runner.run(executor, items, self._scheduler.advance)
            seconds = time.monotonic() - start
            self._pace.observe(_prefill_tokens(items), seconds)
            if self._speculation is not None:
                self._speculation.observe(family, items, seconds)
            self._recorder.on_step(done.num_calls, done.num_call_rows)
            if self.placement is not None:
                self.placement.note(_tokens(items))
            self._judge_prompts(items, done)
        except KVLostError:
            raise
        except Exception as error:
            traceback.print_exc()
            return [(seq, RequestError(f"the engine failed: {error}")) for seq, _ in items]
        results: list[tuple[TokenSequence, Result]] = []
        results += [(items[index].seq, RequestError(message)) for index, message in done.failed.items()]
        for logits, indices in done.logits:
            for index, own in groupby(range(len(indices)), key=indices.__getitem__):
                if index not in done.failed:
                    seq, rows = items[index].seq, list(own)
                    request = self._requests[seq.request_id]
                    wanted = logits[rows[0] : rows[-1] + 1]
                    tokens = self._sampler.follow(wanted, request.sampler, seq.drafted)
                    results.append((seq, tokens if request.max_tokens else None))
        return results

    def _judge_prompts(self, items: list[Scheduled], done: StepOutcome) -> None:
        """Log-probabilities of the prompts' tokens whose logits the step gave."""
        for index, begin, logits in done.prompt_logits:
            if index in done.failed:
                continue
            request = self._requests[items[index].seq.request_id]
            following = request.seq.token_ids[begin + 1 : begin + 1 + len(logits)].tolist()
            try:
                found = self._sampler.judge(
                    logits[: len(following)], following, request.params.prompt_logprobs or 0
                )
            except SamplingError as error:
                done.failed[index] = str(error)
            else:
                request.add_prompt_logprobs(begin, found)

    def _note_start(self, request: Request) -> None:
        if not request.started:
            request.started = True
            share = request.seq.num_spared / request.seq.prompt_len
            self._recorder.on_started(time.monotonic() - request.arrival, share)

    def _take_result(self, request: Request, result: Result) -> RequestOutput:
        if isinstance(result, RequestError):
            return self._fail(request.seq, str(result))
        if result is None:
            self._scheduler.finish(request.seq)
            return self._finish(request, "length")
        try:
            return self._take_tokens(request, result)
        except Exception as error:  # a bug of ours: it ends one request
            traceback.print_exc()
            self._scheduler.abort(request.seq.request_id)
            self._requests.pop(request.seq.request_id, None)
            self._draft_models.forget(request.seq.request_id)
            return request.output("", (), None, "error", f"the engine failed: {error}")

    def _take_tokens(self, request: Request, tokens: Iterator[SampledToken | SamplingError]) -> RequestOutput:
        """Take a token, and those that were drafted behind it, up to the last that the request may have."""
        seq, text = request.seq, ""
        token_ids: list[int] = []
        logprobs: list[TokenLogprob] = []
        reason: FinishReason | None = None
        error: str | None = None
        for token in tokens:
            if isinstance(token, SamplingError):
                reason, error = "error", str(token)
                break
            if token_ids:
                self._scheduler.keep_drafted(seq)
            more, reason = self._take_token(request, token)
            text += more
            token_ids.append(token.token_id)
            if token.logprob is not None:
                logprobs.append(TokenLogprob(token.token_id, token.logprob, token.top))
            if reason is not None:
                break
        if self._speculation is not None:
            self._speculation.judge(request, token_ids)
        told = text, tuple(token_ids), tuple(logprobs) or None
        if reason is None:
            self._scheduler.end_draft(seq)
            return request.output(*told)
        if error is None and self._speculation is not None:
            self._speculation.remember(request)
        self._scheduler.finish(seq)
        return self._finish(request, reason, error, *told)

    def _take_token(self, request: Request, token: SampledToken) -> tuple[str, FinishReason | None]:
        """The text that a token adds, and why it is the last one."""
        request.num_generated += 1
        request.seq.append_token(token.token_id)
        self._record_token(request)
        if token.token_id in request.model.eos_token_ids and not request.params.ignore_eos:
            return request.detokenizer.end(token.token_id), "stop"
        text = request.detokenizer.push(token.token_id)
        if request.detokenizer.stopped:
            return text, "stop"
        return text, "length" if request.num_generated >= request.max_tokens else None

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

    def _fail(self, seq: TokenSequence, message: str) -> RequestOutput:
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
        self._draft_models.forget(request.seq.request_id)
        self._recorder.on_request_finished(
            reason,
            time.monotonic() - request.arrival,
            num_prompt_tokens=request.seq.prompt_len,
            num_cached_tokens=request.seq.num_cached_told,
        )
        text += request.detokenizer.flush()
        return request.output(text, token_ids, logprobs, reason, error)

    def configure_reuse(self, reuse: ReuseConfig) -> None:
        """Change how approximate reuse works, from the next request on: all but `window` and `max_donors`.

        Raises:
            InvalidRequestError: the engine was made without approximate reuse, or for a selector that needs
                less of the engines.
        """
        made = self.config.approximate
        if made is None:
            raise InvalidRequestError("this engine has no approximate reuse: set EngineConfig.approximate")
        try:
            made.check_serves(reuse)
        except ValueError as error:
            raise InvalidRequestError(str(error)) from None
        for cache in self._zoo.caches.values():
            if cache.planner is not None:
                cache.planner.config = reuse

    def reload(self) -> Reloaded:
        """Take over what has changed in the zoo on disk, under the requests that run; thread-safe.

        Engines that are needed are compiled here, while steps go on in other threads; then they take their
        places between two steps. Those of models that are gone stay until their requests end: `settle`.

        Raises:
            ManifestError, StoreError: the zoo cannot be read; nothing has changed.
            InvalidRequestError: the engines are in workers, and requests to models that go are under way.
        """
        reloaded = self._served.reload()
        self._between.run(self._forget_names)
        return reloaded

    def _forget_names(self) -> None:
        """Those of models that are gone: they would pile up as ever others come."""
        self._recorder.keep(self._zoo.models)
        self._pace.keep(self._zoo.models)
        if self._zoo.workers is not None:
            self._zoo.workers.rates.keep(self._zoo.models)
        if self._speculation is not None:
            self._speculation.keep(self._zoo.models)

    @property
    def may_settle(self) -> bool:
        """Whether models are gone whose last requests have ended since: then `settle` gives memory back."""
        if not self._served.may_settle:
            return False
        zoo, in_use = self._zoo, self._chains_in_use()
        return any(zoo.topology.chains[zoo.topology.chain_of_model[n]].key not in in_use for n in zoo.gone)

    def settle(self) -> bool:
        """Let go of engines and KV that only models used that are gone; compiles as `reload`. Thread-safe.

        Returns whether anything has changed.
        """
        return self._served.settle()

    def _change(self, old: LoadedZoo, new: LoadedZoo, take: Callable[[LoadedZoo], None]) -> None:
        """Between two steps, change over; `take` notes what is loaded then. Raises as `change_over`."""

        def work() -> None:
            if self._publisher.is_behind and not old.chain_index.keys() <= new.chain_index.keys():
                raise StillUsedError  # documents may lie in chains that are about to go
            self._draft_models.forget_all()
            if new.workers is not old.workers or new.topology.copies != old.topology.copies:
                self._publisher.forget_all()
            take(change_over(old, new, self._make, list(self._requests.values()), self._scheduler))
            for family in old.caches.keys() - new.caches.keys():
                self._recorder.on_cache_gone(old.caches[family])

        self._between.run(work)

    def _chains_in_use(self) -> Collection[str]:
        """Of requests, and while documents do not follow the models yet, all."""
        if self._publisher.is_behind:
            return self._zoo.chain_index.keys()
        return {request.model.chain.key for request in list(self._requests.values())}

    def _live_placement(self) -> LivePlacement:
        # ZeroMQ is imported with workers alone
        from blockzoo.runtime.serve.live_placement import LivePlacement
        from blockzoo.runtime.serve.span_moves import SpanMover

        mover = SpanMover(
            self._between,
            lambda: self._zoo,
            self._scheduler,
            self._pace.seconds_per_token,
            self._draft_models.forget_all,
            self._served.take_copies,
        )
        return LivePlacement(mover, self._recorder.on_spans_moved)

    @property
    def worker_pids(self) -> list[int]:
        """Of the workers' processes, where the engines are in workers."""
        return [] if self._zoo.workers is None else self._zoo.workers.group.pids

    def watch(self) -> None:
        """Between requests: start a worker again that has ended; not at once where that has just failed."""
        with self._between.held():
            if self._zoo.workers is None or time.monotonic() < self._watch_after:
                return
            try:
                self._zoo.workers.group.check()
            except KVLostError as error:
                self._due += self._begin_anew(error)

    def close(self) -> None:
        """End the workers, where there are some; nothing runs any more."""
        if self.placement is not None:
            self.placement.stop()
        self._zoo.close_workers()

    # ---- looking in

    def check_integrity(self) -> None:
        """Check that every page is accounted for. Raises IntegrityError: a bug of ours."""
        with self._between.held():
            for cache in self._zoo.caches.values():
                running = [seq for seq in self._scheduler.running if seq.cache is cache]
                cache.check_integrity(running + self._draft_models.sequences(cache))
            if self.placement is not None:
                self.placement.check_integrity()

    def metrics(self) -> Metrics:
        """A snapshot of counters, gauges and histograms."""
        caches = list(self._zoo.caches.values())
        return self._recorder.snapshot(
            self._scheduler,
            caches,
            self._zoo.adapters,
            self._publisher.stats(),
            len(self._zoo.left_out),
            {} if self.placement is None else self.placement.spans_held(),
        )


def _tokens(items: list[Scheduled]) -> Counter[str]:
    """Tokens of a step by model."""
    tokens = Counter[str]()
    for seq, num_tokens in items:
        tokens[seq.model] += num_tokens
    return tokens


def _prefill_tokens(items: list[Scheduled]) -> Counter[str]:
    """Prompt tokens of a step by model."""
    tokens = Counter[str]()
    for seq, num_tokens in items:
        if num_tokens > 1:
            tokens[seq.model] += num_tokens
    return tokens
