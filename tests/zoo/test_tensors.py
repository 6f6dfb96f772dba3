import json
from pathlib import Path

import numpy as np
import pytest
import torch

from blockzoo.zoo.tensors import (
    BlockTensor,
    TensorFile,
    from_f32,
    narrowed,
    tensor_file_bytes,
    write_tensor_file,
)


def test_bf16_rounding_equals_torch() -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal(10_000).astype(np.float32) * np.float32(2.0) ** rng.integers(-40, 40, 10_000)
    ties = np.array([1.00390625, 1.01171875, -1.00390625, 0.0, -0.0, 3.4e38], np.float32)
    values = np.concatenate([values.astype(np.float32), ties])
    ours = from_f32(values, "bf16")
    theirs = torch.from_numpy(values).to(torch.bfloat16)
    np.testing.assert_array_equal(ours.data, theirs.view(torch.int16).numpy().view(np.uint16))
    np.testing.assert_array_equal(ours.to_f32(), theirs.float().numpy())


def test_narrowed_is_lossless_and_only_where_exact() -> None:
    exact = from_f32(np.linspace(-3, 3, 1000, dtype=np.float32), "bf16").to_f32()
    assert narrowed(BlockTensor("f32", exact)).dtype == "bf16"
    np.testing.assert_array_equal(narrowed(BlockTensor("f32", exact)).to_f32(), exact)
    exact[-1] = 1.0001
    tensor = BlockTensor("f32", exact)
    assert narrowed(tensor) is tensor
    half = BlockTensor("f16", np.ones(3, np.float16))
    assert narrowed(half) is half


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_is_finite(dtype: str, bad: float) -> None:
    values = np.array([1.0, -3e4, 0.0], np.float32)
    assert from_f32(values, dtype).is_finite()  # type: ignore[arg-type]
    values[1] = bad
    tensor = BlockTensor("bf16", (values.view(np.uint32) >> 16).astype(np.uint16))
    assert not (tensor if dtype == "bf16" else from_f32(values, dtype)).is_finite()  # type: ignore[arg-type]


def test_file_round_trip_is_zero_copy_aligned_and_read_by_safetensors(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    tensors = {
        "odd": from_f32(rng.standard_normal(7), "bf16"),
        "wide": from_f32(rng.standard_normal((3, 5)), "f32"),
        "half": from_f32(rng.standard_normal((2, 2)), "f16"),
    }
    path = tmp_path / "t.safetensors"
    write_tensor_file(path, tensors, {"kind": "attn"})
    assert path.stat().st_size == tensor_file_bytes(tensors, {"kind": "attn"})
    file = TensorFile(path)
    assert file.metadata == {"kind": "attn"}
    for name, tensor in tensors.items():
        seen = file.tensor(name)
        assert (seen.dtype, seen.shape) == (tensor.dtype, tensor.shape)
        assert seen.data.flags.aligned
        assert not seen.data.flags.owndata
        np.testing.assert_array_equal(seen.data, tensor.data)
    file.drop_pages()
    np.testing.assert_array_equal(file.tensor("wide").data, tensors["wide"].data)

    from safetensors.torch import load_file

    loaded = load_file(path)
    np.testing.assert_array_equal(loaded["odd"].float().numpy(), tensors["odd"].to_f32())


@pytest.mark.parametrize("damage", ["empty", "cut", "header", "longer", "offsets"])
def test_damaged_files_are_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "t.safetensors"
    write_tensor_file(path, {"a": from_f32(np.ones(100), "f32")}, {})
    content = path.read_bytes()
    header = json.dumps({"a": {"dtype": "F32", "shape": [100], "data_offsets": [0, 4000]}}).encode()
    path.write_bytes(
        {
            "empty": b"",
            "cut": content[:-1],
            "header": content[:8] + b"?" * (len(content) - 8),
            "longer": content + b"x",
            "offsets": len(header).to_bytes(8, "little") + header + bytes(400),
        }[damage]
    )
    with pytest.raises(ValueError, match="safetensors"):
        TensorFile(path)


def test_other_dtypes_are_named(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"packed": np.zeros(4, np.int8)}, tmp_path / "q.safetensors")
    with pytest.raises(ValueError, match="packed has dtype I8"):
        TensorFile(tmp_path / "q.safetensors").tensor("packed")
