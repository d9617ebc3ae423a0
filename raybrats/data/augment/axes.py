"""Axes of a patch turned by right angles and exchanged, where its edges permit: no resampling."""

from torch import Tensor

from raybrats.data.augment.resample import Shape

Axes = tuple[int, int, int]
"""The three axes in some order."""


def exchangeable(shape: Shape) -> list[int]:
    """The axes that have the most frequent edge; none where all edges differ (nnU-Net).

    Example:
        >>> exchangeable((128, 96, 128)), exchangeable((96, 112, 128))
        ([0, 2], [])
    """
    alike = max(([a for a, m in enumerate(shape) if m == n] for n in shape), key=len)
    return alike if len(alike) > 1 else []


def turned(patch: Tensor, quarters: int, axes: Axes) -> Tensor:
    """A patch (..., i, j, k) turned in the plane of the first two of `axes` that permit it.

    It is a copy, or the same where no plane permits it.

    Example:
        >>> import torch
        >>> turned(torch.arange(4).view(1, 2, 2), 1, (0, 2, 1)).flatten()
        tensor([1, 3, 0, 2])
    """
    permitted = exchangeable(patch.shape[-3:])
    plane = sorted([axis - 3 for axis in axes if axis in permitted][:2])
    return patch.rot90(quarters, plane) if plane else patch


def transposed(patch: Tensor, axes: Axes) -> Tensor:
    """A patch (..., i, j, k) whose axes of equal edge are in the order of `axes`, contiguous.

    Example:
        >>> import torch
        >>> transposed(torch.arange(4).view(1, 2, 2), (2, 0, 1)).flatten()
        tensor([0, 2, 1, 3])
    """
    permitted = exchangeable(patch.shape[-3:])
    order = [-3, -2, -1]
    for place, axis in zip(permitted, [a for a in axes if a in permitted], strict=True):
        order[place] = axis - 3
    return patch.movedim(order, (-3, -2, -1)).contiguous()
