"""What the user names (HF folders, GGUF files, PEFT folders, models of the zoo) as models to be read.

Adapters find their base among the models given and those in the zoo. Their LoRAs stay apart from the base's
weights; only tensors that an adapter replaces (modules_to_save, trained biases) are read in the place of the
base's, so that the blocks they belong to are the model's own.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from blockzoo.build.gguf_checkpoint import is_gguf, open_gguf
from blockzoo.build.partition import chain_names, checkpoint_reader, weight_shapes
from blockzoo.build.tokenizer import ModelTokenizer, check_stated_ids, resolve
from blockzoo.zoo.adapter import LoraAdapter, LoraPair, is_adapter, open_adapter
from blockzoo.zoo.blocks import Dtype
from blockzoo.zoo.chat_files import (
    SPECIAL_TOKENS,
    is_template_file,
    special_tokens_file,
    templates,
    with_templates_of,
)
from blockzoo.zoo.checkpoint import Checkpoint, open_checkpoint
from blockzoo.zoo.errors import CheckpointError, ZooError
from blockzoo.zoo.manifest import ModelRecord
from blockzoo.zoo.model_config import ModelConfig
from blockzoo.zoo.names import RESERVED_NAMES, is_name
from blockzoo.zoo.store import Zoo
from blockzoo.zoo.tensors import BlockTensor, from_f32

MAX_RANK = 512
"""Of a LoRA, as in vLLM: a call computes the ranks of all its rows, so that others pay for a large one."""
_EMBED, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A model to compile: its configuration, its tensors by HF name, and the LoRAs on top of them."""

    name: str
    path: Path | None
    """None for a model that is only in the zoo."""
    config: ModelConfig
    dtype: Dtype
    """The dtype in which most weights were given."""
    read: Callable[[str], BlockTensor]
    pairs: dict[str, tuple[LoraPair, ...]]
    """HF name of a weight -> the LoRAs that are added to it."""
    tokenizer: ModelTokenizer
    origin: "Checkpoint | Adapted | Zoo"
    """What `read` reads: for the oracle, which reads it in its own way."""
    generation_defaults: Mapping[str, float | int] = field(default_factory=dict)
    """Sampling settings of generation_config.json; an adapter's own before its base's."""

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer: those of generation_config.json (else of config.json), and the
        tokenizer's eos_token, as in vLLM. An adapter's folder may bring either; what it lacks is its base's.

        An eos_token that the model cannot give, as it has no row for it, is none.
        """
        ids, eos = self.config.eos_token_ids, self.tokenizer.eos_token_id
        if eos is None or eos in ids or eos >= self.config.vocab_size:
            return ids
        return (*ids, eos)

    def notes(self) -> tuple[str, ...]:
        """What the user should know, for the report."""
        if self.tokenizer.largest_id < self.config.vocab_size:
            return ()
        ids = f"{self.config.vocab_size} to {self.tokenizer.largest_id}"
        return (f"token ids {ids} of its tokenizer have no embedding: texts with them are refused",)


@dataclass(frozen=True, slots=True, eq=False)
class Adapted:
    """An adapter and the model it belongs to."""

    adapter: LoraAdapter
    base: Source


def open_sources(models: Mapping[str, str | Path], zoo: Zoo | None) -> list[Source]:
    """Open every model given (name -> `PATH` or, for an adapter, `PATH@BASE`); bases come before adapters.

    Raises ZooError when a folder is unfit or the base of an adapter is neither given nor in the zoo.
    """
    opened: dict[str, Source] = {}
    adapters: dict[str, tuple[LoraAdapter, str]] = {}
    for name, given in models.items():
        check_name(name)
        path, base = _split_base(given)
        if is_adapter(path):
            adapters[name] = (open_adapter(path), base)
        elif base and path.exists():
            raise ZooError(f"{name}={given}: '@{base}' is for PEFT adapters, and {path} is none")
        else:
            opened[name] = _checkpoint_source(name, path)
    while adapters:
        ready = {}
        for name, (adapter, wanted) in adapters.items():
            found = _find_base(name, adapter, wanted, opened, adapters, zoo)
            if found is not None:
                ready[name] = _adapted_source(name, adapter, found)
        if not ready:
            raise ZooError(f"adapters {', '.join(adapters)} name each other as base: give their base too")
        opened |= ready
        adapters = {name: entry for name, entry in adapters.items() if name not in ready}
    return list(opened.values())


def parse_models(arguments: Sequence[str]) -> dict[str, str]:
    """`[NAME=]PATH[@BASE]` arguments by model name. Raises ZooError for unfit or repeated names."""
    models: dict[str, str] = {}
    for argument in arguments:
        name, equals, given = argument.partition("=")
        if not equals or "/" in name:
            given = argument
            path = _split_base(given)[0].resolve()
            name = path.stem if is_gguf(path) else path.name
        check_name(name)
        if name in models:
            raise ZooError(f"two models are named {name}: {models[name]} and {given}; give one as NAME=PATH")
        if not given:
            raise ZooError(f"{argument!r}: the path is missing (expected NAME=PATH)")
        models[name] = given
    return models


def check_name(name: str) -> None:
    """Refuse model names that could not be file names and URL parts, or are the server's. Raises ZooError."""
    if name in RESERVED_NAMES:
        raise ZooError(
            f"model name {name!r} is one of zoo-serve's own ({', '.join(RESERVED_NAMES)}): give another as "
            "NAME=PATH"
        )
    if not is_name(name):
        raise ZooError(
            f"model name {name!r}: expected up to 128 letters, digits, '.', '_' or '-' (as NAME=PATH)"
        )


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a name that is not known: the nearest one, or all of a few."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" if names else ""


