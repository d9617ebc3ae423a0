"""Weighted Dice, cross-entropy and focal terms over nested regions and several heads."""

from collections.abc import Sequence

import torch
from monai.losses import DiceLoss, FocalLoss
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from raybrats.brats import REGION_LABELS, REGIONS
from raybrats.config import LossConfig


def region_masks(labels: Tensor) -> Tensor:
    """Labels (batch, i, j, k) as one mask a region, float32 (batch, region, i, j, k)."""
    masks = [
        torch.stack([labels == label for label in REGION_LABELS[region]]).any(dim=0)
        for region in REGIONS
    ]
    return torch.stack(masks, dim=1).float()


class RegionLoss(nn.Module):
    """Loss of every head against the region masks; coarser heads count half as much as the finer.

    The weights 1, 1/2, 1/4, ... are normalised to sum to 1 (nnU-Net); all are above zero, so that
    every head gets a gradient, as DDP needs.
    """

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self._config = config
        self._dice = DiceLoss(sigmoid=True, batch=config.batch_dice, smooth_nr=1e-5, smooth_dr=1e-5)
        self._focal = FocalLoss(gamma=config.focal_gamma)

    def forward(self, logits: Sequence[Tensor], labels: Tensor) -> Tensor:
        """Mean over heads of the weighted terms; a scalar."""
        target = region_masks(labels)
        shares = [2.0**-head for head in range(len(logits))]
        terms = [
            share * self._one(head.float(), target)
            for share, head in zip(shares, logits, strict=True)
        ]
        return torch.stack(terms).sum() / sum(shares)

    def _one(self, logits: Tensor, target: Tensor) -> Tensor:
        config, total = self._config, logits.new_zeros(())
        if config.dice_weight > 0:
            total = total + config.dice_weight * self._dice(logits, target)
        if config.ce_weight > 0:
            total = total + config.ce_weight * binary_cross_entropy_with_logits(logits, target)
        if config.focal_weight > 0:
            total = total + config.focal_weight * self._focal(logits, target)
        return total
