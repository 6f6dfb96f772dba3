"""On an NVIDIA GPU, in bf16: kernels against float32 torch, whole chains, CUDA graphs. `make test-gpu`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

from benchmarks.random_chains import RandomZoo, run_steps  # noqa: E402
from blockzoo.engines.reference import ReferenceEngines  # noqa: E402
from blockzoo.engines.reference.attention import DenseAttention  # noqa: E402
from blockzoo.engines.reference.blocks import Operators  # noqa: E402
from blockzoo.zoo.blocks import AttnSpec  # noqa: E402
from blockzoo.zoo.rope import RopeConfig  # noqa: E402

ROPE = RopeConfig("default", 1e4)
SPECS = {
    "8b": AttnSpec(4096, 32, 8, 128, 1e-5, ROPE, 0, False, False, False),
    "0.5b": AttnSpec(896, 14, 2, 64, 1e-5, ROPE, 0, False, False, False),
    "window": AttnSpec(4096, 32, 8, 128, 1e-5, ROPE, 512, False, False, False),
    "qk-norm": AttnSpec(2048, 16, 8, 128, 1e-5, ROPE, 0, False, False, True),
}
BATCHES = {
    "decode": [(1000, 1)] * 3 + [(31, 1), (0, 1)],
    "one": [(4000, 1)],
    "prefill": [(0, 700)],
    "mixed": [(500, 1), (0, 130), (64, 64), (2000, 33)],
}


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.float() - exact).norm() / exact.norm())


def attention_inputs(
    spec: AttnSpec, lens: list[tuple[int, int]]
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    torch.manual_seed(len(lens))
    device = torch.device("cuda")
    pages = [-(-(past + new) // 32) for past, new in lens]
    positions = torch.cat([torch.arange(past, past + new) for past, new in lens])
    cos, sin = (torch.from_numpy(t)[positions][:, None, None] for t in ROPE.tables(spec.head_dim, 4096))
    pool = (sum(pages) + 7, spec.num_kv_heads, 32, spec.head_dim)
    ints = {
        "past_lens": [past for past, _ in lens],
        "subsequence_begins": np.cumsum([0, *(new for _, new in lens)]).tolist(),
        "block_indices_begins": np.cumsum([0, *pages]).tolist(),
    }
    inputs = {name: torch.tensor(values, dtype=torch.int32, device=device) for name, values in ints.items()}
    for name in ("key_cache", "value_cache"):
        inputs[name] = torch.randn(pool, device=device).bfloat16()
    inputs |= {"cos": cos.contiguous().to(device), "sin": sin.contiguous().to(device)}
    width = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    qkv = torch.randn(len(positions), width, device=device).bfloat16()
    return qkv, inputs, torch.randperm(pool[0], device=device)[: sum(pages)].int()


def check_attention(
    spec: AttnSpec, qkv: torch.Tensor, inputs: dict[str, torch.Tensor], ids: torch.Tensor
) -> None:
    from blockzoo.engines.tensorrt.attention import PagedAttention

    norms = None
    if spec.qk_norm:
        norms = tuple(1 + 0.1 * torch.randn(spec.head_dim, device="cuda").bfloat16() for _ in range(2))
    wide = {name: t.float() if t.dtype == torch.bfloat16 else t for name, t in inputs.items()}
    wide_norms = None if norms is None else tuple(norm.float() for norm in norms)
    expected = DenseAttention()(qkv.float(), wide, ids, spec, wide_norms)
    out = PagedAttention(132)(qkv, inputs, ids, spec, norms)
    assert relative_error(out, expected) < 1e-2
    for name in ("key_cache", "value_cache"):
        assert relative_error(inputs[name], wide[name]) < 5e-3


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", SPECS)
def test_attention(name: str, batch: str) -> None:
    check_attention(SPECS[name], *attention_inputs(SPECS[name], BATCHES[batch]))


def test_pools_of_more_than_two_billion_elements() -> None:
    """The last pages of a large pool are written and read as those of a small one."""
    from blockzoo.engines.tensorrt.attention import PagedAttention

    spec = SPECS["8b"]
    qkv, inputs, ids = attention_inputs(spec, [(70, 3), (0, 40)])
    small = len(inputs["key_cache"])
    extra = 2**31 // inputs["key_cache"][0].numel()
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of GPU memory")
    large = dict(inputs)
    for name in ("key_cache", "value_cache"):
        large[name] = torch.zeros(small + extra, *inputs[name].shape[1:], device="cuda", dtype=torch.bfloat16)
        large[name][extra:] = inputs[name]
    expected = PagedAttention(132)(qkv.clone(), inputs, ids, spec, None)
    out = PagedAttention(132)(qkv.clone(), large, ids + extra, spec, None)
    assert torch.equal(out, expected)
    for name in ("key_cache", "value_cache"):
        assert torch.equal(large[name][extra:], inputs[name])


def test_scattered_rows() -> None:
    spec = SPECS["8b"]
    qkv, inputs, ids = attention_inputs(spec, [(0, 1500)])
    some = torch.randperm(1500, device="cuda")[:200]
    inputs |= {
        "positions": some.int(),
        "subsequence_begins": torch.tensor([0, 200], dtype=torch.int32, device="cuda"),
        "cos": inputs["cos"][some],
        "sin": inputs["sin"][some],
    }
    check_attention(spec, qkv[some].contiguous(), inputs, ids)


def test_scores() -> None:
    from blockzoo.engines.tensorrt.attention import PagedAttention

    spec = SPECS["8b"]
    qkv, inputs, ids = attention_inputs(spec, [(900, 8), (0, 300), (70, 1)])
    inputs |= {
        "score_windows": torch.tensor([4, 4, 0], dtype=torch.int32, device="cuda"),
        "block_indices.0": ids,
    }
    paged = PagedAttention(132)
    inputs["scores"] = paged.no_scores(inputs)
    paged(qkv, inputs, ids, spec, None)
    scores = paged.packed_scores(inputs).cpu()
    sums = torch.stack([part.sum() for part in scores.split([908, 300, 71])])
    expected = torch.tensor([4.0, 4.0, 0.0]) * spec.num_heads
    torch.testing.assert_close(sums, expected, rtol=1e-2, atol=1e-3)


def test_operators() -> None:
    from blockzoo.engines.tensorrt.operators import FusedOperators

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda").bfloat16()

    fused, plain = FusedOperators(), Operators()
    x, weight, gate_up = drawn(70, 4096), drawn(4096), drawn(70, 2 * 14336)
    assert relative_error(fused.norm(x, weight, 1e-5), plain.norm(x.float(), weight.float(), 1e-5)) < 5e-3
    assert relative_error(fused.gated(gate_up), plain.gated(gate_up.float())) < 5e-3


@pytest.mark.parametrize("rows", [1, 8, 70, 700])
@pytest.mark.parametrize(("dtype", "group"), [("i8", 32), ("i8", 128), ("i8", 4096), ("i4", 32)])
def test_products_with_packed_matrices(dtype: str, group: int, rows: int) -> None:
    from blockzoo.build.rounding import rounded
    from blockzoo.engines.reference.arrays import PackedMatrix
    from blockzoo.engines.tensorrt.operators import FusedOperators

    values = np.random.default_rng(0).standard_normal((1000, 4096)).astype(np.float32) / 64
    packed = PackedMatrix(rounded(values, dtype, group), torch.bfloat16, torch.device("cuda"))  # type: ignore[arg-type]
    x, to = (torch.randn(rows, width, device="cuda").bfloat16() for width in (4096, 1000))
    expected = x.float() @ packed.dense().float().T
    assert relative_error(FusedOperators().product(x, packed), expected) < 1e-2
    assert relative_error(FusedOperators().product_added(to, x, packed), expected + to.float()) < 1e-2


@pytest.mark.parametrize("rows", [1, 8, 70, 700])
def test_adapters_of_different_ranks(rows: int) -> None:
    """On the columns of a wider matrix, some rows without an adapter."""
    from blockzoo.engines.tensorrt.operators import FusedOperators

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda").bfloat16()

    ends = np.cumsum([16, 8, 64, 40])
    a, b, wide, x = drawn(128, 4096) / 64, drawn(128, 4096), drawn(rows, 6144), drawn(rows, 4096)
    mask = torch.zeros(rows, 128, device="cuda", dtype=torch.bfloat16)
    for row in range(rows):
        if row % 5:
            mask[row, int(ends[row % 5 - 1]) - (16, 8, 64, 40)[row % 5 - 1] : int(ends[row % 5 - 1])] = 1.0
    expected = wide.float()
    Operators().add_adapters(expected[:, 1024:5120], x.float(), a.float(), b.float(), mask.float())
    FusedOperators().add_adapters(wide[:, 1024:5120], x, a, b, mask)
    assert relative_error(wide, expected) < 1e-2


SIZES = {"max_tokens": 256, "max_seqs": 16, "context": 256}


def zoo_on_gpu(cuda_graphs: bool, make: Callable[[ReferenceEngines], None] | None = None) -> RandomZoo:
    engines = ReferenceEngines("bf16", "cuda", cuda_graphs=cuda_graphs)
    if make is not None:
        make(engines)
    return RandomZoo("tiny", engines, 3, 2, **SIZES)


def test_recorded_steps_give_what_direct_ones_give() -> None:
    for recorded, direct in zip(run_steps(zoo_on_gpu(True)), run_steps(zoo_on_gpu(False)), strict=True):
        assert relative_error(torch.from_numpy(recorded), torch.from_numpy(direct)) < 1e-2


def test_kernels_in_a_chain_give_what_plain_torch_gives() -> None:
    def plain(engines: ReferenceEngines) -> None:
        engines.operators, engines._attention = Operators(), DenseAttention()

    for ours, theirs in zip(run_steps(zoo_on_gpu(True)), run_steps(zoo_on_gpu(False, plain)), strict=True):
        assert relative_error(torch.from_numpy(ours), torch.from_numpy(theirs)) < 3e-2


def adapted_zoo(engines: ReferenceEngines) -> RandomZoo:
    return RandomZoo("tiny", engines, 3, 4, lora_rank=4, **SIZES)


def test_recorded_steps_with_adapters_give_what_direct_ones_give() -> None:
    sides = [run_steps(adapted_zoo(ReferenceEngines("bf16", "cuda", cuda_graphs=g))) for g in (True, False)]
    for recorded, direct in zip(*sides, strict=True):
        assert relative_error(torch.from_numpy(recorded), torch.from_numpy(direct)) < 1e-2


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_plans_give_what_torch_gives(cuda_graphs: bool) -> None:
    """With and without adapters, prefill and decode, in plans built for this GPU."""
    pytest.importorskip("onnx")
    from benchmarks.gpu_plans import native_engines
    from blockzoo.engines.base import EngineError

    try:
        engines = native_engines("tiny", cuda_graphs=cuda_graphs, lora_ranks=8)
    except EngineError as error:
        pytest.skip(str(error))
    torch_steps = run_steps(adapted_zoo(ReferenceEngines("bf16", "cuda", cuda_graphs=False)))
    for ours, theirs in zip(run_steps(adapted_zoo(engines)), torch_steps, strict=True):
        assert relative_error(torch.from_numpy(ours), torch.from_numpy(theirs)) < 3e-2


def test_the_whole_runtime_gives_the_tokens_of_the_cpu(tmp_path: Path) -> None:
    """In float32: prefixes shared, prompts in chunks, adapters and full models in one batch."""
    for package in ("openvino", "tokenizers"):  # what compiling and serving need
        pytest.importorskip(package)
    from blockzoo.build.pipeline import CompileOptions, compile_models
    from blockzoo.runtime import LLM, SamplingParams
    from blockzoo.zoo.demo.assemble import assemble

    compile_models(
        assemble(tmp_path / "models"), tmp_path / "zoo", CompileOptions(verify=False, profile=False)
    )
    rng = np.random.default_rng(0)
    greedy = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    prefix = rng.integers(2, 2048, 40).tolist()
    prompts = [prefix + rng.integers(2, 2048, int(rng.integers(1, 90))).tolist() for _ in range(10)]
    sides = []
    for device in ("cpu", "cuda"):
        settings = {"precision": "f32", "kv_cache_bytes": 64 << 20, "max_num_batched_tokens": 96}
        llm = LLM(tmp_path / "zoo", backend="reference", device=device, **settings)
        models = [llm.models[i % len(llm.models)] for i in range(len(prompts))]
        answers = [llm.generate(models, prompts, greedy, progress=False) for _ in range(2)]
        sides.append([[c.token_ids for c in answer] for answer in answers])
    assert sides[0] == sides[1]
