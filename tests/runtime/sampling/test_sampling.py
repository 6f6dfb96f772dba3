import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from blockzoo.runtime.api.errors import InvalidRequestError, NonFiniteLogitsError, SamplingError
from blockzoo.runtime.api.request import SamplingParams
from blockzoo.runtime.sampling.logits_row import CHUNK, LogitsRow, Scratch, largest, pick
from blockzoo.runtime.sampling.sampler import Sampler, SamplerState

EOS = 7


def logits_of(seed, rows=1, vocab=20_000, spread=3.0):
    return (np.random.default_rng(seed).standard_normal((rows, vocab)) * spread).astype(np.float32)


def state_of(vocab=20_000, prompt=(1, 2, 3), eos=(EOS,), bad=(), generated=(), **params):
    return SamplerState(SamplingParams(**params), prompt, vocab, eos, bad, generated)


def row_of(logits):
    return LogitsRow(logits, Scratch(logits.size))


def only(results):
    (result,) = results
    return result


# ---- the likeliest tokens of a row


@settings(max_examples=80, deadline=None)
@given(
    vocab=st.integers(1, 3000),
    count=st.integers(1, 300),
    levels=st.sampled_from([2, 5, 100, 10**6]),  # few levels: many ties
    seed=st.integers(0, 1000),
)
def test_top_is_the_stable_sort_of_the_row(vocab, count, levels, seed):
    values = np.random.default_rng(seed).integers(0, levels, vocab).astype(np.float32)
    expected = np.sort(np.argsort(-values, kind="stable")[:count])
    np.testing.assert_array_equal(row_of(values).top(count), expected)
    np.testing.assert_array_equal(largest(values, count), expected)


@pytest.mark.parametrize("vocab", [5, CHUNK - 1, CHUNK, CHUNK + 1, 1000, 151_936])
@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.999, 1.0])
def test_at_least_finds_every_token_in_order(vocab, quantile):
    values = logits_of(0, vocab=vocab)[0]
    threshold = float(np.quantile(values, quantile, method="higher"))
    np.testing.assert_array_equal(row_of(values).at_least(threshold), np.flatnonzero(values >= threshold))


def test_the_peak_of_a_row_is_nan_wherever_the_nan_is():
    for place in (0, 127, 128, 999):
        values = logits_of(0, vocab=1000)[0]
        assert row_of(values).peak == values.max()
        values[place] = np.nan
        assert math.isnan(row_of(values).peak)


def test_pick_never_takes_a_weight_of_zero():
    running = np.cumsum([0.0, 0.5, 0.0, 0.5, 0.0])
    assert [pick(running, u) for u in (0.0, 0.49, 0.5, 0.99, 1.0, 1.1)] == [1, 1, 3, 3, 3, 3]


# ---- drawing, against Hugging Face


def hf_probabilities(logits, params, prompt=(1, 2, 3)):
    ids = torch.tensor([prompt])
    scores = torch.tensor(logits[None])
    if params.repetition_penalty != 1.0:
        scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, scores)
    scores = TemperatureLogitsWarper(float(params.temperature))(ids, scores)
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(ids, scores)
    if params.top_p < 1.0:
        scores = TopPLogitsWarper(params.top_p)(ids, scores)
    if params.min_p > 0.0:
        scores = MinPLogitsWarper(params.min_p)(ids, scores)
    return scores.double().softmax(-1)[0].numpy()


FILTERS = [
    {},
    {"temperature": 0.5},
    {"temperature": 1.7},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 19_999},
    {"top_k": 50_000},
    {"top_p": 0.3},
    {"top_p": 0.95},  # far more tokens than the first candidates
    {"top_p": 0.9, "temperature": 0.4},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 100, "top_p": 0.8, "min_p": 0.1, "temperature": 0.8},
    {"top_k": 30, "min_p": 0.02, "temperature": 1.3},
    {"top_p": 0.7, "min_p": 0.05, "temperature": 0.6},
    {"top_p": 0.95, "min_p": 0.1},
    {"repetition_penalty": 3.0, "top_k": 50},
]


