import re
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Library

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


def test_endless_broken_bytes_come_out_one_by_one(tokenizer, byte_ids):
    pushes, _ = run(tokenizer, [byte_ids[0xFF]] * 2000)
    assert pushes == [REPLACEMENT] * 2000 + [""]


@pytest.mark.parametrize("num_broken", range(24, 36))
def test_a_character_across_the_end_of_a_window_stays_whole(tokenizer, byte_ids, num_broken):
    data = b"\xff" * num_broken + "😀".encode() * 12
    pushes, _ = run(tokenizer, [byte_ids[byte] for byte in data])
    assert "".join(pushes) == REPLACEMENT * num_broken + "😀" * 12


def test_endless_skipped_tokens_show_nothing(tokenizer):
    detokenizer = Detokenizer(tokenizer, SamplingParams())
    for _ in range(2000):
        assert detokenizer.push(2) == ""
    assert detokenizer.push(tokenizer.encode("the")[0])


def test_flush_twice_gives_nothing_more(tokenizer, byte_ids):
    detokenizer = Detokenizer(tokenizer, SamplingParams(stop=("the end",)))
    shown = "".join(detokenizer.push(token_id) for token_id in tokenizer.encode("the"))
    assert shown == ""
    assert detokenizer.flush() == "the"
    assert detokenizer.flush() == ""


# ---- tokenizers that write spaces into words

SPACE = decoders.Replace("▁", " ")
SPACED_DECODERS = {
    "llama2": [SPACE, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)],
    "gemma": [SPACE, decoders.ByteFallback(), decoders.Fuse()],
    "metaspace": [decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()],
}
WORDS = ["<unk>", "▁the", "▁", "dog", "▁dog", "▁▁▁", "好", REPLACEMENT, "<s>", "</s>"]
FIRST_BYTE = len(WORDS)


