import dataclasses
import math

import numpy as np
import pytest

from blockzoo.runtime.api.errors import InvalidRequestError, NonFiniteLogitsError, RequestError, SamplingError
from blockzoo.runtime.api.request import MAX_WORD_CHARS, MAX_WORDS, SamplingParams


def test_defaults_are_valid_and_random():
    params = SamplingParams()
    assert not params.greedy
    assert not params.has_penalties
    assert (params.max_tokens, params.temperature, params.seed) == (16, 1.0, None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 1),
        ("max_tokens", 1_000_000),
        ("temperature", 0),
        ("temperature", 100.0),
        ("top_k", 2**31 - 1),
        ("top_p", 1e-9),
        ("min_p", 1.0),
        ("repetition_penalty", 0.01),
        ("presence_penalty", -2),
        ("frequency_penalty", 2.0),
        ("seed", 0),
        ("seed", 2**64 - 1),
        ("logprobs", 0),
        ("logprobs", 20),
        ("stop", ("x" * MAX_WORD_CHARS,) * MAX_WORDS),
        ("bad_words", ("x",)),
        ("stop", ("\n",)),
        ("logit_bias", ((0, -100.0), (7, 100.0))),
    ],
)
def test_bounds_are_inclusive(field, value):
    assert getattr(SamplingParams(**{field: value}), field) == value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1_000_001),
        pytest.param("max_tokens", 10**5000, id="max_tokens-many digits"),
        ("max_tokens", 1.0),
        ("max_tokens", True),
        ("max_tokens", "16"),
        ("max_tokens", None),
        ("temperature", -0.1),
        ("temperature", 100.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 10**400),
        ("temperature", "1"),
        ("temperature", False),
        ("top_k", -2),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("min_p", -0.01),
        ("min_p", 1.01),
        ("repetition_penalty", 0),
        ("repetition_penalty", math.inf),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("seed", -1),
        ("seed", 2**64),
        ("logprobs", -1),
        ("logprobs", 21),
        ("min_tokens", -1),
        ("min_tokens", 17),  # above max_tokens
        ("ignore_eos", 1),
        ("skip_special_tokens", None),
        ("include_stop", "yes"),
        ("logit_bias", {5: 100.1}),
        ("logit_bias", {5: math.nan}),
        ("logit_bias", {5: True}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {"five": 1.0}),
        ("logit_bias", {"1" * 11: 1.0}),
        ("logit_bias", [1, 2]),
        ("logit_bias", "5"),
        ("logit_bias", dict.fromkeys(range(1025), 0.0)),
        ("stop", "word"),
        ("stop", ("",)),
        ("stop", ("x" * (MAX_WORD_CHARS + 1),)),
        ("stop", ("x",) * (MAX_WORDS + 1)),
        ("stop", (b"x",)),
        ("stop", ("\ud83d",)),
        ("bad_words", ("",)),
        ("bad_words", None),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(InvalidRequestError, match=field):
        SamplingParams(**{field: value})


def test_the_message_names_field_value_and_range():
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(top_p=1.5)
    assert str(caught.value) == "top_p is 1.5; expected a number above 0 and at most 1."


def test_a_long_value_is_shortened_in_the_message():
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(stop="x" * 10_000)
    assert len(str(caught.value)) < 200


def test_values_are_stored_as_plain_python():
    params = SamplingParams(
        max_tokens=np.int32(3), temperature=np.float32(0.5), top_k=-1, stop=["a", "b"], bad_words=["c"]
    )
    assert type(params.max_tokens) is int
    assert type(params.temperature) is float
    assert params.top_k == 0
    assert params.stop == ("a", "b")
    assert hash(params) == hash(dataclasses.replace(params))


def test_a_tiny_temperature_is_greedy():
    assert SamplingParams(temperature=0).greedy
    assert SamplingParams(temperature=9.9e-6).greedy
    assert not SamplingParams(temperature=1e-5).greedy


def test_sampling_errors_are_request_errors_with_a_row():
    error = NonFiniteLogitsError(3, "message")
    assert isinstance(error, SamplingError)
    assert isinstance(error, RequestError)
    assert error.row == 3
    assert str(error) == "message"
