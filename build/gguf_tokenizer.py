"""The vocabulary in a GGUF file's metadata as tokenizer files, with the ids of transformers' reading of it.

GGUF says what the tokens are and names how texts are split before they are merged; it has no tokenizer.json.
What it leaves open is as transformers reads it.
"""

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

from blockzoo.build.gguf_config import Metadata
from blockzoo.build.tokenizer import QWEN2_SPLIT
from blockzoo.zoo.errors import CheckpointError, UnsupportedModelError

_LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_WORD = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN_SPLIT = (
    rf"{_WORD}*[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+|{_WORD}+[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS: dict[str | None, str | None] = {
    **dict.fromkeys((None, "default", "gpt-2", "gpt2", "smollm", "starcoder", "olmo"), None),  # of GPT-2
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "smaug-bpe", "dbrx"), _LLAMA3_SPLIT),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), QWEN2_SPLIT),
    "tekken": _TEKKEN_SPLIT,
}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_LONGEST = 1024  # characters of a token: all its halves are looked up


def tokenizer_files(metadata: Metadata) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json and, where there is a chat template, chat_template.jinja.

    Raises CheckpointError, UnsupportedModelError; both name the file.
    """
    kind = metadata.text("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise UnsupportedModelError(
            f"{metadata.path}: tokenizer {kind!r:.40} (tokenizer.ggml.model) is not supported (supported: "
            "gpt2 and llama)"
        )
    for cleans in ("remove_extra_whitespaces", "precompiled_charsmap"):
        if metadata.values.get(f"tokenizer.ggml.{cleans}"):
            raise UnsupportedModelError(f"{metadata.path}: tokenizer.ggml.{cleans} is not supported")
    tokens, types = _tokens(metadata)
    named = _named_tokens(metadata, tokens, types)
    special = [token for token, type_id in zip(tokens, types, strict=True) if type_id == _CONTROL]
    special += [token for token in named.values() if token is not None and token not in special]
    defined = [token for token, type_id in zip(tokens, types, strict=True) if type_id == _USER_DEFINED]
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
    try:
        if kind == "gpt2":
            tokenizer = _byte_level(metadata, tokens, {*special, *defined})
        else:
            tokenizer = _sentencepiece(metadata, tokens)
            prefix = metadata.flag("tokenizer.ggml.add_space_prefix")
            settings |= {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": prefix is not False}
        tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
        tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in defined])
        tokenizer.post_processor = _post_processor(metadata, tokenizer, named, kind == "llama")
        text = tokenizer.to_str()
    except CheckpointError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{metadata.path}: the vocabulary is not usable ({error})") from error
    files = {
        "tokenizer.json": text.encode(),
        "tokenizer_config.json": json.dumps(settings, indent=2).encode(),
    }
    template = metadata.text("tokenizer.chat_template")
    return files if template is None else {**files, "chat_template.jinja": template.encode()}


def _tokens(metadata: Metadata) -> tuple[list[str], Sequence[int]]:
    """The tokens by id, and their types."""
    tokens = metadata.texts("tokenizer.ggml.tokens")
    if not tokens:
        raise CheckpointError(
            f"{metadata.path}: metadata tokenizer.ggml.tokens is missing: there is no tokenizer"
        )
    longest = max(tokens, key=len)
    if len(longest) > _LONGEST:
        raise CheckpointError(
            f"{metadata.path}: token {longest!r:.40} has {len(longest)} characters, at most {_LONGEST} are "
            "read"
        )
    types = metadata.numbers("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    _check_length(metadata, "token_type", types, tokens)
    return tokens, types


def _check_length(metadata: Metadata, name: str, values: Sequence[Any], tokens: Sequence[str]) -> None:
    if len(values) != len(tokens):
        raise CheckpointError(
            f"{metadata.path}: tokenizer.ggml.{name} has {len(values)} entries for {len(tokens)} tokens"
        )


def _named_tokens(metadata: Metadata, tokens: list[str], types: Sequence[int]) -> dict[str, str | None]:
    named: dict[str, str | None] = {}
    for name, key in _NAMED.items():
        index = metadata.whole(f"tokenizer.ggml.{key}_token_id")
        if index is not None and index >= len(tokens):
            raise CheckpointError(
                f"{metadata.path}: tokenizer.ggml.{key}_token_id is {index}, and there are {len(tokens)} "
                "tokens"
            )
        named[name] = None if index is None else tokens[index]
    if named["unk_token"] is None and _UNKNOWN in types:
        named["unk_token"] = tokens[types.index(_UNKNOWN)]
    return named


def _byte_level(metadata: Metadata, tokens: list[str], added: set[str]) -> Tokenizer:
    pre = metadata.text("tokenizer.ggml.pre")
    if pre not in _SPLITS:
        known = ", ".join(name for name in _SPLITS if name)
        raise UnsupportedModelError(
            f"{metadata.path}: tokenizer.ggml.pre {pre!r:.40} is not supported (supported: {known})"
        )
    merges = metadata.texts("tokenizer.ggml.merges")
    if merges is None:
        raise CheckpointError(f"{metadata.path}: metadata tokenizer.ggml.merges is missing")
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {
        token if token in added or set(token) <= alphabet else _spelled(token): index
        for index, token in enumerate(tokens)
    }
    model = BPE(vocabulary, _pairs(metadata, merges), continuing_subword_prefix="", end_of_word_suffix="")
    tokenizer = Tokenizer(model)
    split = _SPLITS[pre]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    tokenizer.pre_tokenizer = (
        byte_level
        if split is None
        else pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), byte_level])
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _spelled(token: str) -> str:
    """A token that is written as text, in the letters that stand for bytes."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return "".join(piece for piece, _ in byte_level.pre_tokenize_str(token))


