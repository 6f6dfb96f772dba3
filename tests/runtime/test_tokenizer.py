import json
import shutil
import threading
import time

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, processors

from blockzoo.runtime.errors import InvalidRequestError
from blockzoo.runtime.tokenizer import Tokenizer, TokenizerError


@pytest.fixture(scope="module")
def tokenizer(bpe_tokenizer_dir):
    return Tokenizer.load(bpe_tokenizer_dir)


@pytest.fixture(scope="module")
def sentencepiece_like():
    """As in Llama 2: a space is put before the text, and written as ▁."""
    pieces = ["<unk>", "▁", "b", "a", "d", "▁bad", "bad", "\n", "(", '"']
    library = Library(models.Unigram([(piece, -1.0 - (len(piece) == 1)) for piece in pieces], 0, False))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Metaspace(prepend_scheme="always")
    return Tokenizer(library)


@pytest.mark.parametrize("text", ["", "the quick fox", " two  spaces\n", "你好 😀 naïve", "\x00"])
def test_decode_inverts_encode(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_parsed_and_skipped(tokenizer):
    ids = tokenizer.encode("the<|im_end|>")
    assert ids[-1] == 2
    assert tokenizer.decode(ids) == "the"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "the<|im_end|>"


def test_vocab_size_counts_all_tokens_and_unknown_ids_decode_to_nothing(tokenizer):
    assert tokenizer.vocab_size == 350
    assert tokenizer.decode([350, 10**6]) == ""


def test_post_processors_apply_unless_told_otherwise(bpe_tokenizer_dir):
    library = Library.from_file(str(bpe_tokenizer_dir / "tokenizer.json"))
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = Tokenizer(library)
    assert tokenizer.encode("the") == [0, *tokenizer.encode("the", add_special_tokens=False)]


def test_truncation_and_padding_of_the_file_are_ignored(bpe_tokenizer_dir, tmp_path):
    library = Library.from_file(str(bpe_tokenizer_dir / "tokenizer.json"))
    library.enable_truncation(4)
    library.enable_padding(length=64)
    library.save(str(tmp_path / "tokenizer.json"))
    text = "the quick brown fox jumps over the lazy dog"
    assert Tokenizer.load(tmp_path).encode(text) == Tokenizer.load(bpe_tokenizer_dir).encode(text)


@pytest.mark.parametrize(("text", "match"), [("a\ud83d", "surrogates"), (b"a", "bytes"), (None, "NoneType")])
def test_what_is_no_text_is_refused(tokenizer, text, match):
    with pytest.raises(InvalidRequestError, match=match):
        tokenizer.encode(text)


def test_a_missing_tokenizer_json_is_named_with_what_is_there(tmp_path):
    with pytest.raises(TokenizerError, match=r"no tokenizer file; expected tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(TokenizerError, match=r"only tokenizer\.model.*save_pretrained"):
        Tokenizer.load(tmp_path)
    with pytest.raises(TokenizerError, match="no tokenizer file"):
        Tokenizer.load(tmp_path / "nowhere")


@pytest.mark.parametrize("damage", ["truncated", "not json", "unknown model"])
def test_a_damaged_tokenizer_json_is_named(bpe_tokenizer_dir, tmp_path, damage):
    file = tmp_path / "tokenizer.json"
    shutil.copy(bpe_tokenizer_dir / "tokenizer.json", file)
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "not json":
        file.write_bytes(b"\x80\x00")
    else:
        content = json.loads(file.read_text())
        content["model"]["type"] = "FromTheFuture"
        file.write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.load(tmp_path)


def test_bad_words_come_with_and_without_a_leading_space(tokenizer):
    sequences = tokenizer.bad_word_ids(["dog", " dog", "zebra"])
    texts = [tokenizer.decode(sequence) for sequence in sequences]
    assert sorted(set(texts)) == [" dog", " zebra", "dog", "zebra"]
    assert len(set(sequences)) == len(sequences)
    assert any(len(sequence) == 1 for sequence in sequences)
    assert any(len(sequence) > 1 for sequence in sequences)


def test_bad_words_of_spaces_alone_stay_as_they_are(tokenizer):
    assert tokenizer.bad_word_ids(["  "]) == (tuple(tokenizer.encode("  ")),)
    assert tokenizer.bad_word_ids([]) == ()


def test_bad_words_behind_no_space_are_found_where_the_tokenizer_adds_one(sentencepiece_like):
    ids = {piece: sentencepiece_like._tokenizer.token_to_id(piece) for piece in ("▁bad", "bad")}
    assert sentencepiece_like.encode("bad") == [ids["▁bad"]]
    sequences = sentencepiece_like.bad_word_ids(["bad"])
    assert (ids["▁bad"],) in sequences
    assert (ids["bad"],) in sequences


def test_which_tokens_end_a_line(tokenizer):
    text = "one\ntwo\n\nthree"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.ends_line.shape == (tokenizer.vocab_size,)
    assert [bool(end) for end in tokenizer.ends_line[ids]] == ["\n" in tokenizer.decode([i]) for i in ids]
    assert tokenizer.ends_line[ids].any()
    assert not tokenizer.ends_line[ids].all()


def test_other_threads_run_while_a_long_text_is_tokenized(tokenizer):
    turns, over = 0, False

    def take_turns() -> None:
        nonlocal turns
        while not over:
            turns += 1
            time.sleep(0)

    other = threading.Thread(target=take_turns)
    other.start()
    before = turns
    tokenizer.encode("the quick brown fox " * 20_000)
    taken = turns - before
    over = True
    other.join()
    assert taken > 20  # none to three where the library keeps the interpreter to itself
