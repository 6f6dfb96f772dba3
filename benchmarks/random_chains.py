"""Chains with random weights that are made where they are used: no checkpoint, no disk, no tokenizer."""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np
import torch

from blockzoo.engines.reference import ReferenceEngines
from blockzoo.engines.reference.arrays import TORCH_DTYPES
from blockzoo.engines.reference.blocks import Weights
from blockzoo.runtime.exec.adapters import AdapterCache, AdapterInputs
from blockzoo.runtime.exec.executor import Executor, Rows
from blockzoo.runtime.exec.topology import plan_topology
from blockzoo.zoo.blocks import (
    PROJECTIONS,
    Adapter,
    AdapterSpec,
    Block,
    BlockSpec,
    BlockTensor,
    EmbedSpec,
    HeadSpec,
    LoraSpec,
    chain_specs,
    tensor_shapes,
)
from blockzoo.zoo.manifest import AdapterRecord, BlockRecord, Manifest, ModelRecord, SourceRecord
from blockzoo.zoo.model_config import ModelConfig

_TINY = {  # for dry runs
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 256,
}
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {  # Llama-3.1-8B
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "0.5b": {  # Qwen2.5-0.5B without its biases
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
    "tiny": _TINY,
    "deep": _TINY | {"num_hidden_layers": 32},  # as many layers as the 8B
}


def hf_config(shape: str) -> dict[str, Any]:
    """The config.json of a shape."""
    common = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5}
    lengths = {"max_position_embeddings": 8192, "rope_theta": 500000.0, "tie_word_embeddings": False}
    return common | lengths | SHAPES[shape]


class RandomWeights(Weights):
    """Weights drawn on the device when they are first asked for, scaled to keep activations in range.

    Equal names of equal blocks give equal weights, in whatever order they are asked for.
    """

    def load(self, block: Block, *names: str) -> torch.Tensor:
        """The block's random tensors of these names on top of each other."""
        key = (block.id, *names)
        tensor = self._loaded.get(key)
        if tensor is None:
            shapes = tensor_shapes(block.spec)
            rows = sum(shapes[name][0] for name in names)
            rest = shapes[names[0]][1:]
            tensor = torch.empty(rows, *rest, dtype=self._dtype, device=self._device)
            if rest:
                deviation = 1.0 if isinstance(block.spec, EmbedSpec) else rest[0] ** -0.5
                seed = zlib.crc32(" ".join(key).encode())
                generator = torch.Generator(self._device).manual_seed(seed)
                tensor.normal_(0.0, deviation, generator=generator)
            else:
                tensor.fill_(1.0)
            self._loaded[key] = tensor
        return tensor

    matrix = load


def _adapter_spec(spec: BlockSpec, rank: int) -> AdapterSpec:
    shapes = tensor_shapes(spec)
    return AdapterSpec(
        tuple(LoraSpec(name, rank, shapes[name][1], shapes[name][0], 1.0) for name in PROJECTIONS[spec.kind])
    )


def _random_adapter(key: str, manifest: Manifest) -> Adapter:
    rng, spec = np.random.default_rng(zlib.crc32(key.encode())), manifest.adapters[key].spec
    tensors = {
        name: BlockTensor("f32", rng.standard_normal(shape, np.float32) / np.float32(10 * shape[-1] ** 0.5))
        for name, shape in tensor_shapes(spec).items()
    }
    return Adapter(key, spec, tensors)


