"""ONNX networks of shape classes: what TensorRT compiles, and onnxruntime checks on any CPU.

An attention block is two networks, `attn_pre` and `attn_post`, with the paged attention kernel between
them; `ffn` and `head` are one each. Weights are inputs, so that one plan serves every block of its shape
class; baked, they are constants of the network and the plan is one block's alone.

Adapters are computed in the masked form (OpenVINO's design, and S-LoRA's arXiv 2311.03285 in dense terms):
y = x W^T + ((x A^T) * mask) B^T, where A and B hold all active adapters' ranks side by side and
`lora_mask` [T, ranks] carries the scale in the columns of a row's own adapter and 0 elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from blockzoo.engines.tensorrt.parts import Part, parts_of
from blockzoo.zoo.blocks import AttnSpec, BlockSpec, BlockTensor, Dtype, FfnSpec, HeadSpec

OPSET = 23  # RMSNormalization and RotaryEmbedding as operators
_IR_VERSION = 10
_TYPES = {"bf16": TensorProto.BFLOAT16, "f16": TensorProto.FLOAT16, "f32": TensorProto.FLOAT}


@dataclass(frozen=True, slots=True)
class NetworkInput:
    """An input or output of a network; -1 in `shape` is the number of rows."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]

    @property
    def is_dynamic(self) -> bool:
        """Whether the shape depends on the number of rows."""
        return -1 in self.shape


def build_network(
    spec: BlockSpec,
    part: Part,
    dtype: Dtype,
    *,
    weights: Mapping[str, BlockTensor] | None = None,
    lora_ranks: int = 0,
) -> onnx.ModelProto:
    """The ONNX model of one part of a shape class.

    Args:
        spec: the operator.
        part: one of `parts_of(spec)`.
        dtype: of activations and weights; norms and rotations are computed in float32 inside.
        weights: to bake in, by the names of `WEIGHT_PARTS`; None leaves them inputs.
        lora_ranks: ranks of all adapters together that the network has room for; 0: no adapters.

    Inputs by name (T rows): x [T, hidden]; attn_pre: cos, sin float32 [T, head_dim]; attn_post: attended
    [T, heads * head_dim]; the weights as in the zoo ([out, in]); with adapters lora_mask [T, ranks] and per
    projection <name>.lora_a [n * ranks, in], <name>.lora_b [out, n * ranks], n matrices being stacked.
    Outputs: attn_pre: rotated [T, (heads + 2 kv_heads) * head_dim], q, k, v side by side as the attention
    kernel takes them; attn_post, ffn: y [T, hidden]; head: logits float32 [T, vocab].
    """
    network = _Network(spec, part, dtype, weights, lora_ranks)
    return network.build()