def _split_base(given: str | Path) -> tuple[Path, str]:
    path = Path(given)
    if isinstance(given, str) and not path.exists() and "@" in given:
        folder, _, base = given.rpartition("@")
        return Path(folder), base
    return path, ""


def _checkpoint_source(name: str, path: Path) -> Source:
    checkpoint = open_gguf(path) if is_gguf(path) else open_checkpoint(path)
    read = checkpoint_reader(checkpoint)
    tokenizer = _tokenizer(path, checkpoint.tokenizer_files, checkpoint.raw_config)
    defaults = checkpoint.generation_defaults
    return Source(name, path, checkpoint.config, checkpoint.dtype, read, {}, tokenizer, checkpoint, defaults)


def _tokenizer(where: Path, files: Mapping[str, bytes], config: Mapping[str, Any]) -> ModelTokenizer:
    """`resolve` with what config.json says, and errors that name the folder."""
    try:
        return resolve(files, config.get("model_type"), config.get("tokenizer_class"))
    except CheckpointError as error:
        raise type(error)(f"{where}: {error}") from None


def model_type(config: ModelConfig) -> str:
    """As config.json has it."""
    return config.architecture.removesuffix("ForCausalLM").lower()


def _adapted_tokenizer(adapter: LoraAdapter, base: Source) -> ModelTokenizer:
    """The adapter's own tokenizer, or the base's with what the adapter's folder says of it.

    So it is with chat templates: the adapter's own, all of them, or where it has none those of the base.
    """
    files, given = adapter.tokenizer_files, base.tokenizer.files
    try:
        chat = files if templates(files) else given
        own, over_base = (with_templates_of(chat, each) for each in (files, {**given, **files}))
    except CheckpointError as error:
        raise CheckpointError(f"{adapter.path}: {error}") from None
    if "tokenizer.json" in files:
        return _tokenizer(adapter.path, own, adapter.raw_config)
    if all(is_template_file(name) for name in files):
        if chat is files:
            over_base[SPECIAL_TOKENS] = special_tokens_file(base.tokenizer.special_tokens)
        return replace(base.tokenizer, files=over_base)
    found = _tokenizer(adapter.path, over_base, {"model_type": model_type(base.config)})
    try:
        check_stated_ids(files, found)
    except CheckpointError as error:
        raise CheckpointError(f"{adapter.path}: {error}") from None
    return found


def _find_base(
    name: str,
    adapter: LoraAdapter,
    wanted: str,
    opened: Mapping[str, Source],
    waiting: Mapping[str, object],
    zoo: Zoo | None,
) -> Source | None:
    """The adapter's base, or None while it is itself an adapter that waits for its base."""
    in_zoo = zoo.manifest.models if zoo is not None else {}
    asked = wanted or adapter.base_name
    if not asked:
        raise ZooError(f"{adapter.path}: the adapter does not name its base: give {name}={adapter.path}@BASE")
    for candidate in (asked,) if wanted else (asked, Path(asked).name):
        if candidate in opened:
            return opened[candidate]
        if candidate in waiting and candidate != name:
            return None
        if zoo is not None and candidate in in_zoo and candidate != name:
            return zoo_source(candidate, zoo)
    for source in opened.values():
        if not wanted and source.path is not None and source.path.resolve() == Path(asked).resolve():
            return source
    known = [*opened, *waiting, *in_zoo]
    raise ZooError(
        f"{adapter.path}: its base {asked!r} is neither among the models given nor in the zoo: "
        f"add BASE=PATH, or say which model it is with {name}={adapter.path}@BASE"
        + nearest(asked, [other for other in known if other != name])
    )


def zoo_source(name: str, zoo: Zoo) -> Source:
    """A model of a zoo, as it could be compiled again."""
    record = zoo.manifest.models[name]
    places = {
        hf: (block_id, tensor)
        for block_id, names in zip(record.chain, chain_names(record.config), strict=True)
        for tensor, hf in names.items()
    }
    # f32 weights that are exactly bf16 are stored as bf16; what replaces them must still be read as f32
    widen = record.source.dtype == "f32" and record.source.converted_to is None

    def read(hf: str) -> BlockTensor:
        block_id, tensor = places[hf]
        found = zoo.read_block(block_id).tensors[tensor]
        return BlockTensor("f32", found.to_f32()) if widen and found.scales is None else found

    files = zoo.read_tokenizer(name)
    found = _tokenizer(zoo.tokenizer_dir(name), files, {"model_type": model_type(record.config)})
    dtype = record.source.converted_to or record.source.dtype
    pairs = _zoo_pairs(record, zoo)
    tokenizer = replace(found, files=files)  # a zoo from before they were resolved goes on with what it has
    defaults = record.generation_defaults or {}
    return Source(name, None, record.config, dtype, read, pairs, tokenizer, zoo, defaults)


