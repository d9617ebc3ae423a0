"""Changes of texture, or of a part of the patch: each changes one modality (i, j, k) in place.

They take (modality, brain, value), with brain (i, j, k); the rest of what `intensity` says holds
here. They are what nnU-Net's trainer DA5 has beyond its default (nnunetv2 2.8.1, batchgeneratorsv2
0.3.6), except that statistics are those of the brain.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from raybrats.data.augment.intensity import bend, mean_in, voxels
from raybrats.data.augment.resample import Shape, along_axes, on_device

Step = Callable[[Tensor, Tensor, Any], None]
"""Signature of all of them."""
Box = Sequence[Sequence[float]]
"""Edges over those of the patch, and place in the room that they leave, from 0 to 1: (2, 3)."""
Bump = Sequence[Sequence[float]]
"""Centre and deviation of a Gaussian over the edges of the patch: (2, 3)."""
_WINDOWED = 2**24
"""Most numbers in the windows of the median that are copied at once on a GPU, 64 MB (chosen)."""


def median(modality: Tensor, _: Tensor, size: int) -> None:
    """Takes the median of a cube of `size` voxels about each voxel; edges are repeated.

    Of an even number of voxels it takes the upper of the two in the middle, and reaches farther
    down than up, as SciPy does. Windows are copied plane by plane on a CPU, 22 MB at 128 x 128 and
    size 7: those of more planes leave its caches, and took 1.7 times as long (measured).

    Example:
        >>> modality = torch.tensor([0.0, 0.0, 9.0, 0.0, 5.0, 5.0]).view(6, 1, 1)
        >>> median(modality, modality > 0, 3)
        >>> modality.flatten()
        tensor([0., 0., 0., 5., 5., 5.])
    """
    sizes = [size if n > 1 else 1 for n in modality.shape]
    margins = [reach for s in reversed(sizes) for reach in (s // 2, (s - 1) // 2)]
    windows = pad(modality[None], margins, mode="replicate")[0]
    for axis, edge in enumerate(sizes):
        windows = windows.unfold(axis, edge, 1)
    rank = math.prod(sizes) // 2 + 1
    at_once = 1 if modality.device.type == "cpu" else max(1, _WINDOWED // windows[0].numel())
    for planes, some in zip(modality.split(at_once), windows.split(at_once), strict=True):
        planes.copy_(some.flatten(-3).kthvalue(rank).values)


def blank(modality: Tensor, brain: Tensor, boxes: Sequence[Box]) -> None:
    """Gives boxes the mean of the brain in them, one after the other.

    Example:
        >>> modality = torch.tensor([1.0, 3.0, 5.0, 7.0]).view(4, 1, 1)
        >>> blank(modality, modality > 0, [((0.5, 0, 0), (0.9, 0, 0))])
        >>> modality.flatten()
        tensor([1., 3., 6., 6.])
    """
    for edges, places in boxes:
        sizes = [max(1, int(edge * n)) for edge, n in zip(edges, modality.shape, strict=True)]
        rooms = [n - size + 1 for n, size in zip(modality.shape, sizes, strict=True)]
        firsts = [int(place * room) for place, room in zip(places, rooms, strict=True)]
        box = tuple(slice(a, a + size) for a, size in zip(firsts, sizes, strict=True))
        mean = mean_in(modality[box][None], brain[box], voxels(brain[box]))
        modality[box].copy_(mean[0])


def bump(place: Bump, shape: Shape, device: torch.device) -> Tensor:
    """A Gaussian over the patch (i, j, k), moved and scaled to reach from 0 to 1 within it.

    Example:
        >>> bump(((0.5, 0.5, 0.5), (0.5, 1.0, 1.0)), (3, 1, 1), torch.device("cpu")).flatten()
        tensor([0., 1., 0.])
    """
    rows = []
    for n, centre, deviation in zip(shape, *place, strict=True):
        distances = ((np.arange(n) + 0.5) / n - centre) / deviation
        row = np.exp(-0.5 * distances**2)
        rows.append((row / row.max()).astype(np.float32)[:, None])
    least = float(math.prod(row.min() for row in rows))
    columns = [on_device(row, device) for row in rows]
    product = along_axes(torch.ones(1, 1, 1, device=device), columns)
    return product.sub_(least).div_(1 - least if least < 1 else 1)


def shine(modality: Tensor, _: Tensor, value: tuple[float, Bump]) -> None:
    """Adds a Gaussian of a height, at a place.

    Example:
        >>> modality = torch.ones(3, 1, 1)
        >>> shine(modality, modality > 0, (-2.0, ((0.5, 0.5, 0.5), (0.5, 1.0, 1.0))))
        >>> modality.flatten()
        tensor([ 1., -1.,  1.])
    """
    height, place = value
    modality.add_(bump(place, modality.shape, modality.device), alpha=height)


def bend_locally(modality: Tensor, brain: Tensor, value: tuple[float, Bump]) -> None:
    """Raises to a power within the brain's range, with a Gaussian at a place as weight.

    Example:
        >>> modality = torch.tensor([0.0, 2.0, 2.0, 4.0]).view(4, 1, 1)
        >>> brain, place = torch.ones(4, 1, 1) > 0, ((0.375, 0.5, 0.5), (0.1, 1.0, 1.0))
        >>> bend_locally(modality, brain, (2.0, place))
        >>> modality.flatten()
        tensor([0.0000, 1.0000, 1.9561, 4.0000])
    """
    gamma, place = value
    bent = modality.clone()
    bend(bent[None], brain, [gamma])
    modality.lerp_(bent, bump(place, modality.shape, modality.device))


def sharpen(modality: Tensor, _: Tensor, strength: float) -> None:
    """Takes the Laplacian away, times a strength; edges are repeated.

    Example:
        >>> modality = torch.tensor([0.0, 0.0, 1.0, 1.0]).view(4, 1, 1)
        >>> sharpen(modality, modality > 0, 0.5)
        >>> modality.flatten()
        tensor([ 0.0000, -0.5000,  1.5000,  1.0000])
    """
    before = modality.clone()
    for axis, n in enumerate(modality.shape):
        slope = before.diff(dim=axis).mul_(strength)
        modality.narrow(axis, 0, n - 1).sub_(slope)
        modality.narrow(axis, 1, n - 1).add_(slope)
