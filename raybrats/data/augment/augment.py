"""Random changes of a batch on its device: draw the parameters, then apply them.

Every sample's parameters come from its own draw, and every sample is computed by itself, so the
same draw looks the same, to the bit, on any rank and in any batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raybrats.config import AugmentConfig
from raybrats.data.augment import intensity
from raybrats.data.augment.resample import Warp, resample
from raybrats.data.plan import generator

_PURPOSE = 1
"""Purpose of the random numbers of a draw; placing its patch is 0."""


@dataclass(frozen=True)
class Change:
    """What is done to one patch, from top to bottom; each default does nothing.

    Tuples have one value a modality (None leaves it alone), or are empty.

    Example:
        >>> Change(gamma=(0.7, None, None, 1.5), mirrored=(True, False, False)).blur
        ()
    """

    warp: Warp | None = None
    """Rotation, scale and elastic deformation."""
    bias_field: tuple[np.ndarray | None, ...] = ()
    """Coefficients (4, 4, 4) of the polynomial."""
    noise: tuple[tuple[float, int] | None, ...] = ()
    """Deviation and seed."""
    blur: tuple[tuple[float, float, float] | None, ...] = ()
    """Sigma along each axis, in voxels."""
    brightness: tuple[float | None, ...] = ()
    """Factor."""
    contrast: tuple[float | None, ...] = ()
    """Factor about the brain's mean."""
    low_resolution: tuple[float | None, ...] = ()
    """Zoom of the coarser grid, at most 1."""
    inverted_gamma: tuple[float | None, ...] = ()
    """Exponent, applied to the negative."""
    gamma: tuple[float | None, ...] = ()
    """Exponent."""
    gamma_keeps_moments: bool = False
    """Whether gamma keeps the brain's mean and deviation, instead of its range."""
    dropped: int | None = None
    """Modality that becomes background."""
    mirrored: tuple[bool, bool, bool] = (False, False, False)
    """Whether each axis is reversed."""


def draw_change(config: AugmentConfig, seed: int, draw: int, num_modalities: int) -> Change:
    """The parameters of one draw.

    As many random numbers are taken for what does not happen, so switching one change on or off
    leaves the others as they are.

    Example:
        >>> change = draw_change(AugmentConfig(rotation=1.0, noise=0.0), 0, 7, num_modalities=4)
        >>> change.warp is None, change.noise
        (False, ())
    """
    rng = generator(seed, draw, _PURPOSE)
    count = num_modalities

    def sometimes(probability: float, values: Sequence[Any], each: float = 1.0) -> tuple:
        happens, chosen = rng.random() < probability, rng.random(count) < each
        kept = tuple(v if c else None for v, c in zip(values, chosen, strict=True))
        return kept if happens else ()

    warp = _draw_warp(config, rng)
    bias_field = sometimes(config.bias_field, _polynomials(config, rng, count))
    deviation = rng.uniform(*np.sqrt(config.noise_variance))
    noise = [(deviation, int(s)) for s in rng.integers(2**62, size=count)]
    sigmas = rng.uniform(*config.blur_sigma_voxels, (count, 3)).tolist()
    zooms = rng.uniform(*config.low_resolution_range, count).tolist()
    return Change(
        warp=warp,
        bias_field=bias_field,
        noise=sometimes(config.noise, noise),
        blur=sometimes(config.blur, sigmas, config.blur_per_modality),
        brightness=sometimes(config.brightness, _factors(config.brightness_range, rng, count)),
        contrast=sometimes(config.contrast, _factors(config.contrast_range, rng, count)),
        low_resolution=sometimes(config.low_resolution, zooms, config.low_resolution_per_modality),
        inverted_gamma=sometimes(config.inverted_gamma, _factors(config.gamma_range, rng, count)),
        gamma=sometimes(config.gamma, _factors(config.gamma_range, rng, count)),
        gamma_keeps_moments=config.gamma_keeps == "moments",
        dropped=_draw_dropped(config, rng, count),
        mirrored=tuple((rng.random(3) < config.mirror).tolist()),
    )


