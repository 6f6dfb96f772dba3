"""Plans loaded on a GPU: contexts, scratch memory, addresses; all on the current stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from blockzoo.engines.base import EngineError
from blockzoo.engines.tensorrt.shim import TensorRT
from blockzoo.zoo.manifest import TensorRTPlanRecord

_ALIGNMENT = 256  # bytes, of every address that TensorRT is given
_MAX_OWN_CONTEXTS = 64  # of a plan


class DeviceRuntime:
    """Loads plans; all that it loads work in one scratch arena and so must run one after the other.

    Args:
        read: plan key -> serialized plan.
        library: what runs them.
        device: the GPU.
        settling: whether the step that runs now is about to be recorded: its shapes will come again.
    """

    def __init__(
        self,
        read: Callable[[str], bytes],
        library: TensorRT,
        device: torch.device,
        settling: Callable[[], bool],
    ) -> None:
        self.settling, self.device = settling, device
        self.read, self._library = read, library
        self._log = library.logger()
        # never empty: a context needs an address even where its plan needs no scratch
        self._arena = torch.empty(_ALIGNMENT, dtype=torch.uint8, device=device)
        with torch.cuda.device_of(self._arena):
            self._runtime = library.module.Runtime(self._log.native)
        self._cache: Any = None  # of kernels that TensorRT-RTX compiles on this GPU

    def __call__(self, key: str, record: TensorRTPlanRecord) -> DevicePlan:
        """Load a plan. Raises EngineError."""
        with torch.cuda.device_of(self._arena):
            engine = self._runtime.deserialize_cuda_engine(self.read(key))
        if engine is None:
            raise EngineError(
                f"{self._library.title} could not load the plan {key[:12]} ({record.part} for "
                f"{record.target}, built by {record.library_version}): {self.said()}"
            )
        _check_io(key, engine, record)
        size = int(engine.device_memory_size_v2)  # over all profiles
        if self._arena.numel() < size:  # while plans are loaded: never in a step
            self._arena = torch.empty(size, dtype=torch.uint8, device=self.device)
        return DevicePlan(engine, record, self)

    @property
    def arena(self) -> torch.Tensor:
        """Scratch memory, enough for every plan that was loaded."""
        return self._arena

    def stream(self) -> int:
        """The handle of the stream that work is put on now."""
        on_gpu = self.device.type == "cuda"
        return int(torch.cuda.current_stream(self.device).cuda_stream) if on_gpu else 0

    def context(self, engine: Any, profile: int, *, one_shape: bool) -> Any:
        """An execution context in a profile, without scratch memory of its own.

        TensorRT-RTX compiles kernels for the shapes it meets: at once where the context is for one shape,
        else beside the runs, which take slower ones until then.
        """
        trt = self._library.module
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._library.library == "tensorrt_rtx":
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            kinds = trt.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = kinds.EAGER if one_shape else kinds.LAZY
            if self._cache is None:
                self._cache = config.create_runtime_cache()
            config.set_runtime_cache(self._cache)
            context = engine.create_execution_context(config)
        else:
            context = engine.create_execution_context(strategy)
        if context is None or not context.set_optimization_profile_async(profile, self.stream()):
            raise EngineError(f"{self._library.title} could not make a context: {self.said()}")
        return context

    def said(self) -> str:
        """What the library said last."""
        return self._log.text()


_TYPES = {"BF16": "bf16", "HALF": "f16", "FLOAT": "f32"}


def _check_io(key: str, engine: Any, record: TensorRTPlanRecord) -> None:
    """Raise EngineError where the plan's tensors or profiles are not those that the manifest names."""
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    found = {
        name: (
            _TYPES.get(engine.get_tensor_dtype(name).name, "?"),
            tuple(max(-1, int(size)) for size in engine.get_tensor_shape(name)),
        )
        for name in names
    }
    expected = {
        value.name: (value.dtype, tuple(max(-1, size) for size in value.shape))  # no matter what varies
        for value in (*record.inputs, *record.outputs)
    }
    wrong = {
        name: (found.get(name), expected.get(name))
        for name in sorted(found.keys() | expected.keys())
        if found.get(name) != expected.get(name)
    }
    if wrong or engine.num_optimization_profiles != len(record.profiles):
        seen = "; ".join(f"{name}: {has}, expected {wants}" for name, (has, wants) in wrong.items())
        raise EngineError(
            f"the plan {key[:12]} ({record.part}) is not what the manifest says: {seen or 'its profiles'}; "
            "delete it and run zoo-compile --backend tensorrt on the zoo again"
        )


