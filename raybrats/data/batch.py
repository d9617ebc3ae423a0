"""Rows as they travel -> a batch -> network input on the worker's device."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from raybrats.data.prepare import Scaling


@dataclass(frozen=True)
class Batch:
    """Patches of one rank and step."""

    image: Tensor
    """Voxels, int16 (batch, modality, i, j, k), a view of memory in which i lies closest."""
    labels: Tensor
    """Labels, uint8 (batch, i, j, k), likewise."""
    scaling: Scaling[Tensor]
    """Numbers that make network input of the voxels, (batch, modality)."""
    draw: Tensor
    """Numbers of the draws, int64 (batch,)."""

    def to(self, device: torch.device) -> "Batch":
        """The batch on another device, copied without waiting."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        image, labels, draw = (moved(each) for each in (self.image, self.labels, self.draw))
        return Batch(image, labels, self.scaling.map(moved), draw)


def collate(rows: Sequence[Mapping[str, np.ndarray | int]], *, pin: bool = False) -> Batch:
    """The batch of some rows, as `patch.to_row` makes them: the one copy of a patch in a worker.

    It is page-locked if `pin` and there is a GPU, so that the copy to that runs beside the step.

    Example:
        >>> from raybrats.data.patch import cut, to_row
        >>> from raybrats.data.prepare import prepare
        >>> whole = prepare([np.arange(64, dtype=np.int16).reshape(4, 4, 4)])
        >>> rows = [to_row(whole, cut(whole, (0, 0, 0), (1, 2, 3)), draw) for draw in (6, 7)]
        >>> collate(rows).image.shape
        torch.Size([2, 1, 1, 2, 3])
    """
    pinned = pin and torch.cuda.is_available()

    def column(name: str) -> Tensor:
        values = [np.asarray(row[name]) for row in rows]
        kind = torch.from_numpy(np.empty(0, values[0].dtype)).dtype
        joined = torch.empty((len(values), *values[0].shape), dtype=kind, pin_memory=pinned)
        np.stack(values, out=joined.numpy())
        return joined

    return Batch(
        image=column("image").permute(0, 1, 4, 3, 2),
        labels=column("labels").permute(0, 3, 2, 1),
        scaling=Scaling(**{each.name: column(each.name) for each in fields(Scaling)}),
        draw=column("draw"),
    )


def normalise(image: Tensor, scaling: Scaling[Tensor]) -> tuple[Tensor, Tensor]:
    """Network input, float32 (batch, modality, i, j, k), and the brain mask (batch, 1, i, j, k).

    Example:
        >>> image = torch.tensor([0, 5, 900], dtype=torch.int16).view(1, 1, 3, 1, 1)
        >>> numbers = Scaling(gain=0.5, bias=-1.0, low=0, high=100, background=0)
        >>> normalise(image, numbers.map(lambda number: torch.tensor([[number]])))[0].flatten()
        tensor([ 0.0000,  1.5000, 49.0000])
    """
    each = scaling.map(lambda numbers: numbers[:, :, None, None, None])
    brain = (image != each.background).any(dim=1, keepdim=True)
    scaled = image.clamp(each.low, each.high).float() * each.gain + each.bias
    return torch.where(brain, scaled, scaled.new_zeros(())), brain
