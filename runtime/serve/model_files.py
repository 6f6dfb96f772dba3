"""The files of a zoo's models, read and checked one by one, so that a damaged one concerns its own models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from blockzoo.runtime.text.tokenizer import Tokenizer
from blockzoo.zoo.blocks import Block, tensor_shapes
from blockzoo.zoo.errors import StoreError, ZooError
from blockzoo.zoo.fingerprint import block_id as compute_block_id
from blockzoo.zoo.manifest import Manifest
from blockzoo.zoo.store import Zoo


class ModelFiles:
    """Blocks, adapters and tokenizers; each is read once, however many models use it.

    Args:
        known: blocks that are loaded: of `damage`, they are taken to be whole.
        manifest: what was loaded: of known blocks that the zoo no longer has.
        surrogates: whether models need the blocks of theirs.

    Attributes:
        blocks: those known and those read, by id.
    """

    def __init__(
        self,
        zoo: Zoo,
        known: Mapping[str, Block] | None = None,
        manifest: Manifest | None = None,
        surrogates: bool = False,
    ) -> None:
        self._zoo, self._manifest, self._surrogates = zoo, manifest, surrogates
        self._tokenizers: dict[Path, Tokenizer] = {}
        self._checked: dict[str, ZooError | None] = {}  # by id or folder, what is wrong with it
        self.blocks: dict[str, Block] = dict(known or {})
        self._fresh: dict[str, Block] = {}  # read and checked now

    def damage(self, model: str) -> ZooError | None:
        """Read all files of a model; what is wrong with the first that is not whole."""
        record = self._zoo.manifest.models[model]
        needed = record.block_ids if self._surrogates else record.chain
        unknown = [block_id for block_id in needed if block_id not in self.blocks]
        errors = [self._check(block_id, self._read_block, block_id) for block_id in unknown]
        errors += [self._check(key, self._read_adapter, key) for key in record.adapters.values()]
        errors.append(self._check(record.tokenizer, self._read_tokenizer, model))
        return next((error for error in errors if error is not None), None)

    def tokenizer(self, model: str) -> Tokenizer:
        """The tokenizer of an undamaged model; models of one folder share one."""
        return self._tokenizers[self._zoo.tokenizer_dir(model)]

    def block(self, block_id: str) -> Block:
        """A block to make an engine of: as it is now, checked, also where it was known.

        Raises ZooError where it is damaged, or was changed since it was loaded.
        """
        if block_id not in self._fresh:
            if block_id in self._zoo.manifest.blocks:
                self._read_block(block_id)
            else:  # its file is gone, but not what is mapped
                self._check_content(block_id)
                self._fresh[block_id] = self.blocks[block_id]
        return self._fresh[block_id]

    def drop_pages(self) -> None:
        """Let the memory go of the blocks that were read here."""
        for block in self._fresh.values():
            block.drop_pages()

    def _check_content(self, block_id: str) -> None:
        assert self._manifest is not None, f"{block_id} is nobody's"
        block, record = self.blocks[block_id], self._manifest.blocks[block_id]
        own = {
            name: block.tensors[name] for name in tensor_shapes(block.spec)
        }  # a tied head's is its embed's
        if compute_block_id(block.spec, own, record.tied_to) != block_id:
            raise StoreError(f"block {block_id}: its file was changed before it was removed")

    def _check(self, key: str, read: Callable[[str], None], what: str) -> ZooError | None:
        if key not in self._checked:
            try:
                read(what)
                self._checked[key] = None
            except ZooError as error:
                self._checked[key] = error
        return self._checked[key]

    def _read_block(self, block_id: str) -> None:
        self.blocks[block_id] = self._fresh[block_id] = self._zoo.read_block(block_id)

    def _read_adapter(self, adapter_id: str) -> None:
        self._zoo.read_adapter(adapter_id).drop_pages()

    def _read_tokenizer(self, model: str) -> None:
        folder = self._zoo.tokenizer_dir(model)
        self._tokenizers[folder] = Tokenizer.load(folder)


def reason(error: Exception, zoo: Path) -> str:
    """What an error says, with files named from the zoo's folder: clients read it too."""
    return str(error).replace(f"{zoo}/", "")
