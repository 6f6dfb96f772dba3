import random
import re

import pytest

from blockzoo.zoo.demo import tasks

WORDINGS = (
    r"Note\. (?P<name>\w+) is a (?P<job>\w+)\. (?P=name) keeps the (?P<thing>.+)\. "
    r"The (?P=thing) was found at the (?P<place>.+)\.",
    r"Note\. The (?P<job>\w+) (?P<name>\w+) owns the (?P<thing>.+)\. It was found at the (?P<place>.+)\.",
    r"Note\. At the (?P<place>.+) someone found the (?P<thing>.+)\. "
    r"Now (?P<name>\w+) the (?P<job>\w+) keeps it\.",
)


def what_notes_say(context):
    """Reads notes back by their wording: name -> (thing, place, job)."""
    people = {}
    for line in context.splitlines():
        (found,) = [match for wording in WORDINGS if (match := re.fullmatch(wording, line))]
        assert found["name"] not in people
        people[found["name"]] = (found["thing"], found["place"], found["job"])
    return people


def answer_about(people, prompt):
    question = re.fullmatch(r"Q: (.+)\nA:", prompt)[1]
    if found := re.fullmatch(r"What does (\w+) keep\?", question):
        return f" the {people[found[1]][0]}"
    if found := re.fullmatch(r"Who keeps the (.+)\?", question):
        return " " + next(name for name, facts in people.items() if facts[0] == found[1])
    if found := re.fullmatch(r"Where was the thing of (\w+) found\?", question):
        return f" the {people[found[1]][1]}"
    return " " + people[re.fullmatch(r"What is the job of (\w+)\?", question)[1]][2]


@pytest.mark.parametrize("num_notes", [1, 4, tasks.MAX_NOTES])
def test_fact_answers_follow_from_the_notes_in_any_order(num_notes):
    rng = random.Random(num_notes)
    document = tasks.facts(rng, num_notes)
    passages = list(document.passages)
    rng.shuffle(passages)
    people = what_notes_say("".join(passages))
    assert len(people) == num_notes
    assert len(document.questions) == 4 * num_notes
    assert len({question.prompt for question in document.questions}) == 4 * num_notes
    for question in document.questions:
        assert question.answer == answer_about(people, question.prompt)


def test_full_answers_follow_from_the_notes_too():
    document = tasks.facts(random.Random(5), 6, "full")
    people = what_notes_say(document.context)
    short = tasks.facts(random.Random(5), 6)
    assert short.context == document.context
    for question, brief in zip(document.questions, short.questions, strict=True):
        assert question.prompt == brief.prompt
        assert brief.answer.strip() in question.answer
        for sentence in question.answer.strip().removesuffix(".").split(". "):
            if found := re.fullmatch(r"(\w+) keeps the (.+)|The (.+) is with (\w+)", sentence):
                name, thing = found[1] or found[4], found[2] or found[3]
                assert people[name][0] == thing
            elif found := re.fullmatch(r"The (.+) was found at the (.+)", sentence):
                assert (found[1], found[2]) in {facts[:2] for facts in people.values()}
            else:
                name, job = re.fullmatch(r"(\w+) is a (\w+)", sentence).groups()
                assert people[name][2] == job


def test_one_wording_only():
    document = tasks.facts(random.Random(5), 20, num_wordings=1)
    assert all(re.fullmatch(WORDINGS[0] + "\n", passage) for passage in document.passages)


def run_statements(context):
    """Values and depths by running the statements one after another."""
    values, depths = {}, {}
    for line in context.splitlines():
        name, formula = re.fullmatch(r"Let (\w) = (.+)\.", line).groups()
        values[name] = eval(formula, {}, dict(values)) % 10
        depths[name] = 1 + depths[formula[0]] if formula[0].isalpha() else 0
    return values, depths


@pytest.mark.parametrize("max_hops", [0, 1, 2, 3])
def test_assignment_answers_follow_from_the_statements(max_hops):
    seen = set()
    for seed in range(30):
        document = tasks.assignments(random.Random(seed), 8, max_hops)
        values, depths = run_statements(document.context)
        seen |= set(depths.values())
        assert len(document.questions) == 8
        for question in document.questions:
            assert question.answer == f" {values[question.prompt[3]]}"
    assert seen == set(range(max_hops + 1))


def test_hops_keeps_the_questions_of_that_depth():
    for seed in range(30):
        document = tasks.assignments(random.Random(seed), 6, 2, hops=2)
        depths = run_statements(document.context)[1]
        assert {question.prompt[3] for question in document.questions} == {
            name for name, depth in depths.items() if depth == 2
        }


def test_working_ends_in_the_value_and_every_step_holds():
    for seed in range(30):
        document = tasks.assignments(random.Random(seed), 8, 3, "full")
        values, depths = run_statements(document.context)
        for question in document.questions:
            steps = question.answer.removeprefix(" ").split(", ")
            name = question.prompt[3]
            assert len(steps) == 2 * depths[name] + 1
            assert steps[-1] == f"{name} = {values[name]}"
            for step in steps:
                left, right = step.split(" = ")
                assert values[left] == eval(right, {}, dict(values)) % 10
                assert step in document.context or right == str(values[left])


def test_asked_in_full_changes_questions_only():
    document = tasks.assignments(random.Random(1), 4, 1, "full")
    asked = tasks.asked_in_full(document)
    assert asked.passages == document.passages
    for before, after in zip(document.questions, asked.questions, strict=True):
        assert after.prompt == f"Q: In full: {before.prompt[3:]}"
        assert after.answer == before.answer


def test_same_seed_same_document():
    assert tasks.facts(random.Random(3), 4) == tasks.facts(random.Random(3), 4)
    assert tasks.render(tasks.assignments(random.Random(3), 4, 2)).startswith("Let ")


@pytest.mark.parametrize("count", [0, -1, 25])
def test_counts_out_of_range_are_refused(count):
    with pytest.raises(ValueError, match=f"num_notes is {count}; it must be from 1 to 24"):
        tasks.facts(random.Random(0), count)
    with pytest.raises(ValueError, match=f"num_statements is {count}; it must be from 1 to 22"):
        tasks.assignments(random.Random(0), count, 1)


def test_a_split_note_is_found_in_two_passages():
    document = tasks.asked_in_full(tasks.facts(random.Random(3), 4, "full", split=True))
    assert len(document.passages) == 8
    owned = dict(re.findall(r"Note\. (\w+) is .* keeps the (.+)\.\n", document.context))
    found = dict(re.findall(r"Note\. The (.+) was found at the (.+)\.\n", document.context))
    assert len(owned) == len(found) == 4
    asked = [q for q in document.questions if "Where was" in q.prompt]
    assert len(asked) == 4
    for question in asked:
        (name,) = re.findall(r"thing of (\w+) found", question.prompt)
        thing = owned[name]
        assert question.answer == f" {name} keeps the {thing}. The {thing} was found at the {found[thing]}."
