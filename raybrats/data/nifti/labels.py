"""Label file -> labels 0, 1, 2, ... of its set, whatever values its edition has for them."""

import numpy as np

from raybrats.data.nifti.volume import Volume
from raybrats.errors import DataError


def labels_from(volume: Volume, values: tuple[int, ...], name: str) -> np.ndarray:
    """Labels 0, 1, 2, ... (uint8, canonical) of a label file with these values for 1, 2, ...

    Raises:
        DataError: a voxel is not a whole number or not one of the values.

    Example:
        >>> from raybrats.data.nifti.header import Grid
        >>> stored = np.array([[[0, 1, 2, 4]]], np.uint8)
        >>> labels_from(Volume(stored, 1.0, 0.0, Grid((1, 1, 4), np.eye(4), True)), (1, 2, 4), "x")
        array([[[0, 1, 2, 3]]], dtype=uint8)
    """
    from raybrats.data import scan

    whole = _whole_numbers(volume, name)
    ends = () if whole.dtype == np.uint8 else (whole.min(), whole.max())
    unknown = [end for end in ends if not 0 <= end <= 255]
    labels = np.empty(0, np.uint8)
    if not unknown:
        labels, value = scan.encoded(scan.stored(whole.astype(np.uint8, copy=False)), values)
        unknown = [value] if value >= 0 else []
    if unknown:
        known = ", ".join(str(v) for v in (0, *values))
        raise DataError(
            f"{name}: unknown label {unknown[0]:g}; this edition has {known}; map it to one of "
            "them, or leave the case out"
        )
    return labels.T


def _whole_numbers(volume: Volume, name: str) -> np.ndarray:
    """The label file's voxels, all of them whole numbers.

    Raises:
        DataError: a voxel is not a whole number.
    """
    from raybrats.data import scan

    plain = (volume.slope, volume.intercept) == (1.0, 0.0)
    if plain and volume.voxels.dtype.kind in "iu":
        return volume.voxels
    exact = volume.voxels if plain else volume.values
    labels = scan.rounded(scan.stored(exact))
    if labels is not None:
        return labels.T
    rounded = np.rint(exact)
    if np.abs(exact - rounded).max(initial=0) > scan.WHOLE:
        raise DataError(f"{name}: labels are not whole numbers; was it resampled?")
    return rounded
