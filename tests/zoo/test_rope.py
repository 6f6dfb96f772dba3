import numpy as np
import pytest

from blockzoo.zoo.errors import CheckpointError, UnsupportedModelError
from blockzoo.zoo.rope import RopeConfig

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CASES = {
    "default": ({}, 10000.0),
    "large-theta": ({}, 1e6),
    "linear": ({"rope_type": "linear", "factor": 4.0}, 10000.0),
    "llama3": (LLAMA3, 500000.0),
    "yarn": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}, 10000.0),
    "yarn-qwen": ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 1e6),
    "yarn-mscale": (
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "mscale": 0.8,
            "mscale_all_dim": 0.5,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "truncate": False,
        },
        10000.0,
    ),
    "yarn-attention-factor": (
        {
            "rope_type": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": 4096,
            "attention_factor": 0.7,
        },
        10000.0,
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_tables_equal_those_of_transformers(name: str, head_dim: int) -> None:
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling, theta = CASES[name]
    config = LlamaConfig(
        hidden_size=head_dim * 2,
        num_attention_heads=2,
        max_position_embeddings=16384,
        rope_parameters={"rope_theta": theta, "rope_type": scaling.get("type", "default"), **scaling},
    )
    cos, sin = RopeConfig.from_hf(config.to_dict()).tables(head_dim, 5000)
    embedding = LlamaRotaryEmbedding(config)
    theirs = embedding(torch.zeros(1, dtype=torch.float32), torch.arange(5000)[None])
    for ours, expected in zip((cos, sin), theirs, strict=True):
        assert ours.dtype == np.float32
        assert ours.shape == (5000, head_dim)
        # a frequency may round to the neighbouring float32: 6e-8 of an angle of up to 5000 radians
        np.testing.assert_allclose(ours, expected[0].numpy(), rtol=0, atol=1e-3)
        np.testing.assert_allclose(ours[:64], expected[0, :64].numpy(), rtol=0, atol=2e-5)


def test_both_spellings_read_the_same() -> None:
    new = {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}, "max_position_embeddings": 131072}
    old = {"rope_theta": 5e5, "rope_scaling": LLAMA3, "max_position_embeddings": 131072}
    assert RopeConfig.from_hf(new) == RopeConfig.from_hf(old)
    assert RopeConfig.from_hf({"rope_theta": 5e5}).theta == 5e5
    assert RopeConfig.from_hf({}) == RopeConfig("default", 10000.0)


def test_yarn_window_defaults_to_the_positions_of_the_model() -> None:
    rope = RopeConfig.from_hf(
        {"rope_scaling": {"type": "yarn", "factor": 2}, "max_position_embeddings": 1024}
    )
    assert (rope.original_max_position_embeddings, rope.factor) == (1024, 2.0)


@pytest.mark.parametrize(
    ("scaling", "said"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "'dynamic'"),
        ({"type": "longrope", "short_factor": [1.0]}, "'longrope'"),
        ({"type": "default", "mrope_section": [1, 2]}, "mrope_section"),
        ({"full_attention": {"rope_type": "default"}, "sliding_attention": {}}, "per layer type"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_other_ropes_are_refused_by_name(scaling: dict[str, object], said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        RopeConfig.from_hf({"rope_parameters": scaling})


@pytest.mark.parametrize(
    ("scaling", "said"),
    [
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": "2"}, "factor"),
        ({"rope_type": "llama3", "factor": 2.0}, "original_max_position_embeddings"),
        ({**LLAMA3, "high_freq_factor": 0.5}, "high_freq_factor"),
        ({"rope_theta": -1.0}, "rope_theta"),
    ],
)
def test_wrong_values_are_named(scaling: dict[str, object], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        RopeConfig.from_hf({"rope_parameters": scaling})
