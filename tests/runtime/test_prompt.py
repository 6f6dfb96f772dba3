"""How large a prompt may be: refused unread only where it cannot fit, and read no further than it can."""

from __future__ import annotations

import string
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as TokenizersTokenizer
from tokenizers import decoders, models, normalizers

from blockzoo.runtime.api.errors import InvalidRequestError, PromptTooLongError
from blockzoo.runtime.text.prompt import assemble, check_size, max_prompt_bytes
from blockzoo.runtime.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def byte_level(bpe_tokenizer_dir):
    return Tokenizer.load(bpe_tokenizer_dir)


def byte_fallback(normalizer) -> Tokenizer:
    """As Llama 2's: no word borders, unknown characters as bytes."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *string.ascii_letters, "▁▁", "▁▁▁▁"]
    merges = [("▁", "▁"), ("▁▁", "▁▁")]
    model = models.BPE({t: i for i, t in enumerate(tokens)}, merges, unk_token="<unk>", byte_fallback=True)
    made = TokenizersTokenizer(model)
    made.normalizer = normalizers.Sequence([*normalizer, normalizers.Replace(" ", "▁")])
    made.decoder = decoders.ByteFallback()
    return Tokenizer(made)


TOKENIZERS = {
    "fallback": byte_fallback([]),
    "NFC": byte_fallback([normalizers.NFC()]),
    "NFKC": byte_fallback([normalizers.NFKC()]),
    "lowercase": byte_fallback([normalizers.Lowercase()]),
}
# what shrinks most when it is composed, folded or merged
TEXTS = st.text(
    st.sampled_from(
        " aZ\n1é\u0301\u0308\u0323\u0345\u0313\u03b1\u212a\u212b\u2126\u1100\u1161\u11a8𝐀ﬃＡ你😀"
    ),
    max_size=300,
)


@pytest.mark.parametrize("kind", ["byte_level", *TOKENIZERS])
@given(text=TEXTS)
@settings(max_examples=150, deadline=None)
def test_what_fits_is_never_refused_unread(byte_level, kind, text):
    tokenizer = byte_level if kind == "byte_level" else TOKENIZERS[kind]
    check_size(tokenizer, [text], len(tokenizer.encode(text)))


def test_composing_never_shrinks_more_than_is_allowed():
    """Over all characters: as bytes, against the longest way to write each that normalization knows."""
    longest = {}
    for code in range(0x110000):
        if 0xD800 <= code < 0xE000:
            continue
        char = chr(code)
        for form in ("NFC", "NFKC"):
            for written in (char, unicodedata.normalize("NFD", char)):
                composed = unicodedata.normalize(form, written)
                longest[form] = max(
                    longest.get(form, 0), len(written.encode()) / max(1, len(composed.encode()))
                )
    assert longest == {"NFC": 3.0, "NFKC": 4.0}


def test_a_text_that_cannot_fit_is_not_tokenized(byte_level, monkeypatch):
    limit = max_prompt_bytes(byte_level, 10)
    monkeypatch.setattr(Tokenizer, "encode", lambda *args, **kwargs: pytest.fail("it was tokenized"))
    for prompt, documents in (("x" * (limit + 1), ()), ("x", ("x" * limit,)), ("é" * (limit // 2 + 1), ())):
        with pytest.raises(
            PromptTooLongError, match=f"over {limit} bytes; the model takes at most 10 tokens"
        ):
            assemble(byte_level, prompt, documents, 10)
    with pytest.raises(InvalidRequestError, match="257 texts"):
        assemble(byte_level, "x", ["x"] * 257, 10)


def test_documents_are_tokenized_no_further_than_they_fit(byte_level, monkeypatch):
    seen = []
    real = Tokenizer.encode
    monkeypatch.setattr(
        Tokenizer,
        "encode",
        lambda self, text, *args, **kw: seen.append(text) or real(self, text, *args, **kw),
    )
    documents = [f"{i} {i} {i}" for i in range(100)]
    with pytest.raises(
        PromptTooLongError, match=r"tokens with 3 of its 100 documents; the model takes at most 14"
    ):
        assemble(byte_level, "x", documents, 14)
    assert [text for text in seen if text in documents] == documents[:3]


def test_documents_that_just_fit_do(byte_level):
    documents = ["one two", "three"]
    tokens = assemble(byte_level, "four", documents).token_ids
    assert assemble(byte_level, "four", documents, len(tokens)).token_ids == tokens
    with pytest.raises(PromptTooLongError):
        assemble(byte_level, "four", documents, len(tokens) - 1)
