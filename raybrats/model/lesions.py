"""Lesions: connected components of one region, and their scores by the rules of a year."""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import binary_dilation, find_objects, generate_binary_structure
from scipy.optimize import linear_sum_assignment

from raybrats.model.distances import (
    Spacing,
    Surfaces,
    corner_surfaces,
    pooled_hd95,
    surface_dice,
    voxel_surfaces,
    weighted_hd95,
)

HD95_MISSED_MM = {"brats2023": 374.0, "brats2026": 373.0}
"""HD95 of what was not found, or is not there (BraTS-2023-Metrics; BraTS-evaluation's summary)."""
LEAST_DICE = 1e-6
"""Dice from which two lesions may be matched (BraTS-evaluation's configurations)."""
_NEIGHBOURS = 26


@dataclass(frozen=True)
class Merging:
    """How the rules of 2023 merge and leave out lesions of the reference."""

    dilations: int = 3
    """Dilations (18 neighbours) after which lesions that touch are one."""
    least_mm3: float = 50.0
    """Volume up to which a lesion is left out."""


MERGING = {"MEN": Merging(dilations=1), "MET": Merging(dilations=1, least_mm3=2.0)}
"""Settings of BraTS-2023-Metrics by edition; those of glioma, Africa and children elsewhere."""


@dataclass(frozen=True)
class LesionScore:
    """Scores of the lesions of one region; None where the rules leave one undefined."""

    lesion_dice: float | None = None
    lesion_hd95_mm: float | None = None
    lesion_nsd: float | None = None
    tp: int | None = None
    fp: int | None = None
    fn: int | None = None
    lesion_f1: float | None = None


def lesions_2023(
    prediction: np.ndarray, reference: np.ndarray, spacing_mm: Spacing, merging: Merging
) -> LesionScore:
    """Lesion-wise scores of two masks (i, j, k) by the rules of BraTS 2023.

    Lesions of the reference that touch once dilated are one. All predicted ones that touch the
    dilated lesion are held to the lesion itself; each of the others, and each lesion that was not
    found, counts Dice 0 and HD95 374 mm. Without lesions on both sides: 1 and 0.

    Example:
        >>> mask = np.zeros((12, 12, 12), bool)
        >>> mask[2:6, 2:6, 2:6] = True
        >>> found = lesions_2023(mask, mask, (1.0, 1.0, 1.0), Merging())
        >>> found.lesion_dice, found.lesion_hd95_mm, found.tp
        (1.0, 0.0, 1)
    """
    near = generate_binary_structure(3, 2)
    dilated = binary_dilation(reference, near, iterations=merging.dilations)
    zones, components = _components(dilated), _components(prediction)
    lesions = zones * reference
    volumes = np.bincount(lesions.ravel(), minlength=2)
    both = _pairs(zones, components)[0]
    least = merging.least_mm3 / float(np.prod(spacing_mm))
    dice, distances, fn = [], [], 0
    for zone in np.flatnonzero(volumes[1:] > least) + 1:
        touching = both[1][both[0] == zone]
        fn += not len(touching)
        if len(touching):
            pair = _cropped(np.isin(components, touching), lesions == zone)
            dice.append(_dice(*pair))
            distances.append(weighted_hd95(corner_surfaces(*pair, spacing_mm)))
    tp, fp = len(dice), int(components.max(initial=0)) - len(np.unique(both[1]))
    count = tp + fn + fp
    missed = HD95_MISSED_MM["brats2023"] * (fn + fp)
    return LesionScore(
        lesion_dice=sum(dice) / count if count else 1.0,
        lesion_hd95_mm=(sum(distances) + missed) / count if count else 0.0,
        tp=tp,
        fp=fp,
        fn=fn,
        lesion_f1=2 * tp / (2 * tp + fp + fn) if count else 1.0,
    )


def lesions_2026(prediction: np.ndarray, reference: np.ndarray, spacing_mm: Spacing) -> LesionScore:
    """Lesion-wise scores of two masks (i, j, k) by the official scorer of 2026, glioma's settings.

    Lesions are matched one to one, so that their Dice is greatest in sum; Dice, HD95 (pooled) and
    NSD (within the least spacing) are means over the pairs. Without a pair they are 0, 373 mm and
    0, and without lesions on both sides undefined.

    Example:
        >>> mask = np.zeros((12, 12, 12), bool)
        >>> mask[2:6, 2:6, 2:6] = True
        >>> lesions_2026(mask, mask, (1.0, 1.0, 1.0)).lesion_f1
        1.0
    """
    found, due = _components(prediction), _components(reference)
    num_found, num_due = int(found.max(initial=0)), int(due.max(initial=0))
    if not num_found and not num_due:
        return LesionScore(tp=0, fp=0, fn=0)
    pairs = _matched(found, due)
    dice, surfaces = [], []
    for ours, theirs in pairs:
        pair = _cropped(found == ours, due == theirs)
        dice.append(_dice(*pair))
        surfaces.append(voxel_surfaces(*pair, spacing_mm))
    tp, fp, fn = len(pairs), num_found - len(pairs), num_due - len(pairs)
    missed = HD95_MISSED_MM["brats2026"]
    return LesionScore(
        lesion_dice=float(np.mean(dice)) if pairs else 0.0,
        lesion_hd95_mm=float(np.mean([pooled_hd95(s) for s in surfaces])) if pairs else missed,
        lesion_nsd=_mean_nsd(surfaces, min(spacing_mm)),
        tp=tp,
        fp=fp,
        fn=fn,
        lesion_f1=2 * tp / (2 * tp + fp + fn),
    )


def _mean_nsd(surfaces: list[Surfaces], tolerance_mm: float) -> float:
    return float(np.mean([surface_dice(s, tolerance_mm) for s in surfaces])) if surfaces else 0.0


def _components(mask: np.ndarray) -> np.ndarray:
    """The components of a mask, numbered from 1; 0 elsewhere."""
    import cc3d  # not where a network is trained

    return cc3d.connected_components(mask, connectivity=_NEIGHBOURS)


def _pairs(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers (2, pair) of components of two maps that share voxels, and how many they share."""
    both = (one > 0) & (other > 0)
    width = int(other.max(initial=0)) + 1
    codes, counts = np.unique(one[both].astype(np.int64) * width + other[both], return_counts=True)
    return np.stack(np.divmod(codes, width)), counts


def _matched(found: np.ndarray, due: np.ndarray) -> list[tuple[int, int]]:
    """Numbers of the components that are matched one to one."""
    sizes = [np.bincount(components.ravel()) for components in (found, due)]
    pairs, overlaps = _pairs(found, due)
    dice = np.zeros((len(sizes[0]), len(sizes[1])))
    dice[pairs[0], pairs[1]] = 2 * overlaps / (sizes[0][pairs[0]] + sizes[1][pairs[1]])
    ours, theirs = linear_sum_assignment(dice, maximize=True)
    return [(int(o), int(t)) for o, t in zip(ours, theirs, strict=True) if dice[o, t] >= LEAST_DICE]


def _cropped(*masks: np.ndarray) -> list[np.ndarray]:
    """The masks within the box that holds all of them."""
    (box,) = find_objects(np.logical_or.reduce(masks).view(np.uint8))
    return [mask[box] for mask in masks]


def _dice(prediction: np.ndarray, reference: np.ndarray) -> float:
    return 2 * int((prediction & reference).sum()) / int(prediction.sum() + reference.sum())
