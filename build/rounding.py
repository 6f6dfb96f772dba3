"""Matrices rounded to integers of 8 or 4 bits with a scale for each group of a row (see `zoo.packing`).

Of 4 bits, rounding to nearest loses too much. What counts is the error of the product with the rows x that
the matrix meets, ((W - Q) x)^2, a quadratic form of the error with the Gram matrix of x. So columns are
rounded one after the other, those with the largest inputs first, and the error of each is made up for by
those that are still to come (GPTQ, arXiv 2210.17323; Optimal Brain Quantization). Scales are chosen before,
by least squares over a few candidates for each group, and fitted once more to the integers after.
"""

import numpy as np

from blockzoo.zoo.packing import LIMITS, QuantizedDtype, pack_i4
from blockzoo.zoo.tensors import BlockTensor

_CHUNK = 1 << 22  # elements of temporaries
_SHRINKS = np.linspace(0.6, 1.15, 23, dtype=np.float32)  # of the scale at which the largest value just fits
_DAMPING = 0.01  # of the mean of the Gram matrix' diagonal, added to it
_GGUF_GROUP = 32
_BATCH = 128  # columns whose errors are passed on together


def rounded(
    weight: np.ndarray, dtype: QuantizedDtype, group: int, gram: np.ndarray | None = None
) -> BlockTensor:
    """The matrix in integers.

    Args:
        weight: float32 [out, in].
        dtype: of the integers.
        group: columns that share a scale; divides `in`.
        gram: float32 [in, in], X^T X of the rows X that the matrix is multiplied with; None: rounds to
            nearest.
    """
    scales = _scales(weight, dtype, group, None if gram is None else np.diag(gram))
    if gram is None:
        integers = _nearest(weight, scales, dtype)
    else:
        damped = _damped(gram)
        integers = _compensated(weight, scales, dtype, damped)
        scales = _refitted(weight, integers, scales, damped)
    stored = integers.astype(np.int8)
    return BlockTensor(dtype, pack_i4(stored) if dtype == "i4" else stored, scales)


