"""Foreground box, gain and bias of the normalisation, int16; and the undoing.

A prepared case keeps the file's integers. A few numbers a modality turn them into network input on
the device: gain * voxel + bias inside the brain, 0 outside it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from raybrats.config import Normalisation
from raybrats.errors import DataError

Box = tuple[slice, slice, slice]
Shape = tuple[int, int, int]
Array = TypeVar("Array")
Other = TypeVar("Other")
_INT16 = np.iinfo(np.int16)
_OUTSIDE = _INT16.min
"""Background of quantised floats where it lies far from the brain: below all its voxels."""
_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Scaling(Generic[Array]):
    """Numbers that make network input of int16 voxels, one a modality.

    Arrays are (modality,) where they belong to a case, tensors (batch, modality) on the device.
    """

    gain: Array
    """Factor of the voxels, float32."""
    bias: Array
    """Number added to the product, float32."""
    low: Array
    """Least voxel, int16: those below are raised to it."""
    high: Array
    """Greatest voxel, int16: those above are lowered to it."""
    background: Array
    """Voxel outside the brain, int16."""

    def map(self, function: Callable[[Array], Other]) -> "Scaling[Other]":
        """The function's results for each of the five.

        Example:
            >>> Scaling(2, -1, 0, 9, 0).map(float)
            Scaling(gain=2.0, bias=-1.0, low=0.0, high=9.0, background=0.0)
        """
        return Scaling(
            gain=function(self.gain),
            bias=function(self.bias),
            low=function(self.low),
            high=function(self.high),
            background=function(self.background),
        )


@dataclass(frozen=True)
class Prepared:
    """One case, cropped to the smallest box with brain or tumour in it.

    Arrays are views (..., i, j, k) of memory in which i lies closest, as NIfTI stores it.
    """

    image: np.ndarray
    """Voxels, int16 (modality, i, j, k)."""
    labels: np.ndarray | None
    """Labels 0, 1, 2, ... of the case's label set, uint8 (i, j, k)."""
    scaling: Scaling[np.ndarray]
    """Numbers that make network input of the voxels."""
    tumour: np.ndarray
    """Places of the voxels of label 1, then of 2, and so on, counted along the memory; int32."""
    counts: np.ndarray
    """Voxels of the background and of each label; int64 (label,)."""
    box: Box
    """Where the crop lies in the canonical volume."""
    shape: Shape
    """Extent of the canonical volume."""


def prepare(
    modalities: Sequence[np.ndarray],
    labels: np.ndarray | None = None,
    normalisation: Normalisation = "zscore",
    percentiles: tuple[float, float] = (0.5, 99.5),
    *,
    box: Box | None = None,
    num_labels: int = 3,
) -> Prepared:
    """Crops and quantises the modalities (i, j, k) of one case and measures its normalisation.

    The brain is every voxel that differs, in any modality, from that modality's background: the
    value that the eight corners share, else 0. (Not "> 0": real volumes have negative brain
    voxels, and a z-scored input has a background that is not 0.) A box that is known to hold brain
    and tumour saves looking for it; then each modality is asked for once and let go before the
    next.

    Raises:
        DataError: the shapes differ, or every voxel is background.

    Example:
        >>> from raybrats.phantom.phantom import make_phantom
        >>> image, labels = make_phantom(0, shape=(24, 24, 20))
        >>> prepared = prepare(list(image), labels)
        >>> prepared.image.dtype, prepared.image.shape == image[:, *prepared.box].shape
        (dtype('int16'), True)
    """
    from raybrats.data import scan  # numba: only where cases are prepared, not where they are read

    mask = None if labels is None else scan.stored(labels)
    shapes = [] if labels is None else [labels.shape]
    if box is None:
        shape = _common([modality.shape for modality in modalities] + shapes)
        image, background, sums, box = _searched(modalities, mask)
    else:
        image, background, found = _cropped(modalities, box)
        shape = _common(found + shapes)
        sums = scan.brain(tuple(map(scan.read_only, image)), background)[1]
        if not sums[:, 0].any():
            raise DataError("every voxel of the box is background; index the cohort anew")
    low, high = np.full(len(image), _INT16.min), np.full(len(image), _INT16.max)
    if normalisation == "percentile":
        low, high = _percentiles(scan.histogram(image, background), percentiles)
    cropped = None if mask is None else mask[box[::-1]].copy()
    counts = np.zeros(1 + num_labels, np.int64)
    counts = counts if cropped is None else scan.tumour(cropped, num_labels)[1]
    return Prepared(
        image=image.transpose(0, 3, 2, 1),
        labels=None if cropped is None else cropped.T,
        scaling=_scaling(sums, (low, high), background, normalisation),
        tumour=np.empty(0, np.int32) if cropped is None else scan.places(cropped, counts),
        counts=counts,
        box=box,
        shape=shape,
    )


def restore(prediction: np.ndarray, prepared: Prepared) -> np.ndarray:
    """The prediction of a crop put back into the canonical volume, with 0 outside the box.

    Example:
        >>> from raybrats.phantom.phantom import make_phantom
        >>> image, labels = make_phantom(0, shape=(24, 24, 20))
        >>> prepared = prepare(list(image), labels)
        >>> bool((restore(prepared.labels, prepared) == labels).all())
        True
    """
    full = np.zeros(prepared.shape, prediction.dtype)
    full[prepared.box] = prediction
    return full