@pytest.mark.parametrize("fields", FILTERS, ids=str)
@pytest.mark.parametrize("vocab", [300, 20_000])
def test_draws_follow_the_distribution_of_hugging_face(fields, vocab, monkeypatch):
    """Each token's share of the unit interval is one interval (two at most): an even sweep measures it."""
    logits = logits_of(1, vocab=vocab)
    state = state_of(vocab=vocab, **fields)
    expected = hf_probabilities(logits[0], state.params)
    sweep = 1000
    draws = iter((np.arange(sweep) + 0.5) / sweep)
    monkeypatch.setattr(SamplerState, "uniform", lambda self: next(draws))
    edited = state.edit(logits[0], np.empty_like(logits[0]))
    row = row_of(edited)
    params = state.params
    tokens = [
        row.draw(params.temperature, params.top_k, params.top_p, params.min_p, state.uniform())
        for _ in range(sweep)
    ]
    share = np.bincount(tokens, minlength=vocab) / sweep
    np.testing.assert_allclose(share, expected, atol=2.0 / sweep)
    assert expected[share > 0].min() > 0.0


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    vocab=st.sampled_from([50, 300, 12_000]),
    spread=st.sampled_from([0.1, 2.0, 6.0]),
    temperature=st.floats(0.2, 3.0),
    top_k=st.sampled_from([1, 7, 200]),
    top_p=st.sampled_from([1.0, 0.99, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.01, 0.5]),
)
def test_filtered_draws_invert_the_cumulative_distribution_in_id_order(
    seed, vocab, spread, temperature, top_k, top_p, min_p
):
    logits = logits_of(seed, vocab=vocab, spread=spread)[0]
    params = SimpleNamespace(
        repetition_penalty=1.0, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
    running = np.cumsum(hf_probabilities(logits, params))
    row = row_of(logits)
    for uniform in np.random.default_rng(seed).random(5):
        token = row.draw(temperature, top_k, top_p, min_p, uniform)
        below = running[token - 1] if token else 0.0
        # the oracle computes in float32 and may see one token more or less in the nucleus
        assert below - 6e-3 <= uniform <= running[token] + 6e-3


@settings(max_examples=60, deadline=None)
@given(
    vocab=st.sampled_from([1, 127, 1000, 12_000]),
    levels=st.sampled_from([1, 3, 10**6]),
    spread=st.sampled_from([0.0, 0.01, 1.0, 30.0, 1e4]),
    temperature=st.sampled_from([1e-5, 0.5, 1.0, 100.0]),
    top_p=st.floats(0.001, 0.999),
    seed=st.integers(0, 1000),
)
def test_the_wide_nucleus_is_the_shortest_heavy_prefix_of_the_sorted_row(
    vocab, levels, spread, temperature, top_p, seed
):
    values = np.random.default_rng(seed).integers(0, levels, vocab) * (spread / levels)
    row = row_of(values.astype(np.float32))
    with np.errstate(over="ignore"):
        weights = row.weights(temperature)
    exact = weights.astype(np.float64)
    order = np.argsort(-weights, kind="stable")
    running = np.cumsum(exact[order])
    mass = top_p * running[-1]
    with np.errstate(over="ignore"):
        row._keep_nucleus(weights, temperature, mass)
    count = np.count_nonzero(weights)
    # different logits may have equal weights: which of those are kept is open, what they weigh is not
    np.testing.assert_array_equal(np.sort(exact[order[:count]]), np.sort(weights[weights > 0]))
    slack = 1e-9 * running[-1]
    assert running[count - 1] >= mass - slack
    assert count == 1 or running[count - 2] <= mass + slack


def test_equal_logits_are_cut_at_the_lowest_ids():
    logits = np.zeros((1, 1000), np.float32)
    for fields in ({"top_k": 3}, {"top_p": 0.0029}, {"top_k": 3, "top_p": 0.99}):
        tokens = {
            only(Sampler().sample(logits, [state_of(1000, seed=s, **fields)])).token_id for s in range(60)
        }
        assert tokens == {0, 1, 2}
    assert only(Sampler().sample(logits, [state_of(1000, temperature=0)])).token_id == 0


def test_logits_of_minus_infinity_are_never_drawn():
    logits = np.full((1, 1000), -np.inf, np.float32)
    logits[0, [5, 500, 999]] = [0.0, 1.0, -80.0]
    for fields in ({}, {"top_k": 50}, {"top_p": 0.9999999}, {"min_p": 1e-9}, {"temperature": 1e-5}):
        tokens = {
            only(Sampler().sample(logits, [state_of(1000, seed=s, **fields)])).token_id for s in range(40)
        }
        assert tokens <= {5, 500}


# ---- seeds


def generate(state, logits, batch=()):
    """Tokens of `state` over rows of logits, sampled with `batch` around it."""
    sampler, tokens = Sampler(), []
    for row in logits:
        others = [row[::-1]] * len(batch)
        stacked = np.ascontiguousarray([*others, row])
        tokens.append(sampler.sample(stacked, [*batch, state])[-1].token_id)
    return tokens


def test_a_seeded_request_gives_the_same_tokens_in_any_batch_and_after_preemption():
    logits = logits_of(3, rows=12, vocab=1000)
    fields = {"seed": 42, "top_p": 0.95, "presence_penalty": 0.5, "repetition_penalty": 1.2}
    alone = generate(state_of(1000, **fields), logits)
    neighbours = [state_of(1000, temperature=0), state_of(1000, top_k=5), state_of(1000, seed=42)]
    assert generate(state_of(1000, **fields), logits, neighbours) == alone
    resumed = state_of(1000, generated=alone[:5], **fields)
    assert generate(resumed, logits[5:]) == alone[5:]
    assert generate(state_of(1000, **{**fields, "seed": 43}), logits) != alone


def test_the_draw_is_philox_at_seed_and_position():
    state = state_of(seed=2**64 - 1)
    for position in range(5):
        expected = np.random.Generator(np.random.Philox(key=2**64 - 1, counter=position)).random()
        assert state.uniform() == expected
        assert state.uniform() == expected  # looking changes nothing
        state.append(0)


def test_unseeded_requests_differ():
    logits = logits_of(3, rows=12, vocab=1000, spread=0.1)
    assert generate(state_of(1000), logits) != generate(state_of(1000), logits)


def test_draws_are_uniform():
    draws = []
    for seed in range(50):
        state = state_of(seed=seed)
        for _ in range(40):
            draws.append(state.uniform())
            state.append(0)
    counts, _ = np.histogram(draws, bins=10, range=(0, 1))
    assert counts.min() > 150
    assert counts.max() < 250


# ---- penalties and bans


def test_greedy_rows_are_the_argmax_and_logits_stay_as_they_are():
    logits = logits_of(4, rows=5)
    before = logits.copy()
    logits.flags.writeable = False
    states = [state_of(temperature=0) for _ in range(4)] + [state_of(temperature=0, frequency_penalty=1)]
    tokens = Sampler().sample(logits, states)
    assert [token.token_id for token in tokens] == logits.argmax(1).tolist()
    np.testing.assert_array_equal(logits, before)
    assert all(token.logprob is None and token.top == () for token in tokens)


@pytest.mark.parametrize("penalty", [0.5, 1.3, 100.0])
def test_repetition_penalty_is_that_of_hugging_face(penalty):
    logits = logits_of(5)[0]
    prompt, generated = [3, 3, 9, 11], [20, 3, 20]
    state = state_of(prompt=prompt, generated=generated, repetition_penalty=penalty)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor([prompt + generated]), torch.tensor(logits[None])
    )
    np.testing.assert_array_equal(state.edit(logits, np.empty_like(logits)), expected[0].numpy())


