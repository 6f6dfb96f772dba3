"""Which copies of spans it takes for chains to go where they are wanted."""

from __future__ import annotations

from blockzoo.runtime.exec.topology import ChainPlan, Copy, Family, Span, SpanUse, Topology
from blockzoo.runtime.serve.span_copies import hosts_for, of_model, ways
from blockzoo.runtime.workers.settings import NOWHERE


def topology(*routes: tuple[int, ...], copies: tuple[Copy, ...] = ()) -> Topology:
    """Three spans, and copies; chains through them."""
    spans = tuple(Span((str(i),), 1, False) for i in (0, 1, 2, *(copy.span for copy in copies)))
    plans = tuple(
        ChainPlan(Family(8, 1, 8), "", tuple(SpanUse(s, i + 1, i) for i, s in enumerate(r)), 2, (), 9)
        for r in routes
    )
    return Topology(spans, plans, {str(i): i for i in range(len(plans))}, {}, copies)


def test_a_copy_is_made_joined_and_given_up() -> None:
    plain = topology((0, 1), (0, 2), (0, 2))
    made = hosts_for(plain, (0, 0, 1), {(1, 0): 1})
    assert made.copies == (Copy(0, (1,)),)
    assert made.homes == (0, 0, 1, 1)
    assert made.originals == (0, 1, 2, 0)
    assert made.coming((0, 0, 1)) == {3: 1}
    one = topology((0, 1), (3, 2), (0, 2), copies=made.copies)
    joined = hosts_for(one, made.homes, {(2, 0): 1})
    assert joined.copies == (Copy(0, (1, 2)),)
    assert joined.homes == made.homes
    assert not joined.coming(made.homes)
    assert not joined.given_up(made.homes)
    given_up = hosts_for(one, made.homes, {(1, 0): 0})
    assert (given_up.copies, given_up.homes) == ((), (0, 0, 1))
    assert given_up.given_up(made.homes) == [3]


def test_numbers_stay() -> None:
    """What is not used is there for the next; never in the change that gives it up."""
    copies = (Copy(0, (1,)), Copy(2, (1,)))
    two = topology((0, 1), (3, 4), (0, 2), copies=copies)
    homes = (0, 0, 1, 1, 0)
    left = hosts_for(two, homes, {(1, 0): 0, (0, 1): 1})
    assert left.copies == (Copy(0, ()), Copy(2, (1,)), Copy(1, (0,)))
    assert left.homes == (0, NOWHERE, 1, NOWHERE, 0, 1)
    now = topology((0, 5), (0, 4), (0, 2), copies=left.copies)
    assert ways(now, left.homes) == {(0, 0): 0, (0, 1): 1, (1, 0): 0, (1, 2): 0, (2, 0): 0, (2, 2): 1}
    back = hosts_for(now, left.homes, {(0, 1): 0, (2, 0): 1})
    assert back.copies == (Copy(0, (2,)), Copy(2, (1,)), Copy(1, ()))
    assert back.homes == (0, 0, 1, 1, 0, NOWHERE)


def test_a_models_surrogate_goes_where_it_goes() -> None:
    found = topology((0, 1), (0, 2))
    guessing = Topology(found.spans, found.chains, {"m": 0}, {"m": 1})
    assert of_model(guessing, (0, 1, 1), "m", 2) == [(0, 1), (1, 2)]
    assert of_model(guessing, (0, 1, 1), "m", 0) == [(0, 0), (1, 0)]
