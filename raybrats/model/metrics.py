"""Scores of one case, region by region, and the BraTS rules for empty regions."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raybrats.data.prepare import bounding_box
from raybrats.label_set import GLIOMA, LabelSet, Region

HD95_ONE_EMPTY_MM = 373.12866
"""HD95 where one side is empty: sqrt(240^2 + 240^2 + 155^2) (BraTS 2017-2021)."""


@dataclass(frozen=True)
class Score:
    """Voxel-wise scores of one region of one case."""

    region: str
    """Its name."""
    dice: float
    """Also called F1: over voxels the two are one."""
    iou: float
    hd95_mm: float
    """Larger of the two directed 95th percentiles of surface distances."""
    sensitivity: float
    specificity: float


def region_mask(labels: np.ndarray, region: Region) -> np.ndarray:
    """The voxels of a region, bool, in the shape of the labels.

    Example:
        >>> region_mask(np.array([0, 1, 2, 3]), GLIOMA.regions[1])
        array([False,  True, False,  True])
    """
    return np.isin(labels, region.labels)


def region_sizes(prediction: Tensor, reference: Tensor, known: LabelSet = GLIOMA) -> Tensor:
    """Voxels of each region in both, in the prediction and in the reference, int64 (region, 3).

    They are counted where the labels are, and nothing waits for them.

    Example:
        >>> region_sizes(torch.tensor([1, 1, 2, 0]), torch.tensor([1, 3, 2, 0]))
        tensor([[3, 3, 3],
                [2, 2, 2],
                [0, 0, 1]])
    """

    def mask(labels: Tensor, region: Region) -> Tensor:
        return torch.stack([labels == label for label in region.labels]).any(dim=0)

    pairs = [(mask(prediction, region), mask(reference, region)) for region in known.regions]
    return torch.stack([torch.stack([(p & r).sum(), p.sum(), r.sum()]) for p, r in pairs])


def region_dice(sizes: Tensor) -> list[float]:
    """Dice of each region by its sizes, 1 where both are empty.

    Example:
        >>> region_dice(torch.tensor([[3, 3, 3], [1, 2, 1], [0, 0, 0]]))
        [1.0, 0.6666666666666666, 1.0]
    """
    return [_ratio(2 * both, found + due) for both, found, due in sizes.tolist()]


def score_case(
    prediction: np.ndarray,
    reference: np.ndarray,
    spacing_mm: tuple[float, float, float],
    known: LabelSet = GLIOMA,
) -> list[Score]:
    """Scores of each region of labels (i, j, k) against reference labels of the same shape.

    Both empty: Dice 1, HD95 0, sensitivity 1; one empty: Dice 0, HD95 373.13 mm (BraTS).

    Example:
        >>> labels = np.zeros((8, 8, 8), np.uint8)
        >>> labels[2:6, 2:6, 2:6] = 3
        >>> for score in score_case(labels, np.roll(labels, 1, axis=0), (1.0, 1.0, 1.0)):
        ...     print(score.region, score.dice, score.hd95_mm)
        WT 0.75 1.0
        TC 0.75 1.0
        ET 0.75 1.0
    """
    scores = []
    for region in known.regions:
        p, r = region_mask(prediction, region), region_mask(reference, region)
        tp, fp, fn = int((p & r).sum()), int((p & ~r).sum()), int((~p & r).sum())
        tn = p.size - tp - fp - fn
        scores.append(
            Score(
                region=region.name,
                dice=_ratio(2 * tp, 2 * tp + fp + fn),
                iou=_ratio(tp, tp + fp + fn),
                hd95_mm=hd95(p, r, spacing_mm),
                sensitivity=_ratio(tp, tp + fn),
                specificity=_ratio(tn, tn + fp),
            )
        )
    return scores


def hd95(
    prediction: np.ndarray, reference: np.ndarray, spacing_mm: tuple[float, float, float]
) -> float:
    """95th percentile Hausdorff distance of two masks in mm, as MONAI defines it.

    Example:
        >>> mask = np.zeros((8, 8, 8), bool)
        >>> mask[2, 2, 2] = True
        >>> hd95(mask, np.roll(mask, 3, axis=2), spacing_mm=(1.0, 1.0, 2.0))
        6.0
    """
    if not prediction.any() or not reference.any():
        return 0.0 if prediction.any() == reference.any() else HD95_ONE_EMPTY_MM
    from monai.metrics import compute_hausdorff_distance  # seconds, which no validation waits for

    box = bounding_box(prediction | reference)
    pair = [torch.from_numpy(mask[box].copy())[None, None] for mask in (prediction, reference)]
    distance = compute_hausdorff_distance(
        *pair, include_background=True, percentile=95, spacing=spacing_mm
    )
    return float(distance)


def _ratio(part: int, whole: int) -> float:
    """The part over the whole, or 1 where there is nothing to find."""
    return part / whole if whole else 1.0