class _Network:
    def __init__(
        self,
        spec: BlockSpec,
        part: Part,
        dtype: Dtype,
        weights: Mapping[str, BlockTensor] | None,
        lora_ranks: int,
    ) -> None:
        if part not in parts_of(spec):
            raise ValueError(f"a block of kind {spec.kind} has no part {part}; expected {parts_of(spec)}")
        self._spec, self._part, self._dtype = spec, part, dtype
        self._baked, self._ranks = weights, lora_ranks
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._constants: list[onnx.TensorProto] = []

    def build(self) -> onnx.ModelProto:
        makers = {"attn_pre": self._pre, "attn_post": self._post, "ffn": self._ffn, "head": self._head}
        x = self._input("x", self._dtype, ("T", self._spec.hidden_size))
        name, result, dtype, width = makers[self._part](x)
        self._nodes.append(helper.make_node("Identity", [result], [name]))
        output = helper.make_tensor_value_info(name, _TYPES[dtype], ["T", width])
        graph = helper.make_graph(self._nodes, self._part, self._inputs, [output], self._constants)
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=_IR_VERSION
        )

    # ---- parts: x -> (output name, value, dtype, width)

    def _pre(self, x: str) -> tuple[str, str, Dtype, int]:
        spec = self._spec
        assert isinstance(spec, AttnSpec)
        dim, heads, kv_heads = spec.head_dim, spec.num_heads, spec.num_kv_heads
        width = (heads + 2 * kv_heads) * dim
        cos, sin = (self._half_table(name, dim) for name in ("cos", "sin"))
        normed = self._norm(x, self._weight("norm", (spec.hidden_size,)), spec.rms_norm_eps)
        qkv = self._linear(normed, "qkv", spec.hidden_size, (heads * dim, kv_heads * dim, kv_heads * dim))
        if spec.qkv_bias:
            qkv = self._op("Add", qkv, self._weight("qkv_bias", (width,)))
        sizes = self._ints([heads * dim, kv_heads * dim, kv_heads * dim])
        q, k, v = self._ops("Split", [qkv, sizes], 3, axis=1)
        q = self._rotated_heads(q, "q_norm", heads, cos, sin)
        k = self._rotated_heads(k, "k_norm", kv_heads, cos, sin)
        return "rotated", self._op("Concat", q, k, v, axis=1), self._dtype, width

    def _post(self, x: str) -> tuple[str, str, Dtype, int]:
        spec = self._spec
        assert isinstance(spec, AttnSpec)
        width = spec.num_heads * spec.head_dim
        attended = self._input("attended", self._dtype, ("T", width))
        out = self._linear(attended, "o", width, (spec.hidden_size,))
        if spec.o_bias:
            out = self._op("Add", out, self._weight("o_bias", (spec.hidden_size,)))
        return "y", self._op("Add", x, out), self._dtype, spec.hidden_size

    def _ffn(self, x: str) -> tuple[str, str, Dtype, int]:
        spec = self._spec
        assert isinstance(spec, FfnSpec)
        hidden, inner = spec.hidden_size, spec.intermediate_size
        normed = self._norm(x, self._weight("norm", (hidden,)), spec.rms_norm_eps)
        gate_up = self._linear(normed, "gate_up", hidden, (inner, inner))
        if spec.bias:
            gate_up = self._op("Add", gate_up, self._weight("gate_up_bias", (2 * inner,)))
        gate, up = self._ops("Split", [gate_up], 2, axis=1, num_outputs=2)
        gated = self._op("Mul", self._op("Mul", gate, self._op("Sigmoid", gate)), up)
        out = self._linear(gated, "down", inner, (hidden,))
        if spec.bias:
            out = self._op("Add", out, self._weight("down_bias", (hidden,)))
        return "y", self._op("Add", x, out), self._dtype, hidden

    def _head(self, x: str) -> tuple[str, str, Dtype, int]:
        spec = self._spec
        assert isinstance(spec, HeadSpec)
        normed = self._norm(x, self._weight("norm", (spec.hidden_size,)), spec.rms_norm_eps)
        weight = self._weight("weight", (spec.vocab_size, spec.hidden_size))
        logits = self._op("Gemm", normed, weight, transB=1)
        return "logits", self._cast(logits, "f32"), "f32", spec.vocab_size

    # ---- operators

    def _norm(self, x: str, weight: str, eps: float) -> str:
        if self._dtype == "f32":
            return self._op("RMSNormalization", x, weight, axis=-1, epsilon=eps)
        wide = self._op("RMSNormalization", self._cast(x, "f32"), self._cast(weight, "f32"), epsilon=eps)
        return self._cast(wide, self._dtype)

    def _rotated_heads(self, x: str, norm: str, heads: int, cos: str, sin: str) -> str:
        """[T, heads * D] -> per-head norm where the model has one -> rotated -> [T, heads * D]."""
        spec = self._spec
        assert isinstance(spec, AttnSpec)
        if spec.qk_norm:
            split = self._op("Reshape", x, self._ints([-1, heads, spec.head_dim]))
            split = self._norm(split, self._weight(norm, (spec.head_dim,)), spec.rms_norm_eps)
            x = self._op("Reshape", split, self._ints([-1, heads * spec.head_dim]))
        wide = self._op("Unsqueeze", self._cast(x, "f32"), self._ints([0]))
        rotated = self._op("RotaryEmbedding", wide, cos, sin, num_heads=heads)
        return self._cast(self._op("Squeeze", rotated, self._ints([0])), self._dtype)

    def _half_table(self, name: str, head_dim: int) -> str:
        """cos or sin [T, D], whose halves are equal -> [1, T, D / 2]."""
        table = self._input(name, "f32", ("T", head_dim))
        half = self._op("Slice", table, self._ints([0]), self._ints([head_dim // 2]), self._ints([1]))
        return self._op("Unsqueeze", half, self._ints([0]))

    def _linear(self, x: str, name: str, width: int, outs: Sequence[int]) -> str:
        """x times the stacked matrices `name` [sum(outs), width], and what adapters add."""
        product = self._op("Gemm", x, self._weight(name, (sum(outs), width)), transB=1)
        if not self._ranks:
            return product
        ranks = len(outs) * self._ranks
        a = self._input(f"{name}.lora_a", self._dtype, (ranks, width))
        b = self._input(f"{name}.lora_b", self._dtype, (sum(outs), ranks))
        if not any(value.name == "lora_mask" for value in self._inputs):
            self._input("lora_mask", self._dtype, ("T", self._ranks))
        mask = self._op("Concat", *["lora_mask"] * len(outs), axis=1) if len(outs) > 1 else "lora_mask"
        narrow = self._op("Mul", self._op("Gemm", x, a, transB=1), mask)
        return self._op("Add", product, self._op("Gemm", narrow, b, transB=1))

    def _cast(self, x: str, dtype: Dtype) -> str:
        return x if dtype == self._dtype == "f32" else self._op("Cast", x, to=_TYPES[dtype])

    # ---- graph building

    def _op(self, kind: str, *inputs: str, **attributes: object) -> str:
        return self._ops(kind, inputs, 1, **attributes)[0]

    def _ops(self, kind: str, inputs: Sequence[str], count: int, **attributes: object) -> list[str]:
        outputs = [f"{kind.lower()}.{len(self._nodes)}.{i}" for i in range(count)]
        self._nodes.append(helper.make_node(kind, list(inputs), outputs, **attributes))
        return outputs

    def _ints(self, values: Sequence[int]) -> str:
        name = "ints." + ".".join(map(str, values))
        if not any(constant.name == name for constant in self._constants):
            self._constants.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def _input(self, name: str, dtype: Dtype, shape: Sequence[int | str]) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, _TYPES[dtype], list(shape)))
        return name

    def _weight(self, name: str, shape: tuple[int, ...]) -> str:
        if self._baked is None:
            return self._input(name, self._dtype, shape)
        tensor = self._baked[name]
        if tensor.shape != shape or tensor.dtype != self._dtype:
            raise ValueError(
                f"weight {name} is {tensor.dtype} {tensor.shape}; expected {self._dtype} {shape}"
            )
        raw = np.ascontiguousarray(tensor.data).tobytes()
        self._constants.append(helper.make_tensor(name, _TYPES[self._dtype], shape, raw, raw=True))
        return name


def network_inputs(model: onnx.ModelProto) -> tuple[NetworkInput, ...]:
    """Inputs of a network, in order."""
    return tuple(_described(value) for value in model.graph.input)


def network_outputs(model: onnx.ModelProto) -> tuple[NetworkInput, ...]:
    """Outputs of a network, in order."""
    return tuple(_described(value) for value in model.graph.output)


def _described(value: onnx.ValueInfoProto) -> NetworkInput:
    names: dict[int, Dtype] = {number: name for name, number in _TYPES.items()}  # type: ignore[misc]
    kind = value.type.tensor_type
    shape = tuple(-1 if dim.dim_param else dim.dim_value for dim in kind.shape.dim)
    return NetworkInput(value.name, names[kind.elem_type], shape)
