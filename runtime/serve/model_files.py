"""The files of a zoo's models, read and checked one by one, so that a damaged one concerns its own models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from blockzoo.runtime.text.tokenizer import Tokenizer
from blockzoo.zoo.blocks import Block
from blockzoo.zoo.errors import ZooError
from blockzoo.zoo.store import Zoo


class ModelFiles:
    """Blocks, adapters and tokenizers; each is read once, however many models use it.

    Attributes:
        blocks: those read, by id.
    """

    def __init__(self, zoo: Zoo) -> None:
        self._zoo = zoo
        self._tokenizers: dict[Path, Tokenizer] = {}
        self._checked: dict[str, ZooError | None] = {}  # by id or folder, what is wrong with it
        self.blocks: dict[str, Block] = {}

    def damage(self, model: str) -> ZooError | None:
        """Read all files of a model; what is wrong with the first that is not whole."""
        record = self._zoo.manifest.models[model]
        errors = [self._check(block_id, self._read_block, block_id) for block_id in record.chain]
        errors += [self._check(key, self._read_adapter, key) for key in record.adapters.values()]
        errors.append(self._check(record.tokenizer, self._read_tokenizer, model))
        return next((error for error in errors if error is not None), None)

    def tokenizer(self, model: str) -> Tokenizer:
        """The tokenizer of an undamaged model; models of one folder share one."""
        return self._tokenizers[self._zoo.tokenizer_dir(model)]

    def _check(self, key: str, read: Callable[[str], None], what: str) -> ZooError | None:
        if key not in self._checked:
            try:
                read(what)
                self._checked[key] = None
            except ZooError as error:
                self._checked[key] = error
        return self._checked[key]

    def _read_block(self, block_id: str) -> None:
        self.blocks[block_id] = self._zoo.read_block(block_id)

    def _read_adapter(self, adapter_id: str) -> None:
        self._zoo.read_adapter(adapter_id).drop_pages()

    def _read_tokenizer(self, model: str) -> None:
        folder = self._zoo.tokenizer_dir(model)
        self._tokenizers[folder] = Tokenizer.load(folder)


def reason(error: Exception, zoo: Path) -> str:
    """What an error says, with files named from the zoo's folder: clients read it too."""
    return str(error).replace(f"{zoo}/", "")
