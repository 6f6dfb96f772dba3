"""The Triton-language kernels of rows, alone and in torch engines: interpreted (fp16), against torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from blockzoo.build.rounding import rounded  # noqa: E402
from blockzoo.engines.reference import ReferenceEngines  # noqa: E402
from blockzoo.engines.reference.arrays import PackedMatrices, PackedMatrix  # noqa: E402
from blockzoo.engines.reference.blocks import Operators, Weights  # noqa: E402
from blockzoo.engines.tensorrt.attention import PagedAttention  # noqa: E402
from blockzoo.engines.tensorrt.operators import FusedOperators  # noqa: E402
from blockzoo.zoo.blocks import PROJECTIONS, AttnSpec, Block, FfnSpec, tensor_shapes  # noqa: E402
from blockzoo.zoo.rope import RopeConfig  # noqa: E402
from blockzoo.zoo.tensors import from_f32  # noqa: E402

torch.set_num_threads(1)  # the interpreter is one thread of tiny torch and numpy calls

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU is here: tests/gpu runs the kernels on it"
)


def test_fused_operators() -> None:
    fused, plain = FusedOperators(), Operators()
    torch.manual_seed(0)
    x, weight = torch.randn(5, 96).half(), torch.randn(96).half()
    torch.testing.assert_close(fused.norm(x, weight, 1e-5), plain.norm(x, weight, 1e-5), atol=4e-3, rtol=4e-3)
    gate_up = torch.randn(5, 2 * 1100).half()
    torch.testing.assert_close(fused.gated(gate_up), plain.gated(gate_up), atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize("rows", [1, 37])
@pytest.mark.parametrize(
    ("dtype", "width", "group", "rotate"),
    [
        ("i8", 96, 32, True),
        ("i8", 128, 64, True),
        ("i8", 256, 128, False),
        ("i8", 96, 96, True),  # one scale a row
        ("i8", 72, 72, False),  # no tile divides it
        ("i4", 96, 32, True),
        ("i4", 64, 32, False),
    ],
)
def test_products_with_packed_matrices(dtype: str, width: int, group: int, rotate: bool, rows: int) -> None:
    rng = np.random.default_rng(width)
    tensor = rounded(rng.standard_normal((40, width)).astype(np.float32), dtype, group, rotate=rotate)  # type: ignore[arg-type]
    assert tensor.rotated == rotate
    offsets = rng.standard_normal(tensor.scales.shape).astype(np.float32)
    x = torch.from_numpy(rng.standard_normal((rows, width))).half()
    to, bias = torch.randn(rows, 40).half(), torch.randn(40).half()
    fused = FusedOperators()
    for each in (tensor, replace(tensor, offsets=offsets, rotated=False)):
        packed = PackedMatrix(each, torch.float16, torch.device("cpu"))
        expected = x.float() @ torch.from_numpy(each.to_f32()).T
        size = {"atol": 2e-3 * float(expected.abs().max()), "rtol": 4e-3}
        packed.dense = None  # type: ignore[assignment, method-assign]  # it stays packed
        torch.testing.assert_close(fused.product(x, packed).float(), expected, **size)
        torch.testing.assert_close(fused.product(x, packed, bias).float(), expected + bias.float(), **size)
        torch.testing.assert_close(fused.product_added(to, x, packed).float(), expected + to.float(), **size)


def test_large_batches_unpack_a_matrix_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).standard_normal((24, 64)).astype(np.float32)
    parts = [
        PackedMatrix(rounded(values, dtype, 32), torch.float32, torch.device("cpu")) for dtype in ("i4", "i8")
    ]
    both, x = PackedMatrices(parts), torch.randn(256, 64)
    fused, plain = FusedOperators(), Operators()
    expected = plain.product(x, both)
    torch.testing.assert_close(fused.product(x, both), expected)
    torch.testing.assert_close(fused.product(x[:255], both), expected[:255], atol=1e-4, rtol=1e-4)
    monkeypatch.setattr(PackedMatrix, "dense", None)
    with pytest.raises(TypeError):
        fused.product(x, both)
    assert fused.product(x[:0].new_ones(3, 64), both).shape == (3, 48)


def masked(owners: list[int], ranks: list[int]) -> torch.Tensor:
    """Rows of ones where each row's own adapter lies; owner -1 has none."""
    ends = np.cumsum(ranks)
    mask = torch.zeros(len(owners), int(ends[-1]))
    for row, owner in enumerate(owners):
        if owner >= 0:
            mask[row, ends[owner] - ranks[owner] : ends[owner]] = 1.0
    return mask