class RandomZoo:
    """Models of one shape that share their lower layers, and an executor over them.

    Args:
        shape: of `SHAPES`.
        engines: torch engines; their weights are replaced by random ones.
        models: how many.
        shared_layers: the layers that all models have in common; embedding and head always are.
        max_tokens, max_seqs: of a step.
        context: longest sequence.
        sequences: how many have pages of their own; None: `max_seqs`.
        lora_rank: of an adapter on every projection that each model but the first has; 0: none has.
    """

    def __init__(
        self,
        shape: str,
        engines: ReferenceEngines,
        models: int = 1,
        shared_layers: int = 0,
        *,
        max_tokens: int,
        max_seqs: int,
        context: int,
        sequences: int | None = None,
        lora_rank: int = 0,
    ) -> None:
        self.config = ModelConfig.from_hf(hf_config(shape), None)
        self.engines, self.context = engines, context
        self.weights = engines.weights = RandomWeights(TORCH_DTYPES[engines.precision], engines.device)
        manifest = self._manifest(models, shared_layers, lora_rank)
        self.topology = plan_topology(manifest)
        chains, spans = self.topology.chains, self.topology.spans
        blocks = {i: self._block(i, record) for i, record in manifest.blocks.items()}
        compiled = {
            i: engines.span(
                [blocks[b] for b in span.block_ids], drops_rows=span.drops_rows, lora=dict(span.lora)
            )
            for i, span in enumerate(spans)
        }
        cache = AdapterCache(lambda key: _random_adapter(key, manifest), engines.arrays, 1 << 30)
        specs = [[blocks[b].spec for b in span.block_ids] for span in spans]
        self.pages_per_seq = -(-context // 32)
        self.num_pages = (sequences or max_seqs) * self.pages_per_seq * chains[0].num_layers
        tables = self.config.rope.tables(self.config.head_dim, context)
        self.executor = Executor(
            chains[0].family,
            chains,
            spans,
            compiled,
            {c.embed_id: engines.embedding(blocks[c.embed_id]) for c in chains},
            dict.fromkeys(range(len(chains)), tables),
            engines.arrays,
            self.num_pages,
            max_tokens,
            max_seqs,
            adapters=AdapterInputs(cache, chains, spans, specs),
        )

    def _manifest(self, models: int, shared: int, lora_rank: int) -> Manifest:
        manifest = Manifest()
        source = SourceRecord("hf", "random", "bf16", None, None)
        for model in range(models):
            chain = []
            for i, spec in enumerate(chain_specs(self.config)):
                common = i <= 2 * shared or isinstance(spec, HeadSpec)
                block_id = f"{i:03}-{'shared' if common else model}"
                chain.append(block_id)
                size = 2 * sum(math.prod(dims) for dims in tensor_shapes(spec).values())
                manifest.blocks[block_id] = BlockRecord(spec, "bf16", size, None, "", None, None)
            adapters = {}
            for i, spec in enumerate(chain_specs(self.config)):
                if model and lora_rank and spec.kind in PROJECTIONS:
                    adapters[i] = f"{i:03}-{model}"
                    manifest.adapters[adapters[i]] = AdapterRecord(_adapter_spec(spec, lora_rank), "f32", 0)
            manifest.models[f"m{model}"] = ModelRecord(self.config, tuple(chain), "", source, None, adapters)
        return manifest

    @staticmethod
    def _block(block_id: str, record: BlockRecord) -> Block:
        names: dict[str, Any] = dict.fromkeys(tensor_shapes(record.spec))
        return Block(block_id, record.spec, names)

    def rows(self, seq: int, model: int, num_tokens: int, past: int) -> Rows:
        """New tokens of sequence number `seq`, which has pages of its own."""
        chain = self.topology.chain_of_model[f"m{model}"]
        layers = self.topology.chains[chain].num_layers
        first = seq * layers * self.pages_per_seq
        table = np.arange(first, first + layers * self.pages_per_seq, dtype=np.int32)
        ids = np.random.default_rng(seq).integers(0, self.config.vocab_size, num_tokens, dtype=np.int32)
        return Rows(chain, ids, past, table.reshape(layers, -1), True)

    def step_bytes(self, num_seqs: int, past: int) -> int:
        """Bytes that a decode step must read: all weights but the embedding table, and the K and V."""
        config = self.config
        item = 2 if self.engines.precision == "bf16" else 4
        table = config.vocab_size * config.hidden_size * item
        kv = 2 * config.num_layers * config.num_kv_heads * config.head_dim * item
        return self.weights.num_bytes - table + num_seqs * past * kv

    def step_flops(self, num_tokens: int) -> float:
        """Multiplications and additions of a prefill from position 0, logits of the last token only."""
        config = self.config
        matrices = [
            math.prod(dims)
            for spec in chain_specs(config)[1:-1]
            for dims in tensor_shapes(spec).values()
            if len(dims) == 2
        ]
        attention = 2.0 * config.num_layers * config.num_heads * config.head_dim * num_tokens**2
        head = 2.0 * config.vocab_size * config.hidden_size
        return 2.0 * sum(matrices) * num_tokens + attention + head


def run_steps(zoo: RandomZoo, prompt: int = 40, steps: int = 6) -> list[np.ndarray]:
    """For tests: logits of a prefill of three models, then of decode steps of them in equal shapes."""
    found = zoo.executor.run([zoo.rows(i, i, prompt, 0) for i in range(3)])
    results = [np.concatenate([rows.copy() for rows, _ in found.logits])]
    for step in range(steps):
        batch = [zoo.rows(i, i, 1, prompt + step) for i in range(3)]
        batch += [zoo.rows(3 + i, 0, 1, step) for i in range(2)]  # three of one model: padded to four
        found = zoo.executor.run(batch)
        order = [index for _, indices in found.logits for index in indices]
        assert sorted(order) == list(range(len(batch)))
        logits = np.concatenate([rows for rows, _ in found.logits])
        results.append(logits[np.argsort(order)].copy())
    return results
