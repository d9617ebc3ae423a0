"""Single passes over the voxels of a case, compiled by numba once per node and kept on its disk.

Arrays come in memory order, (k, j, i): NIfTI stores i fastest, so a row is what lies together.
"""

from collections.abc import Callable

import numba
import numpy as np


def _compiled(function: Callable) -> Callable:
    """The function, compiled at its first call; in each process anew if no folder can keep it."""
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # numba: no locator available
        return numba.njit(nogil=True)(function)


NUM_SUMS = 5
"""Columns of what `brain` fills: voxels, their sum, sum of squares, minimum, maximum."""
WHOLE = 1e-3
"""Distance from a whole number at which a label of a float mask still counts as one."""
_START = np.array([0, 0, 0, np.iinfo(np.int64).max, np.iinfo(np.int64).min])


def stored(voxels: np.ndarray) -> np.ndarray:
    """The voxels (i, j, k) as (k, j, i), contiguous: a view where the file was canonical.

    They are read-only and aligned whatever they come from: numba compiles a scan for each kind.

    Example:
        >>> stored(np.zeros((2, 3, 4), order="F")).shape
        (4, 3, 2)
    """
    return read_only(np.require(voxels.T, requirements=("C", "A")))


def read_only(voxels: np.ndarray) -> np.ndarray:
    """A view that cannot be written through.

    Example:
        >>> read_only(np.zeros(3)).flags.writeable
        False
    """
    view = voxels.view()
    view.flags.writeable = False
    return view


