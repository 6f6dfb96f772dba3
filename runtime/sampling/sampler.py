"""From logits to tokens: penalties, temperature, filters, one draw, log-probabilities.

The order is that of Hugging Face: penalties, biases and banned tokens, temperature, top_k, top_p, min_p. Each
row is treated alone, so the token of a request does not depend on the rest of the batch.

Knows nothing of sequences, pages or engines.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from blockzoo.runtime.api.errors import InvalidRequestError, NonFiniteLogitsError, SamplingError
from blockzoo.runtime.api.request import SamplingParams
from blockzoo.runtime.sampling.guided import Guide
from blockzoo.runtime.sampling.logits_row import LogitsRow, Scratch

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One chosen token.

    `logprob` and `top` (id and log-probability, from the likeliest down) are those of the model's own
    distribution, before penalties, bans, temperature and filters; None and () when not asked for.
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


class SamplerState:
    """What sampling has to know about one request: its parameters and the tokens so far.

    The draw of a token depends on the seed and on the number of tokens generated before it, and on
    nothing else: a state made anew from `generated_token_ids` goes on exactly as the old one would.

    Args:
        params: the request's parameters.
        prompt_token_ids: seen by the repetition penalty and by bad words.
        vocab_size: width of the logits.
        eos_token_ids: banned until `params.min_tokens` are generated (unless they are ignored anyway).
        bad_word_ids: token sequences whose last token is banned where the ones before it stand; see
            `Tokenizer.bad_word_ids`.
        generated_token_ids: tokens generated earlier, when a request is taken up again.
        guide: the form that the tokens must have, at its beginning; None: any.

    Raises:
        InvalidRequestError: a token id outside the vocabulary, in the prompt or in `params.logit_bias`.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        vocab_size: int,
        eos_token_ids: Sequence[int],
        bad_word_ids: Sequence[Sequence[int]] = (),
        generated_token_ids: Sequence[int] = (),
        guide: Guide | None = None,
    ) -> None:
        prompt = np.asarray(prompt_token_ids, dtype=np.int64)
        if prompt.size and not (prompt.min() >= 0 and prompt.max() < vocab_size):
            raise InvalidRequestError(
                f"The prompt holds token ids from {prompt.min()} to {prompt.max()}; "
                f"the model's are 0 to {vocab_size - 1}."
            )
        self.params = params
        self.vocab_size = vocab_size
        self.num_generated = 0
        self._guide = guide
        self._eos_ids = [] if params.ignore_eos else [i for i in eos_token_ids if 0 <= i < vocab_size]
        words = [tuple(word) for word in bad_word_ids if word and 0 <= word[-1] < vocab_size]
        self._banned_ids = sorted({word[0] for word in words if len(word) == 1})
        self._banned_sequences = sorted({word for word in words if len(word) > 1})
        self._tail_size = max((len(word) - 1 for word in self._banned_sequences), default=0)
        self._tail = prompt[prompt.size - min(self._tail_size, prompt.size) :].tolist()
        biases = params.logit_bias
        if biases and max(biases)[0] >= vocab_size:
            raise InvalidRequestError(
                f"logit_bias holds the token id {max(biases)[0]}; the model's are 0 to {vocab_size - 1}."
            )
        self._biased_ids = np.array([token_id for token_id, _ in biases], np.int64)
        self._biases = np.array([bias for _, bias in biases], np.float32)
        self._seen: _SeenTokens | None = None
        if params.has_penalties:
            self._seen = _SeenTokens(prompt if params.repetition_penalty != 1.0 else prompt[:0])
        self._philox = np.random.Philox(key=secrets.randbits(64) if params.seed is None else params.seed)
        self._philox_state = self._philox.state
        for token_id in generated_token_ids:
            self.append(token_id)

    @property
    def guide(self) -> Guide | None:
        """The form that the tokens must have, at its place."""
        return self._guide

    def append(self, token_id: int) -> None:
        """Takes note of a generated token."""
        self.num_generated += 1
        if self._guide is not None:
            self._guide.append(token_id)
        if self._seen is not None:
            self._seen.add(token_id)
        if self._tail_size:
            self._tail.append(token_id)
            del self._tail[: -self._tail_size]

    def uniform(self) -> float:
        """The draw for the next token, in [0, 1): block `num_generated` of Philox keyed by the seed."""
        self._philox_state["state"]["counter"][0] = self.num_generated
        self._philox.state = self._philox_state  # the saved one has an empty buffer
        return float(self._philox.random_raw() >> 11) * 2.0**-53

    def likeliest(self, logits: Logits) -> int | None:
        """The token that is taken greedily, where that is seen without editing the logits."""
        if self._guide is None or self._is_edited():
            return None
        token_id = int(logits.argmax())
        return token_id if self._guide.allows(token_id) else None

    def _is_edited(self) -> bool:
        """Whether anything but a guide changes the logits of the next token."""
        return self._seen is not None or bool(self._biases.size) or bool(self._banned_now())

    def edit(self, logits: Logits, out: Logits) -> Logits:
        """Applies penalties, biases, bans: returns `logits` itself where there are none, else fills `out`."""
        banned = self._banned_now()
        if self._seen is None and not banned and not self._biases.size and self._guide is None:
            return logits
        np.copyto(out, logits)
        if self._seen is not None:
            self._seen.penalize(out, self.params)
        out[self._biased_ids] += self._biases
        if self._guide is not None:
            allowed = self._guide.allowed()
            if allowed is None:
                raise GuideError(f"The guide of the answer failed: {self._guide.error}")
            np.copyto(out, -np.inf, where=~allowed)
        out[banned] = -np.inf
        return out

    def _banned_now(self) -> list[int]:
        banned = list(self._banned_ids)
        for word in self._banned_sequences:
            if tuple(self._tail[1 - len(word) :]) == word[:-1]:
                banned.append(word[-1])
        if self.num_generated < self.params.min_tokens:
            banned += self._eos_ids
        return banned


