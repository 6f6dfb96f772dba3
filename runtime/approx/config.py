"""Settings of approximate reuse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Selector = Literal["query", "head-of-run", "deviation", "importance*deviation", "random"]
RefreshOrder = Literal["position", "importance"]
Unit = Literal["line", "page", "token"]


@dataclass(frozen=True, slots=True)
class ReuseConfig:
    """How approximate reuse works.

    Attributes:
        recompute: share of the tokens known from elsewhere that is computed anew in the prefill, 0 (naive
            reuse) to 1: all of them. That is the default where other texts stand before them than in their
            donor, since no smaller share kept a real model near to itself on all tasks (docs/benchmarks.md).
        edit_recompute: the same of tokens behind an edit: those before which their donor has the prompt's
            words but for some, on which they lean less. At most `recompute`. Where nothing else is taken
            over, they are those right behind each edit, to the end of a page: nothing is looked at first, and
            nothing refreshed later.
        refresh: reused tokens computed anew beside each generated one.
        refresh_order: "position" refreshes from the front, so that each is computed over exact KV and a
            drained queue leaves that of a full prefill; "importance" what received the most attention first.
        selector: what is computed anew in the prefill.
            "query": what the unmatched end of the prompt (the question) attends to: it runs first over the
            KV as taken, and its attention is read.
            "head-of-run": the first tokens of each run, whose context differs the most (EPIC, 2410.15332).
            "deviation": where V differs the most once the first `check_layers` have run in full (CacheBlend,
            2405.16444).
            "importance*deviation": that times the attention from the end of the prompt (KVShare).
            "random": the control.
        head: tokens at the front of each run that are always computed anew, of the share: what stood at the
            front of another prompt draws attention wherever it is put.
        edit: the same for runs behind an edit, where others are taken over too: what stands right there leans
            on it the most (2609.17983).
        pointed: share of the reused tokens that "query" adds to those by looking, at most, of what they leave
            of `recompute`: on a real model, more of it gains less than longer heads do.
        check_layers: that run in full for the selectors that look at deviations. Models that have no more
            are computed in full.
        rounds: of looking ("query"): in each but the first, what was chosen before looks too.
        unit: what is chosen at a time. "line": the line of text around a token, at most 16 tokens to either
            side (selectors that do not look take pages). "page": whole pages, which run faster than scattered
            tokens. "token".
        min_share: of the tokens to compute; a prompt with fewer matched is computed in full.
        max_deviation: mean deviation of V at the last check layer, relative to V; beyond it all is computed.
        guard: where a sequence that took something over is so unsure of its next token that the likeliest one
            leads the second by less than that, in nats, all is computed anew before one is chosen, and it
            goes on as an exact one. Asked once, of the model's own distribution, whatever is chosen from it.
            0: never, inf: always.
        negligible: deviation of V, relative to V. Tokens with less are not computed anew by the selectors
            that look at deviations, and a queue in which several in a row showed less is given up.
        window: tokens of a window. Runs of 2 * window - 1 are always found, shorter than window never.
        max_donors: prompts remembered as donors in all; the least recently used go first.
    """

    recompute: float = 1.0
    edit_recompute: float = 0.03
    pointed: float = 0.07
    refresh: int = 3
    refresh_order: RefreshOrder = "importance"
    selector: Selector = "query"
    head: int = 16
    edit: int = 32
    check_layers: int = 2
    rounds: int = 1
    unit: Unit = "line"
    min_share: float = 0.3
    max_deviation: float = 0.5
    guard: float = 0.0
    negligible: float = 0.0
    window: int = 16
    max_donors: int = 1024

    def __post_init__(self) -> None:
        """Raise ValueError naming the setting that is out of range."""
        for name in ("recompute", "edit_recompute", "pointed", "min_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 to 1")
        least = dict.fromkeys(("refresh", "head", "edit", "max_deviation", "guard", "negligible"), 0)
        least |= dict.fromkeys(("max_donors", "check_layers", "rounds"), 1) | {"window": 2}
        for name, low in least.items():
            if not getattr(self, name) >= low:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least {low}")
        for name, kind in (("selector", Selector), ("refresh_order", RefreshOrder), ("unit", Unit)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected {', '.join(get_args(kind))}")

    def check_serves(self, other: ReuseConfig) -> None:
        """Whether engines that were made for this serve another configuration too.

        Raises:
            ValueError: they do not; the message says what they lack.
        """
        if other.uses_scores and not self.uses_scores:
            raise ValueError(
                f"this engine was made for selector {self.selector!r} and reads no attention scores, which "
                f"{other.selector!r} with refresh_order {other.refresh_order!r} needs: make it for that"
            )
        if other.uses_check and (not self.uses_check or other.check_layers != self.check_layers):
            raise ValueError(
                f"this engine was made for selector {self.selector!r} with check_layers {self.check_layers}, "
                f"not for {other.selector!r} with {other.check_layers}: make it for that"
            )

    @property
    def uses_check(self) -> bool:
        """Whether the first layers run in full before it is decided what goes on."""
        return self.selector in ("deviation", "importance*deviation")

    @property
    def uses_scores(self) -> bool:
        """Whether engines must tell what attention tokens receive."""
        return self.selector in ("query", "importance*deviation") or self.refresh_order == "importance"

    @property
    def looks_first(self) -> bool:
        """Whether what was taken over must be looked at before it is decided what is computed anew."""
        return (self.uses_check or self.selector == "query") and self.recompute > 0