def apply_changes(
    changes: Sequence[Change], image: Tensor, labels: Tensor, brain: Tensor
) -> tuple[Tensor, Tensor]:
    """Image (batch, modality, i, j, k) and labels (batch, i, j, k) changed; both contiguous.

    One copy is made of each, whatever the strides of the input, and changed in place.

    Example:
        >>> image, brain = torch.arange(8.0).view(1, 1, 8, 1, 1), torch.ones(1, 1, 8, 1, 1) > 0
        >>> reversed_i = Change(mirrored=(True, False, False))
        >>> apply_changes([reversed_i], image, torch.zeros(1, 8, 1, 1), brain)[0].flatten()
        tensor([7., 6., 5., 4., 3., 2., 1., 0.])
    """
    image = image.clone(memory_format=torch.contiguous_format)
    labels = labels.clone(memory_format=torch.contiguous_format)
    for change, *sample in zip(changes, image, labels, brain, strict=True):
        _change(change, *sample)
    return image, labels


def augment(
    config: AugmentConfig, seed: int, draws: Tensor, batch: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Image and labels of a batch (image, labels, brain), each sample changed by its own draw.

    Example:
        >>> image, brain = torch.randn(2, 4, 16, 16, 16), torch.ones(2, 1, 16, 16, 16) > 0
        >>> batch = image, torch.zeros(2, 16, 16, 16, dtype=torch.uint8), brain
        >>> changed, labels = augment(AugmentConfig(), 0, torch.tensor([6, 7]), batch)
        >>> changed.shape
        torch.Size([2, 4, 16, 16, 16])
    """
    num_modalities = batch[0].shape[1]
    changes = [draw_change(config, seed, draw, num_modalities) for draw in draws.tolist()]
    return apply_changes(changes, *batch)


def _change(change: Change, image: Tensor, labels: Tensor, brain: Tensor) -> None:
    """Changes one sample in place, in nnU-Net's order; outside the brain is background, 0."""
    if change.warp is not None:
        brain = resample(change.warp, image, labels, brain)

    def each(step: intensity.Step, values: tuple) -> None:
        for modality, value in enumerate(values):
            if value is not None:
                step(image[modality], brain[0], value)

    bend = intensity.bend_keeping_moments if change.gamma_keeps_moments else intensity.bend
    each(intensity.shade, change.bias_field)
    each(intensity.add_noise, change.noise)
    each(intensity.blur, change.blur)
    each(intensity.brighten, change.brightness)
    each(intensity.stretch, change.contrast)
    each(intensity.coarsen, change.low_resolution)
    each(intensity.on_negative(bend), change.inverted_gamma)
    each(bend, change.gamma)
    if change.dropped is not None:
        image[change.dropped].zero_()
    image.masked_fill_(~brain, 0)
    axes = [axis - 3 for axis in range(3) if change.mirrored[axis] and labels.shape[axis] > 1]
    if axes:
        image.copy_(image.flip(axes))
        labels.copy_(labels.flip(axes))


def _draw_warp(config: AugmentConfig, rng: np.random.Generator) -> Warp | None:
    rotated, scaled, deformed = rng.random(3) < (config.rotation, config.scale, config.elastic)
    angles = tuple(rng.uniform(-config.rotation_degrees, config.rotation_degrees, 3).tolist())
    scale, largest = rng.uniform(*config.scale_range), rng.uniform(*config.elastic_voxels)
    warp = Warp(
        angles_degrees=angles if rotated else (0.0, 0.0, 0.0),
        scale=scale if scaled else 1.0,
        elastic_voxels=largest if deformed else 0.0,
        spacing_voxels=config.elastic_spacing_voxels,
        seed=int(rng.integers(2**62)),
    )
    return warp if rotated or scaled or deformed else None


def _draw_dropped(config: AugmentConfig, rng: np.random.Generator, count: int) -> int | None:
    """The modality that is dropped, which is never the only one, or None."""
    happens, modality = rng.random() < config.drop_modality, int(rng.integers(count))
    return modality if happens and count > 1 else None


def _factors(span: tuple[float, float], rng: np.random.Generator, count: int) -> list[float]:
    """Factors in a span: half of them below 1 where it reaches both sides (nnU-Net)."""
    low, high = span
    middle = min(max(low, 1.0), high)
    fraction_below = 0.5 if low < 1 < high else float(high <= 1)
    below, above = rng.uniform(low, middle, count), rng.uniform(middle, high, count)
    return np.where(rng.random(count) < fraction_below, below, above).tolist()


def _polynomials(config: AugmentConfig, rng: np.random.Generator, count: int) -> list[np.ndarray]:
    """Coefficients [a, b, c] of i^a j^b k^c for each modality, 0 above the total degree."""
    size = intensity.BIAS_ORDER + 1
    largest = config.bias_field_coefficient
    cubes = rng.uniform(-largest, largest, (count, size, size, size))
    return list(cubes * (np.indices((size,) * 3).sum(axis=0) < size))