def bounding_box(mask: np.ndarray) -> Box:
    """Smallest box that holds every true voxel.

    Raises:
        DataError: there is none.

    Example:
        >>> bounding_box(np.pad(np.ones((1, 2, 3), bool), 4))
        (slice(4, 5, None), slice(4, 6, None), slice(4, 7, None))
    """
    spans = []
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        places = np.flatnonzero(mask.any(axis=others))
        if len(places) == 0:
            raise DataError("every voxel is background; is the volume empty?")
        spans.append(slice(int(places[0]), int(places[-1]) + 1))
    return spans[0], spans[1], spans[2]


def _common(shapes: Sequence[tuple[int, ...]]) -> Shape:
    if len(set(shapes)) > 1:
        raise DataError(f"volumes of one case differ in shape: {list(shapes)}")
    i, j, k = shapes[0]
    return i, j, k


def _searched(
    modalities: Sequence[np.ndarray], mask: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Box]:
    """The crop (modality, k, j, i) as int16, each background, sums over the brain, and the box.

    Raises:
        DataError: every voxel is background.
    """
    from raybrats.data import scan

    pairs = [_quantised(modality) for modality in modalities]
    whole = tuple(scan.stored(voxels) for voxels, _ in pairs)
    background = np.array([outside for _, outside in pairs], np.int16)
    ends, sums = scan.brain(whole, background)
    found = [ends] if mask is None else [ends, scan.tumour(mask, 0)[0]]
    found = [each for each in found if each.any()]  # an empty one is all 0
    if not found:
        raise DataError("every voxel is background; is the volume empty?")
    first, last = np.min(found, axis=0)[:, 0], np.max(found, axis=0)[:, 1]
    k, j, i = (slice(int(a), int(b)) for a, b in zip(first, last, strict=True))
    return np.stack([voxels[k, j, i] for voxels in whole]), background, sums, (i, j, k)


def _cropped(
    modalities: Sequence[np.ndarray], box: Box
) -> tuple[np.ndarray, np.ndarray, list[tuple[int, ...]]]:
    """The crop (modality, k, j, i) as int16, each background among it, and the whole's shapes."""
    image = np.empty((len(modalities), *(s.stop - s.start for s in box[::-1])), np.int16)
    background, shapes = np.empty(len(modalities), np.int16), []
    for place in range(len(modalities)):
        voxels = modalities[place]
        quantised, background[place] = _quantised(voxels)
        image[place] = quantised[box].T
        shapes.append(voxels.shape)
        del voxels, quantised  # so that the next is unpacked into the same memory
    return image, background, shapes


def _quantised(voxels: np.ndarray) -> tuple[np.ndarray, int]:
    """The voxels as int16 on a line with their values, and the background among them.

    Whole numbers that fit are kept; others are spread over the range of the brain, and of the
    background unless it lies so far from it that precision would be lost. No brain voxel gets the
    value of the background.
    """
    corners = voxels[np.ix_(*[(0, -1)] * 3)]
    background = corners.flat[0].item() if (corners == corners.flat[0]).all() else 0
    if voxels.dtype == np.int16:
        return voxels, int(background)
    with np.errstate(invalid="ignore"):  # what does not fit shows by not being equal
        kept = voxels.astype(np.int16)
    if (kept == voxels).all() and background == round(background):
        return kept, round(background)
    brain = voxels != background
    inside = voxels[brain].astype(np.float64)  # float32 is too short
    low, high = (inside.min(), inside.max()) if inside.size else (0.0, 0.0)
    near = 2 * low - high <= background <= 2 * high - low
    if near:  # it is a value like others: that of voxels which are brain in another modality
        low, high = min(low, background), max(high, background)
    middle, step = (low + high) / 2, max((high - low) / (2 * _INT16.max - 2), _TINY)
    outside = round((background - middle) / step) if near else _OUTSIDE
    if near:
        middle = background - outside * step  # so that it is exact
    codes = np.rint((inside - middle) / step)
    codes += np.where(codes == outside, np.sign(inside - background), 0)
    spread = np.full(voxels.shape, outside, np.int16)
    spread[brain] = codes
    return spread, outside


def _percentiles(counts: np.ndarray, percentiles: tuple[float, float]) -> tuple[np.ndarray, ...]:
    """The least voxels (modality,) that so many per cent of the brain do not exceed."""
    below = np.cumsum(counts, axis=1)
    wanted = [np.ceil(below[:, -1:] * percentile / 100).clip(1) for percentile in percentiles]
    low, high = ((below < number).sum(axis=1) + _INT16.min for number in wanted)
    return low, high


def _scaling(
    sums: np.ndarray,
    ends: tuple[np.ndarray, np.ndarray],
    background: np.ndarray,
    normalisation: Normalisation,
) -> Scaling[np.ndarray]:
    """The scaling by the brain's sums; a constant modality carries nothing and becomes 0."""
    low, high = ends
    number, total, squares, least, most = sums.T.astype(np.float64)
    if normalisation == "zscore":
        origin = total / np.maximum(number, 1)
        scale = np.sqrt(np.maximum(squares / np.maximum(number, 1) - origin**2, 0))
    else:
        origin = np.maximum(least, low)
        scale = np.where(number > 0, np.minimum(most, high) - origin, 0)
    varies = (scale > 0) & (most > least)  # a constant's squares may not sum up exactly
    gain = np.divide(1, scale, out=np.zeros_like(scale), where=varies)
    return Scaling(
        gain=gain.astype(np.float32),
        bias=(-origin * gain).astype(np.float32),
        low=low.astype(np.int16),
        high=high.astype(np.int16),
        background=background,
    )
