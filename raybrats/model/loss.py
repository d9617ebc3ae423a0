"""Weighted Dice, cross-entropy and focal terms over nested regions and several heads."""

from collections.abc import Sequence

import torch
import torch.distributed
from monai.losses import FocalLoss
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from raybrats.brats import REGION_LABELS, REGIONS
from raybrats.config import LossConfig

SMOOTH = 1e-5
"""Added above and below the line of the Dice, so that an empty region that is found empty has 1
(nnU-Net, MONAI)."""


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
    every head gets a gradient, as DDP needs. A Dice over the batch is one over the batches of all
    ranks: MONAI's would be over each rank's own, so several GPUs would learn something else.
    """

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self._config = config
        self._focal = FocalLoss(gamma=config.focal_gamma, reduction="none")

    def forward(
        self,
        logits: Sequence[Tensor],
        labels: Tensor,
        *,
        weight: float = 1.0,
        fraction: float = 1.0,
    ) -> Tensor:
        """Mean over heads of the weighted terms; a scalar.

        Args:
            logits: of each head, finest first, (batch, region, i, j, k).
            labels: (batch, i, j, k).
            weight: what the terms count that are means over this batch: its patches times the
                ranks over the global batch, so that DDP's mean over ranks is the mean over patches.
                With 0 the batch counts nowhere.
            fraction: what a Dice over the batch counts: one over the micro-batches of the step.
        """
        target, config = region_masks(labels), self._config
        heads = [head.float() for head in logits]
        weights = torch.arange(len(heads), device=target.device).neg().float().exp2()
        total = target.new_zeros(len(heads))
        if config.ce_weight > 0 or config.focal_weight > 0:
            total = total + weight * torch.stack([self._voxelwise(head, target) for head in heads])
        if config.dice_weight > 0:
            sums = torch.stack([_overlaps(head, target) for head in heads])
            if config.batch_dice:
                sums, weight = _over_ranks((weight > 0) * sums.sum(dim=2)), fraction
            total = total + config.dice_weight * weight * (1 - _dice(sums)).flatten(1).mean(dim=1)
        return (total * weights).sum() / weights.sum()  # no matrix product: autocast would round it

    def _voxelwise(self, logits: Tensor, target: Tensor) -> Tensor:
        config, total = self._config, logits.new_zeros(())
        if config.ce_weight > 0:
            total = total + config.ce_weight * binary_cross_entropy_with_logits(logits, target)
        if config.focal_weight > 0:
            total = total + config.focal_weight * self._focal(logits, target).mean()
        return total


def _overlaps(logits: Tensor, target: Tensor) -> Tensor:
    """Twice the overlap, and the two sizes together: (2, batch, region)."""
    found = torch.sigmoid(logits)
    overlap = (found * target).sum(dim=(2, 3, 4))
    sizes = found.sum(dim=(2, 3, 4)) + target.sum(dim=(2, 3, 4))
    return torch.stack([2 * overlap, sizes])


def _dice(sums: Tensor) -> Tensor:
    """From (head, 2, ...) to (head, ...)."""
    return (sums[:, 0] + SMOOTH) / (sums[:, 1] + SMOOTH)


def _over_ranks(sums: Tensor) -> Tensor:
    """The sums of all ranks; the gradient is of this rank's part, times the ranks.

    DDP takes the mean of the ranks' gradients, which makes it the gradient of the whole.
    """
    if not (torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1):
        return sums
    whole = sums.detach().clone()
    torch.distributed.all_reduce(whole)
    return whole + torch.distributed.get_world_size() * (sums - sums.detach())