class GuideError(Exception):
    """A guide that can say no more which tokens may come."""


class Sampler:
    """Chooses one token for each row of a step's logits. Not thread-safe: it keeps scratch rows."""

    def __init__(self) -> None:
        self._scratches: dict[int, Scratch] = {}  # by vocabulary size

    def sample(self, logits: Logits, states: Sequence[SamplerState]) -> list[SampledToken | SamplingError]:
        """Chooses a token for every row and appends it to the row's state.

        Args:
            logits: [n, vocab] float32, not changed.
            states: one per row.

        Returns:
            Per row its token, or the error that ends this request while the others go on:
            `NonFiniteLogitsError` (NaN, +inf, or nothing but -inf), or `SamplingError` where bans left no
            token. A state whose row failed is as before.
        """
        if logits.ndim != 2 or logits.dtype != np.float32 or logits.shape[0] != len(states):
            raise ValueError(
                f"logits are {logits.dtype} {logits.shape}; expected float32 [{len(states)}, vocab]"
            )
        return [self._take(row, logits[row], state) for row, state in enumerate(states)]

    def follow(
        self, logits: Logits, state: SamplerState, drafted: Sequence[int] = ()
    ) -> Iterator[SampledToken | SamplingError]:
        """Choose a token, and further ones as long as they are those that were drafted.

        Each is chosen from its own row as if nothing had been drafted: with the same draw, after the same
        tokens. So drafts change neither greedy answers nor seeded ones. For a drafter that proposes one token
        and not a distribution this accepts as often as rejection sampling does (Leviathan et al., 2023).

        Args:
            logits: [1 + len(drafted), vocab] float32, not changed: behind the tokens so far, and behind each
                drafted one.
            state: appended to before each token is given; who wants no more leaves the iterator.
            drafted: tokens that were guessed.

        Yields:
            As `sample`; an error is the last.
        """
        if logits.ndim != 2 or logits.dtype != np.float32 or logits.shape[0] != 1 + len(drafted):
            raise ValueError(
                f"logits are {logits.dtype} {logits.shape}; expected float32 [{1 + len(drafted)}, vocab]"
            )
        for row, guess in enumerate([*drafted, None]):
            token = self._take(row, logits[row], state)
            yield token
            if isinstance(token, SamplingError) or token.token_id != guess:
                return

    def _take(self, row: int, logits: Logits, state: SamplerState) -> SampledToken | SamplingError:
        if state.vocab_size != logits.size:
            raise ValueError(f"row {row} is for {state.vocab_size} tokens; the logits have {logits.size}")
        # overflow to -inf (a tiny temperature) is meant; NaN is looked for by ourselves
        with np.errstate(over="ignore", invalid="ignore"):
            try:
                token = _sample_row(row, logits, state, self._scratch(logits.size))
            except SamplingError as error:
                return error
        state.append(token.token_id)
        return token

    def judge(self, logits: Logits, token_ids: Sequence[int], num_top: int) -> list[SampledToken]:
        """The log-probabilities of given tokens, and of the likeliest in their places.

        Args:
            logits: [n, vocab] float32.
            token_ids: n of them.
            num_top: likeliest tokens of each place.

        Raises:
            NonFiniteLogitsError: of a row; nothing is said of the others.
        """
        scratch, found = self._scratch(logits.shape[1]), []
        with np.errstate(over="ignore", invalid="ignore"):
            for row, token_id in enumerate(token_ids):
                model = LogitsRow(logits[row], scratch)
                _check(row, model.peak, logits[row], logits[row])
                found.append(_with_logprobs(token_id, model, num_top))
        return found

    def _scratch(self, vocab_size: int) -> Scratch:
        if vocab_size not in self._scratches:
            self._scratches[vocab_size] = Scratch(vocab_size)
        return self._scratches[vocab_size]


