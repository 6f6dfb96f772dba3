"""Arrays of torch: on the CPU they share the host's memory, on a GPU they are copies."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from blockzoo.engines.arrays import Kind
from blockzoo.engines.base import PAGE_TOKENS, Precision
from blockzoo.engines.kv_pages import KVPrecision, page_width
from blockzoo.engines.reference.pages import pack_u8, unpack_u8
from blockzoo.zoo.packing import ROTATED, rotation
from blockzoo.zoo.tensors import BlockTensor

TORCH_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


class TorchArrays:
    """See `engines.arrays.Arrays`.

    Args:
        device: where the arrays are.
        precision: of activations.
        kv_precision: of pages; None: as activations.
        record: on a GPU, let `recorded` make CUDA graphs.

    Attributes:
        settling: whether the step that runs now is about to be recorded, or is being recorded.
    """

    call_threads = 1
    is_lazy = False

    def __init__(
        self,
        device: torch.device,
        precision: Precision,
        record: bool = False,
        kv_precision: KVPrecision | None = None,
    ) -> None:
        self.device = device
        self.records = record and device.type == "cuda"
        self.settling = False
        self._graphs: _Graphs | None = None
        self._kv_precision: KVPrecision = kv_precision or precision
        self._dtypes = {"activation": TORCH_DTYPES[precision], "f32": torch.float32, "i32": torch.int32}

    def zeros(self, shape: Sequence[int], kind: Kind) -> torch.Tensor:
        """A new tensor of zeros."""
        return torch.zeros(tuple(shape), dtype=self._dtypes[kind], device=self.device)

    def pages(self, num_pages: int, kv_heads: int, head_dim: int) -> torch.Tensor:
        """New pages of zeros."""
        dtype = torch.uint8 if self._kv_precision == "u8" else TORCH_DTYPES[self._kv_precision]
        shape = (num_pages, kv_heads, PAGE_TOKENS, page_width(head_dim, self._kv_precision))
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def discard(self, array: torch.Tensor, indices: np.ndarray) -> None:
        """Nothing: a tensor's memory goes with the tensor."""

    def rows_like(self, part: torch.Tensor, num_rows: int) -> torch.Tensor:
        """A new tensor of `num_rows` rows like those of `part`."""
        return part.new_empty((num_rows, *part.shape[1:]))

    def mirror(self, host: np.ndarray) -> torch.Tensor:
        """On the CPU a tensor over the same memory, else a copy."""
        return torch.from_numpy(host).to(self.device)

    def upload(self, host: np.ndarray, device: torch.Tensor) -> None:
        """Copy, unless the tensor lies over the array."""
        if self.device.type != "cpu":
            device.copy_(torch.from_numpy(host))

    def take(self, table: torch.Tensor, indices: torch.Tensor, out: torch.Tensor) -> None:
        """Write `table[indices]` to `out`."""
        torch.index_select(table, 0, indices, out=out)

    def to_host(self, array: torch.Tensor) -> np.ndarray:
        """The contents; a view on the CPU. Waits for the device."""
        if array.dtype == torch.bfloat16:
            return array.view(torch.int16).cpu().numpy().view(np.uint16)
        return array.cpu().numpy()

    def activations(self, values: np.ndarray) -> torch.Tensor:
        """float32 values as activations."""
        # a copy where they are read-only (mapped files): torch takes no such memory
        writable = np.require(values, requirements="W")
        return torch.from_numpy(writable).to(self.device, self._dtypes["activation"])

    def rotated(self, rows: torch.Tensor, cos: np.ndarray, sin: np.ndarray) -> torch.Tensor:
        """The rows rotated, on the device; those in 8 bits get a new grid."""
        if rows.dtype == torch.uint8:
            return pack_u8(self.rotated(unpack_u8(rows), cos, sin))
        low, high = rows.float().chunk(2, dim=-1)
        c, s = (torch.from_numpy(table).to(self.device)[:, None] for table in (cos, sin))
        return torch.cat([low * c - high * s, high * c + low * s], dim=-1).to(rows.dtype)

    def trim(self) -> None:
        """Return cached device memory to the driver."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def recorded(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """On a GPU a CUDA graph of `run`, made at the third call: the first two compile and warm up."""
        if not self.records:
            return run
        if self._graphs is None:
            self._graphs = _Graphs(self.device)
        return _Recorded(run, self, self._graphs)


class _Graphs:
    """What the recordings of one device have in common.

    They run one after the other, so they may share their scratch memory. All is started on one stream beside
    the default one, which can neither be recorded nor be left unsynchronized by TensorRT.
    """

    def __init__(self, device: torch.device) -> None:
        self.memory = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)
        self.failed = False


class _Recorded:
    """Runs twice directly, which compiles and warms up, then records itself and is replayed."""

    def __init__(self, run: Callable[[], Any], arrays: TorchArrays, graphs: _Graphs) -> None:
        self._run, self._arrays, self._graphs = run, arrays, graphs
        self._graph: Any = None
        self._calls = 0

    def __call__(self) -> None:
        self._calls += 1
        self._arrays.settling = self._calls > 1
        try:
            if self._graph is None and self._calls > 2 and not self._graphs.failed:
                self._record()
            if self._graph is not None:
                self._graph.replay()
            else:
                self._run_directly()
        finally:
            self._arrays.settling = False

    def _run_directly(self) -> None:
        stream, current = self._graphs.stream, torch.cuda.current_stream(self._arrays.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            self._run()
        current.wait_stream(stream)

    def _record(self) -> None:
        """Make the graph. Where that fails nothing was run, and no step is recorded from then on."""
        graph, graphs = torch.cuda.CUDAGraph(), self._graphs
        current = torch.cuda.current_stream(self._arrays.device)
        try:
            # thread_local: TensorRT-RTX compiles on a thread of its own, which is no part of the step
            with torch.cuda.graph(
                graph, pool=graphs.memory, stream=graphs.stream, capture_error_mode="thread_local"
            ):
                self._run()
        except RuntimeError:
            graphs.failed = True
            logging.getLogger(__name__).warning("a step cannot be recorded as a CUDA graph", exc_info=True)
            torch.cuda.set_stream(current)  # torch leaves the recording's where ending it fails
            torch.cuda.synchronize(self._arrays.device)
        else:
            self._graph = graph


def weight_tensor(tensor: BlockTensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A block's tensor that is not quantized, copied out of its mapped file, in `dtype` on `device`."""
    assert tensor.scales is None, "quantized"
    bits = _copied(tensor.data.view(np.int16) if tensor.dtype == "bf16" else tensor.data)
    typed = bits.view(torch.bfloat16) if tensor.dtype == "bf16" else bits
    return typed.to(device=device, dtype=dtype)


