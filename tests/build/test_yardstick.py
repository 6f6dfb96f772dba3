"""What bf16 loses as a yardstick: against transformers in bf16; ties; what passes and what does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blockzoo.build.originals import oracle_for
from blockzoo.build.sources import open_sources
from blockzoo.build.yardstick import Yardstick
from blockzoo.zoo.manifest import LossFigures, LossRecord, Manifest
from blockzoo.zoo.store import Zoo

SEQUENCES = [[int(i) for i in np.random.default_rng(seed).integers(2, 256, 60)] for seed in range(4)]


@pytest.mark.parametrize("variant", ["llama", "qwen3"])
def test_bf16_loses_what_transformers_loses_in_it(checkpoints: dict[str, Path], variant: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    def logits(dtype: Any) -> list[np.ndarray]:
        model = AutoModelForCausalLM.from_pretrained(checkpoints[variant], dtype=dtype).eval()
        with torch.no_grad():
            return [model(torch.tensor([tokens])).logits[0].float().numpy() for tokens in SEQUENCES]

    source = open_sources({"m": checkpoints[variant]}, Zoo(Path("none"), Manifest()))[0]
    yardstick = Yardstick.of(oracle_for(source, True, None), SEQUENCES)
    exact, rounded = logits(torch.float32), logits(torch.bfloat16)
    found = yardstick.judge(rounded, exact)
    assert found.num_tokens == 240
    assert found.bf16.kl == pytest.approx(found.stored.kl, rel=0.6)
    assert found.bf16.max_relative_error == pytest.approx(found.stored.max_relative_error, rel=0.6)
    assert 0 < found.ties < 0.9
    assert found.clear_top1 > 0.98
    itself = yardstick.judge(exact, exact)
    assert (itself.stored, itself.clear_top1) == (LossFigures(0.0, 0.0, 1.0), 1.0)
    assert itself.excess == 0
    noise = np.random.default_rng(0)
    far = [rows + 0.3 * rows.std() * noise.standard_normal(rows.shape).astype(np.float32) for rows in exact]
    assert yardstick.judge(far, exact).excess > 10


def test_ties_do_not_count() -> None:
    exact = np.array([[4.0, 3.99, 0.0], [4.0, 1.0, 0.0]], np.float32)
    yardstick = Yardstick(LossFigures(1e-3, 0.1, 0.5), (np.array([True, False]),))
    turned = exact[:, [1, 0, 2]]
    found = yardstick.judge([np.stack([turned[0], exact[1]])], [exact])
    assert (found.stored.top1, found.clear_top1, found.ties) == (0.5, 1.0, 0.5)
    assert found.excess < 1
    found = yardstick.judge([turned], [exact])
    assert (found.stored.top1, found.clear_top1) == (0.0, 0.0)
    assert found.excess > 1
    nothing_clear = Yardstick(LossFigures(1e-3, 0.1, 0.5), (np.array([True, True]),))
    assert nothing_clear.judge([exact], [exact]).clear_top1 == 1.0


@pytest.mark.parametrize(
    ("stored", "clear", "passes"),
    [
        (LossFigures(1e-3, 0.01, 0.9), 1.0, True),
        (LossFigures(1.1e-3, 0.01, 0.9), 1.0, False),
        (LossFigures(1e-3, 0.011, 0.9), 1.0, False),
        (LossFigures(1e-5, 0.001, 0.9), 0.98, False),
    ],
)
def test_every_figure_must_be_within_what_bf16_loses(stored: LossFigures, clear: float, passes: bool) -> None:
    found = LossRecord(stored, LossFigures(1e-3, 0.01, 0.9), clear, 0.1, 100).excess
    assert (found <= 1) == passes


def test_logits_that_are_none_pass_nowhere() -> None:
    exact = np.array([[4.0, 3.0, 0.0]], np.float32)
    yardstick = Yardstick(LossFigures(1e-3, 0.1, 0.5), (np.array([False]),))
    for bad in (np.nan, np.inf):
        seen = exact.copy()
        seen[0, 2] = bad
        with np.errstate(invalid="ignore"):
            assert yardstick.judge([seen], [exact]).excess == np.inf
