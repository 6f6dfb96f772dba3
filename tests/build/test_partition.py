"""Equal weights give equal block ids, whatever the files look like."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blockzoo.build.partition import CutBlock, cut
from blockzoo.build.sources import Source, open_sources
from blockzoo.zoo.errors import CheckpointError
from blockzoo.zoo.tensors import TensorFile, from_f32, write_tensor_file


def source_of(folder: Path) -> Source:
    return open_sources({"m": folder}, None)[0]


def blocks_of(folder: Path, dtype: Any = None) -> list[CutBlock]:
    source = source_of(folder)
    return list(cut(source.config, source.read, dtype, "m"))


def ids_of(folder: Path) -> list[str]:
    return [block.id for block in blocks_of(folder)]


def rewrite(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change the tensors of a single-file checkpoint."""
    path = folder / "model.safetensors"
    file = TensorFile(path)
    tensors = {name: file.tensor(name) for name in file.names}
    new = folder / "new.safetensors"
    write_tensor_file(new, change(tensors), {})
    new.rename(path)


def test_chain_order_and_kinds(checkpoints: dict[str, Path]) -> None:
    blocks = blocks_of(checkpoints["llama-bias"])
    assert [block.spec.kind for block in blocks] == ["embed", *["attn", "ffn"] * 3, "head"]
    assert len({block.id for block in blocks}) == 8
    assert {block.dtype for block in blocks} == {"bf16"}
    assert list(blocks[1].tensors)[-4:] == ["q_bias", "k_bias", "v_bias", "o_bias"]


def test_a_tied_head_has_no_matrix_and_points_to_the_embedding(checkpoints: dict[str, Path]) -> None:
    blocks = blocks_of(checkpoints["qwen2"])
    assert list(blocks[-1].tensors) == ["norm"]
    assert blocks[-1].tied_to == blocks[0].id


def test_shards_give_the_same_ids(
    checkpoints: dict[str, Path], make_model: Callable[..., Any], save: Callable[..., Path], tmp_path: Path
) -> None:
    folder = save(make_model("llama", 0), tmp_path / "sharded", max_shard_size="60KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert ids_of(folder) == ids_of(checkpoints["llama"])


def test_tensor_order_gives_the_same_ids(checkpoint: Path, checkpoints: dict[str, Path]) -> None:
    rewrite(checkpoint, lambda tensors: dict(reversed(tensors.items())))
    assert ids_of(checkpoint) == ids_of(checkpoints["llama"])


def test_a_copy_saved_in_f32_gives_the_same_ids(checkpoint: Path, checkpoints: dict[str, Path]) -> None:
    rewrite(checkpoint, lambda tensors: {n: from_f32(t.to_f32(), "f32") for n, t in tensors.items()})
    assert source_of(checkpoint).dtype == "f32"
    assert ids_of(checkpoint) == ids_of(checkpoints["llama"])


def test_the_older_rope_spelling_gives_the_same_ids(checkpoint: Path, checkpoints: dict[str, Path]) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert ids_of(checkpoint) == ids_of(checkpoints["llama"])


def test_a_saved_tied_head_gives_the_same_ids(checkpoint: Path, checkpoints: dict[str, Path]) -> None:
    rewrite(checkpoint, lambda tensors: {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]})
    assert ids_of(checkpoint) == ids_of(checkpoints["llama"])


def test_one_changed_value_changes_one_block(checkpoint: Path, checkpoints: dict[str, Path]) -> None:
    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        name = "model.layers.1.mlp.up_proj.weight"
        values = tensors[name].to_f32().copy()
        values[3, 5] += 1
        return {**tensors, name: from_f32(values, "bf16")}

    rewrite(checkpoint, change)
    changed = [a != b for a, b in zip(ids_of(checkpoint), ids_of(checkpoints["llama"]), strict=True)]
    assert changed == [False, False, False, False, True, False, False, False]


@pytest.mark.parametrize(
    ("field", "value"), [("rope_theta", 5e5), ("rms_norm_eps", 1e-5), ("num_attention_heads", 8)]
)
def test_another_operator_is_another_block(checkpoint: Path, field: str, value: Any) -> None:
    before = ids_of(checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    if field == "num_attention_heads":
        config |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
    elif field == "rope_theta":
        config["rope_parameters"]["rope_theta"] = value
    else:
        config[field] = value
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert ids_of(checkpoint)[1] != before[1]


def test_conversion(checkpoints: dict[str, Path]) -> None:
    kept, converted = blocks_of(checkpoints["llama"]), blocks_of(checkpoints["llama"], "f16")
    for before, after in zip(kept, converted, strict=True):
        assert after.dtype == "f16"
        assert before.id != after.id
        for name in before.tensors:
            np.testing.assert_allclose(after.tensors[name].to_f32(), before.tensors[name].to_f32(), atol=1e-6)


def test_tensors_are_views_of_the_file(checkpoints: dict[str, Path]) -> None:
    assert not any(t.data.flags.owndata for b in blocks_of(checkpoints["llama"]) for t in b.tensors.values())


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("model.layers.0.self_attn.q_proj.weight", np.ones((64, 32)), r"\[64, 32\].*asks for \[64, 64\]"),
        ("model.layers.2.mlp.down_proj.weight", np.full((64, 96), np.nan), "NaN or infinite"),
        ("model.norm.weight", np.full(64, np.inf), "NaN or infinite"),
        ("model.embed_tokens.weight", np.full((288, 64), 1e30), "beyond the range of f16"),
        ("lm_head.weight", np.ones((288, 64)), "lm_head.weight differs"),
        ("model.layers.3.mlp.up_proj.weight", np.ones((96, 64)), "belong to no block"),
        ("model.layers.0.self_attn.q_proj.bias", np.ones(64), "belong to no block.*q_proj.bias"),
    ],
)
def test_unfit_tensors_are_named(checkpoint: Path, name: str, values: np.ndarray, said: str) -> None:
    tensor = from_f32(np.where(np.isfinite(values), values, 0), "f32")
    if not np.isfinite(values).all():
        tensor.data[...] = values
    rewrite(checkpoint, lambda tensors: {**tensors, name: tensor})
    with pytest.raises(CheckpointError, match=said) as caught:
        blocks_of(checkpoint, "f16" if "range" in said else None)
    assert name in str(caught.value)


def test_old_inverse_frequencies_are_ignored(checkpoint: Path, checkpoints: dict[str, Path]) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(checkpoint, lambda tensors: {**tensors, name: from_f32(np.ones(8), "f32")})
    assert ids_of(checkpoint) == ids_of(checkpoints["llama"])


def test_a_missing_tensor_is_named(checkpoint: Path) -> None:
    gone = "model.layers.1.input_layernorm.weight"
    rewrite(checkpoint, lambda tensors: {n: t for n, t in tensors.items() if n != gone})
    with pytest.raises(CheckpointError, match=gone):
        ids_of(checkpoint)


def test_copies_do_not_depend_on_the_folder(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(checkpoints["mistral"], tmp_path / "copy")
    assert ids_of(tmp_path / "copy") == ids_of(checkpoints["mistral"])
