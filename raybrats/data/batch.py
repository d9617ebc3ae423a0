"""A batch on the worker's device, from int16 to network input."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Patches of one rank and step, as they travel."""

    image: Tensor
    """int16 (batch, modality, i, j, k), a view of memory in which i lies closest."""
    labels: Tensor
    """uint8 (batch, i, j, k), likewise."""
    gain: Tensor
    """float32 (batch, modality)."""
    bias: Tensor
    """float32 (batch, modality)."""
    low: Tensor
    """int16 (batch, modality): voxels below are taken for it."""
    high: Tensor
    """int16 (batch, modality): voxels above are taken for it."""
    background: Tensor
    """int16 (batch, modality)."""
    draw: Tensor
    """int64 (batch,)."""

    def to(self, device: torch.device) -> "Batch":
        """The batch on another device, copied without waiting."""
        return Batch(**{k: v.to(device, non_blocking=True) for k, v in vars(self).items()})


def normalise(batch: Batch) -> tuple[Tensor, Tensor]:
    """Network input, float32 (batch, modality, i, j, k), and the brain mask (batch, 1, i, j, k)."""
    brain = (batch.image != _spread(batch.background)).any(dim=1, keepdim=True)
    clipped = batch.image.clamp(_spread(batch.low), _spread(batch.high))
    image = clipped.float() * _spread(batch.gain) + _spread(batch.bias)
    return torch.where(brain, image, image.new_zeros(())), brain


def _spread(per_modality: Tensor) -> Tensor:
    return per_modality[:, :, None, None, None]
