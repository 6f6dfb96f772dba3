"""The Triton-language kernels: against torch in the interpreter (fp16), and compiled for sm_90a."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from blockzoo.engines.reference.attention import DenseAttention, rotate  # noqa: E402
from blockzoo.engines.tensorrt import attention  # noqa: E402
from blockzoo.zoo.blocks import AttnSpec  # noqa: E402
from blockzoo.zoo.rope import RopeConfig  # noqa: E402

ROPE = RopeConfig("default", 1e4)
NUM_PAGES = 24
torch.set_num_threads(1)  # the interpreter is one thread of tiny torch and numpy calls

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU is here: tests/gpu runs the kernels on it"
)


def spec_of(
    window: int = 0, qk_norm: bool = False, heads: int = 4, kv_heads: int = 2, dim: int = 32
) -> AttnSpec:
    return AttnSpec(64, heads, kv_heads, dim, 1e-5, ROPE, window, False, False, qk_norm)


def make_inputs(
    spec: AttnSpec, lens: list[tuple[int, int]], slack: int = 0
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """Rows of sequences (past, new) with shuffled pages, the past's K and V there already."""
    rng = torch.Generator().manual_seed(1)
    pages_of = [-(-(past + new) // 32) + slack for past, new in lens]
    shape = (NUM_PAGES, spec.num_kv_heads, 32, spec.head_dim)
    ids = torch.randperm(NUM_PAGES, generator=rng)[: sum(pages_of)].int()
    assert len(ids) == sum(pages_of)
    counts = [new for _, new in lens]
    positions = torch.cat([torch.arange(past, past + new) for past, new in lens])
    cos, sin = (
        torch.from_numpy(table)[positions][:, None, None] for table in ROPE.tables(spec.head_dim, 512)
    )
    inputs = {
        "key_cache": torch.randn(shape, generator=rng).half(),
        "value_cache": torch.randn(shape, generator=rng).half(),
        "past_lens": torch.tensor([past for past, _ in lens], dtype=torch.int32),
        "subsequence_begins": torch.tensor(np.cumsum([0, *counts]), dtype=torch.int32),
        "block_indices_begins": torch.tensor(np.cumsum([0, *pages_of]), dtype=torch.int32),
        "cos": cos.contiguous(),
        "sin": sin.contiguous(),
    }
    width = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    return torch.randn(sum(counts), width, generator=rng).half(), inputs, ids


def run_both(
    spec: AttnSpec,
    qkv: torch.Tensor,
    inputs: dict[str, torch.Tensor],
    ids: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor] | None = None,
    processors: int = 1,
) -> None:
    """Same output and same pool from the kernels and from float32 torch."""
    wide = {name: t.float() if t.dtype == torch.float16 else t for name, t in inputs.items()}
    wide_norms = None if norms is None else (norms[0].float(), norms[1].float())
    expected = DenseAttention()(qkv.float(), wide, ids, spec, wide_norms)
    out = attention.PagedAttention(processors)(qkv, inputs, ids, spec, norms)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.float(), expected, atol=4e-3, rtol=4e-3)
    for name in ("key_cache", "value_cache"):
        torch.testing.assert_close(inputs[name].float(), wide[name], atol=4e-3, rtol=2e-3)


RAGGED = [(0, 5), (70, 1), (31, 3), (63, 1), (40, 20)]


@interpreted
@pytest.mark.parametrize(
    "spec",
    [
        spec_of(),
        spec_of(window=24),
        spec_of(heads=6, kv_heads=2),  # a group that is no power of two
        spec_of(heads=2, kv_heads=1, dim=48),  # a head that is none
        spec_of(heads=3, kv_heads=3, dim=16),
        spec_of(heads=2, kv_heads=1, dim=256),  # tiles of fewer keys
    ],
    ids=["gqa", "window", "group3", "dim48", "mha", "dim256"],
)
def test_ragged_batches_over_shuffled_pages(spec: AttnSpec) -> None:
    run_both(spec, *make_inputs(spec, RAGGED))


@interpreted
def test_decode_and_the_norms_of_qwen3() -> None:
    spec = spec_of(qk_norm=True)
    qkv, inputs, ids = make_inputs(spec, [(past, 1) for past in (0, 31, 32, 100, 7)], slack=1)
    norms = tuple(1 + 0.1 * torch.randn(spec.head_dim).half() for _ in range(2))
    run_both(spec, qkv, inputs, ids, norms)


