"""Patches moved on their own grid: rotation, scale and elastic deformation in one resampling.

The maps along each axis, of which B-splines and polynomials are made, are here too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

Shape = Sequence[int]
_BRAIN = 128
"""Labels are below it, so that labels and brain mask travel through one nearest sampling."""


@dataclass(frozen=True)
class Warp:
    """Where the voxels of a patch come from; the centre stays, each default moves nothing.

    Example:
        >>> Warp(angles_degrees=(0.0, 0.0, 15.0), scale=1.2).elastic_voxels
        0.0
    """

    angles_degrees: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Rotations about i, then j, then k."""
    scale: float | tuple[float, float, float] = 1.0
    """Source voxels a voxel, along all axes or each: above 1 the head looks smaller and background
    comes in."""
    elastic_voxels: float = 0.0
    """Largest displacement of a control point along each axis."""
    spacing_voxels: float = 32.0
    """Distance of control points; nothing folds while `elastic_voxels` is under 0.4 of it (Rueckert
    2006)."""
    seed: int = 0
    """Seed of the control points."""


def resample(warp: Warp, image: Tensor, labels: Tensor, brain: Tensor) -> Tensor:
    """Moves image (modality, i, j, k) and labels (i, j, k) in place; returns the moved brain.

    The image is interpolated linearly, labels and brain take the nearest voxel; beyond the patch
    is background.

    Example:
        >>> image, labels = torch.arange(9.0).view(1, 3, 3, 1), torch.zeros(3, 3, 1)
        >>> brain = torch.ones(1, 3, 3, 1) > 0
        >>> _ = resample(Warp(angles_degrees=(0.0, 0.0, 180.0)), image, labels, brain)
        >>> image.flatten().round()
        tensor([8., 7., 6., 5., 4., 3., 2., 1., 0.])
    """
    grid = sampling_grid(warp, labels.shape, image.device)
    image.copy_(_sample(image, grid, "bilinear"))
    code = _sample(torch.add(labels, brain, alpha=_BRAIN).float(), grid, "nearest")
    brain = code >= _BRAIN
    labels.copy_(code.add_(brain, alpha=-_BRAIN)[0])
    return brain


def _sample(image: Tensor, grid: Tensor, mode: str) -> Tensor:
    """Image (modality, i, j, k) at the places (i, j, k, 3) of a grid.

    Each plane of the result is asked for as a sample of its own, all of one image: on a CPU
    `grid_sample` gives a thread to each sample, not to each part of one.
    """
    same = image.expand(len(grid), *image.shape)
    planes = grid_sample(same, grid[:, None], mode, "zeros", align_corners=False)
    return planes.squeeze(2).movedim(0, 1)


def sampling_grid(warp: Warp, shape: Shape, device: torch.device) -> Tensor:
    """Source places (i, j, k, 3) in `grid_sample`'s order and units; axes of extent 1 stay.

    The rotation acts on voxels, and only then each axis is divided by its own extent: otherwise
    a rotation of a patch with unequal edges would be a shear.

    Example:
        >>> sampling_grid(Warp(), (2, 1, 1), torch.device("cpu"))[..., 2].flatten()
        tensor([-0.5000,  0.5000])
    """
    rows = (2 * _matrix(warp, shape) / np.array(shape)[:, None])[::-1].astype(np.float32)
    places = [(np.arange(n) - (n - 1) / 2).astype(np.float32) for n in shape]
    # products are made on the host, (3, i + j + k): one copy, and only sums are left to the device
    shares = np.concatenate([np.outer(rows[:, a], each) for a, each in enumerate(places)], axis=1)
    i, j, k = on_device(shares, device).split(list(shape), dim=1)
    grid = (i[:, :, None] + j[:, None])[..., None] + k[:, None, None]
    if warp.elastic_voxels > 0:
        for axis, shift in _displacements(warp, shape, device).items():
            grid[2 - axis].add_(shift, alpha=2 / shape[axis])
    return grid.movedim(0, -1)


def on_device(numbers: np.ndarray, device: torch.device) -> Tensor:
    """Numbers as float32 on a device, copied without waiting.

    Example:
        >>> on_device(np.eye(2), torch.device("cpu"))
        tensor([[1., 0.],
                [0., 1.]])
    """
    return torch.from_numpy(numbers.astype(np.float32)).to(device, non_blocking=True)


def along_axes(cube: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """A contiguous cube (i, j, k) with each matrix (out, in) applied along its axis.

    The bits of a batched product may depend on how many are in the batch, so this takes one cube.

    Example:
        >>> matrices = torch.ones(1, 2), torch.eye(3), torch.eye(1)
        >>> along_axes(torch.ones(2, 3, 1), matrices).flatten()
        tensor([2., 2., 2.])
    """
    first, second, third = matrices
    cube = (first @ cube.flatten(1)).view(-1, *cube.shape[1:])
    return second @ cube @ third.T


def _matrix(warp: Warp, shape: Shape) -> np.ndarray:
    """The map (3, 3) from voxels to source voxels, both counted from the centre."""
    matrix = np.eye(3)
    for axis, angle in enumerate(warp.angles_degrees):
        a, b = (axis + 1) % 3, (axis + 2) % 3
        if min(shape[a], shape[b]) > 1:
            rotation, radians = np.eye(3), math.radians(angle)
            rotation[a, a] = rotation[b, b] = math.cos(radians)
            rotation[b, a] = math.sin(radians)
            rotation[a, b] = -rotation[b, a]
            matrix = rotation @ matrix
    return matrix * np.where(np.array(shape) > 1, warp.scale, 1.0)


def _displacements(warp: Warp, shape: Shape, device: torch.device) -> dict[int, Tensor]:
    """Voxels (i, j, k) by which each axis longer than 1 is displaced: cubic B-splines."""
    splines = [on_device(_spline(n, warp.spacing_voxels), device) for n in shape]
    size = (3, *(s.shape[1] for s in splines))
    points = np.random.default_rng(warp.seed).uniform(-1, 1, size) * warp.elastic_voxels
    shifts = on_device(points, device)
    return {a: along_axes(shifts[a], splines) for a, n in enumerate(shape) if n > 1}


def _spline(extent: int, spacing: float) -> np.ndarray:
    """Uniform cubic B-spline basis (voxel, control point), the points reaching past both ends."""
    cell, t = np.divmod(np.arange(extent) / spacing, 1)
    weights = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
    basis = np.zeros((extent, int(cell[-1]) + 4))
    for n, weight in enumerate(weights):
        basis[np.arange(extent), cell.astype(int) + n] = weight / 6
    return basis