def _copied(data: np.ndarray) -> torch.Tensor:
    # .copy(): torch refuses to promise that read-only memory stays unwritten
    return torch.from_numpy(data.copy())


class PackedMatrix:
    """A quantized matrix on the device, as it is stored; its values are made where they are needed.

    Args:
        tensor: quantized, see `zoo.packing`.
        dtype: of the values. device: of all.
    """

    def __init__(self, tensor: BlockTensor, dtype: torch.dtype, device: torch.device) -> None:
        assert tensor.scales is not None
        self._dtype = dtype
        self.four_bits = tensor.dtype == "i4"
        self.data = _copied(tensor.data).to(device)
        self.scales = _copied(tensor.scales).to(device)
        self.offsets = None if tensor.offsets is None else _copied(tensor.offsets).to(device)
        self.rotation = _copied(rotation()).to(device) if tensor.rotated else None
        self.shape = tensor.shape

    @property
    def nbytes(self) -> int:
        """Memory on the device."""
        return self.data.nbytes + self.scales.nbytes * (1 if self.offsets is None else 2)

    def dense(self, rows: torch.Tensor | None = None) -> torch.Tensor:
        """The values [out, in], or those of some rows."""
        data, scales, offsets = self.data, self.scales, self.offsets
        if rows is not None:
            data, scales = data.index_select(0, rows), scales.index_select(0, rows)
            offsets = None if offsets is None else offsets.index_select(0, rows)
        if self.four_bits:
            # the sign of a nibble is that of the byte whose upper half it is
            low, high = (data << 4).view(torch.int8) >> 4, data.view(torch.int8) >> 4
            data = torch.stack([low, high], -1).flatten(1)
        grouped = data.view(*scales.shape, -1).to(torch.float32) * scales[:, :, None]
        if offsets is not None:
            grouped += offsets[:, :, None]
        if self.rotation is not None:
            grouped = grouped.view(len(data), -1, ROTATED) @ self.rotation
        return grouped.flatten(1).to(self._dtype)


class PackedMatrices:
    """Quantized matrices of equal width and different bits on top of each other."""

    def __init__(self, parts: Sequence[PackedMatrix]) -> None:
        self.parts = tuple(parts)
        self.shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])

    @property
    def nbytes(self) -> int:
        """Memory on the device."""
        return sum(part.nbytes for part in self.parts)

    def dense(self) -> torch.Tensor:
        """The values [out, in]."""
        return torch.cat([part.dense() for part in self.parts])