def on_its_grid(weight: np.ndarray, dtype: QuantizedDtype) -> BlockTensor | None:
    """The matrix exactly, where its values lie on a grid of groups of 32 already: as i8 what GGUF's Q8_0 and
    Q4_0 stand for, as i4 what Q4_0 does. None for any other."""
    if weight.shape[1] % _GGUF_GROUP:
        return None
    groups = weight.reshape(len(weight), -1, _GGUF_GROUP)
    # of Q8_0 the largest value is 127 times the scale, of Q4_0 the one of the largest magnitude -8 times
    for top, limits in ((127, LIMITS["i8"]), (-8, LIMITS["i4"])):
        if dtype == "i4" and top > 0:
            continue
        scales = np.empty(groups.shape[:2], np.float32)
        integers = np.empty(weight.shape, np.int8)
        rows = max(1, _CHUNK // weight.shape[1])
        for i in range(0, len(weight), rows):
            part = groups[i : i + rows]
            at = np.abs(part).argmax(axis=2)[..., None]
            largest = np.take_along_axis(part, at, axis=2)[..., 0]
            found = (np.abs(largest) if top > 0 else largest) / np.float32(top)
            scale = np.where(found == 0, np.float32(1), found)
            q = np.rint(part / scale[..., None])
            if q.min() < limits[0] or q.max() > limits[1] or not np.array_equal(q * scale[..., None], part):
                break
            scales[i : i + rows], integers[i : i + rows] = scale, q.reshape(-1, weight.shape[1])
        else:
            return BlockTensor(dtype, pack_i4(integers) if dtype == "i4" else integers, scales)
    return None


def _scales(
    weight: np.ndarray, dtype: QuantizedDtype, group: int, importance: np.ndarray | None
) -> np.ndarray:
    """float32 [out, groups]. Of i8 what lets the largest value fit. Of i4 the best of several by least
    squares, weighted by the mean square of each column's inputs; of either sign, as one side of the range is
    longer."""
    rows = max(1, _CHUNK // weight.shape[1])
    parts = (
        weight[i : i + rows].reshape(-1, weight.shape[1] // group, group) for i in range(0, len(weight), rows)
    )
    if dtype == "i8":
        found = [_fitting_scales(part) for part in parts]
    else:
        each = np.ones(weight.shape[1], np.float32) if importance is None else importance
        found = [_best_scales(part, each.reshape(-1, group)) for part in parts]
    return np.ascontiguousarray(np.concatenate(found), np.float32)


def _fitting_scales(groups: np.ndarray) -> np.ndarray:
    largest = np.abs(groups).max(axis=2) / np.float32(LIMITS["i8"][1])
    return np.where(largest == 0, np.float32(1), largest)


def _best_scales(groups: np.ndarray, importance: np.ndarray) -> np.ndarray:
    low, high = LIMITS["i4"]
    at = np.abs(groups).argmax(axis=2)[..., None]
    fitting = np.take_along_axis(groups, at, axis=2)[..., 0] / np.float32(low)
    fitting = np.where(fitting == 0, np.float32(1), fitting)
    best, least = fitting, np.full(fitting.shape, np.inf, np.float32)
    for shrink in np.concatenate([_SHRINKS, -_SHRINKS]):
        scale = fitting * shrink
        q = np.clip(np.rint(groups / scale[..., None]), low, high)
        norm, product = (importance * q * q).sum(axis=2), (importance * q * groups).sum(axis=2)
        fitted = np.where((norm > 0) & (product != 0), product / np.where(norm > 0, norm, 1), scale)
        error = (importance * np.square(groups - q * fitted[..., None])).sum(axis=2)
        best, least = np.where(error < least, fitted, best), np.minimum(error, least)
    return np.asarray(best)


def _nearest(weight: np.ndarray, scales: np.ndarray, dtype: QuantizedDtype) -> np.ndarray:
    low, high = LIMITS[dtype]
    integers = np.empty(weight.shape, np.int8)
    rows = max(1, _CHUNK // weight.shape[1])
    for i in range(0, len(weight), rows):
        part, scale = weight[i : i + rows], scales[i : i + rows, :, None]
        q = np.rint(part.reshape(*scale.shape[:2], -1) / scale)
        integers[i : i + rows] = np.clip(q, low, high).reshape(part.shape)
    return integers


def _damped(gram: np.ndarray) -> np.ndarray:
    """float64, invertible: inputs that were never seen count a little too."""
    damped = gram.astype(np.float64)
    mean = float(np.diag(damped).mean()) or 1.0
    damped[np.diag_indices_from(damped)] += _DAMPING * mean
    return damped


def _compensated(
    weight: np.ndarray, scales: np.ndarray, dtype: QuantizedDtype, gram: np.ndarray
) -> np.ndarray:
    """The integers, float32 [out, in]."""
    low, high = LIMITS[dtype]
    columns = weight.shape[1]
    order = np.argsort(-np.diag(gram), kind="stable")
    group_of = order // (columns // scales.shape[1])
    # row i of this triangle: how the columns after the i-th make up for its error
    inverse = np.linalg.inv(gram[np.ix_(order, order)])
    triangle = np.linalg.cholesky(inverse).T.astype(np.float32)
    left, integers = weight[:, order], np.empty(weight.shape, np.float32)
    for begin in range(0, columns, _BATCH):
        end = min(begin + _BATCH, columns)
        part, errors = left[:, begin:end].copy(), np.empty((len(weight), end - begin), np.float32)
        for i, column in enumerate(range(begin, end)):
            scale = scales[:, group_of[column]]
            q = np.clip(np.rint(part[:, i] / scale), low, high)
            integers[:, order[column]] = q
            errors[:, i] = (part[:, i] - q * scale) / triangle[column, column]
            part[:, i + 1 :] -= errors[:, i : i + 1] * triangle[column, column + 1 : end]
        left[:, end:] -= errors @ triangle[begin:end, end:]
    return integers


def _refitted(weight: np.ndarray, integers: np.ndarray, scales: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """The scales, float32 [out, groups], that bring the least error of products with given integers."""
    rows, groups = scales.shape
    narrow = gram.astype(np.float32)
    size = weight.shape[1] // groups
    target = ((weight @ narrow) * integers).reshape(rows, groups, size).sum(axis=2, dtype=np.float64)
    normal = np.empty((rows, groups, groups))
    for g in range(groups):
        part = slice(g * size, (g + 1) * size)
        normal[:, g] = ((integers[:, part] @ narrow[part]) * integers).reshape(rows, groups, size).sum(axis=2)
    # a group of zeros keeps its scale
    ridge = 1e-4 * np.trace(normal, axis1=1, axis2=2) / groups + 1e-12
    normal[:, np.arange(groups), np.arange(groups)] += ridge[:, None]
    found = np.linalg.solve(normal, (target + ridge[:, None] * scales)[..., None])[..., 0]
    return np.ascontiguousarray(np.where(found == 0, scales, found), np.float32)