@interpreted
@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("lens", [[(500, 1)], [(480, 3), (10, 1)]])
def test_keys_split_over_programs(window: int, lens: list[tuple[int, int]]) -> None:
    """A short batch uses the whole GPU: some splits see keys, some of no row."""
    spec = spec_of(window=window)
    qkv, inputs, ids = make_inputs(spec, lens)
    paged = attention.PagedAttention(132)
    table = -(-len(ids) // len(lens)) * 32
    assert paged._splits(2 * len(lens), table) > 1
    run_both(spec, qkv, inputs, ids, processors=132)


@interpreted
def test_scattered_rows_in_any_order() -> None:
    """Rows at arbitrary positions of two sequences, mutually attending: what DHD recomputes."""
    spec = spec_of()
    qkv, inputs, ids = make_inputs(spec, [(0, 90), (0, 50)])
    rng = np.random.default_rng(0)
    some = [rng.permutation(90)[:21], rng.permutation(50)[:9]]
    rows = torch.from_numpy(np.concatenate([some[0], some[1] + 90]))
    scattered = {
        **inputs,
        "positions": torch.from_numpy(np.concatenate(some)).int(),
        "subsequence_begins": torch.tensor([0, 21, 30], dtype=torch.int32),
        "cos": inputs["cos"][rows],
        "sin": inputs["sin"][rows],
    }
    run_both(spec, qkv[rows].contiguous(), scattered, ids)


@interpreted
def test_rows_rotated_by_a_network() -> None:
    spec = spec_of()
    qkv, inputs, ids = make_inputs(spec, RAGGED)
    other = {name: t.clone() for name, t in inputs.items()}
    turned = rotate(qkv.float(), inputs["cos"][:, 0], inputs["sin"][:, 0], spec, None).half()
    paged = attention.PagedAttention(1)
    expected = paged(qkv, inputs, ids, spec, None)
    torch.testing.assert_close(paged.rotated(turned, other, ids, spec), expected, atol=4e-3, rtol=4e-3)
    torch.testing.assert_close(other["key_cache"], inputs["key_cache"], atol=4e-3, rtol=4e-3)


@interpreted
@pytest.mark.parametrize("window", [0, 24])
def test_scores_are_what_tokens_receive(window: int) -> None:
    spec = spec_of(window=window)
    lens, windows = [(40, 6), (0, 20), (64, 1), (5, 4)], [3, 3, 5, 0]
    qkv, inputs, ids = make_inputs(spec, lens, slack=1)
    context = [past + new for past, new in lens]
    inputs |= {"score_windows": torch.tensor(windows, dtype=torch.int32), "block_indices.0": ids}
    paged = attention.PagedAttention(1)
    inputs["scores"] = paged.no_scores(inputs) + 0.25  # of a layer before
    paged(qkv, inputs, ids, spec, None)
    scores = (paged.packed_scores(inputs) - 0.25).split(context)
    begins, tables = inputs["subsequence_begins"].tolist(), inputs["block_indices_begins"].tolist()
    q = qkv.float().unflatten(1, (-1, spec.head_dim))[:, : spec.num_heads]
    for i, (past, new) in enumerate(lens):
        keys = inputs["key_cache"][ids[tables[i] : tables[i + 1]].long()].float()
        keys = keys.transpose(1, 2).flatten(0, 1)[: past + new].repeat_interleave(2, 1)
        last = min(new, windows[i])
        weights = torch.einsum("qhd,khd->hqk", q[begins[i + 1] - last : begins[i + 1]], keys)
        where, at = torch.arange(past + new - last, past + new)[:, None], torch.arange(past + new)
        visible = (at <= where) & (at > where - window if window else True)
        shares = (weights * spec.head_dim**-0.5).masked_fill(~visible, float("-inf")).softmax(-1)
        torch.testing.assert_close(scores[i], shares.sum((0, 1)), atol=2e-3, rtol=2e-3)
        assert abs(scores[i].sum() - spec.num_heads * last) < 0.02


def test_all_kernels_compile_for_hopper() -> None:
    """As bf16 and float32 launches ask for them, within the shared memory of every GPU that is served."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    result = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=250, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert len({line.split()[0] for line in result.stdout.splitlines()}) == 10
