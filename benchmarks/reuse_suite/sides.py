"""The settings that the suite compares."""

from __future__ import annotations

from dataclasses import replace

from blockzoo.runtime.approx.config import ReuseConfig

_PLAIN = ReuseConfig(
    recompute=0.15,
    edit_recompute=0.15,
    pointed=1.0,
    refresh=0,
    refresh_order="position",
    head=0,
    edit=0,
    min_share=0.0,
)
_NEVER = 1e9  # a full prefill instead would hide what a share gives

SIDES: dict[str, ReuseConfig] = {
    "naive": replace(_PLAIN, recompute=0.0),
    "before (lines 7 %, N 3)": replace(
        _PLAIN, recompute=0.07, edit_recompute=0.07, refresh=3, refresh_order="importance"
    ),
    "lines 15 %": _PLAIN,
    "EPIC 15 %": replace(_PLAIN, selector="head-of-run", unit="token"),
    "DHD pages 15 %": replace(_PLAIN, selector="importance*deviation", unit="page", max_deviation=_NEVER),
}
SIDES["composed 20 %"] = ReuseConfig(recompute=0.2, min_share=0.0)
for _share in (0.1, 0.15, 0.2, 0.25, 0.3, 0.5):
    _own = replace(_PLAIN, recompute=_share, edit_recompute=_share / 3)
    SIDES[f"lines {_share:.0%}, heads"] = replace(_own, head=8, edit=32)
    SIDES[f"lines {_share:.0%}, heads of 16"] = replace(_own, head=16, edit=32)
    SIDES[f"EPIC {_share:.0%}"] = replace(_own, selector="head-of-run", unit="token")
SIDES["default"] = ReuseConfig(min_share=0.0)