def test_presence_and_frequency_count_generated_tokens_only():
    logits = logits_of(6)[0]
    state = state_of(prompt=[1, 2], generated=[2, 5, 5, 5], presence_penalty=0.25, frequency_penalty=-0.5)
    expected = logits.copy()
    expected[2] -= 0.25 - 0.5
    expected[5] -= 0.25 - 3 * 0.5
    np.testing.assert_allclose(state.edit(logits, np.empty_like(logits)), expected, rtol=1e-6)


def test_penalties_hold_for_more_tokens_than_the_first_table():
    state = state_of(prompt=range(100), repetition_penalty=2.0, presence_penalty=1.0)
    for token_id in range(50, 1500):
        state.append(token_id)
    edited = state.edit(np.full(20_000, 4.0, np.float32), np.empty(20_000, np.float32))
    assert set(edited[:50]) == {2.0}
    assert set(edited[50:1500]) == {1.0}
    assert set(edited[1500:]) == {4.0}


def test_bad_words_ban_as_hugging_face_does():
    bad = [(4,), (1, 2), (1, 2, 3), (9, 8, 7)]
    oracle = NoBadWordsLogitsProcessor([list(word) for word in bad])
    logits = np.zeros(20, np.float32)
    for tokens in ([1], [1, 2], [5, 1, 2], [9, 8], [8], [9, 8, 1], [1, 1]):
        for cut in range(len(tokens) + 1):  # the words may begin in the prompt
            state = state_of(20, prompt=tokens[:cut], generated=tokens[cut:], bad=bad)
            expected = oracle(torch.tensor([tokens]), torch.tensor(logits[None]))[0].numpy()
            np.testing.assert_array_equal(state.edit(logits, np.empty_like(logits)), expected)