@pytest.mark.parametrize(
    ("rows", "width"),
    [(37, 72), (5, 1300), (300, 40)],  # a batch; columns in two splits; large tiles of rows
    ids=["batch", "split", "many"],
)
def test_adapters_add_to_their_own_rows(rows: int, width: int) -> None:
    torch.manual_seed(0)
    ranks, out_width = [8, 3, 32, 17], 200
    mask = masked([(i // 5) % 5 - 1 for i in range(rows)], ranks) * 0.5
    x, wide = torch.randn(rows, width).half(), torch.randn(rows, out_width + 48).half()
    a, b = torch.randn(60, width).half() * 0.1, torch.randn(60, out_width).half() * 0.1
    y = wide[:, 16 : 16 + out_width]  # some columns of a matrix
    expected = wide.float()
    Operators().add_adapters(expected[:, 16 : 16 + out_width], x.float(), a.float(), b.float(), mask)
    FusedOperators().add_adapters(y, x, a, b, mask.half())
    torch.testing.assert_close(wide.float(), expected, atol=1e-2, rtol=1e-2)
    with pytest.raises(ValueError, match="one type"):
        FusedOperators().add_adapters(y, x.float(), a, b, mask.half())


def layer(dtype: str) -> list[Block]:
    """A layer of qwen2's kind."""
    rng = np.random.default_rng(1)
    rope = RopeConfig("default", 1e4)
    specs = AttnSpec(64, 4, 2, 16, 1e-5, rope, 0, True, False, False), FfnSpec(64, 96, 1e-5, False)
    return [
        Block(
            f"{spec.kind}-{dtype}",
            spec,
            {
                name: from_f32(rng.standard_normal(shape) * 0.1 + (1.0 if "norm" in name else 0.0), dtype)
                for name, shape in tensor_shapes(spec).items()
            },
        )
        for spec in specs
    ]


def quantized(blocks: list[Block]) -> list[Block]:
    """In 4 bits, but k and v in 8."""

    def packed(block: Block) -> Block:
        bits = {name: "i8" if name in ("k", "v") else "i4" for name in PROJECTIONS[block.spec.kind]}
        made = {name: rounded(block.tensors[name].to_f32(), dtype, 32) for name, dtype in bits.items()}
        return replace(block, id=f"{block.id}-packed", tensors=block.tensors | made)

    return [packed(block) for block in blocks]


def run_layer(
    engines: ReferenceEngines,
    dtype: torch.dtype,
    *,
    adapted: bool = True,
    make: Callable[[list[Block]], list[Block]] = list,
) -> torch.Tensor:
    """A batch of prefills and decode steps of four adapters of different ranks and of bare rows."""
    torch.manual_seed(2)
    engines.weights = Weights(dtype, torch.device("cpu"))
    blocks = make(layer("f16"))
    lora = {index: PROJECTIONS[block.spec.kind] for index, block in enumerate(blocks)} if adapted else {}
    engine = engines.span(blocks, lora=lora)
    news, pasts = [3, 1, 12, 1, 1, 2], [0, 40, 0, 7, 31, 33]
    owners = [owner for owner, new in zip([2, -1, 0, 3, 1, -1], news, strict=True) for _ in range(new)]
    mask = masked(owners, [4, 24, 7, 16])
    positions = np.concatenate([np.arange(p, p + n) for p, n in zip(pasts, news, strict=True)])
    spec = blocks[0].spec
    assert isinstance(spec, AttnSpec)
    cos, sin = (torch.from_numpy(table[positions])[:, None, None] for table in spec.rope.tables(16, 64))
    floats = {"hidden": torch.randn(len(owners), 64), "lora_mask": mask}
    for name in ("key_cache", "value_cache"):
        floats[name] = torch.randn(12, 2, 32, 16)
    for index, names in lora.items():
        for name in names:
            out, width = tensor_shapes(blocks[index].spec)[name]
            floats[f"lora_a.{index}.{name}"] = torch.randn(mask.shape[1], width) * 0.2
            floats[f"lora_b.{index}.{name}"] = torch.randn(mask.shape[1], out) * 0.2
    ints = {
        "past_lens": pasts,
        "subsequence_begins": np.cumsum([0, *news]),
        "block_indices_begins": np.arange(0, 13, 2),
        "block_indices.0": np.random.default_rng(3).permutation(12),
    }
    result = torch.zeros(len(owners), 64, dtype=dtype)
    bound = {name: tensor.half().to(dtype) for name, tensor in floats.items()} | {"cos": cos, "sin": sin}
    bound |= {name: torch.tensor(values, dtype=torch.int32) for name, values in ints.items()}
    for name, tensor in (bound | {"hidden_out": result}).items():
        engine.bind(name, tensor)
    engine.run()
    return result.float()


def on_kernels() -> ReferenceEngines:
    """What `ReferenceEngines` takes on a GPU in the place of torch."""
    kernels = ReferenceEngines("f32", "cpu")
    kernels.operators, kernels._attention = FusedOperators(), PagedAttention(1)
    return kernels


def test_engines_on_kernels_run_packed_blocks_as_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run_layer(ReferenceEngines("f32", "cpu"), torch.float32, make=quantized)
    plain = run_layer(ReferenceEngines("f32", "cpu"), torch.float32)
    monkeypatch.setattr(PackedMatrix, "dense", None)  # they stay packed
    ours = run_layer(on_kernels(), torch.float16, make=quantized)
    torch.testing.assert_close(ours, expected, atol=1.5e-2, rtol=1e-2)
    assert (expected - plain).abs().max() > 0.05


def test_engines_on_kernels_add_adapters_as_torch_does() -> None:
    """All seven projections, as on a GPU."""
    ours, expected = (
        run_layer(on_kernels(), torch.float16),
        run_layer(ReferenceEngines("f32", "cpu"), torch.float32),
    )
    torch.testing.assert_close(ours, expected, atol=1.5e-2, rtol=1e-2)
    bare = run_layer(ReferenceEngines("f32", "cpu"), torch.float32, adapted=False)
    changed = (expected - bare).abs().amax(1)
    assert (changed[[3, -1, -2]] < 1e-5).all()  # rows without an adapter
    assert (changed[[0, 1, 2, *range(4, 18)]] > 0.1).all()
