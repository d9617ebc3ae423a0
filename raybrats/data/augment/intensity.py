"""Changes of intensity: each changes neighbouring modalities (modality, i, j, k) in place.

All take (modalities, brain, values): brain (i, j, k) is where the statistics are taken, and there
is one value a modality; what they do outside the brain is removed later. On a GPU every kernel
costs the host a launch, so one serves all modalities wherever that cannot change a bit. The last
bits of sums, powers and exponentials depend on the size of what they are computed in: those are
taken modality by modality, powers by `torch._foreach_*`, which launches one kernel on a GPU and is
a loop on a CPU. Nothing here makes the host wait for a GPU.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from raybrats.data.augment.resample import Shape, along_axes, on_device

Step = Callable[[Tensor, Tensor, Sequence[Any]], None]
"""Signature of all changes of intensity."""
BIAS_ORDER = 3
"""Degree of the bias field's polynomial (TorchIO's default)."""
_SMALLEST_SPAN = 1e-7
"""Least divisor of a modality that is divided by its span (nnU-Net's value)."""


def shade(modalities: Tensor, brain: Tensor, coefficients: Sequence[np.ndarray]) -> None:
    """Multiplies the signal, counted from the brain's darkest voxel, by a bias field.

    It is counted from there because in a z-score 0 is the mean; the scanner's zero is near the
    minimum.

    Example:
        >>> modalities, coefficients = torch.tensor([[[[1.0, 3.0]]]]), np.zeros((4, 4, 4))
        >>> coefficients[0, 0, 1] = math.log(2)  # doubles towards the end of k
        >>> shade(modalities, torch.ones(1, 1, 2) > 0, [coefficients])
        >>> modalities
        tensor([[[[1., 5.]]]])
    """
    low = _lowest(modalities, brain)
    fields = bias_fields(coefficients, brain.shape, modalities.device)
    torch._foreach_mul_(list(modalities.sub_(low)), fields)
    modalities.add_(low)


def bias_fields(
    coefficients: Sequence[np.ndarray], shape: Shape, device: torch.device
) -> list[Tensor]:
    """Exponentials of the sums of coefficients[a, b, c] i^a j^b k^c, from -1 to 1 along the patch.

    Example:
        >>> bias_fields([np.zeros((4, 4, 4))], (1, 1, 2), torch.device("cpu"))
        [tensor([[[1., 1.]]])]
    """
    places = [np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in shape]
    powers = [
        on_device(np.vander(axis, BIAS_ORDER + 1, increasing=True), device) for axis in places
    ]
    fields = [along_axes(cube, powers) for cube in on_device(np.stack(coefficients), device)]
    torch._foreach_exp_(fields)
    return fields


def add_noise(modalities: Tensor, _: Tensor, values: Sequence[tuple[float, int]]) -> None:
    """Adds Gaussian noise of a deviation and seed.

    Example:
        >>> modalities = torch.zeros(1, 8, 8, 8)
        >>> add_noise(modalities, modalities[0] > 0, [(0.1, 42)])
        >>> 0.08 < modalities.std() < 0.12
        tensor(True)
    """
    for modality, (deviation, seed) in zip(modalities, values, strict=True):
        source = torch.Generator(modality.device).manual_seed(seed)
        modality.add_(torch.empty_like(modality).normal_(generator=source), alpha=deviation)


def blur(modalities: Tensor, _: Tensor, sigmas: Sequence[tuple[float, float, float]]) -> None:
    """Blurs with the discrete Gaussian of a sigma in voxels along each axis; edges are repeated.

    Sums of shifted views are seven times faster on two CPU cores than torch's convolution or a
    matrix product (measured, 128^3), and their order of summation is the same everywhere.

    Example:
        >>> modalities = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0]).view(1, 5, 1, 1)
        >>> blur(modalities, modalities[0] > 0, [(0.5, 0.0, 0.0)])
        >>> modalities.flatten()
        tensor([0.0061, 0.0981, 0.7910, 0.0981, 0.0061])
    """
    shape = modalities.shape[1:]
    kernels = [
        [gaussian(sigma if n > 1 else 0) for sigma in of_axis]
        for n, of_axis in zip(shape, zip(*sigmas, strict=True), strict=True)
    ]
    reaches = [max(map(len, of_axis)) - 1 for of_axis in kernels]
    weights = np.zeros((3, max(reaches) + 1, len(modalities), 1, 1, 1))
    for axis, of_axis in enumerate(kernels):
        for number, kernel in enumerate(of_axis):
            weights[axis, : len(kernel), number, 0, 0, 0] = kernel
    margins = [reach for reach in reversed(reaches) for _ in range(2)]
    blurred = pad(modalities, margins, mode="replicate")
    for axis, of_axis in enumerate(on_device(weights, modalities.device)):
        n, reach = shape[axis], reaches[axis]
        total = blurred.narrow(axis + 1, reach, n) * of_axis[0]
        for shift in range(1, reach + 1):
            for first in (reach - shift, reach + shift):
                total.addcmul_(blurred.narrow(axis + 1, first, n), of_axis[shift])
        blurred = total
    modalities.copy_(blurred)


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


def brighten(modalities: Tensor, _: Tensor, factors: Sequence[float]) -> None:
    """Multiplies by a factor.

    Example:
        >>> modalities = torch.ones(1, 1, 1, 2)
        >>> brighten(modalities, modalities[0] > 0, [1.25])
        >>> modalities
        tensor([[[[1.2500, 1.2500]]]])
    """
    torch._foreach_mul_(list(modalities), factors)


def lift(modalities: Tensor, _: Tensor, shifts: Sequence[float]) -> None:
    """Adds a number.

    Example:
        >>> modalities = torch.ones(1, 1, 1, 2)
        >>> lift(modalities, modalities[0] > 0, [-0.25])
        >>> modalities
        tensor([[[[0.7500, 0.7500]]]])
    """
    torch._foreach_add_(list(modalities), shifts)


def stretch(modalities: Tensor, brain: Tensor, factors: Sequence[float]) -> None:
    """Changes the contrast about the brain's mean.

    Example:
        >>> modalities = torch.tensor([[[[0.0, 4.0, 8.0]]]])
        >>> stretch(modalities, torch.ones(1, 1, 3) > 0, [1.5])
        >>> modalities
        tensor([[[[-2.,  4., 10.]]]])
    """
    mean = mean_in(modalities, brain, voxels(brain))
    torch._foreach_mul_(list(modalities.sub_(mean)), factors)
    modalities.add_(mean)


def stretch_keeping_range(modalities: Tensor, brain: Tensor, factors: Sequence[float]) -> None:
    """Changes the contrast about the brain's mean; the brain's range is kept (nnU-Net).

    Example:
        >>> modalities = torch.tensor([[[[0.0, 4.0, 8.0]]]])
        >>> stretch_keeping_range(modalities, torch.ones(1, 1, 3) > 0, [1.5])
        >>> modalities
        tensor([[[[0., 4., 8.]]]])
    """
    low, high = _range(modalities, brain)
    stretch(modalities, brain, factors)
    modalities.clamp_(low, high)


def coarsen(modalities: Tensor, _: Tensor, zooms: Sequence[float]) -> None:
    """Takes the nearest voxels of a grid coarser by a zoom, and interpolates back linearly.

    Example:
        >>> modalities = torch.arange(4.0).view(1, 1, 1, 4)
        >>> coarsen(modalities, modalities[0] > 0, [0.5])
        >>> modalities
        tensor([[[[1.0000, 1.5000, 2.5000, 3.0000]]]])
    """
    for modality, zoom in zip(modalities, zooms, strict=True):
        coarse = [max(1, round(n * zoom)) for n in modality.shape]
        small = interpolate(modality[None, None], coarse, mode="nearest-exact")
        modality.copy_(interpolate(small, modality.shape, mode="trilinear")[0, 0])


def bend(modalities: Tensor, brain: Tensor, gammas: Sequence[float]) -> None:
    """Raises to a power within the brain's range, which is kept.

    Example:
        >>> modalities = torch.tensor([[[[0.0, 2.0, 4.0]]]])
        >>> bend(modalities, torch.ones(1, 1, 3) > 0, [2.0])
        >>> modalities
        tensor([[[[0., 1., 4.]]]])
    """
    low, high = _range(modalities, brain)
    span = high - low
    modalities.sub_(low).div_(span.clamp(min=_SMALLEST_SPAN)).clamp_(0, 1)
    torch._foreach_pow_(list(modalities), gammas)
    modalities.mul_(span).add_(low)


def bend_keeping_moments(modalities: Tensor, brain: Tensor, gammas: Sequence[float]) -> None:
    """Raises to a power within the brain's range; its mean and deviation are kept (nnU-Net).

    Example:
        >>> modalities = torch.tensor([[[[0.0, 2.0, 4.0]]]])
        >>> bend_keeping_moments(modalities, torch.ones(1, 1, 3) > 0, [2.0])
        >>> modalities
        tensor([[[[0.3987, 1.3595, 4.2418]]]])
    """
    count = voxels(brain)
    mean = mean_in(modalities, brain, count)
    variance = mean_in((modalities - mean).square_(), brain, count)
    bend(modalities, brain, gammas)
    modalities.sub_(mean_in(modalities, brain, count))
    spread = mean_in(modalities.square(), brain, count).sqrt_()
    modalities.mul_(variance.sqrt_() / spread.clamp(min=_SMALLEST_SPAN)).add_(mean)


def on_negative(step: Step) -> Step:
    """The same step on the negative: gamma then bends most where the modality is bright.

    Example:
        >>> modalities = torch.tensor([[[[1.0, 3.0, 5.0]]]])
        >>> on_negative(bend)(modalities, torch.ones(1, 1, 3) > 0, [2.0])
        >>> modalities
        tensor([[[[1., 4., 5.]]]])
    """

    def inverted(modalities: Tensor, brain: Tensor, values: Sequence[Any]) -> None:
        step(modalities.neg_(), brain, values)
        modalities.neg_()

    return inverted


def voxels(brain: Tensor) -> Tensor:
    """Number of voxels in the brain, at least 1, on the device.

    Example:
        >>> voxels(torch.tensor([[[True, True, False]]]))
        tensor(2)
    """
    return brain.sum().clamp_(min=1)


def mean_in(modalities: Tensor, brain: Tensor, count: Tensor) -> Tensor:
    """Mean of each modality in the brain, on the device, (modality, 1, 1, 1); 0 if it is empty.

    Example:
        >>> brain = torch.tensor([[[True, True, False]]])
        >>> mean_in(torch.tensor([[[[1.0, 3.0, 9.0]]]]), brain, voxels(brain))
        tensor([[[[2.]]]])
    """
    sums = torch.stack([inside.sum() for inside in modalities * brain])
    return sums.div_(count).view(-1, 1, 1, 1)


def _range(modalities: Tensor, brain: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest value of each modality in the brain, on the device."""
    low = _lowest(modalities, brain)
    return low, modalities.where(brain, low).amax((1, 2, 3), keepdim=True)


def _lowest(modalities: Tensor, brain: Tensor) -> Tensor:
    """Least value of each modality in the brain, on the device, (modality, 1, 1, 1).

    `where` would copy a Python number to a GPU and wait; one that is made there it takes as it is.
    """
    beyond = modalities.new_full((), torch.inf)
    return modalities.where(brain, beyond).amin((1, 2, 3), keepdim=True)