def _zoo_pairs(record: ModelRecord, zoo: Zoo) -> dict[str, tuple[LoraPair, ...]]:
    """The LoRAs of a model of the zoo by the HF name of the weight."""
    names = chain_names(record.config)
    pairs: dict[str, tuple[LoraPair, ...]] = {}
    for position, adapter_id in record.adapters.items():
        adapter = zoo.read_adapter(adapter_id)
        for lora in adapter.spec.loras:
            a, b = (adapter.tensors[f"{lora.projection}.{which}"] for which in "ab")
            pairs[names[position][lora.projection]] = (LoraPair(a, b, lora.scale),)
    return pairs


def _adapted_source(name: str, adapter: LoraAdapter, base: Source) -> Source:
    known = {hf for names in chain_names(base.config) for hf in names.values()} | {_HEAD}
    unknown = sorted((adapter.pairs.keys() | adapter.replacements.keys()) - known)
    if unknown:
        raise CheckpointError(
            f"{adapter.path}: {len(unknown)} tensors of the adapter belong to no weight of {base.name}: "
            f"{', '.join(unknown[:3])}"
        )
    replaced, tied = _replacements(adapter, base)
    pairs = {hf: loras for hf, loras in base.pairs.items() if hf not in replaced}
    shapes = weight_shapes(base.config)
    for hf, pair in adapter.pairs.items():
        pairs[hf] = (*pairs.get(hf, ()), pair)
        _check_lora(f"{adapter.path}: the LoRA of {hf}", pair, pairs[hf], shapes[hf], base.name)
    vocab_size = base.config.vocab_size
    if _EMBED in replaced and len(replaced[_EMBED].shape) == 2:  # others do not fit, as will be told
        vocab_size = replaced[_EMBED].shape[0]
    config = replace(base.config, tie_word_embeddings=tied, vocab_size=vocab_size)
    if adapter.eos_token_ids is not None:
        config = replace(config, eos_token_ids=adapter.eos_token_ids)
    tokenizer = _adapted_tokenizer(adapter, base)
    read = _adapted_reader(replaced, base)
    origin, defaults = Adapted(adapter, base), {**base.generation_defaults, **adapter.generation_defaults}
    return Source(name, adapter.path, config, base.dtype, read, pairs, tokenizer, origin, defaults)


def _check_lora(
    what: str, pair: LoraPair, together: Sequence[LoraPair], weight: tuple[int, ...], base: str
) -> None:
    shape = (pair.b.shape[0], pair.a.shape[1])
    if weight != shape:
        raise CheckpointError(
            f"{what} is {list(shape)}, but the weight of {base} is {list(weight)}: is this adapter's base "
            "another model?"
        )
    rank = sum(lora.a.shape[0] for lora in together)
    if rank > MAX_RANK:
        raise CheckpointError(
            f"{what} has rank {rank}{' with those of its base' if len(together) > 1 else ''}, and adapters "
            f"have at most rank {MAX_RANK}: merge it with PEFT and compile the result"
        )


def _replacements(adapter: LoraAdapter, base: Source) -> tuple[dict[str, BlockTensor], bool]:
    """The tensors read in the place of the base's, and whether head and embedding are tied.

    In a base that ties them, PEFT gives modules_to_save copies of their own and loads others into what is
    shared.
    """
    replaced = dict(adapter.replacements)
    given = [name for name in (_EMBED, _HEAD) if name in replaced]
    if not base.config.tie_word_embeddings or not given:
        return replaced, base.config.tie_word_embeddings
    endings = adapter.modules_to_save
    shared = [n for n in given if not any(n.removesuffix(".weight").endswith(end) for end in endings)]
    if len(given) == 1 and shared:
        replaced[_EMBED] = replaced.pop(given[0])
        return replaced, True
    tied = len(given) == 2 and np.array_equal(replaced[_EMBED].data, replaced[_HEAD].data)
    if not tied and len(shared) == 2:
        raise CheckpointError(
            f"{adapter.path}: {base.name} ties {_EMBED} and {_HEAD}, and the adapter has another tensor for "
            "each without naming them in modules_to_save: which one is meant?"
        )
    return replaced, tied


def _adapted_reader(replaced: Mapping[str, BlockTensor], base: Source) -> Callable[[str], BlockTensor]:
    def read_base(hf: str) -> BlockTensor:
        return base.read(_EMBED if hf == _HEAD and base.config.tie_word_embeddings else hf)

    def read(hf: str) -> BlockTensor:
        if hf in replaced:
            given, base_tensor = replaced[hf], read_base(hf)
            if base_tensor.scales is not None or given.dtype == base_tensor.dtype:
                return given
            return from_f32(given.to_f32(), base_tensor.given_dtype)
        return read_base(hf)

    return read
