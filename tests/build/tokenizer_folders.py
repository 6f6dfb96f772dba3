"""Small tokenizer folders of every kind: what a folder says beside, and against, its tokenizer.json."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_TEXTS = [
    "the quick brown fox jumps over the lazy dog. The dog's lazier than the fox's tail, isn't it?",
    "def answer(x):\n    return x + 1  # 1234 and 42\n\n\nclass A: pass\n",
    "les élèves étudient à l'école; Größe, naïve, façade",
    "你好,世界。 これは試験です。 Привет, мир! 안녕하세요",
] * 4


def _trained(split: Any, normalizer: Any = None, **model: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = split
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    return tokenizer


def _gpt2() -> Tokenizer:
    return _trained(pre_tokenizers.ByteLevel(add_prefix_space=False))


def _llama3() -> Tokenizer:
    """Adds <|endoftext|> before a text, keeps digits in threes, and takes whole words from the vocabulary."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"
    )
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = _trained(pre_tokenizers.Sequence([split, byte_level]), ignore_merges=True)
    bos = ("<|endoftext|>", 0)
    template = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[bos])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return tokenizer


def _llama2(metaspace: bool = False) -> Tokenizer:
    """Pieces with ▁ for spaces and bytes for unknown characters; <s> before a text."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    learned.train_from_iterator(_TEXTS, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    model = json.loads(learned.to_str())["model"]
    pieces += [piece for piece in model["vocab"] if piece != "▁"]
    merges = [tuple(merge) for merge in model["merges"]]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", left=1),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(piece, special=True) for piece in pieces[:3]])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@cache
def tokenizer_json(name: str) -> str:
    """The text of a tokenizer.json."""
    made = {"gpt2": _gpt2, "llama3": _llama3, "llama2": _llama2, "metaspace": lambda: _llama2(True)}
    return str(made[name]().to_str())


@dataclass(frozen=True)
class Folder:
    """What stands in a folder."""

    base: str
    """Of `tokenizer_json`."""
    model_type: str | None
    """None: an adapter's folder, which has no config.json."""
    files: dict[str, Any]
    """JSON by file name, beside tokenizer.json."""
    config: dict[str, Any] = field(default_factory=dict)
    """More of config.json."""

    def write(self, path: Path) -> Path:
        """The folder, on disk."""
        path.mkdir(parents=True, exist_ok=True)
        (path / "tokenizer.json").write_text(tokenizer_json(self.base), "utf-8")
        if self.model_type is not None:
            config = {"model_type": self.model_type, "architectures": [ARCHITECTURES[self.model_type]]}
            (path / "config.json").write_text(json.dumps(config | self.config))
        for name, content in self.files.items():
            (path / name).write_text(json.dumps(content))
        return path


def _config(name: str | None = None, **settings: Any) -> dict[str, Any]:
    return {"tokenizer_config.json": ({} if name is None else {"tokenizer_class": name}) | settings}


def token(content: str, **flags: Any) -> dict[str, Any]:
    """A token as `added_tokens_decoder` and special_tokens_map.json have it."""
    defaults = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    return {"content": content} | defaults | flags


def _tagged(content: str, **flags: Any) -> dict[str, Any]:
    return {"__type": "AddedToken"} | token(content, **flags)


