"""Where a request is cheapest, from what replicas were sent."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from blockzoo.server_config.replicas.prefixes import (
    CHUNK_CHARS,
    CHUNK_IDS,
    MAX_CHUNKS,
    Holdings,
    Lane,
    Prompt,
)

WHOLE = (Lane("m", 1.0),)


def prompt(text: str, scope: str | None = None, lanes=WHOLE) -> Prompt:
    return Prompt(scope, lanes, [text])


def text(seed: int, chunks: int) -> str:
    source = random.Random(seed)
    return "".join(source.choice("abcdefgh ") for _ in range(chunks * CHUNK_CHARS))


def test_a_prompt_goes_where_its_beginning_is() -> None:
    holdings = Holdings()
    holdings.send("1", "a", prompt(text(1, 20)))
    holdings.end("1")
    assert holdings.rank(["b", "a"], prompt(text(1, 20) + "and more")) == ["a", "b"]
    assert holdings.rank(["b", "a"], prompt(text(2, 20))) == ["b", "a"]  # equal: as they were given


def test_only_as_far_as_it_is_equal() -> None:
    holdings = Holdings()
    holdings.send("1", "a", prompt(text(1, 20)))
    holdings.end("1")
    other = text(1, 5) + text(2, 15)
    assert holdings.cost("a", prompt(other)) == 15 * CHUNK_IDS
    assert holdings.cost("b", prompt(other)) == 20 * CHUNK_IDS


def test_scopes_and_models_share_nothing() -> None:
    holdings = Holdings()
    holdings.send("1", "a", prompt(text(1, 20), "alice"))
    holdings.end("1")
    assert holdings.cost("a", prompt(text(1, 20), "alice")) == 0
    assert holdings.cost("a", prompt(text(1, 20), "bob")) == 20 * CHUNK_IDS
    assert holdings.cost("a", prompt(text(1, 20))) == 20 * CHUNK_IDS
    assert holdings.cost("a", prompt(text(1, 20), "alice", (Lane("other", 1.0),))) == 20 * CHUNK_IDS


def test_models_share_the_layers_that_they_share() -> None:
    holdings = Holdings()
    holdings.send("1", "a", prompt(text(1, 8), lanes=(Lane("below", 0.75), Lane("x", 0.25))))
    holdings.end("1")
    sibling = prompt(text(1, 8), lanes=(Lane("below", 0.75), Lane("y", 0.25)))
    assert holdings.cost("a", sibling) == 0.25 * 8 * CHUNK_IDS


def test_load_outweighs_what_is_held() -> None:
    holdings = Holdings()
    asked = prompt(text(1, 20))
    holdings.send("1", "a", asked)
    holdings.end("1")
    for number in range(4):  # others, in the middle of their answers
        holdings.send(f"busy{number}", "a", prompt(text(number + 5, 20)))
    assert holdings.rank(["a", "b"], asked) == ["b", "a"]
    for number in range(4):
        holdings.end(f"busy{number}")
    assert holdings.rank(["b", "a"], asked) == ["a", "b"]


def test_a_replica_that_would_read_an_adapter_first_is_dearer() -> None:
    holdings = Holdings()
    assert holdings.rank(["a", "b"], prompt("short"), cold={"a"}) == ["b", "a"]


def test_token_ids_and_documents() -> None:
    holdings = Holdings()
    ids = Prompt(None, WHOLE, [list(range(10 * CHUNK_IDS))])
    holdings.send("1", "a", ids)
    holdings.end("1")
    assert holdings.cost("a", Prompt(None, WHOLE, [list(range(12 * CHUNK_IDS))])) == 2 * CHUNK_IDS
    assert Prompt(None, WHOLE, ["好" * 1280], 1.0).num_tokens == 1280
    document = text(1, 4) + "an end"
    holdings.send("2", "b", Prompt(None, WHOLE, [document, "a question"]))
    holdings.end("2")
    again = Prompt(None, WHOLE, [document, "what else is in it"])
    assert holdings.cost("b", again) < 2 * CHUNK_IDS < holdings.cost("a", again)


def test_what_a_replica_cannot_hold_is_forgotten_from_the_end() -> None:
    holdings = Holdings()
    holdings.set_capacity("a", 10 * CHUNK_IDS)
    holdings.send("1", "a", prompt(text(1, 20)))
    holdings.end("1")
    assert holdings.cost("a", prompt(text(1, 20))) == 10 * CHUNK_IDS
    holdings.send("2", "a", prompt(text(2, 4)))
    holdings.end("2")
    assert holdings.cost("a", prompt(text(2, 4))) == 0
    assert holdings.cost("a", prompt(text(1, 20))) == 14 * CHUNK_IDS


def test_a_long_prompt_is_followed_only_so_far() -> None:
    long = prompt("x" * (MAX_CHUNKS + 100) * CHUNK_CHARS)
    assert long.num_tokens == MAX_CHUNKS * CHUNK_IDS
    assert len(list(long.forgettable_first())) == MAX_CHUNKS


def test_a_lost_replica_takes_its_work_along() -> None:
    holdings = Holdings()
    holdings.send("1", "a", prompt(text(1, 20)))
    holdings.forget("a")
    holdings.end("1")
    assert holdings.replicas == ()
    assert holdings.cost("a", prompt(text(1, 20))) == 20 * CHUNK_IDS


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["send", "end", "forget", "end elsewhere"]), st.integers(0, 5), st.integers(0, 2)
        ),
        max_size=60,
    )
)
def test_work_adds_up_whatever_comes(events) -> None:
    holdings = Holdings()
    where: dict[str, int] = {}
    for kind, number, replica in events:
        request = str(number)
        if kind == "send":
            holdings.set_capacity(replica, 4 * CHUNK_IDS)
            holdings.send(request, replica, prompt(text(number, 3)))
            where[request] = replica
        elif kind == "end":
            holdings.end(request)
            where.pop(request, None)
        elif kind == "end elsewhere":  # of an attempt that was refused
            holdings.end(request, replica)
            if where.get(request) == replica:
                del where[request]
        else:
            holdings.forget(replica)
            where = {name: at for name, at in where.items() if at != replica}
        for each in range(3):
            work = 2 * holdings.cost(each, prompt(""))  # what is under way counts for half
            busy = sum(at == each for at in where.values())
            assert 64 * busy <= work <= (64 + 3 * CHUNK_IDS) * busy