def test_biases_are_added_as_hugging_face_does():
    logits = logits_of(5)
    biases = {int(logits[0].argmax()): -100.0, 11: 3.5, 19_999: 100.0}
    state = state_of(temperature=0.0, logit_bias=biases, repetition_penalty=1.3, prompt=(11, 12))
    expected = RepetitionPenaltyLogitsProcessor(1.3)(
        torch.tensor([[11, 12]]), torch.from_numpy(logits.copy())
    )
    processor = SequenceBiasLogitsProcessor({(token,): bias for token, bias in biases.items()})
    expected = processor(torch.tensor([[11, 12]]), expected)
    np.testing.assert_allclose(state.edit(logits[0], np.empty(20_000, np.float32)), expected[0].numpy())
    assert only(Sampler().sample(logits, [state])).token_id == 19_999
    with pytest.raises(InvalidRequestError, match="logit_bias holds the token id 20000"):
        state_of(logit_bias={20_000: 1.0})


def test_min_tokens_bans_the_end_until_reached():
    logits = np.zeros((1, 20), np.float32)
    logits[0, EOS] = 5.0
    logits[0, 3] = 1.0
    state = state_of(20, temperature=0, min_tokens=2)
    assert [only(Sampler().sample(logits, [state])).token_id for _ in range(4)] == [3, 3, EOS, EOS]
    ignoring = state_of(20, temperature=0, min_tokens=2, ignore_eos=True)
    assert only(Sampler().sample(logits, [ignoring])).token_id == EOS


def test_ids_beyond_the_vocabulary_are_left_out_of_bans_and_refused_in_prompts():
    state = state_of(20, eos=(25,), bad=((30,), (1, 99), ()), min_tokens=1)
    logits = np.zeros(20, np.float32)
    assert state.edit(logits, np.empty_like(logits)) is logits
    for prompt in ([20], [-1]):
        with pytest.raises(InvalidRequestError, match="0 to 19"):
            state_of(20, prompt=prompt)


# ---- log-probabilities


@pytest.mark.parametrize("vocab", [30, 20_000])
def test_logprobs_are_those_of_the_model(vocab):
    logits = logits_of(7, rows=3, vocab=vocab)
    expected = torch.tensor(logits).double().log_softmax(-1).numpy()
    states = [
        state_of(vocab, temperature=0, logprobs=20),
        state_of(vocab, temperature=2.0, top_k=5, logprobs=3, repetition_penalty=2.0, bad=[(4,)]),
        state_of(vocab, logprobs=0),
    ]
    for row, (token, state) in enumerate(zip(Sampler().sample(logits, states), states, strict=True)):
        assert token.logprob == pytest.approx(expected[row, token.token_id], abs=1e-5)
        best = np.argsort(-expected[row], kind="stable")[: state.params.logprobs]
        assert [token_id for token_id, _ in token.top] == best.tolist()
        np.testing.assert_allclose([value for _, value in token.top], expected[row, best], atol=1e-5)


