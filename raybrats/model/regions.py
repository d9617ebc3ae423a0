"""Voxels of regions, counted where the labels are; nothing here needs more than torch."""

import numpy as np
import torch
from torch import Tensor

from raybrats.label_set import GLIOMA, LabelSet, Region


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
    return [2 * both / (found + due) if found + due else 1.0 for both, found, due in sizes.tolist()]
