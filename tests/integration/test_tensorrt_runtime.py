"""The whole runtime on TensorRT's engine code, with onnxruntime in the place of the GPU.

The plans are built for real (for a GPU that is not here), chosen from the manifest, loaded, and handed
shapes and addresses; only what computes is another: the same ONNX network in onnxruntime (`onnx_device`).
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
torch = pytest.importorskip("torch")
pytest.importorskip("tensorrt_rtx")

from onnx_device import onnx_engines  # noqa: E402

from blockzoo.build.inspect import main as inspect  # noqa: E402
from blockzoo.build.pipeline import CompileOptions, compile_models  # noqa: E402
from blockzoo.build.tensorrt_plans import TensorRTOptions  # noqa: E402
from blockzoo.engines.base import EngineError  # noqa: E402
from blockzoo.engines.choose import make_engines  # noqa: E402
from blockzoo.engines.openvino import OpenVINOEngines  # noqa: E402
from blockzoo.engines.probe import ProbeChain  # noqa: E402
from blockzoo.engines.reference import ReferenceEngines  # noqa: E402
from blockzoo.engines.tensorrt.plans import Machine  # noqa: E402
from blockzoo.runtime import LLM, SamplingParams  # noqa: E402
from blockzoo.zoo.blocks import AttnSpec  # noqa: E402
from blockzoo.zoo.store import Zoo  # noqa: E402


def with_plans(zoo: Path, path: Path) -> Path:
    shutil.copytree(zoo, path)
    options = CompileOptions(
        verify=False, profile=False, tensorrt=TensorRTOptions(targets=("sm89",), precision="f32")
    )
    compile_models({}, path, options)
    return path


@pytest.fixture(scope="module")
def planned_zoo(demo_zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo family, its adapters among it."""
    return with_plans(demo_zoo, tmp_path_factory.mktemp("plans") / "zoo")


