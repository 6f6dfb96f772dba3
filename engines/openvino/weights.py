"""Products with weights in OpenVINO graphs: constants over the blocks' memory-mapped files (no copy), as they
are stored; the CPU plugin packs them at the first inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import openvino.opset15 as op
from numpy.lib.stride_tricks import as_strided
from openvino import Tensor, Type
from openvino.op import Constant

from blockzoo.zoo.blocks import BlockTensor
from blockzoo.zoo.packing import ROTATED, rotates, rotation
from blockzoo.zoo.tensors import runs_of_a_type

Node = Any  # ov.Node or ov.Output: the opset functions take both

TYPES = {"bf16": Type.bf16, "f16": Type.f16, "f32": Type.f32, "i32": Type.i32}
TYPES |= {"u8": Type.u8, "i8": Type.i8, "i4": Type.i4}


class Rounding(NamedTuple):
    """Of activations to 8 bits, where they are multiplied."""

    group: int
    """Neighbours in a row that share a scale."""
    how: Literal["plugin", "graph", "graph, everywhere"]
    """By the CPU plugin, beside quantized weights, if it has that for this CPU; or as nodes of the graph,
    which any CPU computes, beside quantized weights or all."""


def openvino_tensor(array: np.ndarray, dtype: str) -> Tensor:
    """A zero-copy ov.Tensor over a C-contiguous array; bf16 and f16 data are given by their bits.

    The caller keeps the returned wrapper alive as long as an engine may use the memory.
    """
    # this constructor, unlike the one with shared_memory, takes read-only memory too
    return Tensor(array.view(np.int16) if dtype == "bf16" else array, list(array.shape), TYPES[dtype])


def products(x: Node, parts: Sequence[BlockTensor], rounding: Rounding | None) -> Node:
    """The products x W^T [rows, out] with matrices of equal width side by side; those of one type in one go.

    Args:
        x: [rows, in], f32 in the graph.
        rounding: of x; None: it stays as it is.
    """
    runs = runs_of_a_type(parts)
    turned = _rotated(x, parts[0].shape[1]) if any(run[0].rotated for run in runs) else x
    made = [_product(turned if run[0].rotated else x, *_stacked(run), rounding) for run in runs]
    return made[0] if len(made) == 1 else op.concat(made, -1)


def _product(x: Node, tensor: BlockTensor, copy: bool, rounding: Rounding | None) -> Node:
    """`x`: rotated where the tensor is."""
    offsets, width = tensor.offsets, tensor.shape[1]
    if rounding is None:
        return op.matmul(x, _weight(tensor, offsets, copy), False, True)
    multiplied = x
    if tensor.scales is not None and rounding.how != "plugin":
        multiplied = _rounded(x, width, rounding.group)
    elif rounding.how == "graph, everywhere":  # as beside the quantized matrix that it would become
        multiplied = _rotated(_rounded(_rotated(x, width), width, rounding.group), width)
    # beside zero points x would not be rounded: so the offsets are multiplied with the sums of x by group
    scaled = op.matmul(multiplied, _weight(tensor, None, copy), False, True)
    if offsets is None:
        return scaled
    groups = op.reshape(x, constant([0, offsets.shape[1], -1]), True)
    theirs = Constant(openvino_tensor(offsets, "f32"), shared_memory=not copy)
    return op.add(scaled, op.matmul(op.reduce_sum(groups, constant([2]), False), theirs, False, True))


def _rotated(x: Node, width: int) -> Node:
    """x [rows, width] as rotated matrices are multiplied with it; as it is, where none of that width is."""
    if not rotates(width):
        return x
    runs = op.reshape(x, constant([-1, ROTATED]), False)
    return op.reshape(op.matmul(runs, op.constant(rotation()), False, True), constant([-1, width]), False)


def _rounded(x: Node, width: int, group: int) -> Node:
    """x [rows, width] in integers from -127 to 127 times a scale for each group; as it is, where these do not
    divide the width."""
    if width % group:
        return x
    groups = op.reshape(x, constant([0, -1, group]), True)
    largest = op.reduce_max(op.abs(groups), constant([2]), True)
    scale = op.divide(op.maximum(largest, constant(1e-30, np.float32)), constant(127, np.float32))
    integers = op.round(op.divide(groups, scale), "half_to_even")
    return op.reshape(op.multiply(integers, scale), constant([0, width]), True)


def constant(value: object, dtype: Any = np.int64) -> Node:
    """A small constant, copied into the graph."""
    return op.constant(np.array(value, dtype=dtype))


def _weight(tensor: BlockTensor, offsets: np.ndarray | None, copy: bool) -> Node:
    """The tensor as f32 in the graph: a constant in its stored type, marked as a weight to unpack."""
    if tensor.scales is not None:
        return _quantized(tensor, tensor.scales, offsets, copy)
    stored = Constant(openvino_tensor(tensor.data, tensor.dtype), shared_memory=not copy)
    if tensor.dtype == "f32":
        return stored
    unpacked = op.convert(stored, "f32")
    unpacked.get_rt_info()["decompression_0"] = ""
    return unpacked


def _quantized(tensor: BlockTensor, scales: np.ndarray, offsets: np.ndarray | None, copy: bool) -> Node:
    """The pattern that the CPU plugin turns into a product with packed weights: no copy of the integers.

    Offsets become zero points, which need not be integers: (q - zero) * scale.
    """
    rows, columns = tensor.shape
    groups = scales.shape[1]
    shape = [rows, columns] if groups == 1 else [rows, groups, columns // groups]
    one_each = [*shape[:-1], 1]
    packed = Tensor(tensor.data, shape, TYPES[tensor.dtype])
    values = op.convert(Constant(packed, shared_memory=not copy), "f32")
    if offsets is not None:
        zeros = np.where(scales == 0, np.float32(0), -offsets / np.where(scales == 0, np.float32(1), scales))
        values = op.subtract(values, Constant(Tensor(zeros, one_each, Type.f32), shared_memory=False))
    scale = Tensor(scales, one_each, Type.f32)
    values = op.multiply(values, Constant(scale, shared_memory=not copy))
    return values if groups == 1 else op.reshape(values, constant([rows, columns]), False)


def _stacked(parts: Sequence[BlockTensor]) -> tuple[BlockTensor, bool]:
    """Matrices of equal width and type on top of each other, and whether they had to be copied together: a
    zoo file holds them side by side, so that this is a view."""
    arrays = [_on_top_of_each_other(each) for each in zip(*(part.arrays for part in parts), strict=True)]
    return parts[0].of([array for array, _ in arrays]), not all(view for _, view in arrays)


def _on_top_of_each_other(parts: Sequence[np.ndarray]) -> tuple[np.ndarray, bool]:
    """Arrays of equal width as one, and whether it is a view."""
    ends = [part.ctypes.data + part.nbytes for part in parts]
    if [part.ctypes.data for part in parts[1:]] == ends[:-1]:
        return as_strided(parts[0], (sum(map(len, parts)), parts[0].shape[1])), True
    return np.concatenate(parts), False
