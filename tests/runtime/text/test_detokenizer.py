import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models

from blockzoo.runtime.api.request import SamplingParams
from blockzoo.runtime.text.detokenizer import Detokenizer
from blockzoo.runtime.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
many_examples = settings(max_examples=200, deadline=None)


@pytest.fixture(scope="module")
def tokenizer(bpe_tokenizer_dir):
    return Tokenizer.load(bpe_tokenizer_dir)


@pytest.fixture(scope="module")
def byte_ids(tokenizer):
    """Token id of each byte that has one of its own."""
    return {byte: _byte_id(tokenizer, byte) for byte in range(256)}


def _byte_id(tokenizer, byte):
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return tokenizer._tokenizer.token_to_id(bytes_to_unicode()[byte])


def run(tokenizer, token_ids, prompt=(), **fields):
    detokenizer = Detokenizer(tokenizer, SamplingParams(max_tokens=10_000, **fields), prompt)
    pushes = []
    for token_id in token_ids:
        pushes.append(detokenizer.push(token_id))
        if detokenizer.stopped:
            break
    pushes.append(detokenizer.flush())
    return pushes, detokenizer.stopped


def cut(text, stop, include_stop=False, earliest_end=1):
    """The text up to the stop word completed first, looked for in the plainest way."""
    for end in range(max(1, earliest_end), len(text) + 1):
        ending = [word for word in stop if text[:end].endswith(word)]
        if ending:
            return text[: end if include_stop else end - max(map(len, ending))], True
    return text, False


# ---- characters


@many_examples
@given(text=st.text(alphabet=st.sampled_from("the dog你好世界😀👩‍👧é\n "), max_size=30))
def test_the_pieces_make_up_the_text_and_hold_no_half_characters(tokenizer, text):
    pushes, stopped = run(tokenizer, tokenizer.encode(text))
    assert "".join(pushes) == text
    assert not any(REPLACEMENT in push for push in pushes)
    assert pushes[-1] == ""
    assert not stopped


@many_examples
@given(token_ids=st.lists(st.integers(0, 360), max_size=60), skip=st.booleans())
def test_any_tokens_give_their_decoding(tokenizer, token_ids, skip):
    """Also special ones, unknown ones, and bytes that are no characters."""
    pushes, _ = run(tokenizer, token_ids, skip_special_tokens=skip)
    assert "".join(pushes) == tokenizer.decode(token_ids, skip)


@many_examples
@given(data=st.binary(min_size=30, max_size=150))
def test_long_runs_of_broken_bytes_give_their_decoding(tokenizer, byte_ids, data):
    # high bytes only: seldom a whole character, so that the window fills up
    token_ids = [byte_ids[byte | 0x80] for byte in data]
    pushes, _ = run(tokenizer, token_ids)
    assert "".join(pushes) == tokenizer.decode(token_ids)


def test_an_emoji_appears_with_its_last_byte(tokenizer, byte_ids):
    pushes, _ = run(tokenizer, [byte_ids[byte] for byte in "a😀b".encode()])
    assert pushes == ["a", "", "", "", "😀", "b", ""]


def test_a_character_left_unfinished_is_flushed_as_replacement(tokenizer, byte_ids):
    pushes, _ = run(tokenizer, [byte_ids[byte] for byte in "a😀".encode()[:-1]])
    assert pushes == ["a", "", "", "", REPLACEMENT]


def test_endless_broken_bytes_come_out_in_bounded_windows(tokenizer, byte_ids):
    pushes, _ = run(tokenizer, [byte_ids[0xFF]] * 2000)
    assert "".join(pushes) == REPLACEMENT * 2000
    assert len(pushes[-1]) <= 40


@pytest.mark.parametrize("num_broken", range(24, 36))
def test_a_character_across_the_end_of_a_window_stays_whole(tokenizer, byte_ids, num_broken):
    data = b"\xff" * num_broken + "😀".encode() * 12
    pushes, _ = run(tokenizer, [byte_ids[byte] for byte in data])
    assert "".join(pushes) == REPLACEMENT * num_broken + "😀" * 12


def test_endless_skipped_tokens_do_not_pile_up(tokenizer):
    detokenizer = Detokenizer(tokenizer, SamplingParams())
    for _ in range(2000):
        assert detokenizer.push(2) == ""
    assert len(detokenizer._window) <= 40
    assert detokenizer.push(tokenizer.encode("the")[0])


def test_flush_twice_gives_nothing_more(tokenizer, byte_ids):
    detokenizer = Detokenizer(tokenizer, SamplingParams(stop=("the end",)))
    shown = "".join(detokenizer.push(token_id) for token_id in tokenizer.encode("the"))
    assert shown == ""
    assert detokenizer.flush() == "the"
    assert detokenizer.flush() == ""


# ---- tokenizers that write spaces into words


