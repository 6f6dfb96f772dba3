"""The tokenizer files of a model as one `tokenizer.json` with the token ids of transformers' AutoTokenizer.

AutoTokenizer (transformers 5) reads more than tokenizer.json: tokenizer_config.json, special_tokens_map.json
and added_tokens.json bring tokens and change how tokens match, and some classes split texts as the class
says, whatever the file says. Here all of that is applied once, with the `tokenizers` library; what a
tokenizer.json cannot say, or what is not known here, is refused by name.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from blockzoo.build.tokenizer_files import read_settings, special_tokens_of
from blockzoo.zoo.chat_files import SPECIAL_TOKENS, read_object, templates
from blockzoo.zoo.errors import CheckpointError, UnsupportedModelError, ZooError

# classes that take tokenizer.json as it is
_PLAIN = {"TokenizersBackend", "PythonBackend", "PreTrainedTokenizer", "BloomTokenizer"}
# classes that build a tokenizer from its vocabulary and merges, and the tokens that they have by default
_REBUILT: dict[str, dict[str, Any]] = {
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "Qwen2Tokenizer": dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>"),
    "GPT2Tokenizer": dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>"),
}
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_SAVE = (
    "with transformers, save PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, "
    "eos_token=...) of the loaded tokenizer into the folder, without that"
)


@dataclass(frozen=True, slots=True, eq=False)
class ModelTokenizer:
    """The tokenizer of a model."""

    files: dict[str, bytes]
    """By name. tokenizer.json alone gives the ids; it stays as given where that was so already. Beside chat
    templates lie the special tokens that they may name."""
    eos_token_id: int | None
    """Of the tokenizer's eos_token, if it has one."""
    largest_id: int
    """Of any token; the model may have fewer rows."""


def resolve(files: Mapping[str, bytes], model_type: Any, tokenizer_class: Any) -> ModelTokenizer:
    """The tokenizer that AutoTokenizer makes of a folder's files. Resolving the result gives the same again.

    Args:
        files: contents by name, tokenizer.json among them.
        model_type: of config.json, which has a say in the class; None without one.
        tokenizer_class: of config.json, if it has one; that of tokenizer_config.json goes first.

    Raises:
        CheckpointError: files that are damaged or contradict each other.
        UnsupportedModelError: what would give other ids, or texts, than AutoTokenizer.
    """
    said = (None if value is None else str(value) for value in (model_type, tokenizer_class))
    return _resolve(tuple(sorted(files.items())), *said)


def check_stated_ids(files: Mapping[str, bytes], tokenizer: ModelTokenizer) -> None:
    """Check that `tokenizer` has the tokens that these of its files name, with the ids that they name.

    For files put over those of another folder: what transformers passes over in silence would be no tokenizer
    that somebody has trained with. Raises CheckpointError.
    """
    decoder = read_object(files, "tokenizer_config.json").get("added_tokens_decoder", {})
    stated: list[tuple[str, int | None]] = [
        (token["content"], int(index)) for index, token in decoder.items()
    ]
    stated += read_object(files, "added_tokens.json").items()
    for value in read_object(files, "special_tokens_map.json").values():
        tokens = value if isinstance(value, list) else [value]
        named = [token.get("content") if isinstance(token, dict) else token for token in tokens]
        stated += [(content, None) for content in named if isinstance(content, str)]
    vocabulary = Tokenizer.from_buffer(tokenizer.files["tokenizer.json"]).get_vocab(with_added_tokens=True)
    for content, index in stated:
        seen = vocabulary.get(content)
        if seen is None or index not in (seen, None):
            said = "names it" if index is None else f"gives it id {index}"
            raise CheckpointError(
                f"token {content!r} has id {seen} in the base's tokenizer with the adapter's files over it, "
                f"but one of these files {said}: save the adapter's whole tokenizer into its folder, "
                "tokenizer.json too (AutoTokenizer.from_pretrained(...).save_pretrained(...))"
            )


