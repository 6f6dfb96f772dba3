"""OpenVINO graphs of spans: blocks -> one `openvino.Model` around the paged attention operator.

All layers of a span write to one KV pool through one pair of cache parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np
import openvino as ov
import openvino.opset15 as op
from openvino import Model, PartialShape, Type
from openvino.op import Parameter, _PagedAttentionExtension

from blockzoo.engines.base import Precision, SpanSpec
from blockzoo.engines.openvino.tiles import products as adapted_products
from blockzoo.engines.openvino.weights import TYPES, Node, Rounding, constant, products
from blockzoo.zoo.blocks import AttnSpec, Block, BlockTensor, FfnSpec, HeadSpec


def build_span(
    blocks: Sequence[Block],
    spec: SpanSpec,
    precision: Precision,
    rounding: Rounding | None = None,
    attends_in_bf16: bool = False,
) -> Model:
    """The graph of consecutive blocks; inputs and outputs are named as in `engines.base.Engine`.

    Args:
        precision: of hidden states, and of K and V where these are not in 8 bits.
        rounding: of activations to 8 bits; None: they stay as they are.
        attends_in_bf16: whether attention alone is computed in bf16, for the pages' sake.
    """
    return _SpanBuilder(spec, precision, rounding, attends_in_bf16).build(blocks)


def _vector(tensor: BlockTensor) -> Node:
    """Norm weights and biases: small, kept in f32."""
    return op.constant(np.ascontiguousarray(tensor.to_f32()))


def _rms_norm(x: Node, weight: BlockTensor, eps: float) -> Node:
    mean = op.reduce_mean(op.power(x, constant(2.0, np.float32)), constant([-1]), keep_dims=True)
    scale = op.divide(constant(1.0, np.float32), op.sqrt(op.add(mean, constant(eps, np.float32))))
    return op.multiply(op.multiply(x, scale), _vector(weight))


def _rotate(x: Node, cos: Node, sin: Node, head_dim: int) -> Node:
    """Rotary embedding in the half-split layout; this exact pattern is fused by the CPU plugin."""
    half = head_dim // 2
    low = op.slice(x, constant([0]), constant([half]), constant([1]), constant([3]))
    high = op.slice(x, constant([half]), constant([2**31 - 1]), constant([1]), constant([3]))
    rotated = op.concat([op.multiply(high, constant(-1.0, np.float32)), low], -1)
    return op.add(op.multiply(x, cos), op.multiply(rotated, sin))


def to_bf16(x: Node) -> Node:
    """To nearest. The plugin's own conversion gives a quarter of values a step too low, so x is rounded to as
    many bits before, by Dekker's splitting (A floating-point technique for extending the available precision,
    1971)."""
    scaled = op.multiply(x, constant(2**16 + 1, np.float32))
    return op.convert(op.subtract(scaled, op.subtract(scaled, x)), "bf16")


class _SpanBuilder:
    def __init__(
        self, spec: SpanSpec, precision: Precision, rounding: Rounding | None, attends_in_bf16: bool
    ) -> None:
        self._spec, self._rounding, self._attends_in_bf16 = spec, rounding, attends_in_bf16
        self._dtype = TYPES[precision]
        self._params: list[Parameter] = []
        self._rows: Node | None = None
        self._lora = {product.name: product for product in adapted_products(spec)}
        self._adapted = {index for index, _ in spec.lora}  # blocks
        self._lora_inputs: dict[str, Node] = {}
        self._dropped = False
        self._meta: dict[str, Node] = {}
        self._scores: list[Node] = []  # of each layer

    def build(self, blocks: Sequence[Block]) -> Model:
        spec = self._spec
        x = self._to_f32(self._param("hidden", self._dtype, [-1, spec.hidden_size]))
        if spec.drops_rows:
            self._rows = self._param("rows", Type.i32, [-1])
        if spec.layers:
            self._attention_params(spec.layers[0].head_dim)
        elif spec.drops_rows:
            x = self._keep_rows(x)
        layer = 0
        for index, block in enumerate(blocks):
            if isinstance(block.spec, AttnSpec):
                x = self._attention(x, block, block.spec, layer, index)
                layer += 1
            elif isinstance(block.spec, FfnSpec):
                x = self._ffn(x, block, block.spec, index)
            elif isinstance(block.spec, HeadSpec):
                x = self._head(x, block, block.spec)
        name = "logits" if spec.head else "hidden_out"
        output = x if spec.head or self._dtype == Type.f32 else op.convert(x, self._dtype)
        result = op.result(output)
        result.input_value(0).get_tensor().set_names({name})
        return Model([result, *self._summed_scores()], self._params, "span")

    def _summed_scores(self) -> list[Node]:
        """The output `scores`, where there are any."""
        if not self._scores:
            return []
        result = op.result(reduce(op.add, self._scores))
        result.input_value(0).get_tensor().set_names({"scores"})
        return [result]

    def _param(self, name: str, dtype: Type, shape: list[int] | PartialShape) -> Parameter:
        shape = shape if isinstance(shape, PartialShape) else PartialShape(shape)
        param = Parameter(dtype, shape)
        param.set_friendly_name(name)
        param.output(0).get_tensor().set_names({name})
        self._params.append(param)
        return param

    def _to_f32(self, x: Node) -> Node:
        return x if self._dtype == Type.f32 else op.convert(x, "f32")

    def _keep_rows(self, x: Node) -> Node:
        """Let the other rows leave."""
        self._dropped = True
        return op.gather(x, self._rows, constant(0))

    def _lora_input(self, name: str) -> Node:
        """`lora_rows` or `lora_back`, or those of the rows that stay once the others have left."""
        full = f"lora_{'kept_' if self._dropped else ''}{name}"
        if full not in self._lora_inputs:
            shape = [-1, -1] if name == "rows" else [-1]
            self._lora_inputs[full] = self._param(full, Type.i32, shape)
        return self._lora_inputs[full]

    def _adapted_rows(self, x: Node, index: int) -> Node:
        """The rows of x that adapters work on, for `_add_lora`, [tiles, rows, features]."""
        if index not in self._adapted:
            return x
        return op.gather(x, self._lora_input("rows"), constant(0))

    def _add_lora(self, y: Node, x: Node, index: int, name: str) -> Node:
        """y, the outputs of a product, with what the adapters add, given the adapted rows of its input."""
        product = self._lora.get(f"{index}.{name}")
        if product is None:
            return y
        mask, a, b = (
            self._to_f32(self._param(f"lora_{which}.{product.name}", self._dtype, [-1, *shape]))
            for which, shape in (
                ("mask", (-1, -1)),
                ("a", (product.depth, -1)),
                ("b", (-1, product.width)),
            )
        )
        delta = op.matmul(op.multiply(op.matmul(x, a, False, False), mask), b, False, False)
        rows = op.reshape(delta, constant([-1, product.width]), False)
        return op.add(y, op.gather(rows, self._lora_input("back"), constant(0)))

    def _project(self, x: Node, adapted: Node, block: Block, index: int, name: str) -> Node:
        """x W^T, with the bias and the adapters' part where there are any; `adapted`: see `_adapted_rows`."""
        y, bias = products(x, [block.tensors[name]], self._rounding), block.tensors.get(f"{name}_bias")
        y = y if bias is None else op.add(y, _vector(bias))
        return self._add_lora(y, adapted, index, name)

    def _attention_params(self, head_dim: int) -> None:
        for name in ("cos", "sin"):
            self._meta[name] = self._param(name, Type.f32, [-1, 1, 1, head_dim])
        for name in ("key_cache", "value_cache"):
            self._meta[name] = self._param(name, Type.dynamic, PartialShape.dynamic(4))
        for name in ("past_lens", "subsequence_begins", "block_indices_begins"):
            self._meta[name] = self._param(name, Type.i32, [-1])
        self._meta["max_context_len"] = self._param("max_context_len", Type.i32, [])
        if self._spec.scores:
            self._meta["score_windows"] = self._param("score_windows", Type.i32, [-1])

    def _attention(self, x: Node, block: Block, spec: AttnSpec, layer: int, index: int) -> Node:
        t = block.tensors
        normed = _rms_norm(x, t["norm"], spec.rms_norm_eps)
        qkv = products(normed, [t["q"], t["k"], t["v"]], self._rounding)
        if spec.qkv_bias:
            biases = np.concatenate([t[name].to_f32() for name in ("q_bias", "k_bias", "v_bias")])
            qkv = op.add(qkv, op.constant(biases))
        qkv = self._add_lora(qkv, self._adapted_rows(normed, index), index, "qkv")
        kv_width = spec.num_kv_heads * spec.head_dim
        sizes = constant([spec.num_heads * spec.head_dim, kv_width, kv_width])
        q, k, v = op.variadic_split(qkv, constant(1), sizes).outputs()
        q = self._heads(q, spec, spec.num_heads, t.get("q_norm"))
        k = self._heads(k, spec, spec.num_kv_heads, t.get("k_norm"))
        attended = self._paged_attention(q, k, v, spec, layer)
        if self._spec.drops_rows and layer == len(self._spec.layers) - 1:
            attended = op.gather(attended, self._rows, constant(0))
            x = self._keep_rows(x)
        return op.add(x, self._project(attended, self._adapted_rows(attended, index), block, index, "o"))

    def _heads(self, x: Node, spec: AttnSpec, heads: int, norm: BlockTensor | None) -> Node:
        """[T, heads * D] -> per-head norm where the model has one -> rotated -> [T, heads * D]."""
        x = op.reshape(x, constant([-1, 1, heads, spec.head_dim]), False)
        if norm is not None:
            x = _rms_norm(x, norm, spec.rms_norm_eps)
        x = op.transpose(x, constant([0, 2, 1, 3]))
        x = _rotate(x, self._meta["cos"], self._meta["sin"], spec.head_dim)
        x = op.transpose(x, constant([0, 2, 1, 3]))
        return op.reshape(x, constant([-1, heads * spec.head_dim]), False)

    def _paged_attention(self, q: Node, k: Node, v: Node, spec: AttnSpec, layer: int) -> Node:
        meta = self._meta
        page_ids = self._param(f"block_indices.{layer}", Type.i32, [-1])
        none_i32, none_f32 = (op.constant(np.zeros(0, dtype=d)) for d in (np.int32, np.float32))
        zero = constant(0, np.int32)
        if self._attends_in_bf16:
            q, k, v = (to_bf16(each) for each in (q, k, v))
        inputs = [q, k, v, meta["key_cache"], meta["value_cache"]]
        inputs += [meta["past_lens"], meta["subsequence_begins"], page_ids, meta["block_indices_begins"]]
        inputs += [constant(spec.head_dim**-0.5, np.float32), constant(spec.sliding_window, np.int32)]
        windows = meta.get("score_windows", none_i32)
        inputs += [none_f32, meta["max_context_len"], windows]  # alibi slopes, ., .
        inputs += [none_i32, none_i32, none_f32]  # cache rotation
        inputs += [none_f32, zero, zero]  # sparse attention
        inputs += [none_f32, zero, none_i32, none_i32, none_i32]  # sinks, eviction
        inputs += [none_i32, op.constant(np.zeros(0, dtype=np.uint8)), none_i32]  # token types, qq bias
        outputs = [node.output(0) if isinstance(node, ov.Node) else node for node in inputs]
        attention = _PagedAttentionExtension(outputs)
        info = attention.get_rt_info()
        info["num_k_heads"] = info["num_v_heads"] = spec.num_kv_heads
        info["k_head_size"] = info["v_head_size"] = spec.head_dim
        if self._spec.scores:
            self._scores.append(attention.output(1))
        attended = attention.output(0)
        return op.convert(attended, "f32") if self._attends_in_bf16 else attended

    def _ffn(self, x: Node, block: Block, spec: FfnSpec, index: int) -> Node:
        normed = _rms_norm(x, block.tensors["norm"], spec.rms_norm_eps)
        adapted = self._adapted_rows(normed, index)
        gate = self._project(normed, adapted, block, index, "gate")
        up = self._project(normed, adapted, block, index, "up")
        inner = op.multiply(op.swish(gate), up)
        return op.add(x, self._project(inner, self._adapted_rows(inner, index), block, index, "down"))

    def _head(self, x: Node, block: Block, spec: HeadSpec) -> Node:
        normed = _rms_norm(x, block.tensors["norm"], spec.rms_norm_eps)
        return products(normed, [block.tensors["weight"]], self._rounding)
