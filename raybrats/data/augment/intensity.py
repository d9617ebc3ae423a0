"""Changes of intensity: each changes one modality (i, j, k) of one patch in place.

All take (modality, brain, value), with brain (i, j, k) where the statistics are taken; what they
do outside it is removed later. They take one modality at a time, because in place on a view there
is nothing to gather, and because the last bits of sums and powers depend on the size of the batch
they are computed in. Nothing here makes the host wait for a GPU.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from raybrats.data.augment.resample import Shape, along_axes

Step = Callable[[Tensor, Tensor, Any], None]
"""Signature of all changes of intensity."""
BIAS_ORDER = 3
"""Degree of the bias field's polynomial (TorchIO's default)."""
_SMALLEST_SPAN = 1e-7
"""Least divisor of a modality that is divided by its span (nnU-Net's value)."""


def shade(modality: Tensor, brain: Tensor, coefficients: np.ndarray) -> None:
    """Multiplies the signal, counted from the brain's darkest voxel, by a bias field.

    It is counted from there because in a z-score 0 is the mean; the scanner's zero is near the
    minimum.

    Example:
        >>> modality, coefficients = torch.tensor([[[1.0, 3.0]]]), np.zeros((4, 4, 4))
        >>> coefficients[0, 0, 1] = math.log(2)  # doubles towards the end of k
        >>> shade(modality, torch.ones(1, 1, 2) > 0, coefficients)
        >>> modality
        tensor([[[1., 5.]]])
    """
    low, _ = _range(modality, brain)
    modality.sub_(low).mul_(bias_field(coefficients, modality.shape, modality.device)).add_(low)


def bias_field(coefficients: np.ndarray, shape: Shape, device: torch.device) -> Tensor:
    """Exponential of the sum of coefficients[a, b, c] i^a j^b k^c, from -1 to 1 along the patch.

    Example:
        >>> bias_field(np.zeros((4, 4, 4)), (1, 1, 2), torch.device("cpu"))
        tensor([[[1., 1.]]])
    """
    places = [np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in shape]
    powers = [np.vander(axis, BIAS_ORDER + 1, increasing=True) for axis in places]
    cube = torch.from_numpy(coefficients.astype(np.float32)).to(device, non_blocking=True)
    return along_axes(cube, powers).exp_()


def add_noise(modality: Tensor, _: Tensor, value: tuple[float, int]) -> None:
    """Adds Gaussian noise of a deviation and seed.

    Example:
        >>> modality = torch.zeros(8, 8, 8)
        >>> add_noise(modality, modality > 0, (0.1, 42))
        >>> 0.08 < modality.std() < 0.12
        tensor(True)
    """
    deviation, seed = value
    source = torch.Generator(modality.device).manual_seed(seed)
    modality.add_(torch.empty_like(modality).normal_(generator=source), alpha=deviation)


def blur(modality: Tensor, _: Tensor, sigmas: tuple[float, float, float]) -> None:
    """Blurs with the discrete Gaussian of a sigma in voxels along each axis; edges are repeated.

    Sums of shifted views are seven times faster on two CPU cores than torch's convolution or a
    matrix product (measured, 128^3), and their order of summation is the same everywhere.

    Example:
        >>> modality = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0]).view(5, 1, 1)
        >>> blur(modality, modality > 0, (0.5, 0.0, 0.0))
        >>> modality.flatten()
        tensor([0.0061, 0.0981, 0.7910, 0.0981, 0.0061])
    """
    kernels = [
        gaussian(sigma if n > 1 else 0) for n, sigma in zip(modality.shape, sigmas, strict=True)
    ]
    margins = [len(kernel) - 1 for kernel in reversed(kernels) for _ in range(2)]
    blurred = pad(modality[None], margins, mode="replicate")[0]
    for axis, (n, kernel) in enumerate(zip(modality.shape, kernels, strict=True)):
        middle = len(kernel) - 1
        total = blurred.narrow(axis, middle, n) * kernel[0]
        for shift, weight in enumerate(kernel[1:], start=1):
            total.add_(blurred.narrow(axis, middle - shift, n), alpha=weight)
            total.add_(blurred.narrow(axis, middle + shift, n), alpha=weight)
        blurred = total
    modality.copy_(blurred)


def gaussian(sigma: float) -> list[float]:
    """Weights of the voxel, of either next one, ...: the solution of the heat equation on a grid.

    Its variance is sigma^2 below a voxel too (Lindeberg 1990); a sampled Gaussian of sigma 0.5
    has 14 % less.

    Example:
        >>> [round(weight, 3) for weight in gaussian(0.5)]
        [0.791, 0.098, 0.006, 0.0]
    """
    reach = math.ceil(4 * sigma) + (sigma > 0)
    num_waves = 16 * (reach + 1)
    decay = 1 - np.cos(2 * np.pi * np.arange(num_waves // 2 + 1) / num_waves)
    weights = np.fft.irfft(np.exp(-(sigma**2) * decay), num_waves)[: reach + 1]
    return (weights / (2 * weights.sum() - weights[0])).tolist()


def brighten(modality: Tensor, _: Tensor, factor: float) -> None:
    """Multiplies by a factor.

    Example:
        >>> modality = torch.ones(1, 1, 2)
        >>> brighten(modality, modality > 0, 1.25)
        >>> modality
        tensor([[[1.2500, 1.2500]]])
    """
    modality.mul_(factor)


def lift(modality: Tensor, _: Tensor, shift: float) -> None:
    """Adds a number.

    Example:
        >>> modality = torch.ones(1, 1, 2)
        >>> lift(modality, modality > 0, -0.25)
        >>> modality
        tensor([[[0.7500, 0.7500]]])
    """
    modality.add_(shift)


def stretch(modality: Tensor, brain: Tensor, factor: float) -> None:
    """Changes the contrast about the brain's mean.

    Example:
        >>> modality = torch.tensor([[[0.0, 4.0, 8.0]]])
        >>> stretch(modality, torch.ones(1, 1, 3) > 0, 1.5)
        >>> modality
        tensor([[[-2.,  4., 10.]]])
    """
    mean, _ = moments(modality, brain)
    modality.sub_(mean).mul_(factor).add_(mean)


def stretch_keeping_range(modality: Tensor, brain: Tensor, factor: float) -> None:
    """Changes the contrast about the brain's mean; the brain's range is kept (nnU-Net).

    Example:
        >>> modality = torch.tensor([[[0.0, 4.0, 8.0]]])
        >>> stretch_keeping_range(modality, torch.ones(1, 1, 3) > 0, 1.5)
        >>> modality
        tensor([[[0., 4., 8.]]])
    """
    low, high = _range(modality, brain)
    stretch(modality, brain, factor)
    modality.clamp_(low, high)


def coarsen(modality: Tensor, _: Tensor, zoom: float) -> None:
    """Takes the nearest voxels of a grid coarser by `zoom`, and interpolates back linearly.

    Example:
        >>> modality = torch.arange(4.0).view(1, 1, 4)
        >>> coarsen(modality, modality > 0, 0.5)
        >>> modality
        tensor([[[1.0000, 1.5000, 2.5000, 3.0000]]])
    """
    coarse = [max(1, round(n * zoom)) for n in modality.shape]
    small = interpolate(modality[None, None], coarse, mode="nearest-exact")
    modality.copy_(interpolate(small, modality.shape, mode="trilinear")[0, 0])


def bend(modality: Tensor, brain: Tensor, gamma: float) -> None:
    """Raises to a power within the brain's range, which is kept.

    Example:
        >>> modality = torch.tensor([[[0.0, 2.0, 4.0]]])
        >>> bend(modality, torch.ones(1, 1, 3) > 0, 2.0)
        >>> modality
        tensor([[[0., 1., 4.]]])
    """
    low, high = _range(modality, brain)
    span = high - low
    modality.sub_(low).div_(span.clamp(min=_SMALLEST_SPAN)).clamp_(0, 1).pow_(gamma)
    modality.mul_(span).add_(low)


def bend_keeping_moments(modality: Tensor, brain: Tensor, gamma: float) -> None:
    """Raises to a power within the brain's range; its mean and deviation are kept (nnU-Net).

    Example:
        >>> modality = torch.tensor([[[0.0, 2.0, 4.0]]])
        >>> bend_keeping_moments(modality, torch.ones(1, 1, 3) > 0, 2.0)
        >>> modality
        tensor([[[0.3987, 1.3595, 4.2418]]])
    """
    mean, deviation = moments(modality, brain)
    bend(modality, brain, gamma)
    moved, spread = moments(modality, brain)
    modality.sub_(moved).mul_(deviation / spread.clamp(min=_SMALLEST_SPAN)).add_(mean)


def on_negative(step: Step) -> Step:
    """The same step on the negative: gamma then bends most where the modality is bright.

    Example:
        >>> modality = torch.tensor([[[1.0, 3.0, 5.0]]])
        >>> on_negative(bend)(modality, torch.ones(1, 1, 3) > 0, 2.0)
        >>> modality
        tensor([[[1., 4., 5.]]])
    """

    def inverted(modality: Tensor, brain: Tensor, value: float) -> None:
        step(modality.neg_(), brain, value)
        modality.neg_()

    return inverted


def moments(modality: Tensor, brain: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation in the brain, on the device; 0 where there is none.

    Example:
        >>> moments(torch.tensor([[[1.0, 3.0, 9.0]]]), torch.tensor([[[True, True, False]]]))
        (tensor(2.), tensor(1.))
    """
    count = brain.sum().clamp(min=1)
    mean = (modality * brain).sum() / count
    return mean, (modality.where(brain, mean) - mean).square_().sum().div_(count).sqrt_()


def _range(modality: Tensor, brain: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest value in the brain, on the device.

    `where` would copy its scalar to a GPU and wait; filling does not.
    """
    outside = ~brain
    low = modality.masked_fill(outside, torch.inf).amin()
    return low, modality.masked_fill(outside, -torch.inf).amax()
