"""Scores of one case, region by region, by the rules of a year."""

from dataclasses import asdict, dataclass

import numpy as np

from raybrats.brats import Rules
from raybrats.data.prepare import bounding_box
from raybrats.label_set import GLIOMA, TREATED, LabelSet, Region
from raybrats.model.distances import (
    Spacing,
    corner_surfaces,
    pooled_hd95,
    surface_dice,
    voxel_surfaces,
    weighted_hd95,
)
from raybrats.model.lesions import (
    HD95_MISSED_MM,
    MERGING,
    LesionScore,
    Merging,
    lesions_2023,
    lesions_2026,
)
from raybrats.model.regions import region_mask

HD95_ONE_EMPTY_MM = {"brats2020": 373.12866, **HD95_MISSED_MM}
"""HD95 where one side is empty. 2017 to 2021: sqrt(240^2 + 240^2 + 155^2) (nnU-Net's Task082)."""
NSD_TOLERANCE_MM = 0.5
"""Tolerance of the NSD of a whole region (BraTS-evaluation)."""
_PARTS = {"NETC": 1, "SNFH": 2, "RC": 4}
"""Labels that BraTS 2026 scores alone, as it calls them: those of glioma, before surgery too."""


@dataclass(frozen=True)
class Score:
    """Scores of one region of one case; None where the rules leave one undefined."""

    region: str
    """Its name."""
    dice: float | None
    """Also called F1: over voxels the two are one."""
    iou: float | None
    hd95_mm: float | None
    """By surface areas, the larger of both directions; `brats2026`: both directions pooled."""
    nsd: float | None
    """Within 0.5 mm; `brats2026` only."""
    sensitivity: float | None
    specificity: float | None
    volume_mm3: float
    reference_volume_mm3: float
    lesion_dice: float | None = None
    """This and what follows is of lesions: from `brats2023` on."""
    lesion_hd95_mm: float | None = None
    lesion_nsd: float | None = None
    tp: int | None = None
    fp: int | None = None
    fn: int | None = None
    lesion_f1: float | None = None


def regions_of(known: LabelSet, rules: Rules) -> tuple[Region, ...]:
    """The regions that are scored: those of the set, and for 2026 what glioma's labels are alone.

    Example:
        >>> [region.name for region in regions_of(GLIOMA, "brats2026")]
        ['WT', 'TC', 'ET', 'NETC', 'SNFH']
    """
    if rules != "brats2026" or known not in (GLIOMA, TREATED):
        return known.regions
    labels = range(1, len(known.names) + 1)
    parts = [Region(n, (v,), v) for n, v in _PARTS.items() if v in labels]
    return (*known.regions, *(p for p in parts if p.name not in known.region_names))


def score_case(
    prediction: np.ndarray,
    reference: np.ndarray,
    spacing_mm: Spacing,
    known: LabelSet = GLIOMA,
    rules: Rules = "brats2020",
    edition: str = "",
) -> list[Score]:
    """Scores of each region of labels (i, j, k) against reference labels of the same shape.

    Both empty: Dice 1 and HD95 0, in 2026 undefined. One empty: Dice 0 and HD95 373.13, 374 or
    373 mm (`HD95_ONE_EMPTY_MM`).

    Args:
        prediction: labels 0, 1, 2, ... of the set.
        reference: the same.
        spacing_mm: edges of a voxel.
        known: the set.
        rules: those of a year.
        edition: whose settings the lesions of 2023 have; glioma's where it has none of its own.

    Example:
        >>> labels = np.zeros((8, 8, 8), np.uint8)
        >>> labels[2:6, 2:6, 2:6] = 3
        >>> for score in score_case(labels, np.roll(labels, 1, axis=0), (1.0, 1.0, 1.0)):
        ...     print(score.region, score.dice, score.hd95_mm)
        WT 0.75 1.0
        TC 0.75 1.0
        ET 0.75 1.0
    """
    voxels, voxel_mm3 = prediction.size, float(np.prod(spacing_mm))
    if prediction.any() or reference.any():
        box = bounding_box((prediction > 0) | (reference > 0))
        prediction, reference = prediction[box], reference[box]
    scores = []
    for region in regions_of(known, rules):
        p, r = region_mask(prediction, region), region_mask(reference, region)
        both, found, due = int((p & r).sum()), int(p.sum()), int(r.sum())
        empty = None if rules == "brats2026" else 1.0
        hd95_mm, nsd = _of_surfaces(p, r, spacing_mm, rules)
        lesions = _of_lesions(p, r, spacing_mm, rules, MERGING.get(edition, Merging()))
        scores.append(
            Score(
                region=region.name,
                dice=_ratio(2 * both, found + due, empty),
                iou=_ratio(both, found + due - both, empty),
                hd95_mm=hd95_mm,
                nsd=nsd,
                sensitivity=_ratio(both, due, empty),
                specificity=_ratio(voxels - found - due + both, voxels - due, empty),
                volume_mm3=found * voxel_mm3,
                reference_volume_mm3=due * voxel_mm3,
                **asdict(lesions),
            )
        )
    return scores


def _of_surfaces(
    p: np.ndarray, r: np.ndarray, spacing_mm: Spacing, rules: Rules
) -> tuple[float | None, float | None]:
    """HD95 in mm and NSD of two masks."""
    pooled = rules == "brats2026"
    if not p.any() or not r.any():
        if p.any() or r.any():
            return HD95_ONE_EMPTY_MM[rules], 0.0 if pooled else None
        return (None, None) if pooled else (0.0, None)
    box = bounding_box(p | r)
    if not pooled:
        return weighted_hd95(corner_surfaces(p[box], r[box], spacing_mm)), None
    surfaces = voxel_surfaces(p[box], r[box], spacing_mm)
    return pooled_hd95(surfaces), surface_dice(surfaces, NSD_TOLERANCE_MM)


def _of_lesions(
    p: np.ndarray, r: np.ndarray, spacing_mm: Spacing, rules: Rules, merging: Merging
) -> LesionScore:
    if rules == "brats2020":
        return LesionScore()
    if rules == "brats2026":
        return lesions_2026(p, r, spacing_mm)
    around = [(merging.dilations + 1,) * 2] * 3  # room to be dilated in
    return lesions_2023(np.pad(p, around), np.pad(r, around), spacing_mm, merging)


def _ratio(part: int, whole: int, empty: float | None) -> float | None:
    """The part over the whole, or what stands where there is nothing to find."""
    return part / whole if whole else empty
