"""One draw -> one patch of a prepared case."""

from dataclasses import dataclass

import numpy as np

from raybrats.brats import ED, ET, NCR
from raybrats.data.prepare import Prepared

Corner = tuple[int, int, int]


@dataclass(frozen=True)
class PatchRule:
    """How patches are placed."""

    size: tuple[int, int, int]
    """(i, j, k) in voxels."""
    foreground_share: float
    """Share of the draws that are centred on a tumour voxel."""


def choose_corner(labels: np.ndarray, rule: PatchRule, rng: np.random.Generator) -> Corner:
    """First voxel of a random patch; negative along axes where the case is smaller than it.

    A share of the draws is centred on tumour: a class drawn uniformly among those present, then
    one of its voxels uniformly (nnU-Net), moved as far as needed to stay within the case.
    """
    room = np.subtract(labels.shape, rule.size)
    low, high = np.minimum(0, room // 2), np.maximum(room, room // 2)
    corner = rng.integers(low, high + 1)
    if rng.random() < rule.foreground_share:
        present = np.flatnonzero(np.bincount(labels.ravel(), minlength=4)[[NCR, ED, ET]])
        if len(present):
            voxels = np.flatnonzero(labels.ravel() == (NCR, ED, ET)[rng.choice(present)])
            centre = np.unravel_index(rng.choice(voxels), labels.shape)
            corner = np.clip(np.subtract(centre, np.floor_divide(rule.size, 2)), low, high)
    return tuple(int(c) for c in corner)


def cut(
    prepared: Prepared, corner: Corner, size: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Image (modality, i, j, k) and labels (i, j, k) of a patch; background beyond the case."""
    image = np.empty((len(prepared.image), *size), np.int16)
    image[:] = prepared.background[:, None, None, None]
    labels = np.zeros(size, np.uint8)
    shape = prepared.image.shape[1:]
    source = tuple(
        slice(max(c, 0), min(c + s, n)) for c, s, n in zip(corner, size, shape, strict=True)
    )
    target = tuple(slice(p.start - c, p.stop - c) for p, c in zip(source, corner, strict=True))
    image[:, *target] = prepared.image[:, *source]
    if prepared.labels is not None:
        labels[target] = prepared.labels[source]
    return image, labels
