import json
import shutil
import threading
import time

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Library
from transformers import PreTrainedTokenizerFast

from blockzoo.runtime.api.errors import InvalidRequestError
from blockzoo.runtime.text.tokenizer import Tokenizer, TokenizerError


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


@pytest.fixture(scope="module", params=["<s> $A", "<s> $A </s>", "<s> <|im_end|> $A", "$A </s>", "$A"])
def around(request, bpe_tokenizer_dir):
    """A tokenizer that puts something around a text, and the same in transformers."""
    library = Library.from_file(str(bpe_tokenizer_dir / "tokenizer.json"))
    special_tokens = [(token, library.token_to_id(token)) for token in ("<s>", "</s>", "<|im_end|>")]
    library.post_processor = processors.TemplateProcessing(
        single=request.param, special_tokens=special_tokens
    )
    return Tokenizer(library), PreTrainedTokenizerFast(tokenizer_object=library), request.param


@pytest.mark.parametrize("text", ["", "the dog", "a<s>b", "the</s>", " <s>", "</s><s>"])
def test_what_belongs_around_a_text_is_put_there_as_transformers_does(around, text):
    tokenizer, oracle, _ = around
    assert tokenizer.encode(text) == oracle(text).input_ids


@pytest.mark.parametrize("text", ["<s>", "<s>the dog", "<s><s>", "<s> the"])
def test_a_text_that_begins_with_bos_gets_no_second_one(around, text):
    tokenizer, oracle, template = around
    if template.startswith("<s> <"):  # what is put before a text is two tokens
        assert tokenizer.encode(text) == oracle(text).input_ids
        text = text.replace("<s>", "<s><|im_end|>", 1)
    end = [1] if template.endswith("</s>") else []
    assert tokenizer.encode(text) == oracle(text, add_special_tokens=False).input_ids + end


def test_an_unknown_word_with_the_id_of_bos_is_no_bos():
    library = Library(models.WordLevel({"<s>": 0, "a": 1}, "<s>"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.add_special_tokens(["<s>"])
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = Tokenizer(library)
    assert tokenizer.encode("unknown a") == [0, 0, 1]
    assert tokenizer.encode("<s> a") == [0, 1]


def test_bytes_of_byte_level_tokens_are_those_of_transformers():
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    chars = bytes_to_unicode()
    library = Library(models.WordLevel({char: byte for byte, char in chars.items()}, chars[0]))
    library.decoder = decoders.ByteLevel()
    assert [Tokenizer(library).bytes_of(byte) for byte in range(256)] == [bytes([b]) for b in range(256)]
    assert Tokenizer(library).bytes_of(256) == b""


def test_a_byte_level_decoder_among_others_is_refused(bpe_tokenizer_dir, tmp_path):
    library = Library.from_file(str(bpe_tokenizer_dir / "tokenizer.json"))
    library.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    assert Tokenizer(library).bytes_of(0) == b"<s>"
    library.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="sequence of ByteLevel, Strip; expected ByteLevel alone"):
        Tokenizer.load(tmp_path)


def test_special_tokens_in_a_text(tokenizer):
    assert tokenizer.with_special_tokens("a</s><|im_end|>b</s") == ("a", 1, 2, *"b</s")
    assert tokenizer.with_special_tokens("") == ()


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


def test_a_text_on_which_the_library_panics_is_refused():
    """Compiling refuses such tokenizers; an older zoo may hold one."""
    made = Library(models.WordLevel({"b": 0, "?": 1}, unk_token="?"))
    made.add_tokens([AddedToken(" ", lstrip=True), AddedToken("<s>", lstrip=True, rstrip=True)])
    tokenizer = Tokenizer(made)
    assert tokenizer.encode("b") == [0]
    with pytest.raises(InvalidRequestError, match="cannot take this text: AddedVocabulary bad split"):
        tokenizer.encode("<s>  ")


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