def brain(
    modalities: tuple[np.ndarray, ...], background: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Box of the voxels that differ from the background in any modality, and sums over them.

    Args:
        modalities: int16 (k, j, i) each, contiguous.
        background: int16 (modality,).

    Returns:
        The box, int64 (axis, 2), first and one past the last, (0, 0) where there is none; and
        the sums, int64 (modality, NUM_SUMS).

    Example:
        >>> from raybrats.phantom.phantom import make_phantom
        >>> image, _ = make_phantom(0, shape=(24, 24, 20))
        >>> box, sums = brain(tuple(map(stored, image)), np.zeros(4, np.int16))
        >>> bool(sums[0, 0] == image.any(axis=0).sum())
        True
    """
    seen, sums = _nowhere(modalities[0].shape), np.tile(_START, (len(modalities), 1))
    _brain(modalities, background, seen, sums)
    return _box(seen), sums


def encoded(labels: np.ndarray, values: tuple[int, ...]) -> tuple[np.ndarray, int]:
    """Labels 0, 1, 2, ... for 0 and the values, and a value that is none of them, or -1.

    Example:
        >>> encoded(stored(np.array([[[0, 4], [2, 1]]], np.uint8)), (1, 2, 4))[0].T.tolist()
        [[[0, 3], [2, 1]]]
    """
    out = np.zeros(labels.shape, np.uint8)
    if not _encoded(labels, np.array(values, np.uint8), out):
        return out, -1
    return out, int(labels[(out == 0) & (labels != 0)][0])


def rounded(values: np.ndarray) -> np.ndarray | None:
    """Floats as uint8, or None where one is not nearly a whole number of 0..255.

    Example:
        >>> rounded(stored(np.array([[[0.0, 1.9999, 4.0]]]))).ravel().tolist()
        [0, 2, 4]
    """
    out, length = np.zeros(values.shape, np.uint8), values.shape[-1]
    return out if _rounded(values.reshape(-1, length), out.reshape(-1, length)) else None


def tumour(labels: np.ndarray, num_labels: int) -> tuple[np.ndarray, np.ndarray]:
    """Box of the voxels above 0, as `brain` gives it, and the number of voxels of each label.

    Example:
        >>> box, counts = tumour(stored(np.array([[[0, 0, 3, 1]]], np.uint8)), num_labels=3)
        >>> counts.tolist()
        [2, 1, 0, 1]
    """
    seen, counts = _nowhere(labels.shape), np.zeros(1 + num_labels, np.int64)
    _tumour(labels, seen, counts)
    return _box(seen), counts


def places(labels: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Flat places of the voxels of label 1, then of 2, and so on, each in order; int32.

    Example:
        >>> places(np.array([[[3, 0, 1, 3]]], np.uint8), np.array([1, 1, 0, 2])).tolist()
        [2, 0, 3]
    """
    ends = np.cumsum(counts[1:])
    found = np.empty(ends[-1], np.int32)
    _places(labels.reshape(-1, labels.shape[-1]), np.array([0, 0, *ends[:-1]]), found)
    return found


def histogram(image: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Numbers of brain voxels by their value + 32768, int64 (modality, 65536).

    Example:
        >>> image = np.array([[[[0, 5, 5]]], [[[7, 0, 0]]]], np.int16)
        >>> np.argwhere(histogram(image, np.zeros(2, np.int16)))[:, 1] - 32768
        array([0, 5, 0, 7])
    """
    counts = np.zeros((len(image), 2**16), np.int64)
    _histogram(image.reshape(len(image), -1), background, counts)
    return counts


def _nowhere(shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    return tuple(np.zeros(length, np.uint8) for length in shape)


def _box(seen: tuple[np.ndarray, ...]) -> np.ndarray:
    """First and one past the last place of each axis at which something was seen."""
    ends = [np.flatnonzero(places)[[0, -1]] if places.any() else (0, -1) for places in seen]
    return np.add(np.array(ends, np.int64), (0, 1))


@_compiled
def _see(seen, k, j, row):  # noqa: ANN001, ANN202 - compiled: numba infers the types
    seen[0][k] = 1
    seen[1][j] = 1
    columns = seen[2]
    for i in range(len(row)):
        columns[i] |= row[i]


@_compiled
def _mark(modalities, k, j, background, row):  # noqa: ANN001, ANN202
    """Fills the row with 1 in the brain and 0 outside."""
    for m in range(len(modalities)):
        voxels, outside = modalities[m][k, j], background[m]
        if m == 0:
            for i in range(len(row)):
                row[i] = voxels[i] != outside
        else:
            for i in range(len(row)):
                row[i] |= np.uint8(voxels[i] != outside)


@_compiled
def _add(voxels, mask, sums):  # noqa: ANN001, ANN202
    """Adds one row, in 32 bits, so that it vectorises: 32,767 voxels cannot overflow them."""
    number, total, squares = np.int32(0), np.int32(0), np.int64(0)
    for i in range(len(mask)):
        number = np.int32(number + mask[i])
    for i in range(len(mask)):
        value = np.int32(np.int32(voxels[i]) * np.int32(mask[i]))
        total = np.int32(total + value)
        squares += np.int64(np.int32(value * value))
    low, high = np.int16(32767), np.int16(-32768)
    for i in range(len(mask)):
        low = min(low, voxels[i] if mask[i] else np.int16(32767))
        high = max(high, voxels[i] if mask[i] else np.int16(-32768))
    sums[0] += number
    sums[1] += total
    sums[2] += squares
    sums[3] = min(sums[3], low)
    sums[4] = max(sums[4], high)


@_compiled
def _any(voxels):  # noqa: ANN001, ANN202
    some = np.uint8(0)
    for i in range(len(voxels)):
        some |= voxels[i]
    return some != 0


@_compiled
def _brain(modalities, background, seen, sums):  # noqa: ANN001, ANN202
    num_k, num_j, num_i = modalities[0].shape
    row = np.empty(num_i, np.uint8)
    for k in range(num_k):
        for j in range(num_j):
            _mark(modalities, k, j, background, row)
            if _any(row):
                _see(seen, k, j, row)
                for m in range(len(modalities)):
                    _add(modalities[m][k, j], row, sums[m])


@_compiled
def _rounded(values, out):  # noqa: ANN001, ANN202
    """Whether every value fits; fills `out`, which is all 0, as far as they do."""
    num_rows, num_i = values.shape
    for r in range(num_rows):
        some = np.uint8(0)
        for i in range(num_i):
            some |= np.uint8(values[r, i] != 0)
        if some:
            for i in range(num_i):
                near = np.rint(values[r, i])
                if not (abs(values[r, i] - near) <= WHOLE and 0 <= near <= 255):
                    return False
                out[r, i] = np.uint8(near)
    return True


@_compiled
def _encoded(labels, values, out):  # noqa: ANN001, ANN202
    """Whether there is a value that is none of those; fills `out`, which is all 0."""
    num_k, num_j, num_i = labels.shape
    planes = labels.reshape(num_k, num_j * num_i)
    strange = np.uint8(0)
    for k in range(num_k):
        if _any(planes[k]):
            for j in range(num_j):
                if _any(labels[k, j]):
                    strange |= _encode(labels[k, j], values, out[k, j])
    return strange != 0


@_compiled
def _encode(row, values, out):  # noqa: ANN001, ANN202
    strange = np.uint8(0)
    for v in range(len(values)):
        value, label = values[v], np.uint8(v + 1)
        for i in range(len(row)):
            out[i] |= np.uint8(row[i] == value) * label
    for i in range(len(row)):
        strange |= np.uint8(out[i] == 0) & np.uint8(row[i] != 0)
    return strange


@_compiled
def _tumour(labels, seen, counts):  # noqa: ANN001, ANN202
    num_k, num_j, num_i = labels.shape
    planes = labels.reshape(num_k, num_j * num_i)
    for k in range(num_k):
        if _any(planes[k]):
            for j in range(num_j):
                if _any(labels[k, j]):
                    _see(seen, k, j, labels[k, j])
            for label in range(1, len(counts)):
                number = np.int64(0)
                for i in range(num_j * num_i):
                    number += planes[k, i] == label
                counts[label] += number
    counts[0] = labels.size - counts[1:].sum()


@_compiled
def _places(rows, starts, found):  # noqa: ANN001, ANN202
    num_rows, num_i = rows.shape
    for r in range(num_rows):
        if _any(rows[r]):
            for i in range(num_i):
                label = rows[r, i]
                if label:
                    found[starts[label]] = r * num_i + i
                    starts[label] += 1


@_compiled
def _histogram(image, background, counts):  # noqa: ANN001, ANN202
    num_modalities, num_voxels = image.shape
    for i in range(num_voxels):
        some = False
        for m in range(num_modalities):
            some |= image[m, i] != background[m]
        if some:
            for m in range(num_modalities):
                counts[m, np.int64(image[m, i]) + 32768] += 1
