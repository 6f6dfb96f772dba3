"""What bf16 alone changes: the numpy oracle with roundings to bf16."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from blockzoo.build.originals import oracle_for
from blockzoo.build.sources import zoo_source
from blockzoo.build.yardstick import Bf16Oracle
from blockzoo.zoo.store import Zoo


class Bf16:
    """A zoo's models, as engines in bf16 would compute them.

    Args:
        zoo: what holds them.
        folder: where logits are kept by prompt, as they take seconds each; None: nowhere.
    """

    def __init__(self, zoo: Zoo, folder: Path | None = None) -> None:
        self._zoo, self._folder = zoo, folder
        self._oracles: dict[str, Bf16Oracle] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def logits(self, model: str, token_ids: Sequence[int], last: int) -> np.ndarray:
        """Of the last positions of a sequence: float32 [last, vocab]."""
        if self._folder is None:
            return self._computed(model, token_ids, last)
        digest = hashlib.sha256(f"{model} {list(token_ids)} {last}".encode()).hexdigest()[:24]
        path = self._folder / f"{digest}.npy"
        if not path.exists():
            np.save(path, self._computed(model, token_ids, last))
        return np.asarray(np.load(path), np.float32)

    def _computed(self, model: str, token_ids: Sequence[int], last: int) -> np.ndarray:
        if model not in self._oracles:
            exact = oracle_for(zoo_source(model, self._zoo), True, None)
            self._oracles = {model: Bf16Oracle(exact.config, exact.weight, exact.dtype)}
        (found,) = self._oracles[model].logits([list(token_ids)], last)
        return found
