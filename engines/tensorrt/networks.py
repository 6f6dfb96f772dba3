"""ONNX networks of shape classes: what TensorRT compiles, and onnxruntime checks on any CPU.

An attention block is two networks, `attn_pre` and `attn_post`, with the paged attention kernel between
them; `ffn` and `head` are one each. Weights are inputs, so that one plan serves every block of its shape
class; baked, they are constants of the network and the plan is one block's alone.

Adapters are computed in the masked form (see `engines.base.Engine`; S-LoRA's arXiv 2311.03285 in dense
terms): y = x W^T + ((x A^T) * mask) B, with the ranks Q of all adapters of a call side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from blockzoo.engines.tensorrt.parts import PART_LORA, Part, part_lora, parts_of
from blockzoo.zoo.blocks import AttnSpec, BlockSpec, BlockTensor, Dtype, FfnSpec, HeadSpec

OPSET = 23  # RMSNormalization and RotaryEmbedding as operators
_IR_VERSION = 10
_TYPES = {"bf16": TensorProto.BFLOAT16, "f16": TensorProto.FLOAT16, "f32": TensorProto.FLOAT}


@dataclass(frozen=True, slots=True)
class NetworkInput:
    """An input or output of a network; in `shape`, -1 is the number of rows T and -2 that of ranks Q."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]

    @property
    def is_dynamic(self) -> bool:
        """Whether the shape depends on the number of rows or ranks."""
        return min(self.shape) < 0


def build_network(
    spec: BlockSpec,
    part: Part,
    dtype: Dtype,
    *,
    weights: Mapping[str, BlockTensor] | None = None,
    lora: Sequence[str] = (),
) -> onnx.ModelProto:
    """The ONNX model of one part of a shape class.

    Args:
        spec: the operator.
        part: one of `parts_of(spec)`.
        dtype: of activations and weights; norms and rotations are computed in float32 inside.
        weights: to bake in, by the names of `WEIGHT_PARTS`; None leaves them inputs.
        lora: projections of the part that take adapters, see `part_lora`.

    Inputs by name (T rows): x [T, hidden]; attn_pre: cos, sin float32 [T, head_dim]; attn_post: attended
    [T, heads * head_dim]; the weights as in the zoo ([out, in]); with adapters lora_mask [T, Q] and per
    projection lora_a.<projection> [Q, in], lora_b.<projection> [Q, out].
    Outputs: attn_pre: rotated [T, (heads + 2 kv_heads) * head_dim], q, k, v side by side as the attention
    kernel takes them; attn_post, ffn: y [T, hidden]; head: logits float32 [T, vocab].
    """
    network = _Network(spec, part, dtype, weights, lora)
    return network.build()


class _Network:
    def __init__(
        self,
        spec: BlockSpec,
        part: Part,
        dtype: Dtype,
        weights: Mapping[str, BlockTensor] | None,
        lora: Sequence[str],
    ) -> None:
        if part not in parts_of(spec):
            raise ValueError(f"a block of kind {spec.kind} has no part {part}; expected {parts_of(spec)}")
        if part_lora(part, lora) != tuple(lora):
            raise ValueError(f"adapters on {', '.join(lora)} of {part}; expected some of {PART_LORA[part]}")
        self._spec, self._part, self._dtype = spec, part, dtype
        self._baked, self._lora = weights, lora
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
        sizes = {"q": heads * dim, "k": kv_heads * dim, "v": kv_heads * dim}
        q, k, v = self._products(normed, "qkv", spec.hidden_size, sizes, spec.qkv_bias)
        q = self._rotated_heads(q, "q_norm", heads, cos, sin)
        k = self._rotated_heads(k, "k_norm", kv_heads, cos, sin)
        return "rotated", self._op("Concat", q, k, v, axis=1), self._dtype, width

    def _post(self, x: str) -> tuple[str, str, Dtype, int]:
        spec = self._spec
        assert isinstance(spec, AttnSpec)
        width = spec.num_heads * spec.head_dim
        attended = self._input("attended", self._dtype, ("T", width))
        (out,) = self._products(attended, "o", width, {"o": spec.hidden_size}, spec.o_bias)
        return "y", self._op("Add", x, out), self._dtype, spec.hidden_size

    def _ffn(self, x: str) -> tuple[str, str, Dtype, int]:
        spec = self._spec
        assert isinstance(spec, FfnSpec)
        hidden, inner = spec.hidden_size, spec.intermediate_size
        normed = self._norm(x, self._weight("norm", (hidden,)), spec.rms_norm_eps)
        gate, up = self._products(normed, "gate_up", hidden, {"gate": inner, "up": inner}, spec.bias)
        gated = self._op("Mul", self._op("Mul", gate, self._op("Sigmoid", gate)), up)
        (out,) = self._products(gated, "down", inner, {"down": hidden}, spec.bias)
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

    def _products(self, x: str, name: str, width: int, outs: Mapping[str, int], bias: bool) -> list[str]:
        """x times the stacked matrices `name` of projections of `outs` rows, with what adapters add."""
        total = sum(outs.values())
        y = self._op("Gemm", x, self._weight(name, (total, width)), transB=1)
        if bias:
            y = self._op("Add", y, self._weight(f"{name}_bias", (total,)))
        sizes = self._ints(list(outs.values())) if len(outs) > 1 else ""
        parts = self._ops("Split", [y, sizes], len(outs), axis=1) if len(outs) > 1 else [y]
        return [
            self._adapted(part, x, projection, width, outs[projection]) if projection in self._lora else part
            for part, projection in zip(parts, outs, strict=True)
        ]

    def _adapted(self, y: str, x: str, projection: str, width: int, out: int) -> str:
        if not any(value.name == "lora_mask" for value in self._inputs):
            self._input("lora_mask", self._dtype, ("T", "Q"))
        a = self._input(f"lora_a.{projection}", self._dtype, ("Q", width))
        b = self._input(f"lora_b.{projection}", self._dtype, ("Q", out))
        narrow = self._op("Mul", self._op("Gemm", x, a, transB=1), "lora_mask")
        return self._op("Add", y, self._op("Gemm", narrow, b))

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
    sizes = {"": None, "T": -1, "Q": -2}
    shape = tuple(sizes[dim.dim_param] or dim.dim_value for dim in kind.shape.dim)
    return NetworkInput(value.name, names[kind.elem_type], shape)
