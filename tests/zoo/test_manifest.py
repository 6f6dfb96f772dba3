import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from blockzoo.zoo.blocks import AdapterSpec, LoraSpec, chain_specs
from blockzoo.zoo.errors import ManifestError
from blockzoo.zoo.manifest import (
    AdapterRecord,
    BlockRecord,
    DeltaRecord,
    LossFigures,
    LossRecord,
    Manifest,
    ModelRecord,
    OptimizationProfileRecord,
    PlanRecord,
    RecoveryRecord,
    SourceRecord,
    VerificationFigures,
    VerificationRecord,
)
from blockzoo.zoo.model_config import ModelConfig
from blockzoo.zoo.strict_json import encode

CONFIG = ModelConfig.from_hf(
    {
        "architectures": ["MistralForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "vocab_size": 32,
        "max_position_embeddings": 4096,
        "rope_theta": 10000,
    }
)


def make() -> Manifest:
    manifest = Manifest()
    profile = OptimizationProfileRecord("decode", 1, 8, 64)
    for spec in chain_specs(CONFIG):
        manifest.plans[f"plan-{spec.kind}"] = PlanRecord(
            "openvino", spec, "bf16", (profile,), {"openvino": "1"}
        )
        manifest.blocks[spec.kind] = BlockRecord(
            spec, "bf16", 100, None, f"plan-{spec.kind}", {1: 5.0, 8: 7.5}, spec.kind
        )
    checked = VerificationRecord("o", 8, 256, 1e-3, {"f32": VerificationFigures(1.0, 1e-6)}, None, None)
    source = SourceRecord("peft", "folder", "f32", "bf16", "base")
    lora = LoraSpec("q", rank=4, in_features=64, out_features=64, scale=2.0)
    manifest.adapters["lora"] = AdapterRecord(AdapterSpec((lora,)), "bf16", 1024)
    manifest.models["m"] = ModelRecord(
        config=CONFIG,
        chain=("embed", "attn", "ffn", "head"),
        tokenizer="t",
        source=source,
        verification=checked,
        adapters={1: "lora"},
        recovery=RecoveryRecord({1: "own"}, 4, 0.9),
    )
    return manifest


def test_round_trip() -> None:
    manifest = make()
    read = Manifest.from_text(manifest.to_text())
    assert read == manifest
    assert read.to_text() == manifest.to_text()
    assert read.models["m"].config.layer_windows == (4096,)
    assert read.blocks["attn"].latency_us == {1: 5.0, 8: 7.5}


def test_a_manifest_from_before_end_tokens_is_read() -> None:
    data = encode(make())
    assert data["models"]["m"].pop("eos_token_ids") is None
    model = Manifest.from_text(json.dumps(data)).models["m"]
    assert model.end_ids == model.config.eos_token_ids
    assert replace(model, eos_token_ids=(5,)).end_ids == (5,)


def test_a_model_is_what_it_was_before_differences_were_taken() -> None:
    figures = LossFigures(1e-3, 0.1, 0.99)
    loss = LossRecord(figures, figures, 1.0, 0.0, 64)
    model = make().models["m"]
    own = replace(model, recovery=None, adapters={2: "other"}, chain=("embed", "own", "ffn", "head"))
    delta = DeltaRecord({1: "own"}, rank=4, share=0.1, max_kl=1e-3, loss=loss, probe="built-in")
    stored = replace(own, chain=model.chain, adapters={1: "lora", 2: "other"}, delta=delta)
    assert replace(stored.with_own_blocks(), delta=None) == own
    data = encode(make())
    data["models"]["m"]["delta"] = encode(replace(delta, own_blocks={9: "own"}))
    with pytest.raises(ManifestError, match=r"delta.own_blocks.9: beyond the chain"):
        Manifest.from_text(json.dumps(data))


def test_config_round_trip() -> None:
    assert ModelConfig.from_json(json.loads(json.dumps(CONFIG.to_json()))) == CONFIG
    with pytest.raises(ManifestError, match=r"config: missing field 'rope'"):
        ModelConfig.from_json({k: v for k, v in CONFIG.to_json().items() if k != "rope"})


def _set(*path: str | int, value: Any) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        if value is ...:
            del data[path[-1]]
        else:
            data[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_set("schema_version", value=1), "schema_version is 1, this blockzoo reads 2"),
        (_set("schema_version", value=...), "schema_version is None"),
        (_set("extra", value=1), "unknown field 'extra'"),
        (_set("models", "../../evil", value=encode(make().models["m"])), r"models: '../../evil' is no name"),
        (_set("models", "m", "tokenizer", value="../../t"), r"models.m.tokenizer: '../../t' is no name"),
        (_set("models", "m", "tokenizer", value=".."), r"'..' is no name"),
        (_set("adapters", "a/b", value=encode(make().adapters["lora"])), r"adapters: 'a/b' is no name"),
        (_set("blocks", "/etc/x", value=encode(make().blocks["attn"])), r"blocks: '/etc/x' is no name"),
        (_set("adapters", value={}), "there is no adapter 'lora'"),
        (_set("models", "m", "adapters", value={"2": "lora"}), "an adapter of q on ffn"),
        (_set("models", "m", "adapters", value={"7": "lora"}), "the chain has 4 blocks"),
        (_set("models", "m", "adapters", value={"x": "lora"}), "'x' is not a whole number"),
        (_set("models", "m", "adapters", value={}), "own_blocks.1: there is no adapter there"),
        (_set("adapters", "lora", "spec", "loras", value=[]), "an adapter of nothing on attn"),
        (_set("adapters", "lora", "spec", "kind", value="attn"), "expected 'adapter', seen 'attn'"),
        (_set("models", value=[]), r"models: expected dict, seen list"),
        (_set("blocks", "attn", "num_bytes", value=...), r"blocks.attn: missing field 'num_bytes'"),
        (
            _set("blocks", "attn", "num_bytes", value="1"),
            r"blocks.attn.num_bytes: expected int, seen str '1'",
        ),
        (_set("blocks", "attn", "num_bytes", value=True), r"num_bytes: expected int, seen bool True"),
        (_set("blocks", "attn", "num_bytes", value=1.5), r"num_bytes: expected int, seen float"),
        (_set("blocks", "attn", "dtype", value="int8"), r"dtype: 'int8' is not one of 'bf16', 'f16', 'f32'"),
        (_set("blocks", "attn", "spec", "kind", value="conv"), r"spec.kind: 'conv' is not one of"),
        (_set("blocks", "attn", "spec", "kind", value="ffn"), r"blocks.attn.spec: unknown field"),
        (_set("blocks", "attn", "latency_us", "x", value=1.0), r"the key 'x' is not a whole number"),
        (_set("blocks", "attn", "plan", value="gone"), r"there is no plan 'gone'"),
        (_set("blocks", "attn", "plan", value="plan-ffn"), r"plan of another shape class"),
        (_set("blocks", "head", "tied_to", value="embed"), r"tied_to: 'embed' contradicts its spec"),
        (_set("models", "m", "chain", 1, value="gone"), r"chain\[1\]: there is no block 'gone'"),
        (_set("models", "m", "chain", 1, value="ffn"), r"chain\[1\]: block ffn does not fit"),
        (_set("models", "m", "chain", value=["embed"]), r"chain: expected 4 blocks, seen 1"),
        (_set("models", "m", "config", "layer_windows", value=[]), r"layer_windows: expected 1 entries"),
        (_set("models", "m", "config", "rms_norm_eps", value=1e999), r"not a finite number"),
        (_set("models", "m", "verification", "figures", "f32", value=None), r"figures.f32: expected dict"),
    ],
)
def test_strict_reading_names_the_place(change: Callable[[Any], None], said: str) -> None:
    data = encode(make())
    change(data)
    with pytest.raises(ManifestError, match=said):
        Manifest.from_text(json.dumps(data))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', b"\xff\xfe"])
def test_other_files_are_refused(text: str | bytes) -> None:
    with pytest.raises(ManifestError):
        Manifest.from_text(text)


def test_a_tie_to_another_embedding_is_refused() -> None:
    manifest = make()
    config = replace(CONFIG, tie_word_embeddings=True)
    spec = chain_specs(config)[-1]
    manifest.plans["plan-head"] = replace(manifest.plans["plan-head"], spec=spec)
    manifest.blocks["head"] = replace(manifest.blocks["head"], spec=spec, tied_to="other")
    manifest.blocks["other"] = manifest.blocks["embed"]
    manifest.models["m"] = replace(manifest.models["m"], config=config)
    with pytest.raises(ManifestError, match="tied to other"):
        manifest.check("x")
