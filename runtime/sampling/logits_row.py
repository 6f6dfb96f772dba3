"""One row of logits: its likeliest tokens and its mass without sorting the row.

A vocabulary has about 150,000 tokens and a sort of one row costs as much as dozens of passes over it.
Everything here is built on the maxima of chunks of 128 logits instead: if k chunks have a maximum of t
or more, at least k logits are t or more, so the logits that are at least the k-th largest chunk maximum
contain the k largest, and all of them lie in the chunks whose maximum is at least that.

On 2 cores of a busy Xeon, for 32 rows of 151,936 logits like a trained model's, benchmarks/sampling.py
gives these shares of the time of an argsort and a running sum per row: top_k 50 1/35, the whole
distribution 1/17, top_p 0.9 1/12; where the nucleus is most of the vocabulary, top_p takes 1/3.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

CHUNK = 128
FIRST_CANDIDATES = 64  # what top_p looks at first: covers 0.9 of the mass in most rows of a trained model
BINS = 1024  # by which wide nuclei are narrowed down

Floats = npt.NDArray[np.floating]
Ids = npt.NDArray[np.int64]


class Scratch:
    """Rows to compute in, used again and again: fresh memory of this size costs more than the computing."""

    def __init__(self, vocab_size: int) -> None:
        self.logits = np.empty(vocab_size, np.float32)  # for the owner's own changes to a row
        self.weights = np.empty(vocab_size, np.float32)
        self.places = np.empty(vocab_size, np.float32)
        self.bins = np.empty(vocab_size, np.intp)
        self.doubles = np.empty(vocab_size, np.float64)


class LogitsRow:
    """Logits of one position: [vocab] float32, finite or -inf (never chosen), at least one finite.

    Ids are returned in ascending order, and of equal logits the lowest ids count as the likeliest:
    results depend on the row alone.
    """

    def __init__(self, logits: npt.NDArray[np.float32], scratch: Scratch) -> None:
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

    def weights(self, temperature: float) -> npt.NDArray[np.float32]:
        """exp((logit - peak) / temperature) of every token: [vocab], valid until the next call."""
        weights = np.subtract(self.logits, np.float32(self.peak), out=self._scratch.weights)
        if temperature != 1.0:
            np.multiply(weights, np.float32(1.0 / temperature), out=weights)
        return np.exp(weights, out=weights)

    def chunk_sums(self, weights: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """Sums of `weights` [vocab] over the chunks, with the sum of the tail last: [C + 1]."""
        sums = np.empty(self._num_chunks + 1, np.float64)
        sums[:-1] = weights[: self._body_size].reshape(CHUNK, self._num_chunks).sum(axis=0)
        sums[-1] = weights[self._body_size :].sum()
        return sums

    def draw(self, temperature: float, top_k: int, top_p: float, min_p: float, uniform: float) -> int:
        """One token drawn after top_k, top_p and min_p in this order, each renormalizing, as in HF.

        `uniform` in [0, 1) decides which.
        """
        # min_p compares with the likeliest token, which the other two always keep
        floor = self.peak + temperature * math.log(min_p) if min_p > 0.0 else -math.inf
        if 0 < top_k < self.logits.size:
            ids = self.top(top_k)
            weights = self._weights_of(ids, temperature)
            if top_p < 1.0:
                ids, weights = nucleus(ids, weights, top_p * weights.sum())
        elif top_p < 1.0:
            all_weights = self.weights(temperature)
            mass = top_p * self.chunk_sums(all_weights).sum()
            ids = self.candidates(FIRST_CANDIDATES)
            weights = all_weights[ids]
            if weights.sum() < mass:
                self._keep_nucleus(all_weights, temperature, mass)
                if floor > -math.inf:
                    all_weights[self.logits < floor] = 0.0
                return self._draw_from_all(all_weights, uniform)
            ids, weights = nucleus(ids, weights, mass)
        elif floor > -math.inf:
            ids = self.at_least(floor)
            weights = self._weights_of(ids, temperature)
        else:
            return self._draw_from_all(self.weights(temperature), uniform)
        if floor > -math.inf:
            weights = np.where(self.logits[ids] >= floor, weights, 0.0)
        running = np.cumsum(weights, dtype=np.float64)
        return int(ids[pick(running, uniform * running[-1])])

    def _weights_of(self, ids: Ids, temperature: float) -> Floats:
        return np.exp((self.logits[ids].astype(np.float64) - self.peak) / temperature)

    def _keep_nucleus(self, weights: npt.NDArray[np.float32], temperature: float, mass: float) -> None:
        """Sets all weights outside the nucleus of `mass` to zero: for rows so flat that it is wide.

        Weights are binned by logit, whole bins are kept as far as they fit, and only the bin in which
        the mass is reached is sorted.
        """
        places = np.subtract(np.float32(self.peak), self.logits, out=self._scratch.places)
        # The span of the bins is a matter of speed only: what lies beyond falls in the last bin. What is
        # lighter than `light` weighs next to nothing even all together.
        light = mass * 1e-3 / weights.size
        span = min(float(places.max()), temperature * -math.log(min(light, 0.5)))
        np.multiply(places, np.float32((BINS - 1) / max(span, 1e-30)), out=places)
        np.minimum(places, np.float32(BINS - 1), out=places)
        bins, doubles = self._scratch.bins, self._scratch.doubles
        np.copyto(bins, places, casting="unsafe")
        np.copyto(doubles, weights)
        running = np.cumsum(np.bincount(bins, doubles, BINS))
        border = min(int(np.searchsorted(running, mass, side="left")), BINS - 1)
        ids = np.flatnonzero(bins == border)
        kept, _ = nucleus(ids, weights[ids], mass - (running[border - 1] if border else 0.0))
        keep = bins < border
        keep[kept] = True
        np.multiply(weights, keep, out=weights)

    def _draw_from_all(self, weights: npt.NDArray[np.float32], uniform: float) -> int:
        # first the chunk, then the token within it: no running sum over the whole row
        running = np.cumsum(self.chunk_sums(weights))
        target = uniform * running[-1]
        chunk = pick(running, target)
        if chunk:
            target -= running[chunk - 1]
        if chunk == self._num_chunks:
            return self._body_size + pick(np.cumsum(weights[self._body_size :], dtype=np.float64), target)
        column = weights[chunk : self._body_size : self._num_chunks]
        return chunk + self._num_chunks * pick(np.cumsum(column, dtype=np.float64), target)


def max_or(values: Floats, other: float) -> float:
    """The largest of `values` and `other`; NaN if any is."""
    return float(np.maximum(values.max(), other)) if values.size else other


def largest(values: Floats, count: int) -> Ids:
    """Places of the `count` largest values, ascending; of equal values the first are taken."""
    if count >= values.size:
        return np.arange(values.size)
    place = values.size - count
    return _down_to(values, float(np.partition(values, place)[place]), count)


def nucleus(ids: Ids, weights: Floats, mass: float) -> tuple[Ids, Floats]:
    """The fewest heaviest of `ids` that weigh `mass` together, and their weights; all if none do."""
    ordered = np.sort(weights)[::-1]
    count = int(np.searchsorted(np.cumsum(ordered, dtype=np.float64), mass, side="left")) + 1
    if count >= ids.size:
        return ids, weights
    kept = _down_to(weights, float(ordered[count - 1]), count)
    return ids[kept], weights[kept]


def _down_to(values: Floats, smallest: float, count: int) -> Ids:
    """Places of the `count` largest values, ascending, given the smallest value among them."""
    keep = values > smallest
    ties = np.flatnonzero(values == smallest)
    keep[ties[: count - np.count_nonzero(keep)]] = True
    return np.flatnonzero(keep)


def pick(running: npt.NDArray[np.float64], target: float) -> int:
    """Index whose weight covers `target`, given running sums of weights; never one of weight zero."""
    index = int(np.searchsorted(running, target, side="right"))
    if index < running.size:
        return index
    return int(np.searchsorted(running, running[-1], side="left"))  # rounding put the target at the end