def _sample_row(row: int, logits: Logits, state: SamplerState, scratch: Scratch) -> SampledToken:
    params = state.params
    seen = state.likeliest(logits) if params.greedy else None
    try:
        edited = logits if seen is not None else state.edit(logits, scratch.logits)
    except GuideError as error:
        raise SamplingError(row, str(error)) from None
    if params.greedy:
        token_id = (
            int(edited.argmax()) if seen is None else seen
        )  # NaN counts as the largest; the first of equals wins
        _check(row, float(edited[token_id]), logits, edited)
    else:
        candidates = LogitsRow(edited, scratch)
        _check(row, candidates.peak, logits, edited)
        token_id = candidates.draw(
            params.temperature, params.top_k, params.top_p, params.min_p, state.uniform()
        )
    if params.logprobs is None:
        return SampledToken(token_id, None, ())
    return _with_logprobs(token_id, LogitsRow(logits, scratch), params.logprobs)


def _check(row: int, peak: float, logits: Logits, edited: Logits) -> None:
    model_peak = peak if edited is logits else float(logits.max())
    if not math.isfinite(model_peak):
        raise NonFiniteLogitsError(
            row,
            f"The model's largest logit is {model_peak}; expected a finite number. "
            "Its weights or its precision are broken.",
        )
    if not math.isfinite(peak):
        raise SamplingError(
            row,
            f"Bad words, bounds, biases and guide leave no token to choose (largest logit {peak}).",
        )


def _with_logprobs(token_id: int, model: LogitsRow, num_top: int) -> SampledToken:
    log_total = model.peak + math.log(model.chunk_sums(model.weights(1.0)).sum())
    ids = model.top(num_top) if num_top else np.empty(0, np.int64)
    values = model.logits[ids]
    order = np.lexsort((ids, -values))
    top = tuple((int(ids[i]), float(values[i]) - log_total) for i in order)
    return SampledToken(token_id, float(model.logits[token_id]) - log_total, top)


class _SeenTokens:
    """Distinct tokens a request has seen, with how often each was generated (0: in the prompt only)."""

    def __init__(self, prompt: npt.NDArray[np.int64]) -> None:
        distinct = np.unique(prompt)
        self._size = distinct.size
        self._ids = np.empty(2 * self._size + 64, np.int64)
        self._ids[: self._size] = distinct
        self._counts = np.zeros(self._ids.size, np.float32)
        self._place = {token_id: place for place, token_id in enumerate(distinct.tolist())}

    def add(self, token_id: int) -> None:
        place = self._place.setdefault(token_id, self._size)
        if place == self._size:
            if self._size == self._ids.size:
                self._ids = np.concatenate((self._ids, np.empty_like(self._ids)))
                self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
            self._ids[place] = token_id
            self._size += 1
        self._counts[place] += 1

    def penalize(self, logits: Logits, params: SamplingParams) -> None:
        ids, counts = self._ids[: self._size], self._counts[: self._size]
        values = logits[ids]
        if params.repetition_penalty != 1.0:
            penalty = np.float32(params.repetition_penalty)
            values = np.where(values > 0, values / penalty, values * penalty)
        values -= np.float32(params.frequency_penalty) * counts
        values -= np.float32(params.presence_penalty) * (counts > 0)
        logits[ids] = values
