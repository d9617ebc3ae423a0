"""What a network says of each voxel -> probabilities of regions, and labels."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from raybrats.config import TrainConfig
from raybrats.label_set import GLIOMA, LabelSet, Region
from raybrats.model.windows import Blend

_TINY = float(np.finfo(np.float32).tiny)
_LEAST = 1e-7
"""Probability that has a finite logit in float32, as 1 less of it has."""
_SLAB = 16
"""Planes that are worked on together, so that what is made on the way stays small."""


def decided(config: TrainConfig, blend: Blend) -> Tensor:
    """Labels uint8 (batch, i, j, k) of what the network of a run says, by the run's rules.

    Example:
        >>> from raybrats.recipes import tiny
        >>> said = Blend(torch.tensor([9.0, 1.0, -1.0]).view(1, 3, 1, 1, 1), torch.ones(1, 1, 1))
        >>> decided(tiny(), said).item()
        1
    """
    return cleaned(config, decoded(config, blend.total, blend.weight))


def decided_together(config: TrainConfig, mean: Tensor) -> Tensor:
    """Labels uint8 (batch, i, j, k) of the mean probabilities of several networks.

    Example:
        >>> from raybrats.recipes import tiny
        >>> decided_together(tiny(), torch.tensor([0.9, 0.6, 0.4]).view(1, 3, 1, 1, 1)).item()
        1
    """
    if config.loss.target == "labels":
        return cleaned(config, mean.argmax(dim=1).to(torch.uint8))
    regions = [mean[:, n] > cut for n, cut in enumerate(_cuts(config))]
    return cleaned(config, labels_of(torch.stack(regions, dim=1), config.labels))


def decoded(config: TrainConfig, total: Tensor, weight: Tensor | None = None) -> Tensor:
    """Labels uint8 (batch, i, j, k) of sums of logits, (batch, output, i, j, k).

    Args:
        config: the run.
        total: sums of logits.
        weight: their weights, (i, j, k); 1 where not given. Only thresholds depend on them.

    Example:
        >>> from raybrats.recipes import crop128
        >>> logits = torch.tensor([0.1, -1.0, 2.0, 0.3]).view(1, 4, 1, 1, 1)
        >>> decoded(crop128(), logits).item()
        2
    """
    if config.loss.target == "labels":
        return total.argmax(dim=1).to(torch.uint8)
    regions = []
    for number, cut in enumerate(_cuts(config)):
        least = math.log(cut / (1 - cut))  # exactly 0 for 0.5, for which no weight matters
        sums = total[:, number]
        regions.append(sums > (0 if least == 0 else least * (1 if weight is None else weight)))
    return labels_of(torch.stack(regions, dim=1), config.labels)


def _cuts(config: TrainConfig) -> Sequence[float]:
    return config.prediction.threshold or (0.5,) * len(config.labels.regions)


def labels_of(regions: Tensor, known: LabelSet = GLIOMA) -> Tensor:
    """Labels uint8 (batch, i, j, k) of regions, painted one over the other.

    In glioma that is ED in WT, over it NCR in TC, over it ET.

    Example:
        >>> regions = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 1]]) > 0  # WT, TC, ET
        >>> labels_of(regions.view(1, 3, 3, 1, 1)).flatten()
        tensor([1, 2, 3], dtype=torch.uint8)
    """
    labels = torch.zeros_like(regions[:, 0], dtype=torch.uint8)
    for place, region in enumerate(known.regions):
        labels[regions[:, place]] = region.painted
    return labels


def cleaned(config: TrainConfig, labels: Tensor) -> Tensor:
    """The labels (batch, i, j, k) without components, and then regions, of too few voxels.

    They become what the next outer region is painted as, or background: in glioma ET becomes NCR,
    TC ED. Outer regions are looked at first. Neighbours share a face, an edge or a corner (26).

    Example:
        >>> from raybrats.config import override
        >>> from raybrats.recipes import tiny
        >>> labels = torch.tensor([1, 3, 3, 0, 2], dtype=torch.uint8).view(1, 5, 1, 1)
        >>> larger = override(tiny(), "prediction.smallest_voxels", [2, 0, 0])
        >>> cleaned(larger, labels).flatten()
        tensor([1, 3, 3, 0, 0], dtype=torch.uint8)
        >>> more = override(tiny(), "prediction.replace_below_voxels", [0, 0, 3])
        >>> cleaned(more, labels).flatten()
        tensor([1, 1, 1, 0, 2], dtype=torch.uint8)
    """
    p, known = config.prediction, config.labels
    if not any((*p.smallest_voxels, *p.replace_below_voxels)):
        return labels
    found = np.array(labels.cpu().numpy())
    for case in found:
        for region, least in zip(known.regions, p.smallest_voxels, strict=False):
            drop_components(case, region, least, known)
        for region, least in zip(known.regions, p.replace_below_voxels, strict=False):
            drop_region(case, region, least, known)
    return torch.from_numpy(found).to(labels.device)


def drop_components(labels: np.ndarray, region: Region, least: int, known: LabelSet) -> None:
    """Repaints, in place, the components of a region that have fewer voxels than this.

    Example:
        >>> labels = np.array([3, 0, 3, 3], np.uint8).reshape(4, 1, 1)
        >>> drop_components(labels, GLIOMA.regions[2], 2, GLIOMA)
        >>> labels.ravel()
        array([1, 0, 3, 3], dtype=uint8)
    """
    mask = np.isin(labels, region.labels)
    if least > 1 and mask.any():
        import cc3d  # not where a network is trained

        kept = cc3d.dust(mask, threshold=least, connectivity=26)
        labels[mask & ~kept] = outer(region, known)


def drop_region(labels: np.ndarray, region: Region, least: int, known: LabelSet) -> None:
    """Repaints, in place, a region that has fewer voxels than this.

    Example:
        >>> labels = np.array([3, 0, 3, 2], np.uint8).reshape(4, 1, 1)
        >>> drop_region(labels, GLIOMA.regions[2], 3, GLIOMA)
        >>> labels.ravel()
        array([1, 0, 1, 2], dtype=uint8)
    """
    mask = np.isin(labels, region.labels)
    if np.count_nonzero(mask) < least:
        labels[mask] = outer(region, known)


def outer(region: Region, known: LabelSet) -> int:
    """Label that the smallest region around a region is painted as; 0 where there is none.

    Example:
        >>> [outer(region, GLIOMA) for region in GLIOMA.regions]  # WT, TC, ET
        [0, 2, 1]
    """
    around = [r for r in known.regions if set(r.labels) > set(region.labels)]
    return min(around, key=lambda r: len(r.labels)).painted if around else 0


@torch.inference_mode()
def probabilities(config: TrainConfig, blend: Blend) -> Tensor:
    """Probabilities of the outputs, float32 (batch, output, i, j, k), in the memory of the sums.

    Where no window was, all is background.

    Example:
        >>> from raybrats.recipes import tiny
        >>> total, weight = torch.tensor([8.0, 0.0, -8.0]), torch.full((1, 1, 1), 4.0)
        >>> probabilities(tiny(), Blend(total.view(1, 3, 1, 1, 1), weight)).flatten()
        tensor([0.8808, 0.5000, 0.1192])
    """
    pieces = zip(blend.total.split(_SLAB, dim=2), blend.weight.split(_SLAB), strict=True)
    for total, weight in pieces:
        seen = weight > 0
        total /= weight.clamp(min=_TINY)
        if config.loss.target == "labels":
            total.copy_(total.softmax(dim=1) * seen)
            total[:, 0] += ~seen
        else:
            total.sigmoid_().mul_(seen)
    return blend.total


def of_regions(config: TrainConfig, found: Tensor) -> Tensor:
    """Probabilities of the regions, float16 (region, i, j, k), at the run's temperatures.

    A softmax's are summed over a region's labels. Where there was no window they are 0.

    Args:
        config: the run.
        found: probabilities of its outputs, (1, output, i, j, k).

    Example:
        >>> from raybrats.config import override
        >>> from raybrats.recipes import tiny
        >>> config = override(tiny(), "prediction.temperature", [2, 1, 1])
        >>> of_regions(config, torch.tensor([0.9, 0.6, 0.4]).view(1, 3, 1, 1, 1)).flatten()
        tensor([0.7500, 0.6001, 0.3999], dtype=torch.float16)
    """
    known = config.labels
    made = found.new_empty((len(known.regions), *found.shape[2:]), dtype=torch.float16)
    heat = config.prediction.temperature or (1.0,) * len(known.regions)
    for out, slab in zip(made.split(_SLAB, dim=1), found[0].split(_SLAB, dim=1), strict=True):
        for number, (region, t) in enumerate(zip(known.regions, heat, strict=True)):
            outputs = region.labels if config.loss.target == "labels" else [number]
            p = slab[list(outputs)].sum(dim=0).clamp(max=1)
            out[number] = p if t == 1 else torch.where(p > 0, (p.logit(_LEAST) / t).sigmoid(), 0)
    return made
