"""ONNX network -> serialized plan, with one optimization profile per token count range."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import Any

import onnx

from blockzoo.engines.base import EngineError
from blockzoo.engines.tensorrt.networks import (
    NetworkInput,
    build_network,
    network_inputs,
    network_outputs,
)
from blockzoo.engines.tensorrt.parts import part_weights
from blockzoo.engines.tensorrt.plans import PlanRequest
from blockzoo.engines.tensorrt.shim import TensorRT
from blockzoo.zoo.blocks import Block
from blockzoo.zoo.manifest import PlanTensorRecord, TensorRTPlanRecord

_USUAL_RANKS = 64  # of all adapters of a call together: what plans are tuned for

OnPhase = Callable[[str], None]
"""Hears the name of every build phase as it begins."""


class PlanBuilder:
    """Builds plans with one library.

    Args:
        library: what compiles.
        timing_cache: bytes that an earlier builder's `timing_cache()` gave for the same library and
            target; the library measures kernels only where it has a GPU, so without one it stays empty.
    """

    def __init__(self, library: TensorRT, timing_cache: bytes = b"") -> None:
        self.library = library
        self._timing_cache = timing_cache
        self._scratch: list[int] = []
        self._log = library.logger(self._scratch.append)
        self._builder = library.module.Builder(self._log.native)

    def timing_cache(self) -> bytes:
        """What was measured so far, for the next builder."""
        return self._timing_cache

    def build(
        self, request: PlanRequest, block: Block | None = None, on_phase: OnPhase | None = None
    ) -> tuple[bytes, TensorRTPlanRecord]:
        """The serialized plan, and its record.

        Args:
            request: what to build; its library is this builder's.
            block: the block to bake, where the request names one.
            on_phase: told of the progress.

        Raises:
            EngineError: the library refused the network or the target, with what it said.
        """
        start = time.perf_counter()
        weights = part_weights(block, request.part, request.precision) if block is not None else None
        model = build_network(
            request.spec, request.part, request.precision, weights=weights, lora=request.lora
        )
        content = self._compile(model, request, on_phase)
        scratch = dict(zip((p.name for p in request.profiles), self._scratch, strict=False))
        record = TensorRTPlanRecord(
            part=request.part,
            spec=request.spec,
            precision=request.precision,
            target=request.target,
            library=request.library,
            library_version=request.library_version,
            profiles=request.profiles,
            inputs=tuple(map(_tensor_record, network_inputs(model))),
            outputs=tuple(map(_tensor_record, network_outputs(model))),
            scratch_bytes=scratch,
            workspace_bytes=request.workspace_bytes,
            baked_block=request.baked_block,
            lora=request.lora,
            max_lora_ranks=request.max_lora_ranks,
            num_bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            build_seconds=round(time.perf_counter() - start, 3),
        )
        return content, record

    def _compile(self, model: onnx.ModelProto, request: PlanRequest, on_phase: OnPhase | None) -> bytes:
        trt = self.library.module
        self._scratch.clear()
        self._log.messages.clear()
        flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # all are from 11 on
        network = self._builder.create_network(0 if flag is None else 1 << int(flag))
        parser = trt.OnnxParser(network, self._log.native)
        if not parser.parse(model.SerializeToString()):
            said = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
            raise EngineError(f"{self.library.title} could not read the network of {request.part}: {said}")
        config = self._config(request, network_inputs(model), on_phase)
        plan = self._builder.build_serialized_network(network, config)
        if plan is None:
            raise EngineError(
                f"{self.library.title} could not compile {request.part} for {request.target} in "
                f"{request.precision}: {self._log.text()}"
            )
        cache = config.get_timing_cache()
        if cache is not None:
            self._timing_cache = bytes(cache.serialize())
        return bytes(plan)

    def _config(
        self, request: PlanRequest, inputs: tuple[NetworkInput, ...], on_phase: OnPhase | None
    ) -> Any:
        trt = self.library.module
        config = self._builder.create_builder_config()
        if request.library == "tensorrt_rtx":
            capability = getattr(trt.ComputeCapability, request.target.upper(), None)
            if capability is None:
                raise EngineError(f"{self.library.title} has no target {request.target}")
            config.num_compute_capabilities = 1
            config.set_compute_capability(capability, 0)
        if request.workspace_bytes is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace_bytes)
        # TensorRT-RTX takes memory of its own in a run unless told so, which a CUDA graph cannot record
        if (flag := getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)) is not None:
            config.set_flag(flag)
        config.set_timing_cache(config.create_timing_cache(self._timing_cache), False)
        if on_phase is not None:
            config.progress_monitor = _make_monitor(trt, on_phase)
        most = request.max_lora_ranks
        ranks = (1, min(_USUAL_RANKS, most), most)
        for profile in request.profiles:
            shapes = self._builder.create_optimization_profile()
            for value in inputs:
                if value.is_dynamic:
                    sizes = (profile.min, profile.opt, profile.max)
                    given = zip(sizes, ranks, strict=True)
                    shapes.set_shape(value.name, *(with_sizes(value.shape, *pair) for pair in given))
            config.add_optimization_profile(shapes)
        return config


def with_sizes(shape: tuple[int, ...], rows: int, ranks: int) -> tuple[int, ...]:
    """The shape of a network's tensor at so many rows (-1 in it) and ranks of adapters (-2)."""
    return tuple({-1: rows, -2: ranks}.get(size, size) for size in shape)


def _tensor_record(value: NetworkInput) -> PlanTensorRecord:
    return PlanTensorRecord(value.name, value.dtype, value.shape)


def _make_monitor(trt: Any, on_phase: OnPhase) -> Any:
    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            on_phase(name)

        def step_complete(self, name: str, step: int) -> bool:
            return True

        def phase_finish(self, name: str) -> None:
            pass

    return Monitor()