class _Context:
    """An execution context, and what it was last given."""

    def __init__(self, native: Any) -> None:
        self.native = native
        self.sizes: tuple[int, int] | None = None  # rows, ranks
        self.arena = 0


class DevicePlan:
    """One deserialized plan; the blocks that use it take turns.

    A context serves a whole profile, and its shapes change from run to run. That a CUDA graph cannot record,
    so steps that are about to be recorded get contexts that only ever see their one shape.
    """

    def __init__(self, engine: Any, record: TensorRTPlanRecord, runtime: DeviceRuntime) -> None:
        self._engine, self._record, self._runtime = engine, record, runtime
        (self._output,) = record.outputs
        self._shared: dict[int, _Context] = {}  # by profile
        self._own: dict[tuple[int, int], _Context] = {}  # by rows and ranks

    def __call__(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Run on the inputs by name; the output, on the way when this returns. Raises EngineError."""
        x = tensors["x"]
        ranks = tensors["lora_mask"].shape[1] if self._record.lora else 0
        context = self._prepared(len(x), ranks)
        held = []  # aligned copies live until the launch
        for value in self._record.inputs:
            tensor = tensors[value.name]
            if not tensor.is_contiguous() or tensor.data_ptr() % _ALIGNMENT:
                tensor = tensor.clone(memory_format=torch.contiguous_format)
                held.append(tensor)
            self._check(context.set_tensor_address(value.name, tensor.data_ptr()), value.name)
        dtype = torch.float32 if self._output.dtype == "f32" else torch.bfloat16
        out = torch.empty((len(x), self._output.shape[1]), dtype=dtype, device=x.device)
        self._check(context.set_tensor_address(self._output.name, out.data_ptr()), self._output.name)
        self._check(context.execute_async_v3(self._runtime.stream()), "its kernels")
        return out

    def _prepared(self, rows: int, ranks: int) -> Any:
        """A context with scratch memory and the shapes of so many rows and ranks."""
        own = self._own.get((rows, ranks))
        if own is None and self._runtime.settling() and len(self._own) < _MAX_OWN_CONTEXTS:
            own = self._own[rows, ranks] = self._made(rows, one_shape=True)
        profile = self._profile(rows)
        if own is None and profile not in self._shared:
            self._shared[profile] = self._made(rows, one_shape=False)
        context = own or self._shared[profile]
        arena = self._runtime.arena
        if context.arena != arena.data_ptr():
            context.native.set_device_memory(arena.data_ptr(), arena.numel())
            context.arena = arena.data_ptr()
        if context.sizes != (rows, ranks):
            for value in self._record.inputs:
                if min(value.shape) < 0:
                    shape = tuple({-1: rows, -2: ranks}.get(size, size) for size in value.shape)
                    self._check(context.native.set_input_shape(value.name, shape), f"{value.name} {shape}")
            context.sizes = rows, ranks
        return context.native

    def _made(self, rows: int, *, one_shape: bool) -> _Context:
        return _Context(self._runtime.context(self._engine, self._profile(rows), one_shape=one_shape))

    def _profile(self, rows: int) -> int:
        for index, profile in enumerate(self._record.profiles):
            if profile.min <= rows <= profile.max:
                return index
        raise EngineError(f"{rows} rows fit no profile of {self._record.part}")

    def _check(self, accepted: bool, what: str) -> None:
        if not accepted:
            raise EngineError(
                f"TensorRT could not run {self._record.part}: it refused {what}: {self._runtime.said()}"
            )
