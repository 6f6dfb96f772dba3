"""A TensorRT library in which onnxruntime stands in for the GPU, below the code that drives TensorRT.

Plans are real; what is deserialized from one is the ONNX network that it was built from. Contexts take the
calls that TensorRT's take (shapes, addresses of memory, scratch, streams) and refuse what TensorRT refuses:
unknown names, shapes outside the profile, addresses that are not aligned, too little scratch.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import tensorrt_rtx as trt
import torch

from blockzoo.engines.tensorrt import device
from blockzoo.engines.tensorrt.builder import with_sizes
from blockzoo.engines.tensorrt.engine import TensorRTEngines
from blockzoo.engines.tensorrt.networks import build_network
from blockzoo.engines.tensorrt.parts import part_weights
from blockzoo.engines.tensorrt.plans import Machine
from blockzoo.engines.tensorrt.shim import TensorRT
from blockzoo.zoo.manifest import PlanTensorRecord, TensorRTPlanRecord
from blockzoo.zoo.store import Zoo

device._ALIGNMENT = 64  # what torch gives on the CPU; it is 512 on a GPU


class OnnxContext:
    def __init__(self, engine: OnnxEngine) -> None:
        self._engine = engine
        self._profile, self._memory = 0, 0
        self._shapes = {t.name: t.shape for t in engine.record.inputs if min(t.shape) > 0}
        self._addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self._profile = index
        return 0 <= index < len(self._engine.record.profiles)

    def set_device_memory(self, address: int, size: int) -> None:
        self._memory = size
        self._engine.arenas.add(address)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        record = self._engine.record
        tensor = next(t for t in record.inputs if t.name == name)
        profile = record.profiles[self._profile]
        low = with_sizes(tensor.shape, profile.min, 1)
        high = with_sizes(tensor.shape, profile.max, record.max_lora_ranks)
        self._shapes[name] = shape
        return all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return name in self._engine.names and address % 64 == 0

    def execute_async_v3(self, stream: int) -> bool:
        record = self._engine.record
        if self._memory < self._engine.device_memory_size_v2 or self._addresses.keys() != self._engine.names:
            return False
        feeds = {t.name: self._array(t, self._shapes[t.name]) for t in record.inputs}
        (result,) = self._engine.session.run(None, feeds)
        self._array(record.outputs[0], result.shape)[...] = result
        self._engine.runs.append({name: array.shape for name, array in feeds.items()})
        return True

    def _array(self, tensor: PlanTensorRecord, shape: tuple[int, ...]) -> np.ndarray:
        assert tensor.dtype == "f32"
        count = int(np.prod(shape))
        memory = (ctypes.c_float * count).from_address(self._addresses[tensor.name])
        return np.ctypeslib.as_array(memory).reshape(shape)


class OnnxEngine:
    def __init__(self, zoo: Zoo, record: TensorRTPlanRecord) -> None:
        self.record, self.runs, self.num_contexts = record, [], 0
        self.arenas: set[int] = set()
        self.names = {t.name for t in (*record.inputs, *record.outputs)}
        self.device_memory_size_v2 = max(record.scratch_bytes.values())
        self.num_io_tensors, self.num_optimization_profiles = len(self.names), len(record.profiles)
        weights = None
        if record.baked_block is not None:
            weights = part_weights(zoo.read_block(record.baked_block), record.part, record.precision)
        model = build_network(record.spec, record.part, record.precision, weights=weights, lora=record.lora)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def get_tensor_name(self, index: int) -> str:
        return self._io()[index].name

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        (tensor,) = (tensor for tensor in self._io() if tensor.name == name)
        return tuple(-1 if isinstance(size, str) else size for size in tensor.shape)

    def get_tensor_dtype(self, name: str) -> trt.DataType:
        (tensor,) = (tensor for tensor in self._io() if tensor.name == name)
        assert tensor.type == "tensor(float)"
        return trt.DataType.FLOAT

    def _io(self) -> list[Any]:
        return [*self.session.get_inputs(), *self.session.get_outputs()]

    def create_runtime_config(self) -> Any:
        return SimpleNamespace(
            set_execution_context_allocation_strategy=lambda strategy: None,
            create_runtime_cache=object,
            set_runtime_cache=lambda cache: True,
        )

    def create_execution_context(self, config: Any) -> OnnxContext:
        self.num_contexts += 1
        return OnnxContext(self)


class OnnxRuntime:
    """Of one zoo; `engines` by plan key."""

    def __init__(self, zoo: Zoo) -> None:
        self._zoo = zoo
        self.engines: dict[str, OnnxEngine] = {}

    def __call__(self, log: Any) -> OnnxRuntime:
        return self

    def deserialize_cuda_engine(self, content: bytes) -> OnnxEngine:
        digest = hashlib.sha256(content).hexdigest()
        plans: Mapping[str, TensorRTPlanRecord] = self._zoo.manifest.tensorrt_plans
        key, record = next(item for item in plans.items() if item[1].sha256 == digest)
        assert key not in self.engines, "loaded twice"
        self.engines[key] = OnnxEngine(self._zoo, record)
        return self.engines[key]


def onnx_engines(zoo: Zoo) -> TensorRTEngines:
    """The tensorrt backend as on a GPU of the zoo's plans; `engines.onnx` is its runtime."""
    version = next((plan.library_version for plan in zoo.manifest.tensorrt_plans.values()), "none is needed")
    runtime = OnnxRuntime(zoo)
    module = SimpleNamespace(
        ILogger=trt.ILogger,
        Runtime=runtime,
        ExecutionContextAllocationStrategy=trt.ExecutionContextAllocationStrategy,
        DynamicShapesKernelSpecializationStrategy=trt.DynamicShapesKernelSpecializationStrategy,
    )
    library = TensorRT("tensorrt_rtx", version, module)
    engines = TensorRTEngines(
        zoo, "f32", "cpu", machine=Machine("sm89", "tensorrt_rtx", version), library=library
    )
    engines.onnx = runtime  # type: ignore[attr-defined]
    assert engines.device == torch.device("cpu")
    return engines
