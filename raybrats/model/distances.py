"""Distances between the surfaces of two masks, and what the field calls HD95 and NSD of them."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.ndimage import binary_erosion
from scipy.spatial import KDTree

Spacing = tuple[float, float, float]
PERCENTILE = 95
_BITS = np.array([[[128, 64], [32, 16]], [[8, 4], [2, 1]]], np.uint8)
"""Bit that each of the eight voxels around a corner has in its code (surface-distance's order)."""
_INSIDE = 255
"""Code of a corner whose eight voxels are all in the mask."""


@dataclass(frozen=True)
class Surfaces:
    """Distances in mm from each element of one surface to the nearest one of the other."""

    from_prediction: np.ndarray
    from_reference: np.ndarray
    areas_prediction: np.ndarray | None = None
    """Areas of the elements in mm2, where they are known."""
    areas_reference: np.ndarray | None = None


def voxel_surfaces(prediction: np.ndarray, reference: np.ndarray, spacing_mm: Spacing) -> Surfaces:
    """Distances between the border voxels of two masks (i, j, k), neither of them empty.

    A voxel is on the border where one of its six neighbours is not in the mask (medpy, MONAI,
    panoptica).

    Example:
        >>> mask = np.zeros((8, 8, 8), bool)
        >>> mask[2, 2, 2] = True
        >>> voxel_surfaces(mask, np.roll(mask, 3, axis=2), (1.0, 1.0, 2.0)).from_prediction
        array([6.])
    """
    borders = [np.argwhere(mask & ~binary_erosion(mask)) for mask in (prediction, reference)]
    there, back = _nearest(borders[0], borders[1], spacing_mm)
    return Surfaces(there, back)


def corner_surfaces(prediction: np.ndarray, reference: np.ndarray, spacing_mm: Spacing) -> Surfaces:
    """Distances between the surfaces of two masks (i, j, k) that run through corners of voxels.

    Each corner whose eight voxels differ bears a piece of surface, whose area marching cubes give
    (DeepMind's surface-distance, whose table of areas is used). Neither mask is empty.

    Example:
        >>> mask = np.zeros((8, 8, 8), bool)
        >>> mask[2, 2, 2] = True
        >>> corner_surfaces(mask, mask, (1.0, 1.0, 1.0)).areas_prediction.sum().round(3)
        np.float64(1.732)
    """
    areas = _areas(spacing_mm)
    codes = [_corner_codes(mask) for mask in (prediction, reference)]
    places = [np.nonzero((code > 0) & (code < _INSIDE)) for code in codes]
    there, back = _nearest(*(np.stack(place, axis=1) for place in places), spacing_mm)
    ours, theirs = (areas[code[place]] for code, place in zip(codes, places, strict=True))
    return Surfaces(there, back, ours, theirs)


def pooled_hd95(surfaces: Surfaces) -> float:
    """95th percentile of the distances of both directions together (medpy, BraTS 2026).

    Example:
        >>> pooled_hd95(Surfaces(np.array([0.0]), np.array([2.0])))
        1.9
    """
    both = np.concatenate([surfaces.from_reference, surfaces.from_prediction])
    return float(np.percentile(both, PERCENTILE))


def directed_hd95(surfaces: Surfaces) -> float:
    """Larger of the two directed 95th percentiles (MONAI).

    Example:
        >>> directed_hd95(Surfaces(np.array([0.0]), np.array([2.0])))
        2.0
    """
    directions = (surfaces.from_prediction, surfaces.from_reference)
    return max(float(np.percentile(distances, PERCENTILE)) for distances in directions)


def weighted_hd95(surfaces: Surfaces) -> float:
    """Larger of the two distances within which 95 % of a surface's area lies (surface-distance).

    Example:
        >>> one = np.ones(1)
        >>> weighted_hd95(Surfaces(np.array([0.0]), np.array([2.0]), one, one))
        2.0
    """
    assert surfaces.areas_prediction is not None, "surfaces with areas"
    assert surfaces.areas_reference is not None, "surfaces with areas"
    return max(
        _weighted_percentile(surfaces.from_prediction, surfaces.areas_prediction),
        _weighted_percentile(surfaces.from_reference, surfaces.areas_reference),
    )


def surface_dice(surfaces: Surfaces, tolerance_mm: float) -> float:
    """NSD: mean of the fractions of each surface that lie within a tolerance of the other one.

    Border voxels are counted, not areas (GaNDLF, BraTS 2026).

    Example:
        >>> surface_dice(Surfaces(np.array([0.0, 3.0]), np.array([0.0])), tolerance_mm=1)
        0.75
    """
    directions = (surfaces.from_prediction, surfaces.from_reference)
    return sum(float((distances <= tolerance_mm).mean()) for distances in directions) / 2


def _weighted_percentile(distances: np.ndarray, areas: np.ndarray) -> float:
    order = np.argsort(distances, kind="stable")
    share = np.cumsum(areas[order]) / areas.sum()
    place = int(np.searchsorted(share, PERCENTILE / 100))
    return float(distances[order[min(place, len(order) - 1)]])


def _nearest(
    points: np.ndarray, others: np.ndarray, spacing_mm: Spacing
) -> tuple[np.ndarray, np.ndarray]:
    """Distance in mm of each point (point, axis; voxels) to the nearest other one, and back."""
    ours, theirs = points * np.asarray(spacing_mm), others * np.asarray(spacing_mm)
    # Sliding midpoints without medians: a tree of lattice points is built three times as fast.
    trees = [KDTree(each, balanced_tree=False, compact_nodes=False) for each in (theirs, ours)]
    return trees[0].query(ours)[0], trees[1].query(theirs)[0]


def _corner_codes(mask: np.ndarray) -> np.ndarray:
    """Which of its eight voxels are in the mask, one bit each, of every corner (uint8)."""
    padded = np.pad(mask, 1).view(np.uint8)
    codes = np.zeros([edge + 1 for edge in mask.shape], np.uint8)
    for place in np.ndindex(2, 2, 2):
        window = tuple(slice(at, at + size) for at, size in zip(place, codes.shape, strict=True))
        codes += padded[window] * _BITS[place]
    return codes


@lru_cache(maxsize=64)
def _areas(spacing_mm: Spacing) -> np.ndarray:
    """Area in mm2 of the surface at a corner, by its code."""
    from surface_distance.lookup_tables import (  # not where a network is trained
        create_table_neighbour_code_to_surface_area,
    )

    return create_table_neighbour_code_to_surface_area(spacing_mm)