@pytest.fixture(scope="module")
def spaced():
    """As Llama 2: ▁ for a space, dropped at the start of a text; bytes that are in no word as <0xNN>."""
    vocab = {"<unk>": 0, "▁the": 1, "▁": 2, "dog": 3, "▁dog": 4}
    vocab |= {f"<0x{byte:02X}>": 5 + byte for byte in range(256)}
    library = Library(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    library.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    return Tokenizer(library)


def test_spaces_between_words_stay_and_the_first_is_dropped(spaced):
    assert run(spaced, [1, 4, 3, 1])[0] == ["the", " dog", "dog", " the", ""]
    assert "".join(run(spaced, [2, 1, 4])[0]) == spaced.decode([2, 1, 4]) == " the dog"


def test_the_prompt_keeps_the_space_before_the_first_word(spaced):
    assert run(spaced, [4, 1], prompt=[1])[0] == [" dog", " the", ""]
    assert "".join(run(spaced, [4, 1])[0]) == "dog the"


def test_a_character_begun_in_the_prompt_is_shown_with_its_last_byte(tokenizer, byte_ids):
    ids = [byte_ids[byte] for byte in "the 😀".encode()]
    assert run(tokenizer, ids[-2:], prompt=ids[:-2])[0] == ["", "😀", ""]


def test_byte_tokens_make_characters(spaced):
    ids = [1, *(5 + byte for byte in "😀".encode()), 4]
    assert run(spaced, ids)[0] == ["the", "", "", "", "😀", " dog", ""]


@many_examples
@given(token_ids=st.lists(st.sampled_from([1, 2, 3, 4, 5 + 0xC3, 5 + 0xA9, 5 + 0xFF]), max_size=120))
def test_byte_tokens_in_any_order_never_break_the_stream(spaced, token_ids):
    """The decoding of such tokens is not monotonic (a bad byte spoils those before it); words still come."""
    text = "".join(run(spaced, token_ids)[0])
    assert text.count("the") == token_ids.count(1)


# ---- stop words


@many_examples
@given(
    text=st.text(alphabet="ab😀", max_size=30),
    stop=st.lists(st.text(alphabet="ab😀", min_size=1, max_size=5), max_size=4).map(tuple),
    include_stop=st.booleans(),
    data=st.data(),
)
def test_the_text_ends_at_the_stop_word_completed_first(tokenizer, byte_ids, text, stop, include_stop, data):
    encoded = tokenizer.encode(text)
    if data.draw(st.booleans()):  # one token per byte: the words lie across tokens
        encoded = [byte_ids[byte] for byte in text.encode()]
    pushes, stopped = run(tokenizer, encoded, stop=stop, include_stop=include_stop)
    assert ("".join(pushes), stopped) == cut(text, stop, include_stop)


@many_examples
@given(text=st.text(alphabet="ab", max_size=20), stop=st.text(alphabet="ab", min_size=1, max_size=4))
def test_only_what_may_begin_the_stop_word_is_held_back(tokenizer, byte_ids, text, stop):
    detokenizer = Detokenizer(tokenizer, SamplingParams(stop=(stop,)))
    shown = ""
    for end, char in enumerate(text, 1):
        shown += detokenizer.push(byte_ids[ord(char)])
        if detokenizer.stopped:
            break
        held = text[len(shown) : end]
        longest = max(n for n in range(len(stop)) if text[:end].endswith(stop[:n]))
        assert shown + held == text[:end]
        assert len(held) == longest


def test_the_beginning_of_a_stop_word_is_held_and_released(tokenizer, byte_ids):
    ids = [byte_ids[byte] for byte in b"xSTOxSTOP!"]
    assert run(tokenizer, ids, stop=("STOP",)) == (["x", "", "", "", "STOx", "", "", "", "", ""], True)
    assert run(tokenizer, ids[:4], stop=("STOP",)) == (["x", "", "", "", "STO"], False)


def test_text_behind_the_stop_word_in_the_same_token_is_dropped(tokenizer):
    (token_id,) = tokenizer.encode(" dog")
    assert run(tokenizer, [token_id], stop=("do",)) == ([" ", ""], True)
    assert run(tokenizer, [token_id], stop=("do",), include_stop=True) == ([" do", ""], True)


def test_nothing_comes_after_the_stop(tokenizer, byte_ids):
    detokenizer = Detokenizer(tokenizer, SamplingParams(stop=("a",)))
    assert [detokenizer.push(byte_ids[ord(char)]) for char in "xab"] == ["x", "", ""]
    assert detokenizer.stopped
    assert detokenizer.flush() == ""


def test_stop_words_count_from_min_tokens_on(tokenizer, byte_ids):
    ids = [byte_ids[byte] for byte in b"abxabxab"]
    for min_tokens, expected in [(0, ""), (2, ""), (3, "abx"), (5, "abx"), (6, "abxabx")]:
        pushes, stopped = run(tokenizer, ids, stop=("ab",), min_tokens=min_tokens)
        assert ("".join(pushes), stopped) == (expected, True)
    assert run(tokenizer, ids, stop=("ab",), min_tokens=9)[1] is False


@many_examples
@given(
    text=st.text(alphabet="ab", max_size=20),
    stop=st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=2).map(tuple),
    min_tokens=st.integers(0, 10),
)
def test_stop_words_that_overlap_an_early_one_still_count(tokenizer, byte_ids, text, stop, min_tokens):
    pushes, stopped = run(tokenizer, [byte_ids[ord(c)] for c in text], stop=stop, min_tokens=min_tokens)
    assert ("".join(pushes), stopped) == cut(text, stop, earliest_end=min_tokens)


def test_a_stop_word_may_be_completed_by_the_flush(tokenizer, byte_ids):
    assert run(tokenizer, [byte_ids[ord("a")], byte_ids[0xF0]], stop=(f"a{REPLACEMENT}",)) == (
        ["", "", ""],
        True,
    )


def test_special_tokens_are_seen_by_stop_words_only_where_they_are_shown(tokenizer):
    ids = tokenizer.encode("the<|im_end|> dog")
    assert run(tokenizer, ids, stop=("<|im_end|>",))[1] is False
    pushes, stopped = run(tokenizer, ids, stop=("<|im_end|>",), skip_special_tokens=False)
    assert ("".join(pushes), stopped) == ("the", True)