def test_top_logprobs_of_equal_logits_start_at_the_lowest_id():
    token = only(Sampler().sample(np.zeros((1, 500), np.float32), [state_of(500, logprobs=3)]))
    assert [token_id for token_id, _ in token.top] == [0, 1, 2]
    assert token.logprob == pytest.approx(-math.log(500))


# ---- hostile numbers

EXTREMES = [0.0, -0.0, 1.0, 1e-45, -1e-45, 1e-38, 30.0, -30.0, 3.4e38, -3.4e38, -math.inf]


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(st.sampled_from(EXTREMES), min_size=1, max_size=8),
    vocab=st.sampled_from([1, 2, 130, 9000]),
    fields=st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.0, 1e-5, 0.7, 1.0, 100.0]),
            "top_k": st.sampled_from([0, 1, 40, 2**31 - 1]),
            "top_p": st.sampled_from([5e-324, 0.5, 0.9999999999999999, 1.0]),
            "min_p": st.sampled_from([0.0, 5e-324, 0.1, 1.0]),
            "repetition_penalty": st.sampled_from([1.0, 0.01, 100.0]),
            "frequency_penalty": st.sampled_from([0.0, -2.0]),
            "seed": st.integers(0, 2**64 - 1),
        }
    ),
)
def test_any_finite_logits_give_a_possible_token_or_a_named_error(values, vocab, fields):
    logits = np.resize(np.array(values, np.float32), (1, vocab))
    state = state_of(vocab, prompt=[0], eos=(), generated=[0] * 3, logprobs=1, **fields)
    result = only(Sampler().sample(logits, [state]))
    if isinstance(result, SamplingError):
        with np.errstate(over="ignore"):
            edited = state.edit(logits[0], np.empty(vocab, np.float32))
        assert not math.isfinite(edited.max())
    else:
        assert logits[0, result.token_id] > -math.inf
        assert result.logprob <= 1e-6


# ---- errors


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("fields", [{"temperature": 0}, {}, {"top_k": 5}, {"bad_words": ("x",), "seed": 1}])
def test_a_broken_row_fails_alone(bad, fields):
    logits = logits_of(8, rows=3)
    logits[1] = bad if bad < 0 else logits[1]
    logits[1, 4] = bad  # on the banned token: seen all the same
    states = [state_of(bad=[(4,)] if "bad_words" in fields else (), **fields) for _ in range(3)]
    results = Sampler().sample(logits, states)
    assert isinstance(results[1], NonFiniteLogitsError)
    assert results[1].row == 1
    assert [state.num_generated for state in states] == [1, 0, 1]


def test_bans_that_leave_no_token_are_an_error_of_the_row():
    for temperature in (0, 1):
        state = state_of(3, prompt=(0,), eos=(2,), bad=[(0,), (1,)], min_tokens=1, temperature=temperature)
        error = only(Sampler().sample(np.zeros((1, 3), np.float32), [state]))
        assert isinstance(error, SamplingError)
        assert not isinstance(error, NonFiniteLogitsError)
        assert "leave no token" in str(error)


def test_logits_of_the_wrong_shape_or_type_are_refused():
    with pytest.raises(ValueError, match="float32"):
        Sampler().sample(np.zeros((1, 10)), [state_of(10)])
    with pytest.raises(ValueError, match="vocab"):
        Sampler().sample(np.zeros((2, 10), np.float32), [state_of(10)])
    with pytest.raises(ValueError, match="row 0 is for 10 tokens"):
        Sampler().sample(np.zeros((1, 11), np.float32), [state_of(10)])
    assert Sampler().sample(np.zeros((0, 10), np.float32), []) == []


# ---- drafted tokens


def _rows_and_others() -> tuple[np.ndarray, np.ndarray]:
    """Logits behind no token and behind the drafted one, and behind any other."""
    rng = np.random.default_rng(4)
    rows = rng.normal(0, 1.5, (2, 12)).astype(np.float32)
    return rows, rng.normal(0, 1.5, (12, 12)).astype(np.float32)


