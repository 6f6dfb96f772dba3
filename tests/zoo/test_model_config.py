from typing import Any

import pytest

from blockzoo.zoo.blocks import AttnSpec, chain_specs, tensor_shapes
from blockzoo.zoo.errors import CheckpointError, UnsupportedModelError
from blockzoo.zoo.model_config import ModelConfig

BASE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 512,
}


def read(architecture: str, generation: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    config = {**BASE, "architectures": [f"{architecture}ForCausalLM"], **changes}
    return ModelConfig.from_hf({k: v for k, v in config.items() if v is not ...}, generation)


@pytest.mark.parametrize("architecture", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_defaults_equal_those_of_transformers(architecture: str) -> None:
    import transformers

    theirs = getattr(transformers, f"{architecture}Config")(**BASE)
    ours = read(architecture)
    assert ours.head_dim == getattr(theirs, "head_dim", 64 // 8)
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    window = getattr(theirs, "sliding_window", None)
    assert ours.layer_windows == ((window or 0,) * 4 if architecture == "Mistral" else (0,) * 4)
    heads = read(architecture, num_key_value_heads=..., num_attention_heads=32, head_dim=16).num_kv_heads
    assert heads == getattr(transformers, f"{architecture}Config")(num_attention_heads=32).num_key_value_heads


def test_biases_and_norms_by_architecture() -> None:
    def flags(config: ModelConfig) -> tuple[bool, bool, bool, bool]:
        return config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm

    assert flags(read("Llama")) == (False, False, False, False)
    assert flags(read("Llama", attention_bias=True, mlp_bias=True)) == (True, True, True, False)
    assert flags(read("Mistral", attention_bias=True)) == (False, False, False, False)
    assert flags(read("Qwen2")) == (True, False, False, False)
    assert flags(read("Qwen3")) == (False, False, False, True)
    assert flags(read("Qwen3", attention_bias=True)) == (True, True, False, True)
    names = tensor_shapes(chain_specs(read("Qwen3", attention_bias=True))[1])
    assert list(names)[5:] == ["q_bias", "k_bias", "v_bias", "o_bias", "q_norm", "k_norm"]
    assert names["q_norm"] == (128,)


def test_sliding_windows_per_layer() -> None:
    assert read("Llama", sliding_window=16).layer_windows == (0, 0, 0, 0)
    assert read("Mistral", sliding_window=16).layer_windows == (16,) * 4
    assert read("Mistral", sliding_window=None).layer_windows == (0,) * 4
    assert read("Qwen2", sliding_window=16).layer_windows == (0,) * 4
    slides: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 16}
    assert read("Qwen2", **slides, max_window_layers=3).layer_windows == (0, 0, 0, 16)
    kinds = ["sliding_attention", "full_attention"] * 2
    config = read("Qwen3", **slides, layer_types=kinds)
    assert config.layer_windows == (16, 0, 16, 0)
    specs = [spec for spec in chain_specs(config) if isinstance(spec, AttnSpec)]
    assert [spec.sliding_window for spec in specs] == [16, 0, 16, 0]


def test_end_of_text_ids() -> None:
    assert read("Llama").eos_token_ids == ()
    assert read("Llama", eos_token_id=5).eos_token_ids == (5,)
    assert read("Llama", {"eos_token_id": [5, 6]}, eos_token_id=5).eos_token_ids == (5, 6)
    assert read("Llama", {"eos_token_id": None}, eos_token_id=5, bos_token_id=1).eos_token_ids == (5,)
    assert read("Llama", bos_token_id=0).bos_token_id == 0


LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("positions", "rope", "outside", "length"),
    [
        (512, {}, None, 512),
        (512, LINEAR, None, 2048),  # vicuna-7b-v1.5-16k: 4096 and 4.0
        (2048, LINEAR | {"original_max_position_embeddings": 512}, None, 2048),
        (2048, LINEAR, 512, 2048),
        (512, LINEAR, 512, 2048),
        (512, YARN, None, 2048),
        (512, YARN | {"original_max_position_embeddings": 512}, None, 2048),  # Qwen2.5's README
        (2048, YARN | {"original_max_position_embeddings": 512}, None, 2048),
        (2048, YARN, 512, 2048),
        (2048, YARN | {"factor": None, "original_max_position_embeddings": 512}, None, 2048),
        (4096, YARN | {"original_max_position_embeddings": 512}, None, 4096),
        (4096, LLAMA3 | {"original_max_position_embeddings": 512}, None, 4096),
        (512, LINEAR | {"factor": 1e300}, None, 2**31 - 1),
        (512, LINEAR | {"factor": 0.5}, None, 512),
    ],
)
def test_length_with_scaled_rotary_embeddings(
    positions: int, rope: dict[str, Any], outside: int | None, length: int
) -> None:
    config = read(
        "Llama",
        max_position_embeddings=positions,
        rope_parameters=rope,
        original_max_position_embeddings=outside or ...,
    )
    assert config.max_length == length
    assert ModelConfig.from_json(config.to_json()).max_length == length


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": ["LlamaModel"]}, "LlamaModel"),
        ({"hidden_act": "gelu_new"}, "'gelu_new'"),
        ({"quantization_config": {"quant_method": "awq"}}, "'awq'"),
        ({"rope_scaling": {"type": "longrope"}}, "'longrope'"),
        ({"layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
    ],
)
def test_unsupported_models_are_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        read("Qwen2", **changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": None}, "architectures"),
        ({"hidden_size": ...}, "hidden_size"),
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads"),
        ({"head_dim": 7}, "must be even"),
        ({"eos_token_id": "x"}, "eos_token_id"),
        ({"layer_types": ["full_attention"]}, "must list 4 layers"),
        ({"layer_types": ["sliding_attention"] * 4}, "use_sliding_window or sliding_window is off"),
        ({"max_position_embeddings": -1}, "max_position_embeddings"),
    ],
)
def test_wrong_fields_are_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        read("Qwen2", **changes)


