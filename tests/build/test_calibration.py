"""What blocks are multiplied with, against transformers' forward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blockzoo.build.calibration import Met, calibrate
from blockzoo.build.originals import oracle_for
from blockzoo.build.sources import open_sources

TEXTS = [list(np.random.default_rng(3).integers(0, 256, 24)) for _ in range(3)]
LAYER = 1


def inputs(model: Any, name: str) -> np.ndarray:
    """What a linear module is called with, float32 [tokens, in]."""
    rows: list[torch.Tensor] = []
    module = model.get_submodule(name.removesuffix(".weight"))
    handle = module.register_forward_pre_hook(lambda _, args: rows.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for tokens in TEXTS:
            model(torch.tensor([tokens]))
    handle.remove()
    return torch.cat(rows).numpy()


@pytest.mark.parametrize(
    ("changed", "last"),
    [(("self_attn.q_proj", "self_attn.v_proj"), "self_attn.o_proj"), (("mlp.gate_proj",), "mlp.down_proj")],
)
def test_rows_before_and_after_others_of_the_block_change(
    changed: tuple[str, ...], last: str, make_model: Callable[..., Any], checkpoints: dict[str, Path]
) -> None:
    model = make_model("qwen2", list(checkpoints).index("qwen2")).float()
    other, prefix = copy.deepcopy(model), f"model.layers.{LAYER}."
    changes: dict[str, np.ndarray] = {}
    for module in changed:
        weight = other.get_submodule(prefix + module).weight
        change = 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            weight += change
        changes[f"{prefix}{module}.weight"] = change.numpy()
    met: dict[int, Met] = {}
    oracle = oracle_for(open_sources({"m": checkpoints["qwen2"]}, None)[0], True, None)
    calibrate(oracle, TEXTS, met.__setitem__)
    assert list(met) == list(range(1, 1 + 2 * model.config.num_hidden_layers))
    block = met[1 + 2 * LAYER + ("mlp" in last)]
    name = f"{prefix}{last}.weight"
    before, after = inputs(model, name), inputs(other, name)
    for seen, expected in zip(
        (block.gram(name), *block.after(changes, name)),
        (before.T @ before, after.T @ after, (before - after).T @ after),
        strict=True,
    ):
        expected = expected / len(before)
        np.testing.assert_allclose(seen, expected, atol=2e-4 * np.abs(expected).max())
