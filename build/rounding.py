"""Matrices rounded to integers of 8 or 4 bits with a scale for each group of a row (see `zoo.packing`).

Of 4 bits, rounding to nearest loses too much. What counts is the error of the product with the rows x that
the matrix meets, ((W - Q) x)^2, a quadratic form of the error with the Gram matrix of x. So columns are
rounded one after the other, those with the largest inputs first, and the error of each is made up for by
those that are still to come (GPTQ, arXiv 2210.17323; Optimal Brain Quantization). Scales are chosen before,
by least squares over a few candidates for each group, and fitted once more to the integers after. What a
matrix' inputs lost because those before it were rounded, it makes up for as far as it can be told from what
is left of them (as in arXiv 2504.09629).
"""

import numpy as np

from blockzoo.zoo.packing import GROUP, LIMITS, QuantizedDtype, pack_i4, rotated, rotates
from blockzoo.zoo.tensors import BlockTensor

_CHUNK = 1 << 22  # elements of temporaries
_SHRINKS: dict[QuantizedDtype, np.ndarray] = {
    "i4": np.outer((1, -1), np.linspace(0.6, 1.15, 23)).astype(np.float32).ravel(),
    "i8": np.linspace(1, 1.8, 41, dtype=np.float32),
}
"""Of the scale at which the largest value just fits: what is tried. 8 bits cut nothing off; among so many
values, those of a coarser grid (GGUF's Q4_1, Q4_K) lie nearly on one of these."""
_DAMPING = 0.01  # of the mean of the Gram matrix' diagonal, added to it
_CAUTION = 0.5  # the same for corrections, which are not of a rounding's size
_BATCH = 128  # columns whose errors are passed on together
_ROWS = 64  # that are looked at together for a grid
_EXACT = 2.0**-21  # of a group's largest value: what float32 makes of a scale, an integer and an offset


def rounded(
    weight: np.ndarray, dtype: QuantizedDtype, group: int, gram: np.ndarray | None = None, rotate: bool = True
) -> BlockTensor:
    """The matrix in integers.

    Args:
        weight: float32 [out, in].
        dtype: of the integers.
        group: columns that share a scale; divides `in`.
        gram: float32 [in, in], X^T X of the rows X that the matrix is multiplied with; None: rounds to
            nearest.
        rotate: before, where its width allows it.
    """
    rotate = rotate and rotates(weight.shape[1])
    if rotate:
        weight, gram = rotated(weight), None if gram is None else _rotated_gram(gram)
    scales = _scales(weight, dtype, group, None if gram is None else np.diag(gram).astype(np.float32))
    if gram is None:
        integers = _nearest(weight, scales, dtype)
    else:
        damped = _damped(gram, _DAMPING)
        integers = _compensated(weight, scales, dtype, damped)
        scales = _refitted(weight, integers, scales, damped)
    return _stored(integers, scales, dtype, rotate)


