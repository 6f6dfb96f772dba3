"""The whole runtime on TensorRT's engine code, with onnxruntime in the place of the GPU.

The plans are built for real (for a GPU that is not here), chosen from the manifest and bound by name; only
what runs them is another: the same ONNX network in onnxruntime.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
torch = pytest.importorskip("torch")
pytest.importorskip("tensorrt_rtx")

from blockzoo.build.pipeline import CompileOptions, compile_models  # noqa: E402
from blockzoo.build.tensorrt_plans import TensorRTOptions  # noqa: E402
from blockzoo.engines.base import EngineError  # noqa: E402
from blockzoo.engines.choose import make_engines  # noqa: E402
from blockzoo.engines.probe import ProbeChain  # noqa: E402
from blockzoo.engines.tensorrt.engine import TensorRTEngines  # noqa: E402
from blockzoo.engines.tensorrt.networks import build_network  # noqa: E402
from blockzoo.engines.tensorrt.plans import Machine  # noqa: E402
from blockzoo.runtime import LLM, SamplingParams  # noqa: E402
from blockzoo.zoo.manifest import TensorRTPlanRecord  # noqa: E402
from blockzoo.zoo.store import Zoo  # noqa: E402


class OnnxPlan:
    def __init__(self, record: TensorRTPlanRecord) -> None:
        model = build_network(record.spec, record.part, record.precision)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        feeds = {name: tensor.contiguous().numpy() for name, tensor in tensors.items()}
        return torch.from_numpy(self._session.run(None, feeds)[0])


def onnx_engines(zoo: Zoo) -> TensorRTEngines:
    version = next(iter(zoo.manifest.tensorrt_plans.values())).library_version
    machine = Machine("sm89", "tensorrt_rtx", version)
    return TensorRTEngines(zoo, "f32", "cpu", machine=machine, load=lambda key, record: OnnxPlan(record))


def with_plans(zoo: Path, path: Path) -> Path:
    shutil.copytree(zoo, path)
    options = CompileOptions(
        verify=False, profile=False, tensorrt=TensorRTOptions(targets=("sm89",), precision="f32")
    )
    compile_models({}, path, options)
    return path


@pytest.fixture(scope="module")
def planned_zoo(demo_family: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo family without its adapters, which this backend does not serve."""
    path = tmp_path_factory.mktemp("plans") / "zoo"
    full = {name: demo_family[name] for name in ("base", "base-sharded", "solver")}
    plans = TensorRTOptions(targets=("sm89",), precision="f32")
    compile_models(full, path, CompileOptions(verify=False, profile=False, tensorrt=plans))
    return path


def test_tokens_are_those_of_openvino(planned_zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    params = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True)
    settings: dict[str, Any] = {"precision": "f32", "kv_cache_bytes": 16 << 20, "max_num_batched_tokens": 70}
    sides = []
    for name in ("openvino", "tensorrt"):
        if name == "tensorrt":
            monkeypatch.setattr(
                "blockzoo.runtime.engine_loop.make_engines", lambda *_, zoo, **__: onnx_engines(zoo)
            )
        llm = LLM(planned_zoo, **settings)
        if not sides:
            models = list(llm.models) * 2
            prompts = [rng.integers(2, 2048, int(rng.integers(1, 120))).tolist() for _ in models]
        assert llm.engine.engine_facts["backend"] == name
        sides.append([c.token_ids for c in llm.generate(models, prompts, params, progress=False)])
    assert sides[0] == sides[1]


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


def test_plans_are_loaded_once_for_all_blocks_of_a_shape(planned_zoo: Path) -> None:
    zoo = Zoo.open(planned_zoo)
    loaded: list[str] = []
    engines = onnx_engines(zoo)
    engines._load = lambda key, record: loaded.append(key) or OnnxPlan(record)  # type: ignore[func-returns-value]
    for model in zoo.manifest.models.values():
        engines.span([zoo.read_block(i) for i in model.chain[1:]])
    assert len(loaded) == len(set(loaded)) == 4


def test_without_a_gpu_or_a_zoo_the_backend_says_so(planned_zoo: Path) -> None:
    with pytest.raises(EngineError, match="runs the plans of a zoo"):
        make_engines("tensorrt")
    if not torch.cuda.is_available():
        with pytest.raises(EngineError, match="needs an NVIDIA GPU"):
            LLM(planned_zoo, backend="tensorrt")


def test_a_zoo_without_fitting_plans_says_what_to_run(planned_zoo: Path) -> None:
    zoo = Zoo.open(planned_zoo)
    engines = onnx_engines(zoo)
    engines._machine = Machine("sm90", "tensorrt", "10.14.1")
    with pytest.raises(EngineError, match=r"plan is for sm89 / TensorRT-RTX .*, this machine has sm90"):
        engines.span([zoo.read_block(zoo.manifest.models["base"].chain[1])])


def test_adapters_are_refused(planned_zoo: Path) -> None:
    zoo = Zoo.open(planned_zoo)
    block = zoo.read_block(zoo.manifest.models["base"].chain[1])
    with pytest.raises(EngineError, match="serves no adapters yet"):
        onnx_engines(zoo).span([block], lora={0: ("q",)})