@pytest.fixture
def serve_on_onnx(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What LLM takes as its backend from now on, in the order in which it is made."""
    made: list[Any] = []

    def make(*_: Any, zoo: Zoo, **__: Any) -> Any:
        made.append(onnx_engines(zoo))
        return made[-1]

    monkeypatch.setattr("blockzoo.runtime.serve.llm_engine.make_engines", make)
    return made


def test_tokens_are_those_of_openvino_and_torch(planned_zoo: Path, request: pytest.FixtureRequest) -> None:
    """Prefills in chunks, mixed steps, shared prefixes, adapters and bare bases in one batch."""
    rng = np.random.default_rng(0)
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    settings: dict[str, Any] = {"precision": "f32", "kv_cache_bytes": 16 << 20, "max_num_batched_tokens": 70}
    sides = []
    for name in ("openvino", "reference", "tensorrt"):
        if name == "tensorrt":
            request.getfixturevalue("serve_on_onnx")
        llm = LLM(planned_zoo, backend=name, **settings)
        if not sides:
            models = list(llm.models) * 2
            prompts = [rng.integers(2, 2048, int(rng.integers(1, 100))).tolist() for _ in models]
        assert llm.engine.engine_facts["backend"] == name
        sides.append([c.token_ids for c in llm.generate(models, prompts, params, progress=False)])
    assert sides[0] == sides[1] == sides[2]


def test_logits_are_those_of_transformers(
    architecture: str, architectures: dict[str, Path], planned_architectures: Path
) -> None:
    import transformers

    zoo = Zoo.open(planned_architectures)
    record = zoo.manifest.models[architecture]
    ids = np.random.default_rng(1).integers(2, 2048, 70).tolist()
    model = transformers.AutoModelForCausalLM.from_pretrained(architectures[architecture])
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    probe = ProbeChain(onnx_engines(zoo), [zoo.read_block(i) for i in record.chain], record.config, 96)
    ours = np.concatenate([probe.forward(ids[:40], 0), probe.forward(ids[40:], 40)])
    np.testing.assert_allclose(ours, expected, atol=2e-4 * np.abs(expected).max(), rtol=1e-3)


@pytest.fixture(scope="module")
def planned_architectures(architecture_zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_plans(architecture_zoo, tmp_path_factory.mktemp("plans") / "zoo")


def test_plans_are_loaded_once_a_shape_and_weights_once_a_block(planned_zoo: Path) -> None:
    zoo = Zoo.open(planned_zoo)
    engines = onnx_engines(zoo)
    kept = [
        engines.span([zoo.read_block(i) for i in model.chain[1:]]) for model in zoo.manifest.models.values()
    ]
    assert len(kept) == len(zoo.manifest.models)  # weights go with the last engine that has them
    distinct = {i for model in zoo.manifest.models.values() for i in model.chain}
    stored = sum(zoo.manifest.blocks[i].num_bytes for i in distinct)
    assert stored < engines.weights.num_bytes <= 2 * stored  # bf16 in the zoo, f32 here; no embedding here
    assert sorted(e.record.part for e in engines.onnx.engines.values()) == [
        "attn_post",
        "attn_pre",
        "ffn",
        "head",
    ]


def test_scores_are_those_of_openvino(planned_zoo: Path) -> None:
    """What tokens receive in two layers: a prompt behind cached tokens, and rows that do not count."""
    zoo = Zoo.open(planned_zoo)
    record = zoo.manifest.models["solver"]
    blocks = [zoo.read_block(i) for i in record.chain[1:5]]
    (spec,) = {b.spec for b in blocks if isinstance(b.spec, AttnSpec)}
    rng = np.random.default_rng(4)
    lens = [(40, 3), (0, 33), (5, 1)]
    page_ids = np.array([3, 1, 0, 4, 5, 2], np.int32)  # the second sequence has a page more than it needs
    positions = np.concatenate([np.arange(past, past + new) for past, new in lens])
    cos, sin = (table[positions, None, None] for table in spec.rope.tables(spec.head_dim, 64))
    pool = (12, spec.num_kv_heads, 32, spec.head_dim)
    inputs = {
        "hidden": rng.standard_normal((len(positions), spec.hidden_size), np.float32),
        "cos": np.ascontiguousarray(cos),
        "sin": np.ascontiguousarray(sin),
        "past_lens": np.array([past for past, _ in lens], np.int32),
        "subsequence_begins": np.array([0, 3, 36, 37], np.int32),
        "block_indices_begins": np.array([0, 2, 5, 6], np.int32),
        "block_indices.0": page_ids,
        "block_indices.1": page_ids + np.int32(6),
        "score_windows": np.array([2, 5, 0], np.int32),
        "max_context_len": np.array(43, np.int32),
        "hidden_out": np.zeros((len(positions), spec.hidden_size), np.float32),
    }
    cached = {name: rng.standard_normal(pool, np.float32) for name in ("key_cache", "value_cache")}
    found = []
    for engines in (OpenVINOEngines("f32"), ReferenceEngines("f32", "cpu"), onnx_engines(zoo)):
        engine = engines.span(blocks, scores=True)
        for name, array in (inputs | {name: pages.copy() for name, pages in cached.items()}).items():
            engine.bind(name, engines.arrays.mirror(array))
        engine.run()
        found.append(np.array(engines.arrays.to_host(engine.scores())))
    assert found[0].shape == (43 + 33 + 6,)
    assert found[0][43:76].sum() == pytest.approx(5 * 2 * spec.num_heads, rel=1e-4)
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-4)


def test_without_a_gpu_or_a_zoo_the_backend_says_so(planned_zoo: Path) -> None:
    with pytest.raises(EngineError, match="runs the plans of a zoo"):
        make_engines("tensorrt")
    with pytest.raises(EngineError, match="device 'cpu': the tensorrt backend runs on cuda"):
        LLM(planned_zoo, backend="tensorrt", device="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(EngineError, match="needs an NVIDIA GPU"):
            LLM(planned_zoo, backend="tensorrt")


def test_a_zoo_without_fitting_plans_says_what_to_run(planned_zoo: Path) -> None:
    zoo = Zoo.open(planned_zoo)
    engines = onnx_engines(zoo)
    engines._machine = Machine("sm90", "tensorrt", "10.14.1")
    with pytest.raises(EngineError, match=r"plan is for sm89 / TensorRT-RTX .*, this machine has sm90"):
        engines.span([zoo.read_block(zoo.manifest.models["base"].chain[1])])


def test_a_plan_that_is_not_what_the_manifest_says_is_refused(planned_zoo: Path) -> None:
    zoo = Zoo.open(planned_zoo)
    block, plans = zoo.read_block(zoo.manifest.models["base"].chain[2]), zoo.manifest.tensorrt_plans
    key, record = next((k, p) for k, p in plans.items() if p.part == "ffn" and not p.lora)
    wrong = replace(record.inputs[0], shape=(-1, 257))
    plans[key] = replace(record, inputs=(wrong, *record.inputs[1:]))
    with pytest.raises(EngineError, match=r"x: \('f32', \(-1, 256\)\), expected \('f32', \(-1, 257\)\)"):
        onnx_engines(zoo).span([block])


def test_calls_without_adapters_run_plans_without(planned_zoo: Path, serve_on_onnx: list[Any]) -> None:
    llm = LLM(planned_zoo, precision="f32", kv_cache_bytes=16 << 20)
    greedy = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)

    def runs_of(model: str) -> tuple[int, int]:
        for engine in serve_on_onnx[0].onnx.engines.values():
            engine.runs.clear()
        llm.generate(model, [[5, 6, 7]], greedy, progress=False)
        plain, adapted = (
            sum(len(e.runs) for e in serve_on_onnx[0].onnx.engines.values() if bool(e.record.lora) == lora)
            for lora in (False, True)
        )
        return plain, adapted

    assert runs_of("base")[1] == 0
    assert runs_of("notes")[1] > 0


def test_plans_with_adapters_are_shown_and_go_with_the_last_of_them(
    planned_zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "zoo"
    shutil.copytree(planned_zoo, path)
    assert inspect([str(path)]) == 0
    assert "takes adapters of 64 ranks on q, k, v" in capsys.readouterr().out
    quick = CompileOptions(verify=False, profile=False)
    compile_models({}, path, quick, remove=["notes"])
    assert len(Zoo.open(path).manifest.tensorrt_plans) == 7  # notes-merged has some too
    compile_models({}, path, quick, remove=["notes-merged"])
    assert not [plan for plan in Zoo.open(path).manifest.tensorrt_plans.values() if plan.lora]


def test_more_ranks_than_the_plans_have_room_for_are_told(planned_zoo: Path) -> None:
    zoo = Zoo.open(planned_zoo)
    block = zoo.read_block(zoo.manifest.models["notes"].chain[1])
    engine = onnx_engines(zoo).span([block], lora={0: ("k", "o", "q", "v")})
    rows, ranks = 3, 65
    width = {"q": 256, "k": 0, "v": 0, "o": 256}
    assert isinstance(block.spec, AttnSpec)
    width["k"] = width["v"] = block.spec.num_kv_heads * block.spec.head_dim
    engine.bind("hidden", torch.randn(rows, block.spec.hidden_size))
    engine.bind("lora_mask", torch.ones(rows, ranks))
    for name in width:
        engine.bind(f"lora_a.0.{name}", torch.zeros(ranks, block.spec.hidden_size))
        engine.bind(f"lora_b.0.{name}", torch.zeros(ranks, width[name]))
    for name in ("cos", "sin"):
        engine.bind(name, torch.zeros(rows, 1, 1, block.spec.head_dim))
    engine.bind("block_indices.0", torch.zeros(1, dtype=torch.int32))
    with pytest.raises(EngineError, match="65 ranks together, the plans have room for 64"):
        engine.run()


def test_steps_about_to_be_recorded_get_contexts_of_one_shape(planned_zoo: Path) -> None:
    zoo = Zoo.open(planned_zoo)
    record = zoo.manifest.models["base"]
    engines = onnx_engines(zoo)
    probe = ProbeChain(engines, [zoo.read_block(i) for i in record.chain], record.config, 64)
    shared = probe.forward([5, 6, 7], 0)
    probe.forward(list(range(9)), 0)
    assert len({arena for engine in engines.onnx.engines.values() for arena in engine.arenas}) == 1
    loaded = list(engines.onnx.engines.values())
    assert {engine.num_contexts for engine in loaded} == {1}
    engines.arrays.settling = True  # type: ignore[attr-defined]
    own = probe.forward([5, 6, 7], 0)
    np.testing.assert_array_equal(own, probe.forward([5, 6, 7], 0))
    np.testing.assert_array_equal(own, shared)
    assert {engine.num_contexts for engine in loaded} == {2}