@lru_cache(maxsize=4)  # most models of a zoo have the same
def _resolve(
    items: tuple[tuple[str, bytes], ...], model_type: str | None, tokenizer_class: str | None
) -> ModelTokenizer:
    files = dict(items)
    try:
        given = Tokenizer.from_buffer(files["tokenizer.json"])
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"tokenizer.json is not readable ({error}); save it again") from error
    try:
        settings, added = read_settings(files)
        kind = _kind(settings, model_type, tokenizer_class, files["tokenizer.json"])
        _refuse_unsupported(settings, given)
        if given.padding is not None:
            settings.setdefault("pad_token", given.padding["pad_token"])
        before = _text(given)
        tokenizer = given if kind is None else _rebuilt(kind, files["tokenizer.json"], given, settings)
        special = _add_tokens(tokenizer, kind, settings, added)
        _refuse_stripping_blanks(tokenizer)
        text = _text(tokenizer)
        if text != before:
            files["tokenizer.json"] = text.encode()
            _check_written(tokenizer, text)
    except ZooError:
        raise
    except Exception as error:  # of the library, or of settings of an unfit type
        raise CheckpointError(
            f"the tokenizer files do not fit together ({type(error).__name__}: {error}); save the tokenizer "
            "into the folder again (AutoTokenizer.from_pretrained(...).save_pretrained(...))"
        ) from error
    if templates(files):
        named = {name: str(token) for name, token in special.items()}
        files[SPECIAL_TOKENS] = json.dumps(named, indent=2, ensure_ascii=False).encode()
    eos = special.get("eos_token")
    eos_id = None if eos is None else tokenizer.token_to_id(str(eos))
    return ModelTokenizer(files, eos_id, max(tokenizer.get_vocab(with_added_tokens=True).values()))


def _text(tokenizer: Tokenizer) -> str:
    tokenizer.no_truncation()  # settings for training batches that some files carry along
    tokenizer.no_padding()
    return tokenizer.to_str()


def _refuse_stripping_blanks(tokenizer: Tokenizer) -> None:
    for token in tokenizer.get_added_tokens_decoder().values():
        if not token.content.strip() and (token.lstrip or token.rstrip):
            raise UnsupportedModelError(
                f"added token {token.content!r} is blank and takes blanks beside it (lstrip, rstrip), with "
                "which the tokenizers library fails on some texts: take the token or the setting out"
            )


def _check_written(tokenizer: Tokenizer, text: str) -> None:
    """Refuse what is lost on the way through a file, as tokens that are given twice, each time otherwise."""
    written = Tokenizer.from_str(text)
    if _text(written) != text:
        raise UnsupportedModelError(f"no tokenizer.json can say what the tokenizer files do: {_SAVE}")
    for index, token in tokenizer.get_added_tokens_decoder().items():
        around = f"a {token.content} b{token.content}c"
        ids = tokenizer.encode(around, add_special_tokens=False).ids
        same = ids == written.encode(around, add_special_tokens=False).ids
        for shown in (ids, [*ids, index, index]):
            same &= tokenizer.decode(shown) == written.decode(shown)
            same &= tokenizer.decode(shown, False) == written.decode(shown, False)
        if not same:
            raise UnsupportedModelError(
                f"token {token.content!r} is given with different settings in the tokenizer files, which no "
                "tokenizer.json can say: give it the same everywhere"
            )


def _kind(
    settings: dict[str, Any], model_type: str | None, config_class: str | None, tokenizer_json: bytes
) -> str | None:
    """The class that rebuilds the tokenizer; None where tokenizer.json is taken as it is."""
    name = settings.pop("tokenizer_class", None) or config_class
    name = None if name is None else str(name).removesuffix("Fast")
    if model_type == "mistral":
        return None
    if model_type == "qwen2" or (model_type == "qwen3" and name is None):
        return "Qwen2Tokenizer"
    if name == "LlamaTokenizer" and b'"ByteLevel"' in tokenizer_json:
        return None
    if name is None or name in _PLAIN:
        return None
    if name not in _REBUILT:
        known = ", ".join([*_REBUILT, "PreTrainedTokenizerFast"])
        raise UnsupportedModelError(
            f"tokenizer_class {name!r} is not supported (supported: {known}): {_SAVE}"
        )
    return name