def rounded_in_haste(weight: np.ndarray, dtype: QuantizedDtype, group: int) -> BlockTensor:
    """As `rounded`, to nearest, with scales at which the largest value of each group just fits."""
    rotate = rotates(weight.shape[1])
    weight = rotated(weight) if rotate else weight
    groups = weight.reshape(len(weight), -1, group)
    rows = max(1, _CHUNK // weight.shape[1])
    scales = [_fitting(groups[i : i + rows], dtype) for i in range(0, len(weight), rows)]
    fitting = np.concatenate(scales)
    return _stored(_nearest(weight, fitting, dtype), fitting, dtype, rotate)


def corrected(weight: np.ndarray, gram: np.ndarray, lost: np.ndarray) -> np.ndarray:
    """The matrix whose products with changed inputs are nearest to those with the ones before.

    Args:
        weight: float32 [out, in].
        gram: float32 [in, in], Y^T Y of the rows Y that it is multiplied with.
        lost: float32 [in, in], (X - Y)^T Y, with X what they were before.
    """
    change = np.linalg.solve(_damped(gram, _CAUTION), (weight @ lost).T.astype(np.float64))
    return weight + change.T.astype(np.float32)


def on_its_grid(weight: np.ndarray, dtype: QuantizedDtype) -> BlockTensor | None:
    """The matrix, where its values lie on a grid of groups of 32 already: as i8 what GGUF's Q8_0 and Q4_0
    stand for, as i4 what Q4_0 does, exactly; as i4 with offsets what Q4_1 and Q4_K do, but for the rounding
    of float32. None for any other."""
    if weight.shape[1] % GROUP:
        return None
    found = _on_multiples(weight, dtype)
    return _between_ends(weight) if found is None and dtype == "i4" else found


def _on_multiples(weight: np.ndarray, dtype: QuantizedDtype) -> BlockTensor | None:
    """Exactly, where the values of each group are multiples of a scale."""
    groups = weight.reshape(len(weight), -1, GROUP)
    # of Q8_0 the largest value is 127 times the scale, of Q4_0 the one of the largest magnitude -8 times
    grids: tuple[QuantizedDtype, ...] = ("i4",) if dtype == "i4" else ("i8", "i4")
    for grid in grids:
        low, high = LIMITS[grid]
        scales = np.empty(groups.shape[:2], np.float32)
        integers = np.empty(weight.shape, np.int8)
        rows = max(1, _CHUNK // weight.shape[1])
        for i in range(0, len(weight), rows):
            part = groups[i : i + rows]
            scale = _fitting(part, grid)
            q = np.rint(part / scale[..., None])
            if q.min() < low or q.max() > high or not np.array_equal(q * scale[..., None], part):
                break
            scales[i : i + rows], integers[i : i + rows] = scale, q.reshape(-1, weight.shape[1])
        else:
            return _stored(integers, scales, dtype)
    return None


def _between_ends(weight: np.ndarray) -> BlockTensor | None:
    """As i4 with offsets, where the values of each group are 16 at most, equally far apart."""
    parts = []
    for i in range(0, len(weight), _ROWS):  # few at a time: the first ones tell for most matrices
        part = _lines(weight[i : i + _ROWS].reshape(-1, GROUP))
        if part is None:
            return None
        parts.append(part)
    integers, scales, offsets = (np.concatenate(each) for each in zip(*parts, strict=True))
    packed = pack_i4(integers.reshape(weight.shape))
    return BlockTensor("i4", packed, scales.reshape(len(weight), -1), offsets.reshape(len(weight), -1))


def _lines(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Of float32 [groups, 32]: integers from -8 to 7, scales, offsets; None where one is on no such line."""
    low, high = groups.min(axis=1), groups.max(axis=1)
    integers, scales, offsets = np.zeros(groups.shape, np.int8), np.ones_like(low), low.copy()
    left = np.flatnonzero(high > low)
    for steps in range(15, 0, -1):  # between the least value and the largest
        if not len(left):
            break
        apart = (high[left] - low[left]) / np.float32(steps)
        q = np.rint((groups[left] - low[left, None]) / apart[:, None])
        error = np.abs(low[left, None] + q * apart[:, None] - groups[left]).max(axis=1)
        fits = error <= _EXACT * np.abs(groups[left]).max(axis=1)
        at = left[fits]
        integers[at], scales[at] = q[fits] - 8, apart[fits]
        offsets[at] += 8 * apart[fits]
        left = left[~fits]
    return None if len(left) else (integers, scales, offsets)


def _scales(
    weight: np.ndarray, dtype: QuantizedDtype, group: int, importance: np.ndarray | None
) -> np.ndarray:
    """float32 [out, groups]: the best of several by least squares, weighted by the mean square of each
    column's inputs; of 4 bits of either sign, as one side of the range is longer."""
    each = np.ones(weight.shape[1], np.float32) if importance is None else importance
    each, rows = each.reshape(-1, group), max(1, _CHUNK // weight.shape[1])
    parts = (weight[i : i + rows].reshape(-1, *each.shape) for i in range(0, len(weight), rows))
    return np.concatenate([_best_scales(part, dtype, each) for part in parts])


def _best_scales(groups: np.ndarray, dtype: QuantizedDtype, importance: np.ndarray) -> np.ndarray:
    (low, high), fitting = LIMITS[dtype], _fitting(groups, dtype)
    best, least = fitting, np.full(fitting.shape, np.inf, np.float32)
    for shrink in _SHRINKS[dtype]:
        scale = fitting * shrink
        q = np.clip(np.rint(groups / scale[..., None]), low, high)
        norm, product = (importance * q * q).sum(axis=2), (importance * q * groups).sum(axis=2)
        fitted = np.where((norm > 0) & (product != 0), product / np.where(norm > 0, norm, 1), scale)
        error = (importance * np.square(groups - q * fitted[..., None])).sum(axis=2)
        best, least = np.where(error < least, fitted, best), np.minimum(error, least)
    return np.asarray(best)


def _fitting(groups: np.ndarray, dtype: QuantizedDtype) -> np.ndarray:
    """Of groups [rows, groups, columns], the scales at which their largest values just fit."""
    low, high = LIMITS[dtype]
    at = np.abs(groups).argmax(axis=2)[..., None]
    largest = np.take_along_axis(groups, at, axis=2)[..., 0]
    fitting = (largest if low < -high else np.abs(largest)) / np.float32(low if low < -high else high)
    return np.where(fitting == 0, np.float32(1), fitting)


def _nearest(weight: np.ndarray, scales: np.ndarray, dtype: QuantizedDtype) -> np.ndarray:
    low, high = LIMITS[dtype]
    integers = np.empty(weight.shape, np.int8)
    rows = max(1, _CHUNK // weight.shape[1])
    for i in range(0, len(weight), rows):
        part, scale = weight[i : i + rows], scales[i : i + rows, :, None]
        q = np.rint(part.reshape(*scale.shape[:2], -1) / scale)
        integers[i : i + rows] = np.clip(q, low, high).reshape(part.shape)
    return integers


def _stored(
    integers: np.ndarray, scales: np.ndarray, dtype: QuantizedDtype, is_rotated: bool = False
) -> BlockTensor:
    narrow = integers.astype(np.int8, copy=False)
    return BlockTensor(dtype, pack_i4(narrow) if dtype == "i4" else narrow, scales, rotated=is_rotated)


def _rotated_gram(gram: np.ndarray) -> np.ndarray:
    """float64 [in, in]: in float32, where one direction is much longer than all others, rounding would leave
    it with negative eigenvalues."""
    return rotated(rotated(gram.astype(np.float64)).T)


def _damped(gram: np.ndarray, damping: float) -> np.ndarray:
    """float64, invertible: inputs that were never seen count a little too."""
    damped = gram.astype(np.float64)
    mean = float(np.diag(damped).mean()) or 1.0
    damped[np.diag_indices_from(damped)] += damping * mean
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
    # columns lie in rows here
    left, across = np.ascontiguousarray(weight.T[order]), np.ascontiguousarray(scales.T)
    integers = np.empty(left.shape, np.float32)
    for begin in range(0, columns, _BATCH):
        end = min(begin + _BATCH, columns)
        part, errors = left[begin:end], np.empty((end - begin, len(weight)), np.float32)
        for i, column in enumerate(range(begin, end)):
            scale = across[group_of[column]]
            q = np.clip(np.rint(part[i] / scale), low, high)
            integers[order[column]] = q
            errors[i] = (part[i] - q * scale) / triangle[column, column]
            part[i + 1 :] -= np.outer(triangle[column, column + 1 : end], errors[i])
        left[end:] -= triangle[begin:end, end:].T @ errors
    return np.ascontiguousarray(integers.T)


def _refitted(weight: np.ndarray, integers: np.ndarray, scales: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """The scales, float32 [out, groups], that bring the least error of products with given integers."""
    narrow, groups = gram.astype(np.float32), scales.shape[1]
    rows = max(1, _CHUNK // groups**2)
    parts = [slice(i, i + rows) for i in range(0, len(weight), rows)]
    return np.concatenate([_refitted_rows(weight[p], integers[p], scales[p], narrow) for p in parts])


def _refitted_rows(
    weight: np.ndarray, integers: np.ndarray, scales: np.ndarray, gram: np.ndarray
) -> np.ndarray:
    rows, groups = scales.shape
    size = weight.shape[1] // groups
    target = ((weight @ gram) * integers).reshape(rows, groups, size).sum(axis=2, dtype=np.float64)
    normal = np.empty((rows, groups, groups))
    for g in range(groups):
        part = slice(g * size, (g + 1) * size)
        normal[:, g] = ((integers[:, part] @ gram[part]) * integers).reshape(rows, groups, size).sum(axis=2)
    # a group of zeros keeps its scale
    ridge = 1e-4 * np.trace(normal, axis1=1, axis2=2) / groups + 1e-12
    normal[:, np.arange(groups), np.arange(groups)] += ridge[:, None]
    found = np.linalg.solve(normal, (target + ridge[:, None] * scales)[..., None])[..., 0]
    return np.ascontiguousarray(np.where(found == 0, scales, found), np.float32)