_LLAMA, _MISTRAL, _QWEN2, _QWEN3 = ARCHITECTURES
_FAST = "PreTrainedTokenizerFast"
_DECODER = {
    "added_tokens_decoder": {"380": token("<tool>"), "381": token("word", special=False, normalized=True)}
}
_FLAGS = {
    "added_tokens_decoder": {
        "400": token("<left>", lstrip=True),
        "401": token("<right>", rstrip=True, special=False),
        "402": token("fox", single_word=True, special=False),
        "403": token("École", normalized=True, special=False),
    }
}
FOLDERS: dict[str, Folder] = {
    "bare": Folder("gpt2", _LLAMA, {}),
    "bare-qwen2": Folder("gpt2", _QWEN2, {}),
    "bare-qwen3": Folder("llama3", _QWEN3, {}),
    "bare-mistral": Folder("llama2", _MISTRAL, {}),
    "bare-adapter": Folder("gpt2", None, {}),
    "new-eos": Folder("gpt2", _LLAMA, _config(_FAST, eos_token="<end>", pad_token="<pad>")),
    "known-eos": Folder("gpt2", _LLAMA, _config(_FAST, eos_token="<|im_end|>")),
    "eos-with-flags": Folder("gpt2", _LLAMA, _config(_FAST, eos_token=_tagged("<end>", rstrip=True))),
    "decoder": Folder("gpt2", _LLAMA, _config(_FAST, **_DECODER)),
    "decoder-adapter": Folder("gpt2", None, _config(_FAST, **_DECODER)),
    "flags": Folder("llama3", _LLAMA, _config(_FAST, **_FLAGS)),
    "flags-of-pieces": Folder("llama2", _MISTRAL, _config(_FAST, **_FLAGS)),
    "flags-rebuilt": Folder("llama2", _LLAMA, _config("LlamaTokenizer", **_FLAGS)),
    "flags-qwen2": Folder("gpt2", _QWEN2, _config("Qwen2Tokenizer", eos_token="<left>", **_FLAGS)),
    "additional": Folder("gpt2", _LLAMA, _config(_FAST, additional_special_tokens=["<a>", "<b>"])),
    "additional-tagged": Folder(
        "gpt2",
        _QWEN3,
        _config("Qwen2Tokenizer", additional_special_tokens=[_tagged("<a>", lstrip=True), "<b>"]),
    ),
    "extra": Folder("gpt2", _LLAMA, _config(_FAST, extra_special_tokens=["<a>", "fox"])),
    "extra-named": Folder("gpt2", _LLAMA, _config(_FAST, extra_special_tokens={"image_token": "<image>"})),
    "extra-and-additional": Folder(
        "gpt2", _LLAMA, _config(_FAST, extra_special_tokens=["<a>"], additional_special_tokens=["<b>"])
    ),
    "own-name": Folder("gpt2", _LLAMA, _config(_FAST, image_token="<image>", tool_token=_tagged("<tool>"))),
    "added-tokens": Folder("gpt2", _LLAMA, {"added_tokens.json": {"<x>": 381, "quick": 380}}),
    "added-tokens-special": Folder(
        "gpt2", _LLAMA, {"added_tokens.json": {"<x>": 380, "<y>": 381}} | _config(_FAST, eos_token="<y>")
    ),
    "added-tokens-far": Folder("gpt2", _LLAMA, {"added_tokens.json": {"<x>": 500}}),
    "special-map": Folder(
        "gpt2",
        _LLAMA,
        {"special_tokens_map.json": {"eos_token": token("<end>", lstrip=True), "pad_token": "<pad>"}},
    ),
    "special-map-extra": Folder(
        "gpt2",
        _LLAMA,
        {"special_tokens_map.json": {"additional_special_tokens": ["<a>"], "extra_special_tokens": ["<b>"]}}
        | _config(_FAST, extra_special_tokens=["<c>"]),
    ),
    "special-map-beside-decoder": Folder(
        "gpt2", _LLAMA, {"special_tokens_map.json": {"eos_token": "<end>"}} | _config(_FAST, **_DECODER)
    ),
    "special-map-adapter": Folder(
        "llama2",
        None,
        {"special_tokens_map.json": {"pad_token": "<pad>"}, "added_tokens.json": {"<pad>": 459}},
    ),
    "adds-bos": Folder(
        "llama2", _LLAMA, _config(_FAST, add_bos_token=False, add_eos_token=True, bos_token="<s>")
    ),
    "llama": Folder("llama2", _LLAMA, _config("LlamaTokenizer")),
    "llama-legacy": Folder("llama2", _LLAMA, _config("LlamaTokenizerFast", legacy=True)),
    "llama-no-prefix": Folder("llama2", _LLAMA, _config("LlamaTokenizerFast", add_prefix_space=False)),
    "llama-metaspace": Folder(
        "metaspace", _LLAMA, _config("LlamaTokenizer", legacy=False, pad_token="<pad>")
    ),
    "llama-byte-level": Folder("llama3", _LLAMA, _config("LlamaTokenizerFast", eos_token="<end>")),
    "llama-mistral": Folder("llama2", _MISTRAL, _config("LlamaTokenizer", legacy=False, pad_token="<pad>")),
    "llama-adapter": Folder("llama2", None, _config("LlamaTokenizer", pad_token="<pad>", legacy=None)),
    "llama-without-unk": Folder("llama2", _LLAMA, _config("LlamaTokenizer", unk_token=None)),
    "llama-config-class": Folder("llama2", _LLAMA, {}, {"tokenizer_class": "LlamaTokenizer"}),
    "gpt2": Folder("llama3", _LLAMA, _config("GPT2Tokenizer")),
    "gpt2-prefix": Folder(
        "gpt2", _LLAMA, _config("GPT2TokenizerFast", add_prefix_space=True, unk_token=None)
    ),
    "qwen2": Folder("gpt2", _QWEN2, _config("Qwen2TokenizerFast", pad_token="<pad>")),
    "qwen2-prefix": Folder("gpt2", _QWEN3, _config("Qwen2Tokenizer", add_prefix_space=True)),
    "qwen2-of-other-class": Folder("llama3", _QWEN2, _config("LlamaTokenizerFast")),
    "qwen2-plain": Folder("llama3", _QWEN2, _config(_FAST, eos_token="<|im_end|>")),
    "qwen3-plain": Folder("llama3", _QWEN3, _config(_FAST, eos_token="<|im_end|>")),
    "qwen3-llama": Folder("llama2", _QWEN3, _config("LlamaTokenizer")),
    "clean-up": Folder("gpt2", _LLAMA, _config(_FAST, clean_up_tokenization_spaces=True)),
}

SCRIPTS = (
    "the quick brown fox's tail, isn't it? I'LL say: 1234567 foxes, word by word.",
    "def answer(x):\n    return x + 1\t# naïve\r\n\r\n\n  \n class A:  pass   ",
    "École école É E\u0301cole ﬁ Ⅷ",
    "你好,世界。 これは試験です。 Привет, мир! 안녕하세요 नमस्ते السلام 😀👩‍👩‍👧 \u0000\ufffd\u200b",
    "",
    " ",
    "   three spaces, and three   ",
    "▁under ▁ scores▁",
)


def corpus(special: list[str]) -> list[str]:
    """Texts of many scripts, code and spaces, with each of these tokens in several places."""
    texts = list(SCRIPTS)
    for content in special:
        texts += [
            content,
            f"the {content} fox",
            f"the{content}fox{content}",
            f" {content}  {content}\n",
            f"{content} 你好",
        ]
    return [*texts, "".join(special), " ".join(special)]
