"""Tokens that a guide leaves no choice about: names of fields and what stands between them."""

from __future__ import annotations

from blockzoo.runtime.draft.guesses import Context, Guess, Kind


class ForcedTokens:
    """Asks the guide. Its text is certain, how the model cuts that into tokens is not quite."""

    name = "grammar"

    def propose(self, context: Context, limit: int) -> list[Guess]:
        """What must come next."""
        if context.guide is None:
            return []
        kind = Kind(self.name)
        return [Guess(token_id, kind) for token_id in context.guide.forced()[:limit]]
