"""The ways to reuse KV that the benchmarks of approximate reuse compare."""

from __future__ import annotations

from dataclasses import replace

from blockzoo.runtime.api.request import KVReuse
from blockzoo.runtime.approx.config import ReuseConfig

SELECTORS = {  # name -> settings
    "query": ReuseConfig(head=0, selector="query"),
    "query and heads of 8": ReuseConfig(head=8, selector="query"),
    "query, pages": ReuseConfig(head=0, selector="query", unit="page"),
    "head of run (EPIC)": ReuseConfig(head=0, selector="head-of-run", unit="token"),
    "deviation (CacheBlend)": ReuseConfig(head=0, selector="deviation", unit="token"),
    "DHD": ReuseConfig(head=0, selector="importance*deviation", unit="page"),
    "random": ReuseConfig(head=0, selector="random", unit="page"),
}
SHARES = (0.05, 0.07, 0.1, 0.15, 0.3)
REFRESHES = (1, 3, 8)
_NEVER = 1e9  # a full prefill instead would hide what a share gives
ENGINE = ReuseConfig(selector="importance*deviation")  # needs the most of the engines, so allows the others

Sides = dict[str, tuple[KVReuse, ReuseConfig | None]]


def _sharing(config: ReuseConfig, share: float) -> ReuseConfig:
    return replace(config, recompute=share, edit_recompute=share, pointed=1.0)


def quality_sides() -> Sides:
    """Every selector at every share, and refreshing beside decoding for some; "full" first."""
    grid = {f"{name} {share:g}": _sharing(c, share) for name, c in SELECTORS.items() for share in SHARES}
    naive = ReuseConfig(recompute=0.0, head=0)
    sides = {"naive": naive} | grid
    configs = {
        name: replace(c, refresh=0, refresh_order="position", max_deviation=_NEVER, min_share=0.0)
        for name, c in sides.items()
    }
    for name in ("naive", "query 0.07", "query and heads of 8 0.07"):
        for refresh in REFRESHES:
            configs[f"{name}, N {refresh}"] = replace(configs[name], refresh=refresh)
    for name in ("naive, N 3", "query 0.07, N 3", "query and heads of 8 0.07, N 3"):
        configs[f"{name} by importance"] = replace(configs[name], refresh_order="importance")
    # the last, since it leaves exact KV
    configs["all recomputed"] = replace(configs["naive"], recompute=1.0, edit_recompute=1.0)
    full: Sides = {"full": ("off", None)}
    return full | {name: ("approx", config) for name, config in configs.items()}


def time_sides() -> Sides:
    """Those whose time to first token is taken; "full" first."""
    chosen = {"naive": ReuseConfig(recompute=0.0, head=0)}
    for name, config in SELECTORS.items():
        if name == "random":  # a control of quality
            continue
        for share in SHARES if name.startswith("query") else (0.15,):
            chosen[f"{name} {share:g}"] = _sharing(config, share)
    sides: Sides = {"full": ("off", None), "exact prefix": ("exact", None)}
    for name, config in chosen.items():
        sides[name] = "approx", replace(config, refresh=0, max_deviation=_NEVER)
    return sides