def spaced_tokenizer(kind):
    """▁ for a space, perhaps dropped at the start of a text; bytes that are in no word as <0xNN>."""
    vocab = {word: index for index, word in enumerate(WORDS)}
    vocab |= {f"<0x{byte:02X}>": FIRST_BYTE + byte for byte in range(256)}
    library = Library(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    library.add_special_tokens(["<s>", "</s>"])
    library.decoder = decoders.Sequence(SPACED_DECODERS[kind])
    return Tokenizer(library)


spaced_tokenizers = {kind: spaced_tokenizer(kind) for kind in SPACED_DECODERS}


@pytest.fixture(scope="module")
def spaced():
    return spaced_tokenizers["llama2"]


def spell(text):
    """Words of `text` that are tokens, and bytes."""
    ids = []
    while text:
        longest = max((word for word in WORDS if text.startswith(word)), key=len, default="")
        ids += [WORDS.index(longest)] if longest else [FIRST_BYTE + byte for byte in text[0].encode()]
        text = text[len(longest) or 1 :]
    return ids


def decode_each_run(tokenizer, token_ids, skip):
    """The library's decoding, where only bytes that are in no character are U+FFFD, not all of their run."""
    ids = [i for i in token_ids if not (skip and i in tokenizer.special_tokens)]
    mended = []
    while ids:
        lengths = (n for n in (1, 2, 3, 4) if is_character([i - FIRST_BYTE for i in ids[:n]]))
        length = next(lengths, 1)
        if length == 1 and ids[0] - FIRST_BYTE >= 0x80:
            mended.append(WORDS.index(REPLACEMENT))
        else:
            mended += ids[:length]
        ids = ids[length:]
    return tokenizer.decode(mended, skip)


def is_character(data):
    try:
        return len(bytes(data).decode()) == 1
    except ValueError:  # no bytes at all, or no character
        return False


def behind(prompt, both):
    """`both` without what it has in common with `prompt`."""
    common = next(n for n in range(len(prompt), -1, -1) if both.startswith(prompt[:n]))
    return both[common:]


scripts = st.text(st.sampled_from("the dog▁好世界ก็👩\u200d👧e\u0301é\n"), max_size=25)
spelled = scripts.map(lambda text: spell(text.replace(" ", "▁")))
single_bytes = st.sampled_from([0x20, 0x41, 0x80, 0xC3, 0xA9, 0xE4, 0xBD, 0xA0, 0xF0, 0x9F, 0x98, 0xFF])
any_token = st.one_of(st.integers(0, FIRST_BYTE - 1), single_bytes.map(FIRST_BYTE.__add__))
any_tokens = st.lists(st.one_of(spelled, st.lists(any_token, max_size=8)), max_size=6).map(
    lambda parts: list(chain.from_iterable(parts))
)


@settings(max_examples=300, deadline=None)
@given(prompt=any_tokens, answer=any_tokens, skip=st.booleans())
@pytest.mark.parametrize("kind", SPACED_DECODERS)
def test_byte_fallback_gives_what_decoding_adds_to_the_prompt(kind, prompt, answer, skip):
    tokenizer = spaced_tokenizers[kind]
    pushes, _ = run(tokenizer, answer, prompt, skip_special_tokens=skip)
    texts = [decode_each_run(tokenizer, ids, skip) for ids in (prompt, prompt + answer)]
    assert "".join(pushes) == behind(*texts)


@settings(max_examples=200, deadline=None)
@given(text=scripts, data=st.data())
@pytest.mark.parametrize("kind", SPACED_DECODERS)
def test_text_cut_anywhere_between_bytes_is_the_librarys_decoding(kind, text, data):
    """No oracle of our own: a prompt that ends between characters, an answer of valid UTF-8."""
    tokenizer = spaced_tokenizers[kind]
    ids = spell(text.replace(" ", "▁"))
    cut = data.draw(st.integers(0, len(ids)))
    before = tokenizer.decode(ids[:cut])
    pushes, _ = run(tokenizer, ids[cut:], ids[:cut])
    if REPLACEMENT not in before:
        assert before + "".join(pushes) == tokenizer.decode(ids)
    assert REPLACEMENT not in "".join(pushes)
    assert pushes[-1] == ""


@settings(max_examples=200, deadline=None)
@given(prompt=st.lists(st.integers(0, 360), max_size=12), answer=st.lists(st.integers(0, 360), max_size=30))
def test_byte_level_gives_what_decoding_adds_to_the_prompt(tokenizer, prompt, answer):
    pushes, _ = run(tokenizer, answer, prompt)
    assert "".join(pushes) == behind(tokenizer.decode(prompt), tokenizer.decode(prompt + answer))


def test_a_prompt_that_ends_in_characters_of_three_bytes(spaced):
    prompt = [1, *(FIRST_BYTE + byte for byte in "世世世世".encode())]
    assert run(spaced, spell("dog"), prompt)[0] == ["dog", ""]
    assert run(spaced, spell("世"), prompt)[0] == ["", "", "世", ""]


def test_bytes_that_a_prompt_leaves_broken_are_not_the_answers(spaced, tokenizer, byte_ids):
    begun = "世".encode()[:2]
    assert run(spaced, spell("dog"), [FIRST_BYTE + byte for byte in begun])[0] == ["dog", ""]
    assert run(tokenizer, [byte_ids[ord("d")]], [byte_ids[byte] for byte in begun])[0] == ["d", ""]
    assert run(tokenizer, [], [byte_ids[byte] for byte in begun])[0] == [""]


@pytest.mark.parametrize("nothing", [0, 1000], ids=["special", "unknown"])
def test_tokens_without_a_text_at_the_end_of_a_prompt_hide_nothing(spaced, tokenizer, byte_ids, nothing):
    begun, rest = "世".encode()[:2], "世".encode()[2:]
    prompt = [byte_ids[byte] for byte in begun] + [nothing] * 9
    assert run(tokenizer, [byte_ids[byte] for byte in rest], prompt)[0] == ["世", ""]
    nothing = nothing or WORDS.index("<s>")
    assert run(spaced, spell("▁dog"), spell("▁the") + [nothing] * 9)[0] == [" dog", ""]
    assert run(spaced, spell("▁dog"), [nothing] * 9)[0] == ["dog", ""]


def test_added_tokens_of_any_characters(bpe_tokenizer_dir):
    library = Library.from_file(str(bpe_tokenizer_dir / "tokenizer.json"))
    library.add_tokens(["é", "a b", "你好", "\n"])
    tokenizer = Tokenizer(library)
    ids = tokenizer.encode("xéa b你好\nyé", add_special_tokens=False)
    assert "".join(run(tokenizer, ids)[0]) == tokenizer.decode(ids)


@pytest.mark.parametrize(
    "decoder",
    [None, decoders.WordPiece(), decoders.Metaspace(), decoders.BPEDecoder()],
    ids=["none", "wordpiece", "metaspace", "bpe"],
)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_decoders_that_look_at_the_token_before(decoder, data):
    words = ["<unk>", "▁the", "##s", "dog", "dog</w>", "the</w>", ".", "▁"]
    library = Library(models.WordLevel({word: index for index, word in enumerate(words)}, "<unk>"))
    if decoder is not None:
        library.decoder = decoder
    tokenizer = Tokenizer(library)
    ids = data.draw(st.lists(st.integers(1, len(words) - 1), max_size=12))
    cut = data.draw(st.integers(0, len(ids)))
    answer = "".join(run(tokenizer, ids[cut:], ids[:cut])[0])
    assert tokenizer.decode(ids[:cut]) + answer == tokenizer.decode(ids)


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
    ids = [1, *(FIRST_BYTE + byte for byte in "😀".encode()), 4]
    assert run(spaced, ids)[0] == ["the", "", "", "", "😀", " dog", ""]


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


# ---- stop words that are special tokens


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("include_stop", [True, False])
def test_a_special_token_is_a_stop_word(tokenizer, skip, include_stop):
    ids = tokenizer.encode("the<|im_end|> dog")
    pushes, stopped = run(
        tokenizer, ids, stop=("<|im_end|>",), skip_special_tokens=skip, include_stop=include_stop
    )
    assert ("".join(pushes), stopped) == ("the<|im_end|>" if include_stop else "the", True)


def test_other_special_tokens_and_their_texts_do_not_end_it(tokenizer):
    ids = tokenizer.encode("the</s> dog")
    for stop in ("<|im_end|>", "<", "s>", "</s> cat", "the </s>"):
        pushes, stopped = run(tokenizer, ids, stop=(stop,))
        assert ("".join(pushes), stopped) == ("the dog", False)


def test_a_special_token_spelled_in_other_tokens_ends_it_too(tokenizer, byte_ids):
    ids = [byte_ids[byte] for byte in b"a</s>b"]
    assert run(tokenizer, ids, stop=("</s>",)) == (["a", "", "", "", "", ""], True)


def test_stop_words_of_text_and_special_tokens(tokenizer):
    ids = tokenizer.encode("x dog<|im_end|>\nthe<s>")
    for stop, text in {
        " dog<|im_end|>": "x",
        "<|im_end|>\nthe": "x dog",
        "g<|im_end|>\n": "x do",
        "the<s>": "x dog\n",
    }.items():
        for field in ({}, {"skip_special_tokens": False}):
            shown = text.replace("\n", "<|im_end|>\n") if field else text
            assert ("".join(run(tokenizer, ids, stop=(stop,), **field)[0])) == shown
        assert "".join(run(tokenizer, ids, stop=(stop, "x"), include_stop=True)[0]) == "x"
    assert run(tokenizer, ids, stop=("the<|im_end|>",))[1] is False


def test_words_of_text_alone_do_not_see_hidden_tokens(tokenizer):
    ids = tokenizer.encode("the</s> dog")
    assert "".join(run(tokenizer, ids, stop=("e d",))[0]) == "th"


def test_what_a_special_token_shows_unfinished_is_shown_before_it(tokenizer, byte_ids):
    ids = [byte_ids[ord("a")], byte_ids[0xE4], 2, byte_ids[0xBD], byte_ids[0xA0]]
    assert "".join(run(tokenizer, ids, stop=("<|im_end|>",))[0]) == f"a{REPLACEMENT}"
    assert "".join(run(tokenizer, ids)[0]) == "a你" == tokenizer.decode(ids)


def test_special_stop_words_count_from_min_tokens_on(tokenizer):
    ids = tokenizer.encode("<|im_end|>the<|im_end|>")
    assert "".join(run(tokenizer, ids, stop=("<|im_end|>",), min_tokens=2)[0]) == "the"


@pytest.mark.parametrize("skip", [True, False])
def test_a_token_that_ends_the_text_completes_stop_words(tokenizer, byte_ids, skip):
    for stop, include_stop, text in [
        ((), False, f"x dog{REPLACEMENT}"),
        (("</s>",), False, f"x dog{REPLACEMENT}"),
        (("</s>",), True, f"x dog{REPLACEMENT}</s>"),
        (("<s>", "dogs"), True, f"x dog{REPLACEMENT}"),
        (("g</s>",), False, "x do"),
    ]:
        params = SamplingParams(stop=stop, include_stop=include_stop, skip_special_tokens=skip)
        detokenizer = Detokenizer(tokenizer, params)
        pushes = [detokenizer.push(token) for token in tokenizer.encode("x dog")]
        if text.endswith((REPLACEMENT, "</s>")):
            pushes.append(detokenizer.push(byte_ids[0xE4]))
        pushes += [detokenizer.end(1), detokenizer.flush(), detokenizer.end(1)]
        assert "".join(pushes) == text


def test_white_space_that_a_special_token_takes_along(bpe_tokenizer_dir):
    library = Library.from_file(str(bpe_tokenizer_dir / "tokenizer.json"))
    library.add_special_tokens([AddedToken("<end>", lstrip=True, rstrip=True)])
    tokenizer = Tokenizer(library)
    ids = tokenizer.encode("the <end>\n")
    assert ids == tokenizer.encode("the<end>")
    for stop in ("<end>", " <end>", "<end>\n\n"):
        assert "".join(run(tokenizer, ids, stop=(stop,))[0]) == "the"


@many_examples
@given(
    parts=st.lists(st.sampled_from(["a", "b", "ab", "<s>", "</s>", "😀"]), max_size=12),
    stop=st.lists(
        st.lists(st.sampled_from(["a", "b", "<s>", "</s>"]), min_size=1, max_size=4).map("".join), max_size=3
    ).map(tuple),
    include_stop=st.booleans(),
)
def test_words_with_special_tokens_end_the_text_as_if_they_were_shown(tokenizer, parts, stop, include_stop):
    """Words of text alone see the text as shown, others the text with all its tokens."""
    ids = tokenizer.encode("".join(parts))
    pushes, stopped = run(tokenizer, ids, stop=stop, include_stop=include_stop)
    marks = re.findall("<s>|</s>|.", "".join(parts))
    for end in range(1, len(marks) + 1):
        whole, shown = "".join(marks[:end]), "".join(m for m in marks[:end] if len(m) == 1)
        ending = [w for w in stop if (whole if "<" in w else shown).endswith(w)]
        if len(marks[end - 1]) > 1:  # what is not shown completes no word of text alone
            ending = [w for w in ending if "<" in w]
        if ending:
            hidden = {w: len(re.sub("</?s>", "", w)) for w in ending}
            length = max(hidden.values())
            text = shown[: len(shown) - length]
            options = {text + (w if include_stop else "") for w in ending if hidden[w] == length}
            assert "".join(pushes) in options
            assert stopped
            return
    assert ("".join(pushes), stopped) == ("".join(m for m in marks if len(m) == 1), False)
