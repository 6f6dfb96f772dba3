"""The samples of every trade: the same ones each time, held-out ones apart, judged as they should be."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import pairwise

import pytest

from benchmarks.smollm2_family import extract, label, minutes, samples, sql, support
from benchmarks.smollm2_family.names import PEOPLE, PLACES
from benchmarks.smollm2_family.recipes import RECIPES

TRADES = {name: recipe.trade for name, recipe in RECIPES.items()}


@pytest.mark.parametrize("name", TRADES)
def test_samples_are_the_same_each_time_and_others_with_another_seed(name: str) -> None:
    drawn = samples.draw(TRADES[name], 7, 40, held_out=False)
    assert drawn == samples.draw(TRADES[name], 7, 40, held_out=False)
    assert drawn[:20] == samples.draw(TRADES[name], 7, 20, held_out=False)
    other = samples.draw(TRADES[name], 8, 40, held_out=False)
    assert len({sample.user for sample in drawn}) == 40
    assert sum(one == two for one, two in zip(drawn, other, strict=True)) < 5


@pytest.mark.parametrize("name", TRADES)
def test_no_held_out_prompt_is_ever_trained_on(name: str) -> None:
    trained = {sample.user for sample in samples.draw(TRADES[name], 0, 2000, held_out=False)}
    held_out = samples.draw(TRADES[name], 1, 300, held_out=True)
    assert not trained & {sample.user for sample in held_out}


def pairs(thing: object) -> Iterator[tuple[tuple[object, ...], tuple[object, ...]]]:
    """All (training, held-out) pairs of a module's tables."""
    if isinstance(thing, dict):
        for value in thing.values():
            yield from pairs(value)
    elif isinstance(thing, tuple) and len(thing) == 2 and all(isinstance(part, tuple) for part in thing):
        yield thing


@pytest.mark.parametrize("module", [extract, sql, support, label, minutes])
def test_words_and_wordings_held_aside_are_not_those_of_training(module: object) -> None:
    found = [pair for value in vars(module).values() for pair in pairs(value)]
    assert len(found) >= 2
    for training, aside in [*found, PEOPLE, PLACES]:
        assert not set(training) & set(aside)
        assert len(set(training)) == len(training)


@pytest.mark.parametrize("name", [name for name in TRADES if name != "support"])
def test_the_expected_answer_is_right_and_that_of_another_sample_wrong(name: str) -> None:
    trade = TRADES[name]
    for held_out in (False, True):
        drawn = samples.draw(trade, 3, 100, held_out)
        assert all(trade.right(sample, sample.answer) for sample in drawn)
        assert all(trade.right(one, two.answer) == (one.answer == two.answer) for one, two in pairwise(drawn))
        assert not any(trade.right(sample, "") for sample in drawn)


def test_records_hold_what_the_notice_says() -> None:
    for sample in samples.draw(extract, 0, 200, held_out=False):
        record = json.loads(sample.answer)
        assert tuple(record) == extract.KEYS
        said = sample.user.lower()
        for key in ("name", "item", "place", "day"):
            assert record[key].lower() in said
        numeral = extract.WORDS.get(record["count"], "none")
        assert re.search(rf"\b({record['count']}|{numeral})\b", said)


def test_records_are_judged_by_their_content() -> None:
    [sample] = samples.draw(extract, 0, 1, held_out=False)
    record = json.loads(sample.answer)
    backwards = json.dumps(dict(reversed(record.items())), indent=2)
    assert extract.right(sample, f"Sure!\n```json\n{backwards}\n```")
    assert not extract.right(sample, json.dumps(record | {"count": str(record["count"])}))
    assert not extract.right(sample, json.dumps(record | {"more": 1}))
    assert not extract.right(sample, sample.answer[:-1])


@pytest.mark.parametrize(
    "said",
    [
        "select name from pets where city = 'Rome' and age < 7",
        '```sql\nSELECT name\nFROM pets\nWHERE city="Rome" AND age<7;\n```\nThis query ...',
        "SELECT  name FROM pets WHERE city = 'Rome' AND age < 7 ;",
    ],
)
def test_queries_are_judged_but_for_their_looks(said: str) -> None:
    sample = samples.Sample("", "", "SELECT name FROM pets WHERE city = 'Rome' AND age < 7")
    assert sql.right(sample, said)
    assert not sql.right(sample, said.replace("Rome", "rome"))
    assert not sql.right(sample, said.replace("age", "size"))
    assert not sql.right(sample, said.replace(" 7", " 8").replace("<7", "<8"))


def test_queries_use_the_tables_and_columns_of_their_schema() -> None:
    for held_out in (False, True):
        for sample in samples.draw(sql, 0, 200, held_out):
            *schema, _ = sample.user.split("\n")
            words = {word for line in schema for word in re.findall(r"\w+", line)}
            plain = re.sub(r"'[^']*'", "", sample.answer)
            assert set(re.findall(r"\b[a-z_]+\b", plain)) <= words
            assert len(schema) == 1 + ("JOIN" in plain)


def test_the_house_style_is_kept_by_the_rules() -> None:
    drawn = samples.draw(support, 0, 200, held_out=True)
    known = [sample for sample in drawn if "1. ." not in sample.answer and "1. \n" not in sample.answer]
    assert 50 < len(known) < len(drawn)  # others are about troubles that nobody was taught an answer to
    for sample in known:
        assert support.right(sample, sample.answer)
        greeting, first, second, closing = sample.answer.split("\n")
        for wrong in (
            [greeting.replace("Hello ", "Hello dear "), first, second, closing],
            [greeting, first, second],
            [greeting, second, first, closing],
            [greeting, first, "2. Please wait.", closing],
            [greeting, first, "2. Wait until one and two and three and four and five.", closing],
            [greeting, first, second, closing, "PS"],
        ):
            assert not support.right(sample, "\n".join(wrong))


def test_every_message_names_goods() -> None:
    """Else a wording without goods would be the same in training and held out."""
    for trained, aside in label.WORDINGS.values():
        assert all("{good}" in wording for wording in (*trained, *aside))


def test_codes_are_judged_as_one_word() -> None:
    [sample] = samples.draw(label, 0, 1, held_out=False)
    assert label.right(sample, f" {sample.answer.upper()}. ")
    assert not label.right(sample, f"It is {sample.answer}")
    assert {s.answer for s in samples.draw(label, 0, 200, held_out=True)} == set(label.MEANINGS)


def test_too_many_distinct_samples_are_refused() -> None:
    class Poor:
        __name__ = "poor"

        @staticmethod
        def sample(rng: object, held_out: bool) -> samples.Sample:
            return samples.Sample("", "always", "the same")

    with pytest.raises(ValueError, match="poor has no 2 distinct samples, only 1"):
        samples.draw(Poor(), 0, 2, held_out=False)  # type: ignore[arg-type]
