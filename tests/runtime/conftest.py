"""A small byte-level BPE tokenizer, made on the spot."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CORPUS = [
    "the quick brown fox jumps over the lazy dog, and the dog barks: stop it!",
    "def answer(question: str) -> str:\n    return 'stop here'\n\nEND of the story.",
    "naïve café, 你好世界, 世界你好, 😀 emoji 👩‍👩‍👧 family",
] * 4
SPECIAL_TOKENS = ["<s>", "</s>", "<|im_end|>"]


@pytest.fixture(scope="session")
def bpe_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a tokenizer.json: 350 tokens, of which 256 bytes and 3 special ones (ids 0 to 2).

    Characters outside ASCII mostly take several tokens, some words one.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=350,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
