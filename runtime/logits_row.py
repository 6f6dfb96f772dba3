"""One row of logits: its likeliest tokens and its mass without sorting the row.

A vocabulary has about 150,000 tokens and a sort of one row costs as much as dozens of passes over it.
Everything here is built on the maxima of chunks of 128 logits instead: if k chunks have a maximum of t
or more, at least k logits are t or more, so the logits that are at least the k-th largest chunk maximum
contain the k largest, and all of them lie in the chunks whose maximum is at least that.

A chunk is a column of the row seen as a matrix, not a run of neighbours, so that maxima and sums over
chunks are elementwise passes over long rows:

    row [128 * C + tail]:   0      1   ...  C-1         chunk 0 = tokens 0, C, 2C, ...
                            C     C+1  ... 2C-1
                           ...                          the tail (fewer than 128 tokens) is
                          127C    ...      128C-1       always looked at whole
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

CHUNK = 128
FIRST_CANDIDATES = 64  # what top_p looks at first: covers 0.9 of the mass in most rows of a trained model

Floats = npt.NDArray[np.floating]
Ids = npt.NDArray[np.int64]


class LogitsRow:
    """Logits of one position: [vocab] float32, finite or -inf (never chosen), at least one finite.

    Ids are returned in ascending order, and of equal logits the lowest ids count as the likeliest:
    results depend on the row alone. `scratch` [vocab] float32 is overwritten by `weights`.
    """

    def __init__(self, logits: npt.NDArray[np.float32], scratch: npt.NDArray[np.float32]) -> None:
        self.logits = logits
        self._scratch = scratch
        self._num_chunks = logits.size // CHUNK
        self._body_size = self._num_chunks * CHUNK
        self._body = logits[: self._body_size].reshape(CHUNK, self._num_chunks)
        self._tail = logits[self._body_size :]
        self._maxima = self._body.max(axis=0) if self._num_chunks else logits[:0]
        # NaN anywhere makes it NaN
        self.peak = float(max_or(self._tail, max_or(self._maxima, -math.inf)))

    def at_least(self, threshold: float) -> Ids:
        """All tokens whose logit is `threshold` or more."""
        chunks = np.flatnonzero(self._maxima >= threshold)
        if chunks.size * 8 > self._num_chunks:  # most of the row: one pass is cheaper than gathering
            return np.flatnonzero(self.logits >= threshold)
        # row-major order of the gathered columns is ascending order of token ids
        lines, columns = np.nonzero(self._body[:, chunks] >= threshold)
        ids = lines * self._num_chunks + chunks[columns]
        in_tail = np.flatnonzero(self._tail >= threshold)
        return np.concatenate((ids, in_tail + self._body_size)) if in_tail.size else ids

    def candidates(self, count: int) -> Ids:
        """A set that contains the `count` likeliest tokens, usually little more; all tokens at most."""
        if count >= self._num_chunks:
            return np.arange(self.logits.size)
        place = self._num_chunks - count
        return self.at_least(np.partition(self._maxima, place)[place])

    def top(self, count: int) -> Ids:
        """Exactly the `count` likeliest tokens (all, if the row has fewer)."""
        ids = self.candidates(count)
        return ids[largest(self.logits[ids], count)]

    def weights(self, temperature: float) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
        """exp((logit - peak) / temperature) of every token [vocab], valid until the next call.

        Also their sums over the chunks, with the sum of the tail last [C + 1].
        """
        weights = np.subtract(self.logits, np.float32(self.peak), out=self._scratch)
        if temperature != 1.0:
            np.multiply(weights, np.float32(1.0 / temperature), out=weights)
        np.exp(weights, out=weights)
        sums = np.empty(self._num_chunks + 1, np.float64)
        sums[:-1] = weights[: self._body_size].reshape(CHUNK, self._num_chunks).sum(axis=0)
        sums[-1] = weights[self._body_size :].sum()
        return weights, sums

    def draw_any(self, temperature: float, uniform: float) -> int:
        """One token drawn from the whole distribution; `uniform` in [0, 1) decides which."""
        weights, sums = self.weights(temperature)
        # first the chunk, then the token within it: no running sum over the whole row
        running = np.cumsum(sums)
        chunk = pick(running, uniform * running[-1])
        target = uniform * running[-1] - (running[chunk - 1] if chunk else 0.0)
        if chunk == self._num_chunks:
            return self._body_size + pick(np.cumsum(weights[self._body_size :], dtype=np.float64), target)
        column = weights[chunk : self._body_size : self._num_chunks]
        return chunk + self._num_chunks * pick(np.cumsum(column, dtype=np.float64), target)

    def draw(self, temperature: float, top_k: int, top_p: float, min_p: float, uniform: float) -> int:
        """One token drawn after top_k, top_p and min_p in this order, each renormalizing, as in HF."""
        if top_k >= self.logits.size:
            top_k = 0
        if not top_k and top_p >= 1.0 and min_p <= 0.0:
            return self.draw_any(temperature, uniform)
        # min_p compares with the likeliest token, which the other two always keep
        floor = self.peak + temperature * math.log(min_p) if min_p > 0.0 else -math.inf
        if top_k:
            ids = self.top(top_k)
            weights = self._weights_of(ids, temperature)
            if top_p < 1.0:
                ids, weights = nucleus(ids, weights, top_p * weights.sum())
        elif top_p < 1.0:
            ids, weights = self._nucleus_of_all(temperature, top_p)
        else:
            ids = self.at_least(floor)
            weights = self._weights_of(ids, temperature)
        if floor > -math.inf:
            weights = np.where(self.logits[ids] >= floor, weights, 0.0)
        running = np.cumsum(weights)
        return int(ids[pick(running, uniform * running[-1])])

    def _weights_of(self, ids: Ids, temperature: float) -> npt.NDArray[np.float64]:
        return np.exp((self.logits[ids].astype(np.float64) - self.peak) / temperature)

    def _nucleus_of_all(self, temperature: float, top_p: float) -> tuple[Ids, npt.NDArray[np.float64]]:
        all_weights, sums = self.weights(temperature)
        total = float(sums.sum())
        ids = self.candidates(FIRST_CANDIDATES)
        if all_weights[ids].sum() < top_p * total:
            # tokens lighter than this weigh less than 1 - top_p together: they can be left out
            light = (1.0 - top_p) * total / self.logits.size
            ids = np.flatnonzero(all_weights >= np.float32(light))
        return nucleus(ids, all_weights[ids].astype(np.float64), top_p * total)


def max_or(values: Floats, other: float) -> float:
    """The largest of `values` and `other`; NaN if any is."""
    return float(np.maximum(values.max(), other)) if values.size else other


def largest(values: Floats, count: int) -> Ids:
    """Places of the `count` largest values, ascending; of equal values the first are taken."""
    if count >= values.size:
        return np.arange(values.size)
    place = values.size - count
    smallest = np.partition(values, place)[place]
    keep = values > smallest
    ties = np.flatnonzero(values == smallest)
    keep[ties[: count - np.count_nonzero(keep)]] = True
    return np.flatnonzero(keep)


def nucleus(ids: Ids, weights: npt.NDArray[np.float64], mass: float) -> tuple[Ids, npt.NDArray[np.float64]]:
    """The fewest heaviest of `ids` that weigh `mass` together, and their weights; all if none do."""
    running = np.cumsum(np.sort(weights)[::-1])
    kept = largest(weights, int(np.searchsorted(running, mass, side="left")) + 1)
    return ids[kept], weights[kept]


def pick(running: npt.NDArray[np.float64], target: float) -> int:
    """Index whose weight covers `target`, given running sums of weights; never one of weight zero."""
    index = int(np.searchsorted(running, target, side="right"))
    if index < running.size:
        return index
    return int(np.searchsorted(running, running[-1], side="left"))  # rounding put the target at the end
