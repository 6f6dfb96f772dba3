"""A checkpoint as the OpenVINO IR that optimum-intel exports for OpenVINO GenAI.

A stateful decoder: token ids in, logits of all tokens out, K and V per layer in variables that beams
reorder. GenAI turns the attention into its paged form when it loads the model; so what is built here
decides nothing but the weights and the order of the operators around the attention.

    python -m benchmarks.peers.ir CHECKPOINT FOLDER [int8|int4]

int8: one scale a row; int4: groups of 128 where they divide, embedding and head in int8: as exporters do.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset15 as op
from openvino import Model, PartialShape, Tensor, Type
from openvino.op import Constant, Parameter

from blockzoo.build.rounding import rounded
from blockzoo.engines.openvino.weights import openvino_tensor
from blockzoo.zoo.checkpoint import Checkpoint, open_checkpoint
from blockzoo.zoo.packing import QuantizedDtype
from blockzoo.zoo.tensors import BlockTensor

_GROUP = 128

Node = Any  # ov.Node or ov.Output


def write_ir(checkpoint: Path, folder: Path, weights: str | None = None) -> None:
    """Write model, tokenizer and configs for `openvino_genai` into `folder`. Weights keep their bf16 unless
    `weights` are "int8" or "int4"."""
    opened = open_checkpoint(checkpoint)  # must outlive the model, whose constants lie over its files
    model = _Decoder(opened, weights).build()
    ov.save_model(model, folder / "openvino_model.xml", compress_to_fp16=False)
    if weights is None:
        _mark_weights(folder / "openvino_model.xml")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        shutil.copy(checkpoint / name, folder / name)
    _write_tokenizer(checkpoint, folder)


def _mark_weights(xml: Path) -> None:
    """Mark the conversions of weights to f32, as exporters do and Python cannot: without it the plugin
    would carry them out at load and hold f32 copies of all weights."""
    text = xml.read_text()
    bare = re.compile(
        r'(<data destination_type="f32" />)(\s*)(<input>\s*<port id="0" precision="BF16">)', re.MULTILINE
    )
    mark = '<rt_info><attribute name="decompression" version="0" /></rt_info>'
    marked, count = bare.subn(rf"\1\2{mark}\2\3", text)
    if not count:
        raise RuntimeError(f"{xml}: no conversions of bf16 weights found; has the format of the IR changed?")
    xml.write_text(marked)


def _write_tokenizer(checkpoint: Path, folder: Path) -> None:
    from openvino_tokenizers import convert_tokenizer
    from transformers import PreTrainedTokenizerFast

    file = str(checkpoint / "tokenizer.json")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=file, bos_token="<s>", eos_token="</s>")
    converted = convert_tokenizer(tokenizer, with_detokenizer=True)
    for name, model in zip(("openvino_tokenizer.xml", "openvino_detokenizer.xml"), converted, strict=True):
        ov.save_model(model, folder / name)


def _const(value: object, dtype: Any = np.int64) -> Node:
    return op.constant(np.array(value, dtype=dtype))


def _quantized_weight(tensor: BlockTensor) -> Node:
    """The pattern of compressed weights: integers, converted and scaled, in groups or whole rows."""
    assert tensor.scales is not None
    (rows, columns), groups = tensor.shape, tensor.scales.shape[1]
    shape = [rows, columns] if groups == 1 else [rows, groups, columns // groups]
    integers = Constant(Tensor(tensor.data, shape, Type.i8 if tensor.dtype == "i8" else Type.i4), False)
    values = op.multiply(op.convert(integers, "f32"), op.constant(tensor.scales.reshape(*shape[:-1], 1)))
    return values if groups == 1 else op.reshape(values, _const([rows, columns]), False)


class _Decoder:
    def __init__(self, checkpoint: Checkpoint, weights: str | None) -> None:
        self._checkpoint, self._config, self._weights = checkpoint, checkpoint.config, weights
        self._params = {
            name: self._param(name, Type.i64, [-1, -1])
            for name in ("input_ids", "attention_mask", "position_ids")
        }
        self._params["beam_idx"] = self._param("beam_idx", Type.i32, [-1])
        self._sinks: list[Node] = []

    def build(self) -> Model:
        """The whole model; inputs input_ids, attention_mask, position_ids [B, T] int64, beam_idx [B]."""
        config = self._config
        embedding = self._weight("model.embed_tokens.weight")
        x = op.gather(embedding, self._params["input_ids"], _const(0))
        cos, sin = self._rotary_tables()
        mask = self._causal_mask()
        for layer in range(config.num_layers):
            prefix = f"model.layers.{layer}."
            normed = self._rms_norm(x, f"{prefix}input_layernorm.weight")
            x = op.add(x, self._attention(normed, f"{prefix}self_attn.", layer, cos, sin, mask))
            normed = self._rms_norm(x, f"{prefix}post_attention_layernorm.weight")
            x = op.add(x, self._ffn(normed, f"{prefix}mlp."))
        logits = op.matmul(self._rms_norm(x, "model.norm.weight"), embedding, False, True)
        result = op.result(logits)
        result.input_value(0).get_tensor().set_names({"logits"})
        return Model([result], self._sinks, list(self._params.values()), "decoder")

    @staticmethod
    def _param(name: str, dtype: Type, shape: list[int]) -> Parameter:
        param = Parameter(dtype, PartialShape(shape))
        param.set_friendly_name(name)
        param.output(0).get_tensor().set_names({name})
        return param

    def _weight(self, name: str) -> Node:
        tensor = self._checkpoint.tensor(name)
        if self._weights is not None:
            columns = tensor.shape[1]
            four = self._weights == "int4" and name != "model.embed_tokens.weight" and columns % _GROUP == 0
            dtype: QuantizedDtype = "i4" if four else "i8"
            group = _GROUP if four else columns
            return _quantized_weight(rounded(tensor.to_f32(), dtype, group, rotate=False))
        constant = Constant(openvino_tensor(tensor.data, tensor.dtype), shared_memory=True)
        if tensor.dtype == "f32":
            return constant
        return op.convert(constant, "f32")

    def _vector(self, name: str) -> Node:
        return op.constant(np.ascontiguousarray(self._checkpoint.tensor(name).to_f32()))

    def _linear(self, x: Node, name: str) -> Node:
        y = op.matmul(x, self._weight(f"{name}.weight"), False, True)
        y.set_friendly_name(f"__module.{name}/MatMul")  # GenAI finds what a LoRA changes by this name
        bias = f"{name}.bias"
        return op.add(y, self._vector(bias)) if bias in self._checkpoint.files else y

    def _rms_norm(self, x: Node, weight: str) -> Node:
        mean = op.reduce_mean(op.power(x, _const(2.0, np.float32)), _const([-1]), keep_dims=True)
        root = op.sqrt(op.add(mean, _const(self._config.rms_norm_eps, np.float32)))
        return op.multiply(self._vector(weight), op.multiply(x, op.divide(_const(1.0, np.float32), root)))

    def _rotary_tables(self) -> tuple[Node, Node]:
        """cos and sin [B, 1, T, D] of the positions."""
        dim = self._config.head_dim
        exponents = np.arange(0, dim, 2, dtype=np.float64) / dim
        frequencies = op.constant((self._config.rope.theta**-exponents).astype(np.float32)[None, None, :])
        positions = op.convert(op.unsqueeze(self._params["position_ids"], _const(2)), "f32")
        angles = op.matmul(positions, frequencies, False, False)
        both = op.unsqueeze(op.concat([angles, angles], -1), _const(1))
        return op.cos(both), op.sin(both)

    def _causal_mask(self) -> Node:
        """Boolean [B, 1, T, total]: what each token attends to."""
        mask = self._params["attention_mask"]
        total = op.gather(op.shape_of(mask), _const(1), _const(0))
        keys = op.range(_const(0), total, _const(1), "i64")
        positions = op.unsqueeze(self._params["position_ids"], _const([1, 3]))
        visible = op.less_equal(keys, positions)
        kept = op.convert(op.unsqueeze(mask, _const([1, 2])), "boolean")
        return op.logical_and(visible, kept)

    def _heads(self, x: Node, count: int) -> Node:
        """[B, T, heads * D] -> [B, heads, T, D]."""
        split = op.reshape(x, _const([0, 0, count, self._config.head_dim]), True)
        return op.transpose(split, _const([0, 2, 1, 3]))

    def _rotate(self, x: Node, cos: Node, sin: Node) -> Node:
        half = self._config.head_dim // 2
        low = op.slice(x, _const([0]), _const([half]), _const([1]), _const([3]))
        high = op.slice(x, _const([half]), _const([2**63 - 1]), _const([1]), _const([3]))
        rotated = op.concat([op.multiply(high, _const(-1.0, np.float32)), low], -1)
        return op.add(op.multiply(x, cos), op.multiply(rotated, sin))

    def _attention(self, x: Node, prefix: str, layer: int, cos: Node, sin: Node, mask: Node) -> Node:
        config = self._config
        q = self._rotate(self._heads(self._linear(x, f"{prefix}q_proj"), config.num_heads), cos, sin)
        k = self._rotate(self._heads(self._linear(x, f"{prefix}k_proj"), config.num_kv_heads), cos, sin)
        v = self._heads(self._linear(x, f"{prefix}v_proj"), config.num_kv_heads)
        k, v = (
            self._repeated(self._with_past(new, f"past_key_values.{layer}.{name}"))
            for name, new in (("key", k), ("value", v))
        )
        scale = _const(config.head_dim**-0.5, np.float32)
        attended = op.scaled_dot_product_attention(q, k, v, mask, scale)
        width = config.num_heads * config.head_dim
        joined = op.reshape(op.transpose(attended, _const([0, 2, 1, 3])), _const([0, 0, width]), True)
        return self._linear(joined, f"{prefix}o_proj")

    def _with_past(self, new: Node, name: str) -> Node:
        """[B, kv_heads, past + T, D]: the variable's content and the new rows, which it is set to."""
        heads, dim = self._config.num_kv_heads, self._config.head_dim
        batch = op.gather(op.shape_of(self._params["input_ids"]), _const([0]), _const(0))
        empty_shape = op.concat([batch, _const([heads]), _const([0]), _const([dim])], 0)
        empty = op.broadcast(_const(0.0, np.float32), empty_shape)
        past = op.read_value(empty, name, Type.f32, PartialShape([-1, heads, -1, dim]))
        past = op.gather(past, self._params["beam_idx"], _const(0))
        both = op.concat([past, new], -2)
        self._sinks.append(op.assign(both, name))
        return both

    def _repeated(self, x: Node) -> Node:
        """[B, kv_heads, T, D] -> [B, heads, T, D]."""
        config = self._config
        group = config.num_heads // config.num_kv_heads
        wide = op.broadcast(
            op.unsqueeze(x, _const(2)), _const([1, 1, group, 1, 1]), broadcast_spec="BIDIRECTIONAL"
        )
        return op.reshape(wide, _const([0, config.num_heads, -1, config.head_dim]), True)

    def _ffn(self, x: Node, prefix: str) -> Node:
        gate, up = self._linear(x, f"{prefix}gate_proj"), self._linear(x, f"{prefix}up_proj")
        return self._linear(op.multiply(op.swish(gate), up), f"{prefix}down_proj")


if __name__ == "__main__":
    write_ir(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
