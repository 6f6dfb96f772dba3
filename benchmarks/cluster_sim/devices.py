"""How long spans take on a GPU, by roofline, and what links cost. Assumptions, none of them measured here.

A call takes the longer of two times: that of reading weights and KV at the memory's rate, and that of the
arithmetic at the rate of dense bf16, each at a share of the data sheet's figure that good kernels reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU by its data sheet, and what of that is reached."""

    name: str
    memory_bytes: float
    bytes_per_s: float
    flops_per_s: float
    memory_share: float = 0.8
    flops_share: float = 0.6
    call_s: float = 20e-6  # to begin a call
    layer_s: float = 10e-6  # of kernels' ends in each layer, whatever they do


A100 = Device("A100-80GB", 80e9, 2.039e12, 312e12)
H200 = Device("H200", 141e9, 4.8e12, 989e12)
DEVICES = {device.name: device for device in (A100, H200)}


@dataclass(frozen=True, slots=True)
class Shape:
    """A base model; weights and KV in bf16."""

    name: str
    hidden: int
    layers: int
    kv_width: int  # K or V of a token and layer, values
    ffn: int
    vocab: int

    @property
    def layer_bytes(self) -> int:
        """Of a layer's matrices."""
        return 2 * (2 * self.hidden**2 + 2 * self.hidden * self.kv_width + 3 * self.hidden * self.ffn)

    @property
    def head_bytes(self) -> int:
        """Of the output matrix; the embedding is looked up in host memory."""
        return 2 * self.hidden * self.vocab

    @property
    def kv_bytes(self) -> int:
        """Of a token in all layers."""
        return 4 * self.kv_width * self.layers


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("7B", 4096, 32, 4096, 11008, 32000),  # as LLaMA
        Shape("13B", 5120, 40, 5120, 13824, 32000),
        Shape("8B", 4096, 32, 1024, 14336, 128256),  # as Llama 3
    )
}


@dataclass(frozen=True, slots=True)
class Piece:
    """A span on a device: layers of a shape, perhaps with the head behind them."""

    shape: Shape
    layers: int
    head: bool

    @property
    def num_bytes(self) -> int:
        """Of its weights."""
        return self.layers * self.shape.layer_bytes + self.head * self.shape.head_bytes

    def flops(self, rows: int, logit_rows: int, attended: float) -> float:
        """Of `rows` tokens that look at `attended` ones in all, and `logit_rows` rows of the head."""
        matrices = (
            rows * self.layers * self.shape.layer_bytes + logit_rows * self.head * self.shape.head_bytes
        )
        return matrices + 4.0 * attended * self.shape.hidden * self.layers  # 2 flops a value of 2 bytes

    def seconds(
        self, device: Device, rows: int, logit_rows: int, attended: float, context: float, more_bytes: float
    ) -> float:
        """Of a call.

        Args:
            device: where.
            rows, logit_rows, attended: as of `flops`.
            context: tokens whose KV is read.
            more_bytes: that are read besides: of adapters.
        """
        read = self.num_bytes + more_bytes + context * self.shape.kv_bytes * self.layers / self.shape.layers
        by_memory = read / (device.bytes_per_s * device.memory_share)
        work = self.flops(rows, logit_rows, attended)
        by_arithmetic = work / (device.flops_per_s * device.flops_share)
        return max(by_memory, by_arithmetic) + device.call_s + self.layers * device.layer_s


@dataclass(frozen=True, slots=True)
class Link:
    """Between two GPUs: seconds of a message are latency_s + bytes / bytes_per_s."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, num_bytes: float) -> float:
        """Of a message."""
        return self.latency_s + num_bytes / self.bytes_per_s


NONE = Link(0.0, float("inf"))
NVLINK = Link(50e-6, 250e9)
NETWORK = Link(150e-6, 0.9 * 100e9 / 8)  # 100 Gb/s
DISK_BYTES_PER_S = 5e9


@dataclass(frozen=True, slots=True)
class Machines:
    """GPUs in servers.

    Attributes:
        device: all are alike.
        servers: GPUs of each.
        within, between: links inside a server and between two.
    """

    device: Device
    servers: Sequence[int]
    within: Link = NVLINK
    between: Link = NETWORK

    @property
    def num_gpus(self) -> int:
        """In all."""
        return sum(self.servers)

    def server_of(self) -> list[int]:
        """By GPU."""
        return [server for server, count in enumerate(self.servers) for _ in range(count)]

    def cells(self) -> list[list[int]]:
        """The GPUs of each server."""
        places = self.server_of()
        return [[gpu for gpu, at in enumerate(places) if at == server] for server in range(len(self.servers))]

    def links(self) -> list[list[Link]]:
        """[from][to]."""
        places = self.server_of()
        count = range(len(places))
        return [
            [NONE if a == b else self.within if places[a] == places[b] else self.between for b in count]
            for a in count
        ]


PUBLISHED = Machines(A100, (2, 2, 4, 4))
"""The cluster of BlockLLM's evaluation (arXiv 2404.18322)."""
