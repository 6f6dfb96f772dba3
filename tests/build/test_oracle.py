"""The oracle against transformers: the two agree, so a chain that agrees with the oracle is right."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blockzoo.build.originals import oracle_for
from blockzoo.build.sources import open_sources

ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn-mscale": {
        "rope_type": "yarn",
        "rope_theta": 500.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "mscale": 0.9,
        "mscale_all_dim": 0.4,
        "beta_fast": 8.0,
        "truncate": False,
    },
}
TOKENS = [list(np.random.default_rng(0).integers(0, 256, length)) for length in (70, 9)]


def hf_logits(model: Any, tokens: list[int]) -> np.ndarray:
    import torch

    with torch.no_grad():
        return np.asarray(model.float()(torch.tensor([tokens])).logits[0].numpy())


def assert_agrees(model: Any, folder: str | Path, **others: str | Path) -> None:
    source = open_sources({**others, "m": folder}, None)[-1]
    ours = oracle_for(source, True, None).logits(TOKENS, 9)
    for tokens, seen in zip(TOKENS, ours, strict=True):
        expected = hf_logits(model, tokens)[-9:]
        np.testing.assert_allclose(seen, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("variant", ["llama", "llama-bias", "mistral", "qwen2", "qwen2-sliding", "qwen3"])
def test_every_architecture(
    variant: str, make_model: Callable[..., Any], checkpoints: dict[str, Path]
) -> None:
    seed = list(checkpoints).index(variant)
    assert_agrees(make_model(variant, seed), checkpoints[variant])


@pytest.mark.parametrize("rope", ROPES)
def test_every_rope(
    rope: str, make_model: Callable[..., Any], save: Callable[..., Path], tmp_path: Path
) -> None:
    model = make_model("llama", 7, rope_parameters=dict(ROPES[rope]))
    assert_agrees(model, save(model, tmp_path / rope))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "target_modules": ["gate_proj", "up_proj", "down_proj", "o_proj", "k_proj"]},
        {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ],
    ids=["plain", "rslora", "patterns", "head", "embedding", "tied-embedding"],
)
@pytest.mark.parametrize("base", ["llama", "qwen3"])  # a tied and an untied head
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # of peft and transformers
def test_unmerged_adapters(
    base: str,
    settings: dict[str, Any],
    checkpoints: dict[str, Path],
    make_adapter: Callable[..., Any],
    tmp_path: Path,
) -> None:
    if base == "qwen3" and "ensure_weight_tying" in settings:
        pytest.skip("the head is not tied")
    model = make_adapter(checkpoints[base], tmp_path / "adapter", **settings)
    sources = open_sources({"m": f"{tmp_path / 'adapter'}@base", "base": checkpoints[base]}, None)
    source = next(source for source in sources if source.name == "m")
    exact = oracle_for(source, False, None).logits(TOKENS, 9)
    rounded = oracle_for(source, True, None).logits(TOKENS, 9)
    for tokens, seen, served in zip(TOKENS, exact, rounded, strict=True):
        expected = hf_logits(model, tokens)[-9:]
        scale = np.abs(expected).max()
        np.testing.assert_allclose(seen, expected, atol=2e-5 * scale)
        np.testing.assert_allclose(served, expected, atol=5e-2 * scale)


def test_a_converted_model_is_judged_as_converted(
    checkpoints: dict[str, Path], make_model: Callable[..., Any]
) -> None:
    import torch

    source = open_sources({"m": checkpoints["llama"]}, None)[0]
    seen = oracle_for(source, True, "f16").logits(TOKENS, 9)
    model = make_model("llama", 0)
    for weight in model.parameters():
        weight.data = weight.data.to(torch.float16)
    expected = hf_logits(model, TOKENS[0])[-9:]
    np.testing.assert_allclose(seen[0], expected, atol=2e-5 * np.abs(expected).max())
