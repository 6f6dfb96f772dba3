"""OpenVINO CPU engines: spans compiled at load, run on bound arrays."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from blockzoo.engines.arrays import Arrays, HostArrays
from blockzoo.engines.base import PAGE_TOKENS, EngineError, Precision, SpanSpec
from blockzoo.engines.embedding import EmbeddingTable
from blockzoo.engines.kv_pages import KVPrecision, by_default, goes_with, page_width
from blockzoo.engines.openvino.adapters import AdapterPacker
from blockzoo.engines.openvino.graphs import build_span
from blockzoo.engines.openvino.weights import Rounding, openvino_tensor
from blockzoo.zoo.blocks import AttnSpec, Block, BlockSpec
from blockzoo.zoo.packing import GROUP, groups_dividing
from blockzoo.zoo.store import Zoo

# OpenVINO keeps the kernels that it has made for the shapes of each compiled model, 5000 a model unless told
# otherwise, at about 0.1 MB each: prompts of random lengths would fill gigabytes. So many are shared out
# between the spans of a process. With 32 for each, 5M parameters decode in steps of ever other shapes at 1.09
# times the CPU time, with 128 or for larger models at no more: oneDNN keeps 1024 of its own besides.
_KEPT_KERNELS = 512
_FEWEST_KERNELS, _MOST_KERNELS = 32, 256  # of a span

_CPUINFO = Path("/proc/cpuinfo")

_U8_HEADS = 16
"""Heads whose size is no multiple of this are not kept in 8 bits: what is left over beside whole vectors is
computed wrongly (seen with sizes of 4 to 100 on AVX2, which has vectors of 8; others have 16)."""

_DTYPES = {"H": "bf16", "f": "f32", "e": "f16", "i": "i32", "B": "u8"}  # numpy's type characters


class _Bound:
    """What an infer request is bound to: it would not keep that alive itself.

    It knows the engine not, so that who drops an engine frees it at once.
    """

    def __init__(self, request: ov.InferRequest) -> None:
        self._request = request
        self._tensors: dict[str, ov.Tensor] = {}  # a wrapper that is dropped leaves the request dangling

    def set(self, name: str, array: np.ndarray) -> None:
        tensor = openvino_tensor(array, _DTYPES[array.dtype.char])
        self._request.set_tensor(name, tensor)
        self._tensors[name] = tensor


def against_u8(specs: Iterable[BlockSpec]) -> str | None:
    """Why K and V of blocks are not kept in 8 bits; None where they can be."""
    sizes = {spec.head_dim for spec in specs if isinstance(spec, AttnSpec) and spec.head_dim % _U8_HEADS}
    if not sizes:
        return None
    return (
        f"heads of {min(sizes)}: OpenVINO computes KV in 8 bits rightly for multiples of {_U8_HEADS} alone; "
        "leave the KV precision out"
    )


def multiplies_int8() -> bool:
    """Whether this CPU has instructions that multiply integers of 8 bits and add them up (VNNI)."""
    return "vnni" in _CPUINFO.read_text()


def prefers_int8() -> bool:
    """Whether int8 activations are the faster way with quantized weights here: with VNNI, and without AMX,
    whose products of weights unpacked to bf16 take half as long for a prompt."""
    return multiplies_int8() and "amx_bf16" not in _CPUINFO.read_text()


class OpenVINOEngine:
    """A compiled span with one infer request. Not thread-safe: one caller at a time."""

    def __init__(self, compiled: ov.CompiledModel, spec: SpanSpec, blocks: Sequence[Block]) -> None:
        self.spec = spec
        self._blocks = tuple(blocks)  # keeps the files mapped over which the graph's constants lie
        self._request = compiled.create_infer_request()
        self._bound = _Bound(self._request)
        self._adapters = AdapterPacker(spec, self._bound.set)

    def bind(self, name: str, array: np.ndarray) -> None:
        """Bind an input or output; see `engines.base.Engine` for names, types and shapes."""
        takes = self._adapters.takes(name)
        if takes or name == "rows":  # which rows stay
            self._adapters.give(name, array)
        if not takes:
            self._bound.set(name, array)

    def run(self) -> None:
        """Run the span on what is bound."""
        self._adapters.pack()
        self._request.infer(share_outputs=True)

    def scores(self) -> np.ndarray:
        """A view that the next run overwrites; see `engines.base.Engine`."""
        values: np.ndarray = self._request.get_tensor("scores").data
        return values

    def release_memory(self) -> None:
        """Give activation scratch back; the next run allocates it again."""
        self._request.get_compiled_model().release_memory()


class OpenVINOEngines:
    """Compiles spans for this machine's CPU.

    Args:
        precision: of activations and weights in use; None takes bf16 where the CPU computes it in
            hardware (avx512_bf16, amx_bf16) and f32 elsewhere.
        num_threads: compute threads; None leaves OpenVINO's choice (the physical cores).
        int8_activations: multiply quantized weights with activations rounded to 8 bits on the fly, in groups
            of a row that divide those of the weights, the rest in f32. Without, weights are unpacked to the
            precision as they are multiplied.
        kv_precision: of K and V in pages (`kv_pages`): "f32" or "f16" beside the precision f32, "bf16" beside
            bf16, "u8" beside both. None: f16 beside int8 activations, else the precision.

    Raises:
        EngineError: the precision, or rounded activations, are not available on this CPU, or not together; or
            KV in another precision does not go with this one.
    """

    name = "openvino"

    def __init__(
        self,
        precision: Precision | None = None,
        num_threads: int | None = None,
        *,
        int8_activations: bool = False,
        kv_precision: KVPrecision | None = None,
    ) -> None:
        if int8_activations and precision == "bf16":
            raise EngineError(
                "int8 activations are rounded from f32, and precision bf16 was asked for: leave one out"
            )
        self._core = ov.Core()
        capabilities = self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        has_bf16 = "BF16" in capabilities
        if precision == "bf16" and not has_bf16:
            raise EngineError(
                f"precision bf16 was asked for, but this CPU offers {', '.join(capabilities)}; use f32"
            )
        if int8_activations and not multiplies_int8():
            raise EngineError("int8 activations were asked for, but this CPU lacks VNNI: leave them out")
        self.precision: Precision = precision or ("bf16" if has_bf16 and not int8_activations else "f32")
        self.int8_activations = int8_activations
        self.kv_precision: KVPrecision = kv_precision or by_default(self.precision, int8_activations)
        if self.kv_precision not in (fit := goes_with(self.precision)):
            raise EngineError(
                f"KV in {kv_precision} was asked for beside activations in {self.precision}, with which go "
                f"{' and '.join(fit)}: leave one out"
            )
        self.arrays: Arrays = HostArrays(
            self.precision, num_threads or len(os.sched_getaffinity(0)), self.kv_precision
        )
        self._properties: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": self.precision,
            "KV_CACHE_PRECISION": self.kv_precision,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,  # engines that run at the same time would share the same cores
        }
        if self.kv_precision == "u8":  # by channel, keys of a page would be rounded anew with each token
            self._properties |= {"KEY_CACHE_QUANT_MODE": "BY_TOKEN", "VALUE_CACHE_QUANT_MODE": "BY_TOKEN"}
        self.expect(1)
        if num_threads is not None:
            self._properties["INFERENCE_NUM_THREADS"] = num_threads

    def expect(self, num_spans: int) -> None:
        """Share out what all spans together may keep for themselves: see `engines.base.EngineMaker`."""
        kernels = min(max(_KEPT_KERNELS // max(1, num_spans), _FEWEST_KERNELS), _MOST_KERNELS)
        self._properties["CPU_RUNTIME_CACHE_CAPACITY"] = kernels

    def follow(self, zoo: Zoo) -> None:
        """Nothing to do: engines are made of blocks alone."""

    @property
    def version(self) -> str:
        """The OpenVINO build in use."""
        return ov.get_version()

    def facts(self) -> dict[str, Any]:
        """Backend, version, precision and CPU, for manifests and reports."""
        cpu = self._core.get_property("CPU", "FULL_DEVICE_NAME")
        facts = {"backend": self.name, "version": self.version, "precision": self.precision, "target": cpu}
        facts |= {"activations": "int8"} if self.int8_activations else {}
        return facts | ({"kv": self.kv_precision} if self.kv_precision != self.precision else {})

    def embedding(self, block: Block) -> EmbeddingTable:
        """The look-up of an embed block, over its mapped file."""
        return EmbeddingTable(block, self.precision)

    def span(
        self,
        blocks: Sequence[Block],
        *,
        drops_rows: bool = False,
        lora: Mapping[int, Sequence[str]] = {},
        scores: bool = False,
        drafts: bool = False,
    ) -> OpenVINOEngine:
        """Compile consecutive blocks (no embed) into one engine. One of quantized weights that drafts rounds
        activations to 8 bits, where that is the faster way.

        The blocks' pages may be dropped (`Block.drop_pages`) after the first run, when the plugin holds
        its own packed copy.

        Raises:
            EngineError: OpenVINO refused the graph, lays pages out in another way, or would compute these
                blocks' KV in 8 bits wrongly.
        """
        unfit = against_u8(block.spec for block in blocks) if self.kv_precision == "u8" else None
        if unfit is not None:
            raise EngineError(unfit)
        targets = tuple((index, tuple(names)) for index, names in sorted(lora.items()))
        spec = SpanSpec(tuple(block.spec for block in blocks), drops_rows, targets, scores)
        try:
            compiled = self._compile(blocks, spec, drafts and _is_quantized(blocks) and prefers_int8())
        except RuntimeError as error:
            kinds = "-".join(block.spec.kind for block in blocks)
            raise EngineError(
                f"OpenVINO {self.version} could not compile the span {kinds}: {error}"
            ) from error
        if spec.layers:
            self._check_pages(compiled, spec.layers[0].head_dim)
        return OpenVINOEngine(compiled, spec, blocks)

    def _compile(self, blocks: Sequence[Block], spec: SpanSpec, rounds: bool) -> ov.CompiledModel:
        """`rounds`: activations to 8 bits, whatever others do, between hidden states, K and V like theirs."""
        rounding, given, in_bf16 = self._rounding(blocks), self._properties, False
        if rounds and rounding is None:
            rounding, in_bf16 = Rounding(_common_group(blocks), "plugin"), self.kv_precision == "bf16"
            given = given | {"INFERENCE_PRECISION_HINT": "f32"}
        group = rounding.group if rounding is not None and rounding.how == "plugin" else 0
        model = build_span(blocks, spec, self.precision, rounding, in_bf16)
        given = given | {"DYNAMIC_QUANTIZATION_GROUP_SIZE": group}
        return self._core.compile_model(model, "CPU", given)

    def _rounding(self, blocks: Sequence[Block]) -> Rounding | None:
        return Rounding(_common_group(blocks), "plugin") if self.int8_activations else None

    def _check_pages(self, compiled: ov.CompiledModel, head_dim: int) -> None:
        """Pages are this process's to lay out: make sure that the operator reads them so."""
        expected = PAGE_TOKENS, page_width(head_dim, self.kv_precision)
        for name in ("key_cache", "value_cache"):
            shape = compiled.input(name).partial_shape
            found = tuple(str(shape[axis]) for axis in (2, 3))
            if found != tuple(map(str, expected)):
                raise EngineError(
                    f"OpenVINO {self.version} keeps {name} in {self.kv_precision} as pages of "
                    f"{' x '.join(found)}, expected {' x '.join(map(str, expected))}: leave the KV precision "
                    "out, or use the version that is pinned"
                )


