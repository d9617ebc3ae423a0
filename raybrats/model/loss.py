"""Weighted Dice, cross-entropy and focal terms over regions or labels, and several heads."""

from collections.abc import Sequence

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, log_softmax, logsigmoid

from raybrats.config import LOSSES, LossConfig, TrainConfig
from raybrats.label_set import GLIOMA, LabelSet
from raybrats.model.others import loss_by_name

SMOOTH = 1e-5
"""Voxels added to numerator and denominator of the Dice, which makes it 1 for an empty region that
is found empty (nnU-Net, MONAI)."""
TINY = 1e-12
"""Least probability of a miss, whose power of a gamma below 1 has else no finite gradient."""


def region_masks(labels: Tensor, known: LabelSet = GLIOMA) -> Tensor:
    """Labels (batch, i, j, k) as one mask a region, float32 (batch, region, i, j, k).

    Example:
        >>> labels = torch.tensor([1, 2, 3]).view(1, 3, 1, 1)  # NCR, ED, ET
        >>> region_masks(labels)[0, :, :, 0, 0]  # WT, TC, ET
        tensor([[1., 1., 1.],
                [1., 0., 1.],
                [0., 0., 1.]])
    """
    masks = [
        torch.stack([labels == label for label in region.labels]).any(dim=0)
        for region in known.regions
    ]
    return torch.stack(masks, dim=1).float()


def label_masks(labels: Tensor, known: LabelSet = GLIOMA) -> Tensor:
    """Labels (batch, i, j, k) as background and one mask a label, float32 (batch, n, i, j, k).

    Example:
        >>> label_masks(torch.tensor([0, 3]).view(1, 2, 1, 1))[0, :, :, 0, 0]
        tensor([[1., 0.],
                [0., 0.],
                [0., 0.],
                [0., 1.]])
    """
    values = range(1 + len(known.names))
    return torch.stack([labels == value for value in values], dim=1).float()


def loss_of(config: TrainConfig) -> nn.Module:
    """The loss of a run, by its name.

    Raises:
        UsageError: it is one of others, which is not there or no loss.

    Example:
        >>> type(loss_of(TrainConfig())).__name__
        'SegmentationLoss'
    """
    own = config.loss.name in LOSSES.own
    return SegmentationLoss(config.loss, config.labels) if own else loss_by_name(config.loss)


class SegmentationLoss(nn.Module):
    """Loss of every head against regions or labels; coarser heads count half as much as the finer.

    The weights 1, 1/2, 1/4, ... are normalised to sum to 1 (nnU-Net); all are above zero, so that
    every head gets a gradient, as DDP needs. A Dice over the batch is one over the batches of all
    ranks: MONAI's would be over each rank's own, so several GPUs would learn something else.

    Example:
        >>> labels = torch.randint(0, 4, (2, 8, 8, 8))
        >>> right = 100 * (2 * region_masks(labels) - 1)  # logits of a sure network that is right
        >>> loss = SegmentationLoss(LossConfig())
        >>> bool(loss([right], labels) < 1e-3), bool(loss([-right], labels) > 1)
        (True, True)
    """

    def __init__(self, config: LossConfig, labels: LabelSet = GLIOMA) -> None:
        super().__init__()
        self._config, self._labels = config, labels

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
            logits: the logits of each head, finest first, (batch, output, i, j, k), whose edges
                divide those of the labels.
            labels: the labels, (batch, i, j, k).
            weight: what the terms count that are means over this batch: its patches times the
                ranks over the global batch, so that DDP's mean over ranks is the mean over patches.
                With 0 the batch counts nowhere.
            fraction: what a Dice over the batch counts: 1 over the number of the step's
                micro-batches.
        """
        config = self._config
        masks = region_masks if config.target == "regions" else label_masks
        seen = [(head.float(), masks(_sampled(labels, head), self._labels)) for head in logits]
        weights = torch.arange(len(seen), device=labels.device).neg().float().exp2()
        total = torch.zeros_like(weights)
        if config.ce_weight > 0 or config.focal_weight > 0:
            total = total + weight * torch.stack([self._voxelwise(*pair) for pair in seen])
        if config.dice_weight > 0:
            sums = torch.stack([self._overlaps(*pair) for pair in seen])
            if config.batch_dice:
                sums, weight = _over_ranks((weight > 0) * sums.sum(dim=2)), fraction
            dice = (sums[:, 0] + SMOOTH) / (sums[:, 1] + SMOOTH)  # (head, ...)
            total = total + config.dice_weight * weight * (1 - dice).flatten(1).mean(dim=1)
        return (total * weights).sum() / weights.sum()  # no matrix product: autocast would round it

    def _voxelwise(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy and focal term, weighted: of each region, or of the softmax.

        The focal term weighs the entropy of each output by (1 - p)^gamma, p being the probability
        of the truth (Lin et al. 2017); its mean is over the outputs too, as MONAI's.
        """
        config, total = self._config, logits.new_zeros(())
        if config.target == "regions":
            entropy = binary_cross_entropy_with_logits(logits, target, reduction="none")
            whole, missed = entropy.mean(), logsigmoid(logits * (1 - 2 * target)).exp()
        else:
            known = log_softmax(logits, dim=1)
            entropy = -target * known
            whole, missed = entropy.sum(dim=1).mean(), 1 - known.exp()
        if config.ce_weight > 0:
            total = total + config.ce_weight * whole
        if config.focal_weight > 0:
            focal = self._counted(missed.clamp(min=TINY) ** config.focal_gamma * entropy)
            total = total + config.focal_weight * focal.mean()
        return total

    def _overlaps(self, logits: Tensor, target: Tensor) -> Tensor:
        """Twice the overlap and the sum of the two sizes, in voxels: (2, batch, output)."""
        regions = self._config.target == "regions"
        found = torch.sigmoid(logits) if regions else torch.softmax(logits, dim=1)
        found, target = self._counted(found), self._counted(target)
        overlap = (found * target).sum(dim=(2, 3, 4))
        sizes = found.sum(dim=(2, 3, 4)) + target.sum(dim=(2, 3, 4))
        return torch.stack([2 * overlap, sizes])

    def _counted(self, outputs: Tensor) -> Tensor:
        """The outputs without the background, where it does not count."""
        config = self._config
        return outputs if config.target == "regions" or config.background else outputs[:, 1:]


def _sampled(labels: Tensor, logits: Tensor) -> Tensor:
    """The labels (batch, i, j, k) on the coarser grid of a head: of each block its middle voxel.

    That is what "nearest-exact" takes, by which nnU-Net samples them.
    """
    for axis in (1, 2, 3):
        step = labels.shape[axis] // logits.shape[axis + 1]
        labels = labels[(slice(None),) * axis + (slice(step // 2, None, step),)]
    return labels


def _over_ranks(sums: Tensor) -> Tensor:
    """The sums over all ranks, with the gradient of this rank's part times the number of ranks.

    DDP takes the mean of the ranks' gradients, which makes it the gradient of the whole.
    """
    if not (torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1):
        return sums
    whole = sums.detach().clone()
    torch.distributed.all_reduce(whole)
    return whole + torch.distributed.get_world_size() * (sums - sums.detach())