def _refuse_unsupported(settings: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    auto_map = settings.get("auto_map")
    refused = {
        "auto_map": isinstance(auto_map, list)
        or (isinstance(auto_map, dict) and "AutoTokenizer" in auto_map),
        "split_special_tokens": settings.get("split_special_tokens"),
        "clean_up_tokenization_spaces": settings.get("clean_up_tokenization_spaces")
        and not isinstance(tokenizer.model, BPE),
        "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": settings.get(
            "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
        ),
        "fix_mistral_regex": settings.get("fix_mistral_regex") and tokenizer.get_vocab_size() > 100000,
        "init_inputs": settings.get("init_inputs"),
        "fast_tokenizer_files": set(settings.get("fast_tokenizer_files") or ()) - {"tokenizer.json"},
        "add_bos_token (special_tokens_map.json)": "add_bos_token" in settings,
        "add_eos_token (special_tokens_map.json)": "add_eos_token" in settings,
    }
    for name, wrong in refused.items():
        if wrong:
            value = settings.get(name.partition(" ")[0])
            raise UnsupportedModelError(f"tokenizer setting {name}={value!r:.60} is not supported: {_SAVE}")


def _rebuilt(kind: str, tokenizer_json: bytes, given: Tokenizer, settings: dict[str, Any]) -> Tokenizer:
    """The vocabulary and post-processor of tokenizer.json in what the class puts around them.

    Tokens that the class has by default enter `settings`, as does the class's own idea of what is set.
    """
    model = json.loads(tokenizer_json)["model"]
    if not isinstance(given.model, BPE):
        raise UnsupportedModelError(
            f"tokenizer_class {kind} over a tokenizer.json of {type(given.model).__name__}, not BPE, is not "
            f"supported: {_SAVE}"
        )
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    for name, token in _REBUILT[kind].items():
        settings.setdefault(name, token)
    prefix = settings.get("add_prefix_space")
    if kind == "LlamaTokenizer":
        tokenizer = Tokenizer(BPE(model["vocab"], merges, fuse_unk=True, byte_fallback=True))
        prefix = True if prefix is None else prefix
        scheme = ("always" if settings.get("legacy") else "first") if prefix else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
        decoding = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence(decoding + ([decoders.Strip(" ", left=1)] if prefix else []))
    else:
        tokenizer = Tokenizer(
            BPE(model["vocab"], merges, continuing_subword_prefix="", end_of_word_suffix="")
        )
        tokenizer.decoder = decoders.ByteLevel()
        if kind == "Qwen2Tokenizer":
            tokenizer.normalizer = normalizers.NFC()
            split = pre_tokenizers.Split(Regex(_QWEN2_SPLIT), "isolated")
            byte_level = pre_tokenizers.ByteLevel(add_prefix_space=bool(prefix), use_regex=False)
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(prefix))
    if given.post_processor is not None:
        tokenizer.post_processor = given.post_processor
    return tokenizer


def _add_tokens(
    tokenizer: Tokenizer, kind: str | None, settings: dict[str, Any], added: Mapping[int, AddedToken]
) -> dict[str, str | AddedToken]:
    """Add all tokens in the order of transformers, which decides their ids; returns those with names."""
    special, extra = special_tokens_of(settings)
    tokens: list[Any] = [token for _, token in sorted(added.items())]
    known = {str(token) for token in [*tokenizer.get_added_tokens_decoder().values(), *tokens]}
    for token in [*special.values(), *extra]:
        if str(token) not in known and token not in tokens:
            tokens.append(token)
    names = {str(token) for token in special.values()}
    made = [AddedToken(token, special=True) if isinstance(token, str) else token for token in tokens]
    for token in made:
        token.special = token.special or str(token) in names
    tokenizer.add_tokens(made)
    if kind == "Qwen2Tokenizer":
        again = dict.fromkeys(str(token) for token in [*special.values(), *extra])
        tokenizer.add_tokens([AddedToken(token, special=True) for token in again])
    return special
