"""LoRA folders as tenants: rows of many adapters and of the bare base in one batch, against PEFT."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.build.tensorrt_plans import TensorRTOptions
from blockzoo.engines.openvino import OpenVINOEngines
from blockzoo.engines.probe import ProbeChain
from blockzoo.runtime import LLM, EngineConfig, LLMEngine, SamplingParams
from blockzoo.zoo.store import Zoo

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # of peft

MakeLora = Callable[[Path, Path, int, dict[str, Any]], None]
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "qv": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "all": {"r": 16, "lora_alpha": 24, "target_modules": ALL},
    "rslora": {"r": 7, "lora_alpha": 5, "target_modules": ["o_proj", "down_proj"], "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "gate_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 9},
        "alpha_pattern": {"gate_proj": 3},
    },
    "upper": {"r": 2, "lora_alpha": 4, "target_modules": ALL, "layers_to_transform": [2]},
    "head": {"r": 4, "lora_alpha": 8, "target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
}
OTHER_ENDS: dict[str, dict[str, Any]] = {  # over a base with biases, its head tied to its embedding
    "all-biases": {"r": 3, "target_modules": ["q_proj", "up_proj"], "bias": "all"},
    "its-biases": {"r": 256, "lora_alpha": 200, "target_modules": ["k_proj"], "bias": "lora_only"},
    "embeddings": {"r": 1, "target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"]},
    "both-ends": {"r": 2, "target_modules": ["o_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
}


@pytest.fixture(scope="module")
def tenants(
    architectures: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, make_lora: MakeLora
) -> dict[str, Path]:
    """The base and LoRA folders of every kind."""
    root = tmp_path_factory.mktemp("tenants")
    base = architectures["llama-gqa-untied"]
    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        make_lora(base, root / name, seed, settings)
    return {"base": base, **{name: root / name for name in ADAPTERS}}


@pytest.fixture(scope="module")
def zoo(tenants: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("zoo") / "adapters"
    compile_models(tenants, path, CompileOptions(verify=False, profile=False))
    return path


@pytest.fixture(scope="module")
def peft_models(tenants: dict[str, Path]) -> dict[str, torch.nn.Module]:
    return load_all(tenants)


def load_all(tenants: dict[str, Path]) -> dict[str, torch.nn.Module]:
    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(tenants["base"], dtype=torch.float32).eval()

    models = {n: PeftModel.from_pretrained(load(), path).eval() for n, path in tenants.items() if n != "base"}
    return {"base": load(), **models}


def logits_of(model: torch.nn.Module, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(torch.tensor([ids])).logits[0])


def test_every_adapter_computes_what_peft_computes(
    zoo: Path, peft_models: dict[str, torch.nn.Module]
) -> None:
    compare(zoo, peft_models)


def compare(zoo: Path, peft_models: dict[str, torch.nn.Module]) -> None:
    opened, engines = Zoo.open(zoo), OpenVINOEngines("f32")
    ids = np.random.default_rng(0).integers(2, 2048, 40).tolist()
    plain = logits_of(peft_models["base"], ids)
    for name, record in opened.manifest.models.items():
        blocks = [opened.read_block(block_id) for block_id in record.chain]
        adapters = {i: opened.read_adapter(key) for i, key in record.adapters.items()}
        found = ProbeChain(engines, blocks, record.config, len(ids), adapters).forward(ids, 0)
        expected = logits_of(peft_models[name], ids)
        np.testing.assert_allclose(found, expected, atol=2e-4, rtol=1e-4, err_msg=name)
        assert name == "base" or np.abs(expected - plain).max() > 0.1


def test_trained_biases_and_embeddings(
    architectures: dict[str, Path], tmp_path: Path, make_lora: MakeLora
) -> None:
    tenants = {"base": architectures["qwen2-bias-tied"]}
    for seed, (name, settings) in enumerate(OTHER_ENDS.items()):
        tenants[name] = tmp_path / name
        make_lora(tenants["base"], tenants[name], seed, settings)
    zoo = tmp_path / "zoo"
    done = compile_models(tenants, zoo, CompileOptions(profile=False))  # each is verified as well
    assert all(report.verification is not None for report in done.models)
    peft_models = load_all(tenants)
    compare(zoo, peft_models)
    models = Zoo.open(zoo).manifest.models
    own = {  # how many blocks are not the base's: those with trained biases, and embedding and head
        name: sum(ours != base for ours, base in zip(record.chain, models["base"].chain, strict=True))
        for name, record in models.items()
    }
    assert own == {"base": 0, "all-biases": 3, "its-biases": 3, "embeddings": 2, "both-ends": 2}
    rng = np.random.default_rng(1)
    prompts = [rng.integers(2, 2048, 20).tolist() for _ in tenants]
    llm = LLM(zoo, precision="f32", kv_cache_bytes=32 << 20)
    for name, answer in zip(
        tenants, llm.generate(list(tenants), prompts, GREEDY, progress=False), strict=True
    ):
        ids = [*answer.prompt, *answer.token_ids]
        expected = logits_of(peft_models[name], ids[:-1])[len(answer.prompt) - 1 :].argmax(-1)
        assert tuple(expected.tolist()) == answer.token_ids, name


@pytest.mark.parametrize("settings", [{}, {"max_span_layers": 1}, {"adapter_cache_bytes": 1}])
def test_rows_of_all_adapters_in_one_batch(
    zoo: Path, peft_models: dict[str, torch.nn.Module], settings: dict[str, int]
) -> None:
    rng = np.random.default_rng(1)
    names = [name for _ in range(2) for name in peft_models]
    prompts = [rng.integers(2, 2048, int(rng.integers(1, 70))).tolist() for _ in names]
    llm = LLM(zoo, precision="f32", kv_cache_bytes=32 << 20, max_num_batched_tokens=96, **settings)
    for name, done in zip(names, llm.generate(names, prompts, GREEDY, progress=False), strict=True):
        ids = [*done.prompt, *done.token_ids]
        expected = logits_of(peft_models[name], ids[:-1])[len(done.prompt) - 1 :].argmax(-1)
        assert tuple(expected.tolist()) == done.token_ids, name


@pytest.mark.parametrize("settings", [{}, {"backend": "reference", "device": "cpu"}])
def test_adapters_that_come_and_go_change_no_token(zoo: Path, settings: dict[str, Any]) -> None:
    """Beside running ones, with a cache that holds none of them."""
    rng = np.random.default_rng(4)
    config = {"precision": "f32", "kv_cache_bytes": 32 << 20, "prefix_caching": False} | settings
    engine = LLMEngine(zoo, EngineConfig(**config, adapter_cache_bytes=1))
    models = [engine.models[i] for i in rng.integers(0, len(engine.models), 40)]
    jobs = [
        (model, rng.integers(2, 2048, int(rng.integers(1, 20))).tolist(), replace(GREEDY, max_tokens=length))
        for model, length in zip(models, rng.integers(1, 20, len(models)).tolist(), strict=True)
    ]
    alone = LLM(zoo, **config)
    expected = [alone.generate(*job, progress=False)[0].token_ids for job in jobs]
    found: list[tuple[int, ...]] = [()] * len(jobs)
    waiting = list(range(len(jobs)))
    while waiting or engine.has_unfinished():
        for index in waiting[: int(rng.integers(0, 3)) if engine.num_waiting == 0 else 0]:
            engine.add_request(str(index), *jobs[index])
            waiting.remove(index)
        for output in engine.step():
            assert output.error is None
            found[int(output.request_id)] += output.token_ids
    assert found == expected
    assert engine.metrics().adapter_reloads_total > 0


def test_base_and_adapted_rows_go_through_one_engine(zoo: Path) -> None:
    llm = LLM(zoo, precision="f32", kv_cache_bytes=32 << 20)
    names = ["base", "qv", "all", "rslora", "patterns", "upper"]
    llm.generate(names, [[5, 6, 7]] * len(names), GREEDY, progress=False)
    metrics = llm.engine.metrics()
    # the tenant with its own head splits the trunk from the head; every other row goes through both
    assert metrics.engine_calls_per_step == 2
    assert metrics.mean_batch_per_block > 5


def test_kv_is_shared_below_the_first_adapter_only(zoo: Path) -> None:
    prompt = np.random.default_rng(2).integers(2, 2048, 100).tolist()
    short = SamplingParams(max_tokens=1, temperature=0.0)
    llm = LLM(zoo, precision="f32", kv_cache_bytes=32 << 20)
    llm.generate("base", [prompt], short, progress=False)
    again = llm.generate("base", [prompt], short, progress=False)[0]
    other = llm.generate("qv", [prompt], short, progress=False)[0]
    assert (again.num_cached_tokens, other.num_cached_tokens) == (96, 0)
    hits = llm.engine.metrics().prefix_hit_tokens
    llm.generate("qv", [prompt], short, progress=False)
    assert sum(llm.engine.metrics().prefix_hit_tokens.values()) > sum(hits.values())


def test_other_precisions_and_backends(zoo: Path) -> None:
    names = ["base", "all", "upper", "head"]
    prompts = [[7, 8, 9, 10]] * len(names)
    expected = LLM(zoo, precision="f32", kv_cache_bytes=32 << 20).generate(
        names, prompts, GREEDY, progress=False
    )
    torch_llm = LLM(zoo, backend="reference", device="cpu", precision="f32", kv_cache_bytes=32 << 20)
    found = torch_llm.generate(names, prompts, GREEDY, progress=False)
    assert [done.token_ids for done in found] == [done.token_ids for done in expected]


@pytest.fixture(scope="module")
def planned_zoo(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with TensorRT plans."""
    pytest.importorskip("tensorrt_rtx")
    path = tmp_path_factory.mktemp("planned") / "zoo"
    shutil.copytree(zoo, path)
    plans = TensorRTOptions(targets=("sm89",), precision="f32")
    compile_models({}, path, CompileOptions(verify=False, profile=False, tensorrt=plans))
    return path


