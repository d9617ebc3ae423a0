"""Foreground box, gain and bias of the normalisation, int16; and the undoing.

A prepared case keeps the file's integers. Two numbers a modality turn them into network input on
the device: gain * voxel + bias inside the brain, 0 outside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from raybrats.data.volume import Volume
from raybrats.errors import DataError

Box = tuple[slice, slice, slice]
Normalisation = Literal["zscore", "minmax"]
_INT16 = np.iinfo(np.int16)


@dataclass(frozen=True)
class Prepared:
    """One case, cropped to the smallest box with brain in it."""

    image: np.ndarray
    """int16 (modality, i, j, k)."""
    labels: np.ndarray | None
    """uint8 (i, j, k): 0, NCR, ED, ET."""
    gain: np.ndarray
    """float32 (modality,)."""
    bias: np.ndarray
    """float32 (modality,)."""
    background: np.ndarray
    """int16 (modality,): the voxel value outside the brain."""
    box: Box
    """Where the crop lies in the canonical volume."""
    shape: tuple[int, int, int]
    """Of the canonical volume."""


def prepare(
    modalities: Sequence[np.ndarray],
    labels: np.ndarray | None = None,
    normalisation: Normalisation = "zscore",
) -> Prepared:
    """Crops and quantises the modalities (i, j, k) of one case and measures its normalisation.

    The brain is every voxel that differs, in any modality, from that modality's background: the
    value that the eight corners share, else 0. (Not "> 0": real volumes have negative brain
    voxels, and a z-scored input has a background that is not 0.)

    Raises:
        DataError: the shapes differ, or every voxel is background.
    """
    shape = modalities[0].shape
    given = [m.shape for m in modalities] + ([] if labels is None else [labels.shape])
    if any(other != shape for other in given):
        raise DataError(f"volumes of one case differ in shape: {given}")
    backgrounds = [_background(m) for m in modalities]
    brain = np.zeros(shape, bool, order="F")
    for modality, background in zip(modalities, backgrounds, strict=True):
        brain |= modality != background
    box = bounding_box(brain)
    inside = np.ascontiguousarray(brain[box])
    image = np.empty((len(modalities), *inside.shape), np.int16)
    gain, bias = np.zeros((2, len(modalities)), np.float32)
    background = np.zeros(len(modalities), np.int16)
    for m, modality in enumerate(modalities):
        background[m] = _quantise(modality[box], backgrounds[m], image[m])
        gain[m], bias[m] = _gain_bias(image[m][inside], normalisation)
    cropped = None if labels is None else np.ascontiguousarray(labels[box], np.uint8)
    return Prepared(image, cropped, gain, bias, background, box, shape)


def labels_from(volume: Volume, values: tuple[int, int, int], name: str) -> np.ndarray:
    """Labels 0, NCR, ED, ET (uint8, canonical) from a label file with these values for them.

    Raises:
        DataError: a voxel is not a whole number or not one of the values.
    """
    exact = volume.voxels if (volume.slope, volume.intercept) == (1.0, 0.0) else volume.values
    rounded = np.rint(exact)
    if np.abs(exact - rounded).max(initial=0) > 1e-3:
        raise DataError(f"{name}: labels are not whole numbers; was it resampled?")
    found = np.unique(rounded).astype(int)
    unknown = sorted(set(found.tolist()) - {0, *values})
    if unknown:
        known = ", ".join(str(v) for v in (0, *values))
        raise DataError(f"{name}: unknown label {unknown[0]}; this edition has {known}")
    table = np.zeros(max(values) + 1, np.uint8)
    table[list(values)] = (1, 2, 3)
    return table[rounded.astype(np.uint8)]


def restore(prediction: np.ndarray, prepared: Prepared) -> np.ndarray:
    """The prediction of a crop put back into the canonical volume; 0 outside the box."""
    full = np.zeros(prepared.shape, prediction.dtype)
    full[prepared.box] = prediction
    return full


def bounding_box(mask: np.ndarray) -> Box:
    """Smallest box that holds every true voxel.

    Raises:
        DataError: there is none.
    """
    spans = []
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        places = np.flatnonzero(mask.any(axis=others))
        if len(places) == 0:
            raise DataError("every voxel is background; is the volume empty?")
        spans.append(slice(int(places[0]), int(places[-1]) + 1))
    return spans[0], spans[1], spans[2]


def _background(voxels: np.ndarray) -> float:
    corners = voxels[np.ix_(*[(0, -1)] * 3)]
    return corners.flat[0].item() if (corners == corners.flat[0]).all() else 0


def _quantise(voxels: np.ndarray, background: float, out: np.ndarray) -> int:
    """Fills `out` with int16 on a line with the voxels; returns the background on that line.

    Whole numbers that fit are kept. The line spans the background too, which the box may lack.
    """
    low = min(float(voxels.min()), background)
    high = max(float(voxels.max()), background)
    whole = voxels.dtype.kind in "iu" or bool((voxels == np.rint(voxels)).all())
    if whole and low >= _INT16.min and high <= _INT16.max and background == round(background):
        out[:] = voxels
        return round(background)
    step = max((high - low) / 65_534, np.finfo(np.float32).tiny)
    middle = (low + high) / 2
    out[:] = np.rint((voxels.astype(np.float64) - middle) / step)  # float32 would round past 32767
    return round((background - middle) / step)


def _gain_bias(brain: np.ndarray, normalisation: str) -> tuple[float, float]:
    if normalisation == "minmax":
        origin, scale = float(brain.min()), float(brain.max()) - float(brain.min())
    else:
        origin, scale = float(brain.mean(dtype=np.float64)), float(brain.std(dtype=np.float64))
    if scale == 0:  # a constant modality carries nothing: 0 everywhere
        return 0.0, 0.0
    return 1 / scale, -origin / scale