class RoundedActivations(OpenVINOEngines):
    """Engines in f32 that round activations to 8 bits as nodes of their graphs: they give what those with
    `int8_activations` do, but on any CPU, and slowly. For judging what rounding loses.

    Args:
        num_threads: as of `OpenVINOEngines`.
        group: neighbours in a row that share a scale, beside all weights; None: beside quantized ones, and as
            many as theirs.
    """

    def __init__(self, num_threads: int | None = None, group: int | None = None) -> None:
        super().__init__("f32", num_threads, kv_precision="f16")
        self._group = group

    def _rounding(self, blocks: Sequence[Block]) -> Rounding:
        if self._group is not None:
            return Rounding(self._group, "graph, everywhere")
        return Rounding(_common_group(blocks), "graph")


def rounding_engines(num_threads: int | None = None) -> OpenVINOEngines:
    """Engines with int8 activations, by what this CPU has for it. `num_threads`: see `OpenVINOEngines`."""
    if multiplies_int8():
        return OpenVINOEngines(num_threads=num_threads, int8_activations=True)
    return RoundedActivations(num_threads)


def _common_group(blocks: Sequence[Block]) -> int:
    """Activations of a row that share a scale, which divide the groups of all weights beside which they are
    rounded: in others OpenVINO takes several times as long, or does not round."""
    sizes = {
        tensor.shape[1] // tensor.scales.shape[1]
        for block in blocks
        for tensor in block.tensors.values()
        if tensor.scales is not None
    }
    return next(iter(groups_dividing(sizes)), GROUP) if sizes else GROUP


def _is_quantized(blocks: Sequence[Block]) -> bool:
    """Whether all matrices are."""
    tensors = (tensor for block in blocks for tensor in block.tensors.values())
    return all(tensor.scales is not None for tensor in tensors if len(tensor.shape) == 2)