JUNK: list[Any] = [None, -1, 0, 1, 0.5, float("nan"), float("inf"), 2**40, "x", "", True, [], [1], [[]], {}]
JUNK += [{"a": 1}, {"rope_type": []}, {"rope_type": "yarn", "factor": {}}, {"x": {"rope_type": "linear"}}]
FIELDS = (*BASE, "architectures", "head_dim", "hidden_act", "rms_norm_eps", "rope_parameters", "rope_scaling")
FIELDS += ("rope_theta", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
FIELDS += ("tie_word_embeddings", "attention_bias", "mlp_bias", "bos_token_id", "eos_token_id")
FIELDS += ("partial_rotary_factor", "original_max_position_embeddings", "quantization_config")


@pytest.mark.parametrize("architecture", ["Llama", "Mistral", "Qwen2"])
def test_junk_in_any_field_is_a_named_error_or_harmless(architecture: str) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    for rope in ({"rope_type": "default"}, yarn):
        for field in FIELDS:
            for junk in JUNK:
                try:
                    config = read(architecture, **{"rope_parameters": dict(rope), field: junk})
                except CheckpointError:
                    continue
                config.rope.tables(config.head_dim % 1000, 4)
                assert ModelConfig.from_json(config.to_json()) == config
    for field in (*yarn, "attention_factor", "mscale", "beta_fast", "truncate", "type"):
        for junk in JUNK:
            try:
                read(architecture, rope_parameters={**yarn, "mscale_all_dim": 1.0, field: junk})
            except CheckpointError:
                continue


@pytest.mark.parametrize("given", [1e-05, 9.999999747378752e-06, 1e-06, 1e-40, 1e300])
def test_an_epsilon_is_the_number_that_is_computed_with(given: float) -> None:
    found = read("Llama", rms_norm_eps=given).rms_norm_eps
    assert found == {9.999999747378752e-06: 1e-05}.get(given, given)
