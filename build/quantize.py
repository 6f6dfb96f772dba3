"""Models whose blocks are stored in 8 or 4 bits: made of the blocks as they were given, and judged by them.

A model is compiled with its weights as they are given first (blocks found, merged LoRAs taken out, verified);
then its blocks are quantized one by one, and those as they were given leave the zoo with the commit unless
some model uses them. A quantized block knows what it was made of, so models that shared a block share what
becomes of it, also those that are added later.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from blockzoo.build.calibration import Met, calibrate
from blockzoo.build.draft import Draft
from blockzoo.build.oracle import Oracle
from blockzoo.build.partition import CutBlock, chain_names
from blockzoo.build.progress import Progress
from blockzoo.build.rounding import corrected, on_its_grid, rounded
from blockzoo.zoo.blocks import PROJECTIONS, BlockSpec, BlockTensor, HeadSpec, matrix_names, tensor_shapes
from blockzoo.zoo.fingerprint import block_id
from blockzoo.zoo.manifest import ModelRecord, QuantizedRecord
from blockzoo.zoo.packing import GROUP, WHOLE_ROW, QuantizedDtype, groups_dividing

_IN_EIGHT = ("k", "v")
"""Matrices that keep 8 bits in a block of 4: small ones where heads share K and V, whose errors go into every
token that looks at theirs."""

Choice = Mapping[int, QuantizedDtype]
"""Position in a chain -> what the block there is stored in; others stay as they were given."""


def uniform(draft: Draft, chain: Sequence[str], dtype: QuantizedDtype) -> dict[int, QuantizedDtype]:
    """All blocks in one dtype, but embedding and head in 8 bits in any case."""
    blocks = [draft.manifest.blocks[key] for key in chain]
    return {
        position: dtype if block.spec.kind in PROJECTIONS else "i8"
        for position, block in enumerate(blocks)
        if not block.is_quantized  # another model's that stands for its own
    }


@dataclass(frozen=True, slots=True)
class Calibration:
    """What rounding may look at; both are made when they are first needed."""

    oracle: Callable[[], Oracle]
    """The model."""
    texts: Callable[[], Sequence[Sequence[int]]]
    """Token ids that it is run over; none: matrices are rounded to nearest."""


class Quantizer:
    """Makes the quantized blocks of one model, in a draft.

    Args:
        draft: where its blocks are, and where the new ones go.
        name, record: the model, with its blocks as they were given.
        calibration: of it.
        progress: told of.
    """

    group = GROUP
    """Columns that share a scale, or `WHOLE_ROW`."""

    def __init__(
        self, draft: Draft, name: str, record: ModelRecord, calibration: Calibration, progress: Progress
    ) -> None:
        self._draft, self._name, self._record = draft, name, record
        self._calibration, self._progress = calibration, progress
        self._made: dict[QuantizedRecord, str] = {}  # the zoo may have them under other names

    def make(self, choices: Sequence[Choice]) -> None:
        """Have the blocks of all choices in the draft."""
        wanted = sorted({(at, dtype) for choice in choices for at, dtype in choice.items()})
        missing = [(at, dtype) for at, dtype in wanted if self._find(at, dtype) is None]
        blocks: dict[int, list[QuantizedDtype]] = {}
        for position, dtype in missing:
            inner = self._spec(position).kind in PROJECTIONS and self._draft.writer is not None
            if inner and not self.keeps(position, dtype):
                blocks.setdefault(position, []).append(dtype)
            else:
                self._store(position, dtype, None)
        if not blocks:
            return
        what, steps = f"rounding {self._name}", 2 * self._record.config.num_layers

        def on_block(position: int, met: Met | None) -> None:
            self._progress(what, position - 1, steps)
            for dtype in blocks.get(position, ()):
                self._store(position, dtype, met)

        texts = self._calibration.texts()
        if texts:
            calibrate(self._calibration.oracle(), texts, on_block)
        else:
            for position in blocks:
                on_block(position, None)
        self._progress(what, steps, steps)

    def chain(self, choice: Choice) -> tuple[str, ...]:
        """The chain with the blocks of a choice, which are made already."""
        chain = list(self._record.chain)
        for position, dtype in choice.items():
            found = self._find(position, dtype)
            assert found is not None, "made before"
            chain[position] = found
        return tuple(chain)

    def keeps(self, position: int, dtype: QuantizedDtype) -> bool:
        """Whether the block there loses nothing, as all its matrices lie on a grid that can be kept."""
        return all(self._on_grids(position, dtype))

    def keeps_some(self, position: int, dtype: QuantizedDtype) -> bool:
        """Whether any of its matrices does."""
        return any(self._on_grids(position, dtype))

    def _on_grids(self, position: int, dtype: QuantizedDtype) -> Iterator[bool]:
        """Of each matrix of the block there, whether it lies on a grid that can be kept."""
        tensors = self._draft.zoo.read_block(self._record.chain[position]).tensors
        for name in matrix_names(self._spec(position)):
            kind, _ = _grid(dtype, name, tensors[name].shape[1], self.group)
            yield _kept(tensors[name], dtype, kind) is not None

    def _spec(self, position: int) -> BlockSpec:
        return self._draft.manifest.blocks[self._record.chain[position]].spec

    def _find(self, position: int, dtype: QuantizedDtype) -> str | None:
        """The whole block in the zoo that the one there is in `dtype`; None where there is none."""
        wanted, tied_to = self._made_of(position, dtype), self._tied_to(position)
        if wanted in self._made:
            return self._made[wanted]
        for key, record in self._draft.manifest.blocks.items():
            if record.quantized == wanted and record.tied_to == tied_to and self._draft.is_whole(key):
                return key
        return None

    def _made_of(self, position: int, dtype: QuantizedDtype) -> QuantizedRecord:
        return QuantizedRecord(self._record.chain[position], dtype, self.group)

    def _tied_to(self, position: int) -> str | None:
        """The quantized embedding that a tied head takes its matrix from."""
        spec = self._spec(position)
        return self._find(0, "i8") if isinstance(spec, HeadSpec) and spec.tied else None

    def _store(self, position: int, dtype: QuantizedDtype, met: Met | None) -> None:
        key, spec, tied_to = self._record.chain[position], self._spec(position), self._tied_to(position)
        made_of = self._made_of(position, dtype)
        if self._draft.writer is None:
            size = quantized_bytes(spec, self._draft.tensors_of(key), dtype, made_of.group)
            self._draft.expect(spec, dtype, size, tied_to, made_of)
            return
        given = self._draft.zoo.read_block(key)
        names = chain_names(self._record.config)[position]
        tensors = quantized_tensors(spec, given.tensors, dtype, names, met, made_of.group)
        given.drop_pages()
        made = CutBlock(block_id(spec, tensors, tied_to), spec, tensors, tied_to)
        self._draft.store(made, lambda: tensors, made_of)
        self._made[made_of] = made.id


def quantized_tensors(
    spec: BlockSpec,
    tensors: Mapping[str, BlockTensor],
    dtype: QuantizedDtype,
    names: Mapping[str, str],
    met: Met | None,
    group: int = GROUP,
) -> dict[str, BlockTensor]:
    """The tensors of a block with its matrices rounded (see `rounding.rounded`), unless they lie on a grid
    that can be kept, as those of a GGUF file may; all others as they are.

    Of 4 bits the last matrix also makes up for what the ones before it lost.

    Args:
        spec, tensors: of the block as it was given.
        dtype: of the integers.
        names: its tensors' names -> HF names.
        met: what its matrices are multiplied with; None: they are rounded to nearest.
        group: columns that share a scale, or `WHOLE_ROW`.
    """
    made = {name: tensors[name] for name in tensor_shapes(spec)}
    changes: dict[str, np.ndarray] = {}
    for name in matrix_names(spec):
        values = given = tensors[name].to_f32()
        kind, columns = _grid(dtype, name, values.shape[1], group)
        kept = _kept(tensors[name], dtype, kind)
        if kept is not None:
            made[name] = kept
            continue
        gram = None
        if met is not None:
            gram = met.gram(names[name])
            if dtype == "i4" and changes and name == PROJECTIONS[spec.kind][-1]:
                gram, lost = met.after(changes, names[name])
                values = corrected(values, gram, lost)
        made[name] = rounded(values, kind, columns, gram)
        if met is not None:
            changes[names[name]] = made[name].to_f32() - given
    return made


def quantized_bytes(
    spec: BlockSpec, tensors: Mapping[str, BlockTensor], dtype: QuantizedDtype, group: int
) -> int:
    """The bytes of what `quantized_tensors` gives."""
    matrices = matrix_names(spec)
    total = sum(tensors[name].num_bytes for name in tensor_shapes(spec) if name not in matrices)
    for name in matrices:
        rows, columns = tensors[name].shape
        kind, together = _grid(dtype, name, columns, group)
        kept = _kept(tensors[name], dtype, kind)
        if kept is not None:
            total += kept.num_bytes
            continue
        total += rows * columns // (2 if kind == "i4" else 1) + 4 * rows * (columns // together)
    return total


def _grid(dtype: QuantizedDtype, name: str, columns: int, group: int) -> tuple[QuantizedDtype, int]:
    """Of a matrix: its integers, and how many columns share a scale. 4 bits need groups."""
    if columns % GROUP:
        return "i8", columns
    kind: QuantizedDtype = "i8" if name in _IN_EIGHT else dtype
    if group == WHOLE_ROW:
        return kind, columns if kind == "i8" else groups_dividing([columns])[0]
    return kind, GROUP if columns % group else group


def _kept(tensor: BlockTensor, *dtypes: QuantizedDtype) -> BlockTensor | None:
    """The matrix exactly as it is, in the first of these in which it can be; None where it cannot."""
    if tensor.dtype != "f32":
        return None
    found = (on_its_grid(tensor.to_f32(), dtype) for dtype in dict.fromkeys(dtypes))
    return next((kept for kept in found if kept is not None), None)
