"""What is read out of checkpoint folders: the tensors and settings that transformers takes from them.

Verification cannot see a misreading that the oracle shares, so the oracle's weights are compared too.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from readings import assert_reads_as, edit, from_transformers, rewrite

from blockzoo.build import oracle
from blockzoo.build.originals import oracle_for
from blockzoo.build.sources import Source, open_sources
from blockzoo.zoo.errors import CheckpointError
from blockzoo.zoo.tensors import from_f32


def open_one(folder: Path) -> Source:
    return open_sources({"m": folder}, None)[0]


@pytest.fixture
def shards(checkpoint: Path, tmp_path: Path) -> Path:
    """The checkpoint in shards."""
    from_transformers(checkpoint).save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    shutil.copyfile(checkpoint / "tokenizer.json", tmp_path / "shards/tokenizer.json")
    return tmp_path / "shards"


def test_an_index_beside_the_single_file_is_stale(
    checkpoint: Path, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    make_model("llama", 99).save_pretrained(tmp_path / "old", max_shard_size="50KB")
    for stale in (tmp_path / "old").glob("model*safetensors*"):
        shutil.copyfile(stale, checkpoint / stale.name)
    assert (checkpoint / "model.safetensors.index.json").exists()
    assert_reads_as(from_transformers(checkpoint), open_one(checkpoint))
    (checkpoint / "model.safetensors").unlink()
    assert_reads_as(from_transformers(checkpoint), open_one(checkpoint))
    np.testing.assert_array_equal(
        open_one(checkpoint).read("model.norm.weight").to_f32(),
        make_model("llama", 99).model.norm.weight.detach().float().numpy(),
    )


def test_what_the_index_does_not_list_is_read_from_the_shards(shards: Path) -> None:
    index = shards / "model.safetensors.index.json"
    listed = json.loads(index.read_text())["weight_map"]
    assert len(set(listed.values())) > 1
    del listed["model.norm.weight"]
    edit(index, weight_map=listed)
    assert_reads_as(from_transformers(shards), open_one(shards))


def test_a_tensor_in_two_shards_is_refused(shards: Path) -> None:
    listed = json.loads((shards / "model.safetensors.index.json").read_text())["weight_map"]
    other = next(shard for shard in listed.values() if shard != listed["model.norm.weight"])
    norm = {"model.norm.weight": from_f32(np.ones(64, np.float32), "f32")}
    rewrite(shards / other, lambda tensors: tensors | norm)
    with pytest.raises(CheckpointError, match="both hold model"):
        open_one(shards)


def test_a_snapshot_of_the_hub_cache_is_read(checkpoint: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name/snapshots/0123"
    blobs = snapshot.parents[1] / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(checkpoint.iterdir())):
        shutil.copyfile(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert_reads_as(from_transformers(snapshot), open_one(snapshot))


YARN = {"rope_type": "yarn", "rope_theta": 5e4, "factor": 4.0}
LINEAR = {"type": "linear", "factor": 2.0}
ROPES: dict[str, dict[str, Any]] = {
    "both": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_scaling": LINEAR},
    "both-thetas": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_theta": 7e4},
    "theta-outside": {"rope_parameters": ..., "rope_theta": 7e4, "rope_scaling": LINEAR},
    "both-types": {"rope_parameters": {"rope_type": "linear", "type": "yarn", "factor": 4.0}},
    "two-windows": {
        "rope_parameters": {**YARN, "original_max_position_embeddings": 32},
        "original_max_position_embeddings": 64,
    },
    "window-outside": {"rope_parameters": YARN, "original_max_position_embeddings": 64},
    "no-window": {"rope_parameters": YARN},
    "linear-window": {"rope_parameters": {**LINEAR, "original_max_position_embeddings": 128}},
    "no-factor": {
        "rope_parameters": {**YARN, "factor": None, "original_max_position_embeddings": 128},
    },
}


@pytest.mark.parametrize("case", ROPES)
def test_rotary_settings_are_those_that_transformers_takes(case: str, checkpoint: Path) -> None:
    import torch

    edit(checkpoint / "config.json", **ROPES[case])
    source = open_one(checkpoint)
    theirs = from_transformers(checkpoint).model.rotary_emb
    cos, sin = theirs(torch.zeros(1, dtype=torch.float32), torch.arange(600)[None])
    dim = source.config.head_dim
    for ours, expected in zip(source.config.rope.tables(dim, 600), (cos, sin), strict=True):
        np.testing.assert_allclose(ours, expected[0].numpy(), rtol=0, atol=1e-4)
    config = oracle_for(source, False, None).config
    angles = np.outer(np.arange(600), oracle._frequencies(config, dim))
    factor = oracle._attention_factor(config)
    np.testing.assert_allclose(np.cos(angles) * factor, cos[0, :, : dim // 2].numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("variant", ["llama", "qwen2", "qwen3"])
def test_no_number_of_kv_heads_means_one_each(
    variant: str, make_model: Callable[..., Any], save: Callable[..., Path], tmp_path: Path
) -> None:
    folder = save(make_model(variant, 1, num_key_value_heads=4), tmp_path / "m")
    edit(folder / "config.json", num_key_value_heads=None)
    assert_reads_as(from_transformers(folder), open_one(folder))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "qwen2"}, "model_type 'qwen2' contradicts architectures 'LlamaForCausalLM'"),
        ({"architectures": ["MistralForCausalLM"]}, "model_type 'llama' contradicts"),
        ({"text_config": {"num_hidden_layers": 1}}, "text_config"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": None}}, "rope_theta"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10**400}}, "rope_theta"),
        ({"rope_parameters": ..., "rope_theta": None}, "rope_theta"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
    ],
)
def test_settings_that_mean_another_model_are_refused(
    changes: dict[str, Any], said: str, checkpoint: Path
) -> None:
    edit(checkpoint / "config.json", **changes)
    with pytest.raises(CheckpointError, match=said):
        open_one(checkpoint)


@pytest.mark.parametrize("in_config", [5, [5, 6], None])
@pytest.mark.parametrize("in_generation", [..., 7, [7, 8]])
def test_end_tokens_are_those_that_transformers_stops_at(
    in_config: Any, in_generation: Any, checkpoint: Path
) -> None:
    edit(checkpoint / "config.json", eos_token_id=in_config)
    if in_generation is ...:
        (checkpoint / "generation_config.json").unlink()
    else:
        edit(checkpoint / "generation_config.json", eos_token_id=in_generation)
    theirs = from_transformers(checkpoint).generation_config.eos_token_id
    expected = theirs if isinstance(theirs, list) else [] if theirs is None else [theirs]
    assert open_one(checkpoint).config.eos_token_ids == tuple(expected)