def test_tensorrt_plans_compute_what_peft_computes(
    planned_zoo: Path, peft_models: dict[str, torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of all adapters in one batch, with onnxruntime in the place of the GPU."""
    from onnx_device import onnx_engines

    rng = np.random.default_rng(3)
    monkeypatch.setattr(
        "blockzoo.runtime.serve.llm_engine.make_engines", lambda *_, zoo, **__: onnx_engines(zoo)
    )
    names = [name for _ in range(2) for name in peft_models]
    prompts = [rng.integers(2, 2048, int(rng.integers(1, 70))).tolist() for _ in names]
    llm = LLM(planned_zoo, backend="tensorrt", kv_cache_bytes=32 << 20, max_num_batched_tokens=96)
    for name, done in zip(names, llm.generate(names, prompts, GREEDY, progress=False), strict=True):
        whole = [*done.prompt, *done.token_ids]
        expected = logits_of(peft_models[name], whole[:-1])[len(done.prompt) - 1 :].argmax(-1)
        assert tuple(expected.tolist()) == done.token_ids, name


def test_an_adapters_own_end_tokens_end_its_answers(
    tenants: dict[str, Path], zoo: Path, tmp_path: Path
) -> None:
    """Named in its folder, by id or as the tokenizer's eos_token; from the start, and after a reload."""
    prompt = list(range(2, 40))
    (free,) = LLM(zoo, precision="f32").generate("qv", [prompt], GREEDY, progress=False)
    end = free.token_ids[4]
    assert end not in free.token_ids[:4]
    text = Tokenizer.from_file(str(tenants["base"] / "tokenizer.json")).id_to_token(end)
    says: dict[str, tuple[str, dict[str, Any]]] = {
        "by-id": ("generation_config.json", {"eos_token_id": [end]}),
        "by-name": ("tokenizer_config.json", {"tokenizer_class": "TokenizersBackend", "eos_token": text}),
    }
    for name, (file, content) in says.items():
        shutil.copytree(tenants["qv"], tmp_path / name)
        (tmp_path / name / file).write_text(json.dumps(content))
    fast = CompileOptions(verify=False, profile=False)
    compile_models({"base": tenants["base"], "by-id": tmp_path / "by-id"}, tmp_path / "zoo", fast)
    engine = LLMEngine(tmp_path / "zoo", EngineConfig(precision="f32", kv_cache_bytes=32 << 20))
    compile_models({"by-name": tmp_path / "by-name"}, tmp_path / "zoo", fast)
    assert engine.reload().added == ("by-name",)
    greedy = SamplingParams(max_tokens=12, temperature=0.0)
    for name in ("base", *says):
        engine.enqueue(engine.prepare(name, name, prompt, greedy))
    answers: dict[str, list[int]] = {name: [] for name in ("base", *says)}
    while engine.has_unfinished():
        for output in engine.step():
            answers[output.request_id] += output.token_ids
    assert len(answers["base"]) == 12
    assert [tuple(answers[name]) for name in says] == [free.token_ids[:5]] * 2
