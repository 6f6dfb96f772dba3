"""From what a client asks to a request that the engine can queue: every check that needs no engine."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import get_args

from blockzoo.runtime.api.errors import InvalidRequestError, PromptTooLongError, UnknownModelError
from blockzoo.runtime.api.request import (
    FinishReason,
    KVReuse,
    RequestOutput,
    SamplingParams,
    TokenLogprob,
)
from blockzoo.runtime.approx.config import ReuseConfig
from blockzoo.runtime.draft.acceptance import Acceptance
from blockzoo.runtime.draft.guesses import Guess
from blockzoo.runtime.kv.sequence import TokenSequence
from blockzoo.runtime.sampling.guided import Guides
from blockzoo.runtime.sampling.sampler import SampledToken, SamplerState
from blockzoo.runtime.serve.config import LEAST_WEIGHT, MOST_WEIGHT, EngineConfig
from blockzoo.runtime.serve.loaded import Calibrated, LoadedModel, LoadedZoo
from blockzoo.runtime.text.detokenizer import Detokenizer
from blockzoo.runtime.text.prompt import Prompt, assemble


@dataclass(slots=True)
class Request:
    """A checked request on its way through the engine."""

    seq: TokenSequence
    model: LoadedModel
    params: SamplingParams
    sampler: SamplerState
    detokenizer: Detokenizer
    max_tokens: int  # params.max_tokens, or what the model's length leaves
    arrival: float
    declined: bool = False  # asked for approximate reuse, which is not near enough for its model
    started: bool = False
    last_token_time: float | None = None
    num_generated: int = field(default=0)
    prompt_logprobs: list[TokenLogprob | None] | None = None  # of its first tokens; None once they are told
    guesses: Sequence[Guess] = ()  # of what its next tokens are
    untried: Sequence[Guess] = ()  # others, for which these took the place
    acceptance: Acceptance | None = None  # of guesses so far, once there were any

    def add_prompt_logprobs(self, begin: int, found: Sequence[SampledToken]) -> None:
        """Those of the tokens that follow the one at place `begin`."""
        assert self.prompt_logprobs is not None, f"{self.seq} wants no log-probabilities of its prompt"
        del self.prompt_logprobs[begin + 1 :]
        for token in found:
            assert token.logprob is not None, "it was asked for"
            self.prompt_logprobs.append(TokenLogprob(token.token_id, token.logprob, token.top))
        self.seq.logits_from = begin + len(found)

    def output(
        self,
        text: str,
        token_ids: tuple[int, ...],
        logprobs: tuple[TokenLogprob, ...] | None,
        reason: FinishReason | None = None,
        error: str | None = None,
    ) -> RequestOutput:
        """What is to be told of it now; with a `reason` for the last time."""
        prompt_ids, prompt_logprobs = None, None
        if self.prompt_logprobs is not None and len(self.prompt_logprobs) == self.seq.prompt_len:
            prompt_logprobs, self.prompt_logprobs = tuple(self.prompt_logprobs), None
            prompt_ids = tuple(self.seq.token_ids[: self.seq.prompt_len].tolist())
        return RequestOutput(
            request_id=self.seq.request_id,
            model=self.model.name,
            text=text,
            token_ids=token_ids,
            logprobs=logprobs,
            finished=reason is not None,
            finish_reason=reason,
            error=error,
            num_prompt_tokens=self.seq.prompt_len,
            num_cached_tokens=self.seq.num_cached_told,
            num_generated=self.num_generated,
            prompt_token_ids=prompt_ids,
            prompt_logprobs=prompt_logprobs,
        )


class RequestBuilder:
    """Checks requests. Thread-safe.

    Args:
        zoo: what is loaded now.
        config: of the engine.
    """

    def __init__(self, zoo: Callable[[], LoadedZoo], config: EngineConfig) -> None:
        self._zoo, self._config = zoo, config
        self._guides = Guides()

    def model(self, name: str) -> LoadedModel:
        """A model by its name. Raises UnknownModelError."""
        return find_model(self._zoo(), name)

    def build(
        self,
        request_id: str,
        model: str,
        prompt: Prompt,
        params: SamplingParams,
        scope: str | None,
        kv_reuse: KVReuse | None,
        documents: Sequence[str],
        tenant: str | None,
        weight: float | None,
    ) -> Request:
        """See `LLMEngine.prepare`."""
        if weight is not None and not LEAST_WEIGHT <= weight <= MOST_WEIGHT:
            raise InvalidRequestError(
                f"weight is {weight!r}; expected a number from {LEAST_WEIGHT} to {MOST_WEIGHT}"
            )
        zoo = self._zoo()
        loaded = find_model(zoo, model)
        token_ids, spans = assemble(
            loaded.tokenizer, loaded.chain.vocab_size, prompt, documents, loaded.max_len - 1
        )
        if not token_ids:
            raise InvalidRequestError("the prompt is empty; expected at least one token")
        if len(token_ids) >= loaded.max_len:
            raise PromptTooLongError(
                f"the prompt has {len(token_ids)} tokens; {model} takes at most {loaded.max_len - 1}, so "
                "that one can be generated: shorten it"
            )
        if params.prompt_logprobs is not None and kv_reuse == "approx":
            raise InvalidRequestError("prompt_logprobs cannot go with kv_reuse 'approx'; leave one out")
        reuse = self._allowed_reuse(loaded, kv_reuse)
        own = self._calibrated(loaded) if reuse == "approx" else None
        declined = own is not None and own.reuse is None
        if declined:
            reuse = "exact"
        if params.prompt_logprobs is not None:
            reuse = "off"  # what is taken from the cache has no logits
        bad_words = loaded.tokenizer.bad_word_ids(params.bad_words)
        vocab = loaded.chain.vocab_size
        guide = None
        if params.guided is not None:
            guide = self._guides.guide(params.guided, loaded.tokenizer, vocab, tuple(loaded.eos_token_ids))
        sampler = SamplerState(params, token_ids, vocab, loaded.eos_token_ids, bad_words, guide=guide)
        arrival = time.monotonic()
        seq = TokenSequence(
            request_id,
            model,
            zoo.caches[loaded.chain.family],
            loaded.chain.segments,
            # unambiguous whatever a scope contains: it comes from the network
            json.dumps([model if self._config.kv_sharing == "model" else None, scope]),
            token_ids,
            arrival,
            reuse,
            spans,
            ends_line=loaded.tokenizer.ends_line if reuse == "approx" else None,
            chain_index=loaded.chain_index,
            tenant=tenant,
            weight=weight,
            approximate=None if own is None else own.reuse,
        )
        known: list[TokenLogprob | None] | None = None
        if params.prompt_logprobs is not None:
            seq.logits_from, known = 0, [None]
        detokenizer = Detokenizer(loaded.tokenizer, params, token_ids)
        max_tokens = min(params.max_tokens, loaded.max_len - len(token_ids))
        return Request(
            seq, loaded, params, sampler, detokenizer, max_tokens, arrival, declined, prompt_logprobs=known
        )

    def _calibrated(self, model: LoadedModel) -> Calibrated | None:
        """What was found for a model, where the operator leaves it to that."""
        is_left = self._config.calibrated and self._config.approximate == ReuseConfig()
        return model.calibrated if is_left else None

    def _allowed_reuse(self, model: LoadedModel, asked: KVReuse | None) -> KVReuse:
        """What a request gets. Raises InvalidRequestError where it may not have what it asked for."""
        default = self._config.kv_reuse
        if asked is None:
            return "exact" if default == "approx" and not model.plain_rope else default
        if asked not in get_args(KVReuse):
            raise InvalidRequestError(f"kv_reuse is {asked!r}; expected {' or '.join(get_args(KVReuse))}")
        if default == "off" and asked != "off":
            raise InvalidRequestError(f"kv_reuse is {asked!r}; this engine reuses no KV: use 'off'")
        if asked == "approx" and self._config.approximate is None:
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


def find_model(zoo: LoadedZoo, name: str) -> LoadedModel:
    """A model by its name. Raises UnknownModelError."""
    model = zoo.models.get(name)
    if model is None:
        if name in zoo.left_out:
            raise UnknownModelError(f"model {name!r} is left out: {zoo.left_out[name]}")
        close = get_close_matches(name, zoo.models, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"it serves {', '.join(sorted(zoo.models))}"
        raise UnknownModelError(f"no model {name!r} in this zoo; {hint}")
    return model
