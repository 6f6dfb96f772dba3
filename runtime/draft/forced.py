"""Tokens that a guide leaves no choice about: names of fields and what stands between them."""

from __future__ import annotations

from blockzoo.runtime.draft.guesses import Context, Guess, Kind
from blockzoo.runtime.sampling.guided import NUM_STYLES


class ForcedTokens:
    """Asks the guide. Its text is certain, how the model cuts that into tokens is not quite.

    Args:
        style: a way to write JSON, in which more is certain, and where a value ends what follows; None: what
            holds for any way.
    """

    name = "grammar"

    def __init__(self, style: int | None = None) -> None:
        self._style = style

    def propose(self, context: Context, limit: int) -> list[Guess]:
        """What must come next."""
        guide = context.guide
        if guide is None:
            return []
        if self._style is None:
            tokens, kind = guide.forced(), Kind(self.name)
        else:
            tokens, must_come = guide.likely(self._style)
            kind = Kind(self.name, 1 + self._style if must_come else 1 + NUM_STYLES + self._style)
        return [Guess(token_id, kind) for token_id in tokens[:limit]]