@pytest.mark.parametrize(
    "given", [{}, {"temperature": 0.6, "top_p": 0.8}, {"min_p": 0.1, "presence_penalty": 1.5}]
)
def test_drafts_leave_the_distribution_as_it_is(given: dict[str, float]) -> None:
    """Pairs of tokens over many seeds, one of them drafted: as often as their probabilities say."""
    rows, behind = _rows_and_others()
    behind[3] = rows[1]
    counts, expected = np.zeros((12, 12)), np.zeros((12, 12))
    sampler, seeds, accepted = Sampler(), 1500, 0
    for seed in range(seeds):
        params = SamplingParams(seed=seed, **given)
        state = SamplerState(params, [1], 12, [])
        tokens = [token.token_id for token in sampler.follow(rows, state, [3])]
        accepted += len(tokens) == 2
        if len(tokens) == 1:  # not the drafted one: the next step gives the second
            tokens += [t.token_id for t in sampler.follow(behind[tokens[0]][None], state)]
        counts[tuple(tokens)] += 1

        state = SamplerState(params, [1], 12, [])
        first = next(sampler.follow(rows[:1], state)).token_id
        assert [first, next(sampler.follow(behind[first][None], state)).token_id] == tokens, "the same, too"
    for first in range(12):
        for second in range(12):
            chance = _chance(rows[0], first, given, []) * _chance(behind[first], second, given, [first])
            expected[first, second] = chance * seeds
    assert accepted == pytest.approx(seeds * _chance(rows[0], 3, given, []), rel=0.25)
    common = expected > 5
    assert counts[expected == 0].sum() == 0
    chi2 = ((counts - expected)[common] ** 2 / expected[common]).sum()
    freedom = common.sum() - 1
    assert chi2 < freedom + 4 * np.sqrt(2 * freedom)


def _chance(logits: np.ndarray, token: int, given: dict[str, float], seen: list[int]) -> float:
    """Of a token, by the definitions of the filters."""
    values = logits.astype(np.float64)
    values[seen] -= given.get("presence_penalty", 0.0)
    weights = np.exp(values / given.get("temperature", 1.0))
    weights /= weights.sum()
    order = np.argsort(-weights)
    before = np.cumsum(weights[order]) - weights[order]
    weights[order[before >= given.get("top_p", 1.0)]] = 0.0
    weights[weights < given.get("min_p", 0.0) * weights.max()] = 0.0
    return float(weights[token] / weights.sum())


def test_a_draft_is_followed_as_far_as_it_is_right() -> None:
    sampler = Sampler()
    rows = np.full((4, 8), -1.0, np.float32)
    rows[[0, 1, 2, 3], [5, 6, 7, 2]] = 3.0
    greedy = SamplingParams(temperature=0.0)
    for drafted, expected in (
        ([5, 6, 7], [5, 6, 7, 2]),
        ([5, 1, 7], [5, 6]),
        ([0, 6, 7], [5]),
    ):
        state = SamplerState(greedy, [1], 8, [])
        assert [token.token_id for token in sampler.follow(rows, state, drafted)] == expected
        assert state.num_generated == len(expected)
    state = SamplerState(greedy, [1], 8, [])
    next(sampler.follow(rows, state, [5, 6, 7]))
    assert state.num_generated == 1, "who wants no more takes no more"
    with pytest.raises(ValueError, match=r"expected float32 \[2, vocab\]"):
        next(sampler.follow(rows, state, [5]))


def test_a_row_that_is_broken_ends_the_draft() -> None:
    rows = np.full((3, 8), -1.0, np.float32)
    rows[0, 5], rows[1, 0], rows[2, 3] = 3.0, np.nan, 3.0
    state = SamplerState(SamplingParams(temperature=0.0), [1], 8, [])
    good, bad = Sampler().follow(rows, state, [5, 6])
    assert good.token_id == 5
    assert isinstance(bad, NonFiniteLogitsError)
    assert state.num_generated == 1
