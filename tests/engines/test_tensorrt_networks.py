"""ONNX networks: numerics in onnxruntime against torch, and real builds for GPUs that are not here."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
torch = pytest.importorskip("torch")

from blockzoo.engines.base import EngineError  # noqa: E402
from blockzoo.engines.reference.attention import rotate  # noqa: E402
from blockzoo.engines.reference.blocks import Operators, TorchAttn, TorchFfn, TorchHead, Weights  # noqa: E402
from blockzoo.engines.tensorrt.networks import build_network, network_inputs  # noqa: E402
from blockzoo.engines.tensorrt.parts import PART_LORA, Part, part_weights, parts_of  # noqa: E402
from blockzoo.engines.tensorrt.plans import PlanRequest, plan_requests  # noqa: E402
from blockzoo.zoo.blocks import PROJECTIONS, AttnSpec, Block, BlockSpec, FfnSpec, HeadSpec, tensor_shapes  # noqa: E402
from blockzoo.zoo.rope import RopeConfig  # noqa: E402
from blockzoo.zoo.tensors import BlockTensor, from_f32  # noqa: E402

ROPE = RopeConfig("default", 1e4)
LLAMA3 = RopeConfig("llama3", 5e5, 8.0, 8192, 1.0, 4.0)
SPECS: dict[str, BlockSpec] = {
    "llama": AttnSpec(64, 4, 2, 16, 1e-5, LLAMA3, 0, False, False, False),
    "llama-bias": AttnSpec(64, 4, 4, 16, 1e-5, ROPE, 0, True, True, False),
    "mistral": AttnSpec(64, 4, 1, 32, 1e-6, ROPE, 24, False, False, False),
    "qwen2": AttnSpec(64, 4, 2, 16, 1e-6, ROPE, 0, True, False, False),
    "qwen3": AttnSpec(64, 4, 2, 32, 1e-6, ROPE, 0, False, False, True),
    "ffn": FfnSpec(64, 160, 1e-5, False),
    "ffn-bias": FfnSpec(64, 160, 1e-5, True),
    "head": HeadSpec(64, 256, 1e-5, False),
    "tied-head": HeadSpec(64, 256, 1e-5, True),
}
PARTS = [(name, part) for name, spec in SPECS.items() for part in parts_of(spec)]
TARGETS = ("sm89", "sm120")


def make_block(name: str) -> Block:
    spec = SPECS[name]
    rng = np.random.default_rng(3)
    shapes = tensor_shapes(spec)
    if isinstance(spec, HeadSpec):
        shapes["weight"] = (spec.vocab_size, spec.hidden_size)
    tensors = {
        key: from_f32(rng.standard_normal(shape) * 0.2 + (1.0 if "norm" in key else 0.0), "f32")
        for key, shape in shapes.items()
    }
    return Block(f"{name}-{id(tensors)}", spec, tensors)


def feeds(block: Block, part: Part, rows: int) -> dict[str, np.ndarray]:
    spec, rng = block.spec, np.random.default_rng(5)
    given = {"x": rng.standard_normal((rows, spec.hidden_size), np.float32)}
    if isinstance(spec, AttnSpec) and part == "attn_pre":
        cos, sin = spec.rope.tables(spec.head_dim, 4096)
        positions = rng.choice(4096, rows, replace=False)
        given |= {"cos": cos[positions], "sin": sin[positions]}
    if isinstance(spec, AttnSpec) and part == "attn_post":
        given["attended"] = rng.standard_normal((rows, spec.num_heads * spec.head_dim), np.float32)
    return given


def in_torch(block: Block, part: Part, given: dict[str, np.ndarray]) -> np.ndarray:
    weights, ops = Weights(torch.float32, torch.device("cpu")), Operators()
    t = {name: torch.from_numpy(array) for name, array in given.items()}
    if part == "attn_pre":
        attn = TorchAttn.load(block, weights, ops)
        return rotate(
            attn.pre(t["x"]), t["cos"][:, None], t["sin"][:, None], attn.spec, attn.qk_norms
        ).numpy()
    if part == "attn_post":
        return TorchAttn.load(block, weights, ops).post(t["attended"], t["x"]).numpy()
    maker = TorchFfn if part == "ffn" else TorchHead
    return maker.load(block, weights, ops)(t["x"]).numpy()


def in_onnxruntime(model: onnx.ModelProto, given: dict[str, np.ndarray]) -> np.ndarray:
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, given)[0]


@pytest.mark.parametrize(("name", "part"), PARTS)
@pytest.mark.parametrize("rows", [1, 7])
def test_networks_compute_what_torch_computes(name: str, part: Part, rows: int) -> None:
    block = make_block(name)
    given = feeds(block, part, rows)
    expected = in_torch(block, part, given)
    weights = part_weights(block, part, "f32")
    model = build_network(block.spec, part, "f32")
    assert {value.name for value in network_inputs(model)} == given.keys() | weights.keys()
    outputs = [
        in_onnxruntime(model, given | {key: weight.data for key, weight in weights.items()}),
        in_onnxruntime(build_network(block.spec, part, "f32", weights=weights), given),
    ]
    for output in outputs:
        np.testing.assert_allclose(output, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize(("name", "part"), [(n, p) for n, p in PARTS if p != "head"])
def test_adapters_in_one_batch_equal_merged_weights_row_by_row(name: str, part: Part, some: bool) -> None:
    """Two adapters and rows with none: each row must see its own merged weights."""
    block = make_block(name)
    lora = PART_LORA[part][-1:] if some else PART_LORA[part]
    rows, rank = 6, 4
    owners = [0, 1, -1, 1, 0, -1]
    slots = [slice(0, rank), slice(rank, 2 * rank)]
    mask = np.zeros((rows, 2 * rank), np.float32)
    for row, owner in enumerate(owners):
        if owner >= 0:
            mask[row, slots[owner]] = 1
    rng = np.random.default_rng(9)
    given = feeds(block, part, rows)
    adapters, deltas = {"lora_mask": mask}, [dict[str, np.ndarray](), dict[str, np.ndarray]()]
    for projection in lora:
        out, width = block.tensors[projection].shape
        a = rng.standard_normal((2 * rank, width)).astype(np.float32) * 0.1
        b = rng.standard_normal((2 * rank, out)).astype(np.float32) * 0.1
        adapters |= {f"lora_a.{projection}": a, f"lora_b.{projection}": b}
        for owner, slot in enumerate(slots):
            deltas[owner][projection] = b[slot].T @ a[slot]
    weights = {key: weight.data for key, weight in part_weights(block, part, "f32").items()}
    model = build_network(block.spec, part, "f32", lora=lora)
    together = in_onnxruntime(model, given | weights | adapters)
    for row, owner in enumerate(owners):
        delta = deltas[owner] if owner >= 0 else {}
        merged = {
            key: BlockTensor("f32", tensor.data + delta[key]) if key in delta else tensor
            for key, tensor in block.tensors.items()
        }
        one = {key: array[row : row + 1] for key, array in given.items()}
        expected = in_torch(Block(f"{block.id}-{row}", block.spec, merged), part, one)
        np.testing.assert_allclose(together[row : row + 1], expected, atol=5e-5, rtol=5e-5)


def test_a_part_of_another_kind_and_a_wrong_weight_are_refused() -> None:
    with pytest.raises(ValueError, match="kind ffn has no part head"):
        build_network(SPECS["ffn"], "head", "f32")
    with pytest.raises(ValueError, match="adapters on q of ffn"):
        build_network(SPECS["ffn"], "ffn", "f32", lora=("q",))
    weights = part_weights(make_block("ffn"), "ffn", "bf16")
    with pytest.raises(ValueError, match="weight norm is bf16"):
        build_network(SPECS["ffn"], "ffn", "f32", weights=weights)


@pytest.fixture(scope="module")
def library() -> object:
    from blockzoo.engines.tensorrt.shim import load_tensorrt

    pytest.importorskip("tensorrt_rtx")
    return load_tensorrt("tensorrt_rtx")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", SPECS)
def test_every_block_compiles(library: object, name: str, target: str) -> None:
    from blockzoo.engines.tensorrt.builder import PlanBuilder

    builder = PlanBuilder(library)
    phases: list[str] = []
    lora = PROJECTIONS.get(SPECS[name].kind, ())
    requests = plan_requests(
        SPECS[name], "bf16", target, "tensorrt_rtx", library.version, lora=lora, lora_ranks=130
    )
    for request in requests:
        content, record = builder.build(request, on_phase=phases.append)
        assert len(content) == record.num_bytes > 10_000
        assert [(p.min, p.opt, p.max) for p in record.profiles] == (
            [(1, 8, 64)] if request.part == "head" else [(1, 8, 64), (64, 512, 4096)]
        )
        assert record.scratch_bytes.keys() == {profile.name for profile in record.profiles}
        assert record.inputs[0].shape == (-1, 64)
        assert record.max_lora_ranks == (256 if record.lora else 0)
        assert {value.dtype for value in record.inputs} <= {"bf16", "f32"}
    assert phases
    assert builder.timing_cache()


def test_baked_weights_and_a_workspace_bound_compile(library: object) -> None:
    from blockzoo.engines.tensorrt.builder import PlanBuilder

    block = make_block("qwen3")
    requests = plan_requests(
        block.spec,
        "bf16",
        "sm89",
        "tensorrt_rtx",
        library.version,
        workspace_bytes=64 << 20,
        baked_block=block.id,
    )
    for request in requests:
        content, record = PlanBuilder(library).build(request, block)
        assert content
        assert {value.name for value in record.inputs} <= {"x", "cos", "sin", "attended"}
        assert record.workspace_bytes == 64 << 20


def test_scratch_bytes_are_heard_with_and_without_their_unit(library: object) -> None:
    heard: list[int] = []
    native = library.logger(heard.append).native
    severity = library.module.ILogger.Severity
    for message in ("Total Activation Memory: 1577062400", "Total Activation Memory: 64 bytes", "Total: 1"):
        native.log(severity.INFO, message)
    assert heard == [1577062400, 64]


def test_a_tensorrt_without_the_operators_of_the_networks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from blockzoo.engines.tensorrt.shim import load_tensorrt

    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.14.1.48"))
    with pytest.raises(EngineError, match=r"tensorrt is 10.14.1.48, at least 10.15 is needed"):
        load_tensorrt("tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="11.4.0.106"))
    assert load_tensorrt("tensorrt").title == "TensorRT 11.4.0.106"


def test_a_target_that_the_library_does_not_know_is_refused(library: object) -> None:
    from blockzoo.engines.tensorrt.builder import PlanBuilder

    (request,) = plan_requests(SPECS["ffn"], "bf16", "sm42", "tensorrt_rtx", library.version)
    with pytest.raises(EngineError, match="no target sm42"):
        PlanBuilder(library).build(request)


def test_a_network_that_cannot_be_built_says_why(library: object) -> None:
    from blockzoo.engines.tensorrt.builder import PlanBuilder

    (request,) = plan_requests(SPECS["ffn"], "bf16", "sm75", "tensorrt_rtx", library.version)
    with pytest.raises(EngineError, match="could not compile ffn for sm75 in bf16"):
        PlanBuilder(library).build(request)
    assert isinstance(request, PlanRequest)
