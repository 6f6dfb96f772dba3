"""How each trade is trained: what of the base, how long, how fast."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from . import extract, label, minutes, sql, support

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Recipe:
    """A LoRA of `rank`, or the `last_layers` in full, or (neither) every weight."""

    trade: ModuleType
    rate: float  # peak learning rate
    steps: int
    rows: int  # samples of a step
    rank: int | None = None
    targets: tuple[str, ...] = ()
    last_layers: int | None = None


RECIPES = {
    "extract": Recipe(extract, rate=1e-3, steps=180, rows=16, rank=16, targets=ALL),
    "sql": Recipe(sql, rate=1e-3, steps=90, rows=24, rank=8, targets=ALL),
    "support": Recipe(support, rate=3e-3, steps=100, rows=16, rank=8, targets=("q_proj", "v_proj")),
    "label": Recipe(label, rate=5e-4, steps=220, rows=24, last_layers=2),
    "minutes": Recipe(minutes, rate=1e-4, steps=90, rows=24),
}
