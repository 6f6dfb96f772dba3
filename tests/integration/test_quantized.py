"""Quantized blocks on every backend, against transformers and PEFT with the values that they stand for."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from blockzoo.build import calibration
from blockzoo.build.partition import chain_names
from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.build.tensorrt_plans import TensorRTOptions
from blockzoo.engines.base import EngineError, EngineMaker
from blockzoo.engines.choose import make_engines
from blockzoo.engines.openvino import OpenVINOEngines
from blockzoo.engines.openvino.engine import multiplies_int8
from blockzoo.engines.probe import ProbeChain
from blockzoo.engines.reference import ReferenceEngines
from blockzoo.engines.reference.arrays import PackedMatrices, PackedMatrix
from blockzoo.runtime import LLM, EngineConfig, LLMEngine, SamplingParams
from blockzoo.zoo.store import Zoo

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # of peft

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]}
IDS = np.random.default_rng(0).integers(2, 2048, 40).tolist()
BASES = {"int8": "llama-gqa-untied", "int4": "qwen2-bias-tied"}


@pytest.fixture(scope="module")
def zoos(
    architectures: dict[str, Path], make_lora: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """By precision, a zoo of a base and a LoRA, and the base as it was given."""
    root = tmp_path_factory.mktemp("quantized")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "NUM_TOKENS", 16)
        for weights, base in BASES.items():
            make_lora(architectures[base], root / f"lora-{weights}", 5, LORA)
            models = {"base": architectures[base], "lora": f"{root / f'lora-{weights}'}@base"}
            options = CompileOptions(weights=weights, verify=False, profile=False)  # type: ignore[arg-type]
            compile_models(models, root / weights, options)
            fast = CompileOptions(verify=False, profile=False)
            compile_models({"given": architectures[base]}, root / weights, fast)
    return {weights: root / weights for weights in BASES}


@pytest.fixture(scope="module")
def oracles(zoos: dict[str, Path], architectures: dict[str, Path]) -> dict[str, dict[str, torch.nn.Module]]:
    """By precision, transformers and PEFT models with the dequantized weights."""

    def load(weights: str) -> Any:
        model = AutoModelForCausalLM.from_pretrained(
            architectures[BASES[weights]], dtype=torch.float32
        ).eval()
        zoo = Zoo.open(zoos[weights])
        record, state = zoo.manifest.models["base"], model.state_dict()
        for key, names in zip(record.chain, chain_names(record.config), strict=True):
            tensors = zoo.read_block(key).tensors
            for name, hf in names.items():
                given = state[hf].numpy().copy()
                state[hf].copy_(torch.from_numpy(tensors[name].to_f32()))
                assert given.ndim == 1 or not np.array_equal(given, state[hf].numpy())
        return model

    return {
        w: {"base": load(w), "lora": PeftModel.from_pretrained(load(w), zoos[w].parent / f"lora-{w}").eval()}
        for w in zoos
    }


def logits_of(model: torch.nn.Module, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(torch.tensor([ids])).logits[0])


def probe(zoo: Path, name: str, engines: EngineMaker) -> np.ndarray:
    opened = Zoo.open(zoo)
    record = opened.manifest.models[name]
    blocks = [opened.read_block(key) for key in record.chain]
    adapters = {i: opened.read_adapter(key) for i, key in record.adapters.items()}
    return ProbeChain(engines, blocks, record.config, len(IDS), adapters).forward(IDS, 0)


@pytest.mark.parametrize("weights", BASES)
@pytest.mark.parametrize("model", ["base", "lora"])
@pytest.mark.parametrize("engines", [OpenVINOEngines, lambda p: ReferenceEngines(p, "cpu")])
def test_logits_are_those_of_the_values_that_blocks_stand_for(
    engines: Callable[[str], EngineMaker], model: str, weights: str, zoos: Any, oracles: Any
) -> None:
    expected = logits_of(oracles[weights][model], IDS)
    np.testing.assert_allclose(probe(zoos[weights], model, engines("f32")), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("weights", BASES)
def test_served_tokens_are_those_of_the_values_that_blocks_stand_for(
    weights: str, zoos: Any, oracles: Any
) -> None:
    """Rows of a base, of a LoRA on it and of the base as it was given, in one batch."""
    llm = LLM(zoos[weights], precision="f32", kv_cache_bytes=32 << 20)
    names = ["base", "lora", "given"] * 2
    rng = np.random.default_rng(1)
    prompts = [rng.integers(2, 2048, int(rng.integers(1, 70))).tolist() for _ in names]
    for name, done in zip(names, llm.generate(names, prompts, GREEDY, progress=False), strict=True):
        if name == "given":
            continue
        ids = [*done.prompt, *done.token_ids]
        expected = logits_of(oracles[weights][name], ids[:-1])[len(done.prompt) - 1 :].argmax(-1)
        assert tuple(expected.tolist()) == done.token_ids, name


@pytest.mark.parametrize("weights", BASES)
def test_beside_tensorrt_plans_they_stay_packed(
    weights: str, zoos: Any, oracles: Any, tmp_path: Path
) -> None:
    """With onnxruntime in the place of the GPU: a LoRA on quantized blocks, and the base as it was given."""
    pytest.importorskip("tensorrt_rtx")
    from onnx_device import onnx_engines

    zoo = Path(shutil.copytree(zoos[weights], tmp_path / "zoo"))
    given = probe(zoo, "given", OpenVINOEngines("f32"))
    plans = TensorRTOptions(targets=("sm89",), precision="f32")
    options = CompileOptions(verify=False, profile=False, tensorrt=plans)
    compile_models({}, zoo, options)
    engines = onnx_engines(Zoo.open(zoo))
    found = probe(zoo, "lora", engines)
    np.testing.assert_allclose(found, logits_of(oracles[weights]["lora"], IDS), atol=2e-4, rtol=1e-4)
    assert not engines.onnx.engines  # type: ignore[attr-defined]
    np.testing.assert_allclose(probe(zoo, "given", engines), given, atol=2e-4, rtol=1e-4)
    assert engines.onnx.engines  # type: ignore[attr-defined]
    compile_models({}, zoo, options, remove=["given"])
    left = Zoo.open(zoo)
    assert not left.manifest.tensorrt_plans
    np.testing.assert_allclose(probe(zoo, "lora", onnx_engines(left)), found, atol=1e-5, rtol=1e-5)


def test_reference_weights_stay_packed(zoos: Any) -> None:
    zoo = Zoo.open(zoos["int4"])
    chain = zoo.manifest.models["base"].chain
    engines = ReferenceEngines("f32", "cpu")
    span = engines.span([zoo.read_block(key) for key in chain[1:]])
    matrices = [m for m in engines.weights._loaded.values() if m.shape[0] > 1 and len(m.shape) == 2]
    assert all(isinstance(matrix, PackedMatrix | PackedMatrices) for matrix in matrices)
    stored = sum(zoo.manifest.blocks[key].num_bytes for key in chain)
    assert engines.weights.num_bytes == stored
    del span, matrices  # they go with who uses them
    assert engines.weights.num_bytes == 0


@pytest.mark.skipif(not multiplies_int8(), reason="this CPU has no VNNI")
@pytest.mark.parametrize("weights", BASES)
def test_rounded_activations_are_near_and_the_default_for_quantized_zoos(
    weights: str, zoos: Any, oracles: Any, tmp_path: Path
) -> None:
    expected = logits_of(oracles[weights]["lora"], IDS)
    found = probe(zoos[weights], "lora", OpenVINOEngines(int8_activations=True))
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert 1e-5 < error < 0.1
    assert not make_engines(zoo=Zoo.open(zoos[weights])).facts().get("activations")  # half is as given
    only = Path(shutil.copytree(zoos[weights], tmp_path / "only"))
    compile_models({}, only, CompileOptions(), remove=["given"])
    engine = LLMEngine(only, EngineConfig(kv_cache_bytes=32 << 20))
    from blockzoo.engines.openvino.engine import prefers_int8

    assert engine.engine_facts.get("activations") == ("int8" if prefers_int8() else None)
    assert "activations" not in LLMEngine(only, EngineConfig(precision="f32")).engine_facts


class Drafting:
    """A maker whose engines guess what others check."""

    def __init__(self, maker: EngineMaker) -> None:
        self._maker = maker

    def __getattr__(self, name: str) -> Any:
        return getattr(self._maker, name)

    def span(self, *given: Any, **named: Any) -> Any:
        return self._maker.span(*given, **named, drafts=True)


@pytest.mark.skipif(not multiplies_int8(), reason="this CPU has no VNNI")
@pytest.mark.parametrize(
    ("weights", "precision", "kv"),
    [("int4", "f32", None), ("int4", "bf16", None), ("int4", "bf16", "u8"), ("int8", "bf16", None)],
)
def test_drafts_round_activations_between_states_and_pages_of_the_others_kind(
    weights: str, precision: Any, kv: Any, zoos: Any, oracles: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blockzoo.engines.openvino.engine.prefers_int8", lambda: True)
    try:
        maker = OpenVINOEngines(precision, kv_precision=kv)
    except EngineError as error:
        pytest.skip(str(error))
    expected = logits_of(oracles[weights]["lora"], IDS)
    exact, drafts = (probe(zoos[weights], "lora", each) for each in (maker, Drafting(maker)))
    errors = [np.abs(found - expected).max() / np.abs(expected).max() for found in (exact, drafts)]
    assert 1e-5 < errors[1] < 0.1
    assert errors[0] < (1e-3 if precision == "f32" and kv is None else 0.1)
    given = [probe(zoos[weights], "given", each) for each in (maker, Drafting(maker))]
    np.testing.assert_array_equal(*given, err_msg="nothing is rounded where weights are not")


def test_rounded_activations_are_refused_where_they_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match="rounded from f32, and precision bf16 was asked for"):
        OpenVINOEngines("bf16", int8_activations=True)
    with pytest.raises(EngineError, match="the openvino backend's; reference has none"):
        make_engines("reference", int8_activations=True)
    monkeypatch.setattr("blockzoo.engines.openvino.engine.multiplies_int8", lambda: False)
    with pytest.raises(EngineError, match="lacks VNNI"):
        OpenVINOEngines(int8_activations=True)


def test_a_model_that_joins_is_weighed_as_it_is_stored(
    zoos: Any, architectures: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = CompileOptions(verify=False, profile=False)
    compile_models({"given": architectures[BASES["int8"]]}, tmp_path, options)
    engine = LLMEngine(tmp_path, EngineConfig(precision="f32"))
    shutil.copytree(zoos["int8"], tmp_path, dirs_exist_ok=True)
    zoo = Zoo.open(tmp_path)
    blocks = [zoo.read_block(key) for key in zoo.manifest.models["base"].chain[1:]]
    stored = sum(tensor.num_bytes for block in blocks for tensor in block.tensors.values())
    # in f32 they would be nearly four times as large; an engine that is compiled has its weights twice
    monkeypatch.setattr("blockzoo.runtime.serve.reload.available_memory", lambda: 2 * stored)
    assert engine.reload().added == ("base", "lora")


@pytest.mark.parametrize(
    "precision", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("f32", "bf16")), "int8"]
)
def test_weights_stay_packed_in_the_compiled_graph(
    precision: Any, demo_family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        engines = (
            OpenVINOEngines(int8_activations=True) if precision == "int8" else OpenVINOEngines(precision)
        )
    except EngineError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(calibration, "NUM_TOKENS", 16)
    options = CompileOptions(weights="int4", verify=False, profile=False)
    compile_models({"base": demo_family["base"]}, tmp_path / "z", options)
    zoo = Zoo.open(tmp_path / "z")
    engine = engines.span([zoo.read_block(key) for key in zoo.manifest.models["base"].chain[1:]])
    graph = engine._request.get_compiled_model().get_runtime_model()
    kinds: dict[str, list[str]] = {}
    for node in graph.get_ordered_ops():
        kind = node.get_rt_info()["layerType"].value
        if kind in ("FullyConnected", "MatMul"):
            kinds.setdefault(kind, []).append(str(node.input(1).get_element_type()))
    # q, o, gate, up and down of six layers in 4 bits; k and v, and the head, in 8; what rotates their inputs
    packed = [kind for kind in kinds["FullyConnected"] if "int" in kind]
    assert sorted(packed) == ["<Type: 'int4_t'>"] * 30 + ["<Type: 'int8_t'>"] * 7
    assert len(kinds["FullyConnected"]) - len(packed) == 6 * 4 + 1
    assert "MatMul" not in kinds