def _sentencepiece(metadata: Metadata, tokens: list[str]) -> Tokenizer:
    """Vocabulary and merges; what the class puts around them is added when the files are resolved."""
    merges = metadata.texts("tokenizer.ggml.merges")
    if merges is not None:
        pairs = _pairs(metadata, merges)
    else:
        scores = metadata.numbers("tokenizer.ggml.scores") or ()
        _check_length(metadata, "scores", scores, tokens)
        pairs = _implied_pairs(tokens, scores)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return Tokenizer(BPE(vocabulary, pairs, fuse_unk=True, byte_fallback=True))


def _pairs(metadata: Metadata, merges: list[str]) -> list[tuple[str, str]]:
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        if not left or not right or " " in right:
            raise CheckpointError(
                f"{metadata.path}: merge {merge!r:.60} is not two tokens with a space between"
            )
        pairs.append((left, right))
    return pairs


def _implied_pairs(tokens: list[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """All ways to put a token together of two others, best token first, as BPE merges."""
    vocabulary = {token: index for index, token in enumerate(tokens)}
    found: list[tuple[float, str, str]] = []
    for token, score in dict(zip(tokens, scores, strict=True)).items():
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [(left, right) for left, right in halves if left in vocabulary and right in vocabulary]
        known.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        found += [(score, left, right) for left, right in known]
    found.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [(left, right) for _, left, right in found]


def _post_processor(
    metadata: Metadata, tokenizer: Tokenizer, named: dict[str, str | None], adds_bos: bool
) -> processors.TemplateProcessing | None:
    """What is put before and behind a text: a flag of the file's, else `adds_bos` for the beginning."""
    flags = {name: metadata.flag(f"tokenizer.ggml.add_{name}_token") for name in ("bos", "eos")}
    bos = named["bos_token"] if (adds_bos if flags["bos"] is None else flags["bos"]) else None
    eos = named["eos_token"] if flags["eos"] else None
    if bos is None and eos is None:
        return None
    single = [*([f"{bos}:0"] if bos else []), "$A:0", *([f"{eos}:0"] if eos else [])]
    pair = [*single, *([f"{bos}:1"] if bos else []), "$B:1", *([f"{eos}:1"] if eos else [])]
    special = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys((bos, eos)) if token]
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)
