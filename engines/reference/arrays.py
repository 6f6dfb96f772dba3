"""Arrays of torch: on the CPU they share the host's memory, on a GPU they are copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from blockzoo.engines.arrays import Kind
from blockzoo.engines.base import Precision
from blockzoo.zoo.tensors import BlockTensor

TORCH_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


class TorchArrays:
    """See `engines.arrays.Arrays`.

    Args:
        device: where the arrays are.
        precision: of activations and KV.
        record: on a GPU, let `recorded` make CUDA graphs.
    """

    def __init__(self, device: torch.device, precision: Precision, record: bool = False) -> None:
        self.device = device
        self.records = record and device.type == "cuda"
        self._graph_memory: Any = None
        self._dtypes = {"activation": TORCH_DTYPES[precision], "f32": torch.float32, "i32": torch.int32}

    def zeros(self, shape: Sequence[int], kind: Kind) -> torch.Tensor:
        """A new tensor of zeros."""
        return torch.zeros(tuple(shape), dtype=self._dtypes[kind], device=self.device)

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
        if self._graph_memory is None:  # graphs run one after the other: they may share their scratch
            self._graph_memory = torch.cuda.graph_pool_handle()
        return _Recorded(run, self._graph_memory)


class _Recorded:
    def __init__(self, run: Callable[[], Any], memory: Any) -> None:
        self._run, self._memory = run, memory
        self._graph: Any = None
        self._calls = 0

    def __call__(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        elif self._calls < 2:
            self._calls += 1
            self._run()
        else:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._memory):
                self._run()
            self._graph = graph
            graph.replay()


def weight_tensor(tensor: BlockTensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A block's tensor, copied out of its mapped file, in `dtype` on `device`."""
    # .copy(): torch refuses to promise that read-only memory stays unwritten
    data = tensor.data.copy()
    bits = torch.from_numpy(data.view(np.int16) if tensor.dtype == "bf16" else data)
    typed = bits.view(torch.bfloat16) if tensor.dtype == "bf16" else bits
    return typed.to(device=device, dtype=dtype)
