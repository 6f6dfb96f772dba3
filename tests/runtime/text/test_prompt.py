import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import processors

from blockzoo.runtime.api.errors import InvalidRequestError
from blockzoo.runtime.text.prompt import assemble, checked_ids, document_tokens
from blockzoo.runtime.text.tokenizer import Tokenizer

BOS, EOS = 0, 1
VOCAB = 350


@pytest.fixture(scope="module")
def tokenizer(bpe_tokenizer_dir):
    """Puts <s> before and </s> behind a text."""
    library = Library.from_file(str(bpe_tokenizer_dir / "tokenizer.json"))
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return Tokenizer(library)


def bare(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("bos", ["", "<s>"])
@pytest.mark.parametrize("document_bos", ["", "<s>"])
def test_one_bos_before_documents_and_prompt_and_one_eos_behind(tokenizer, bos, document_bos):
    documents = [f"{document_bos}the fox\n", f"{document_bos}the dog\n"]
    expected = [BOS]
    spans = []
    for text in ("the fox\n", "the dog\n"):
        spans.append((len(expected), len(expected) + len(bare(tokenizer, text))))
        expected += bare(tokenizer, text)
    expected += bare(tokenizer, "jumps")
    assert assemble(tokenizer, VOCAB, f"{bos}jumps", documents) == ([*expected, EOS], tuple(spans))
    ids = [BOS] * bool(bos) + bare(tokenizer, "jumps")
    assert assemble(tokenizer, VOCAB, ids, documents) == (expected, tuple(spans))
    assert document_tokens(tokenizer, documents[0]) == ([BOS, *bare(tokenizer, "the fox\n")], 1)


def test_without_documents_a_text_is_encoded_and_token_ids_stay(tokenizer):
    assert assemble(tokenizer, VOCAB, "<s>jumps") == ([BOS, *bare(tokenizer, "jumps"), EOS], ())
    assert assemble(tokenizer, VOCAB, [5, BOS, 7]) == ([5, BOS, 7], ())


def test_a_document_of_bos_alone_is_empty(tokenizer):
    for text in ("", "<s>"):
        with pytest.raises(InvalidRequestError, match="a document is empty"):
            assemble(tokenizer, VOCAB, "a", [text])


@pytest.mark.parametrize("documents", ["a text", None, {"a": 1}, 5, iter(["a"])])
def test_documents_that_are_no_list_are_refused(tokenizer, documents):
    with pytest.raises(InvalidRequestError, match=r"documents is of type .*; expected a list of texts"):
        assemble(tokenizer, VOCAB, "a", documents)
    with pytest.raises(InvalidRequestError, match="text to tokenize is of type int"):
        assemble(tokenizer, VOCAB, "a", [5])


# ---- token ids

INTEGERS = [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64]


@settings(max_examples=50, deadline=None)
@given(ids=st.lists(st.integers(0, 127), max_size=8), dtype=st.sampled_from(INTEGERS))
def test_integers_of_any_type_are_token_ids(ids, dtype):
    array = np.array(ids, dtype)
    for prompt in (ids, tuple(ids), array, array[::-1][::-1], list(array)):
        found = checked_ids(prompt, 128)
        assert found == ids
        assert all(type(token) is int for token in found)
    assert checked_ids(range(3), 128) == [0, 1, 2]


@pytest.mark.parametrize(
    ("prompt", "match"),
    [
        ([5, True], r"prompt\[1\] is True \(bool\)"),
        ([np.True_], r"prompt\[0\] is .*\(bool_?\)"),
        ([5.0], r"prompt\[0\] is 5.0 \(float\)"),
        ([np.float32(5)], r"prompt\[0\] is .*\(float32\)"),
        (["5"], r"prompt\[0\] is '5' \(str\)"),
        ([[1, 2]], r"prompt\[0\] is \[1, 2\] \(list\)"),
        ([None], r"prompt\[0\] is None"),
        ([128], r"prompt\[0\] is 128 "),
        ([-1], r"prompt\[0\] is -1 "),
        ([2**80], r"prompt\[0\] is 1208925819614629174706176"),
        ([10**100], r"prompt\[0\] is 1000.*\.\.\. \(int\)"),
        ([10**5000], r"prompt\[0\] is an int that is too large"),
        (np.array([2**63], np.uint64), r"prompt\[0\] is 9223372036854775808"),
        (np.array([1.0]), r"an array of float64 of shape \(1,\)"),
        (np.array([]), r"an array of float64 of shape \(0,\)"),
        (np.array([True]), "an array of bool"),
        (np.array([[1, 2]]), r"an array of int64 of shape \(1, 2\)"),
        (np.array(5), r"an array of int64 of shape \(\)"),
        (b"abc", "of type bytes"),
        (None, "of type NoneType"),
        ({1: 2}, "of type dict"),
        (5, "of type int"),
    ],
)
def test_what_is_no_token_id_is_refused_by_name(tokenizer, prompt, match):
    with pytest.raises(InvalidRequestError, match=rf"{match}.*; expected a text, or .* from 0 to 127"):
        assemble(tokenizer, 128, prompt)
