"""What was looked at in a step, as it comes from workers: attention received, hidden states that are kept."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from blockzoo.runtime.exec.executor import Hidden


class Seen:
    """Of one step.

    Args:
        dtype: of hidden states.
        hidden_size: of the family.

    Attributes:
        scores: by member of the step's batch, as in `StepResult`: sums over workers and micro-batches.
    """

    def __init__(self, dtype: np.dtype, hidden_size: int) -> None:
        self._dtype, self._hidden_size = dtype, hidden_size
        self.scores: dict[int, np.ndarray] = {}
        self._hidden: dict[tuple[int, int], dict[int, np.ndarray]] = defaultdict(dict)

    def note(self, done: Mapping[str, Any], members: Sequence[int]) -> None:
        """Add what came with a micro-batch that a worker has done; `members`: of the step's batch."""
        frames = iter(done["frames"] or ())
        for member in done["scores"]:
            self._add(members[member], np.frombuffer(next(frames), np.float32))
        for member, entry in done["hidden"]:
            rows = np.frombuffer(next(frames), self._dtype).reshape(-1, self._hidden_size)
            self._hidden[members[member], entry][done["micro"]] = rows

    def _add(self, member: int, scores: np.ndarray) -> None:
        """Of a member that was cut, an earlier piece has looked at fewer tokens."""
        known = self.scores.get(member)
        if known is None:
            self.scores[member] = scores
            return
        short, long = sorted((known, scores), key=len)
        total = self.scores[member] = long.copy()
        total[: len(short)] += short

    def hidden(self) -> list[Hidden]:
        """As in `StepResult`: of each member and entry, the rows of all micro-batches."""
        return [
            Hidden(member, entry, np.concatenate([pieces[micro] for micro in sorted(pieces)]))
            for (member, entry), pieces in self._hidden.items()
        ]
