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
"""Of the random numbers of a draw; placing its patch is 0."""


@dataclass(frozen=True)
class Change:
    """What is done to one patch, from top to bottom; each default does nothing.

    Tuples have one value a modality (None leaves it alone), or are empty.
    """

    warp: Warp | None = None
    bias_field: tuple[np.ndarray | None, ...] = ()
    """Coefficients (4, 4, 4) of the polynomial."""
    noise: tuple[tuple[float, int] | None, ...] = ()
    """Deviation and seed."""
    blur: tuple[tuple[float, float, float] | None, ...] = ()
    """Sigma along each axis."""
    brightness: tuple[float | None, ...] = ()
    contrast: tuple[float | None, ...] = ()
    low_resolution: tuple[float | None, ...] = ()
    inverted_gamma: tuple[float | None, ...] = ()
    gamma: tuple[float | None, ...] = ()
    gamma_keeps_moments: bool = False
    """Mean and deviation of the brain, instead of its range."""
    dropped: int | None = None
    """The modality that becomes background."""
    mirrored: tuple[bool, bool, bool] = (False, False, False)


def draw_change(config: AugmentConfig, seed: int, draw: int, num_modalities: int) -> Change:
    """The parameters of one draw.

    As many random numbers are taken for what does not happen, so switching one change on or off
    leaves the others as they are.
    """
    rng = generator(seed, draw, _PURPOSE)
    count = num_modalities

    def sometimes(probability: float, values: Sequence[Any], each: float = 1.0) -> tuple:
        happens, chosen = rng.random() < probability, rng.random(count) < each
        kept = tuple(v if c else None for v, c in zip(values, chosen, strict=True))
        return kept if happens else ()

    warp = _draw_warp(config, rng)
    bias_field = sometimes(config.bias_field, _polynomials(config, rng, count))
    deviation = float(np.sqrt(rng.uniform(*config.noise_variance)))
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
    """
    image = image.clone(memory_format=torch.contiguous_format)
    labels = labels.clone(memory_format=torch.contiguous_format)
    for change, *sample in zip(changes, image, labels, brain, strict=True):
        _change(change, *sample)
    return image, labels


def augment(
    config: AugmentConfig, seed: int, draws: Tensor, batch: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The (image, labels, brain) of a batch changed sample by sample, each by its own draw."""
    num_modalities = batch[0].shape[1]
    changes = [draw_change(config, seed, draw, num_modalities) for draw in draws.tolist()]
    return apply_changes(changes, *batch)


def _change(change: Change, image: Tensor, labels: Tensor, brain: Tensor) -> None:
    """Changes one sample in place, in nnU-Net's order; outside the brain is background, 0."""
    if change.warp is not None:
        brain = resample(change.warp, image, labels, brain)
    bend = intensity.bend_keeping_moments if change.gamma_keeps_moments else intensity.bend
    steps: tuple[tuple[tuple, intensity.Step], ...] = (
        (change.bias_field, intensity.shade),
        (change.noise, intensity.add_noise),
        (change.blur, intensity.blur),
        (change.brightness, intensity.brighten),
        (change.contrast, intensity.stretch),
        (change.low_resolution, intensity.coarsen),
        (change.inverted_gamma, intensity.on_negative(bend)),
        (change.gamma, bend),
    )
    for values, step in steps:
        for modality, value in enumerate(values):
            if value is not None:
                step(image[modality], brain[0], value)
    if change.dropped is not None:
        image[change.dropped].zero_()
    image.masked_fill_(~brain, 0)
    axes = [axis - 3 for axis in range(3) if change.mirrored[axis] and labels.shape[axis] > 1]
    if axes:
        image.copy_(image.flip(axes))
        labels.copy_(labels.flip(axes))


def _draw_warp(config: AugmentConfig, rng: np.random.Generator) -> Warp | None:
    turned, scaled, bent = rng.random(3) < (config.rotation, config.scale, config.elastic)
    angles = tuple(rng.uniform(-config.rotation_degrees, config.rotation_degrees, 3).tolist())
    scale, largest = rng.uniform(*config.scale_range), rng.uniform(*config.elastic_voxels)
    warp = Warp(
        angles_degrees=angles if turned else (0.0, 0.0, 0.0),
        scale=scale if scaled else 1.0,
        elastic_voxels=largest if bent else 0.0,
        spacing_voxels=config.elastic_spacing_voxels,
        seed=int(rng.integers(2**62)),
    )
    return warp if turned or scaled or bent else None


def _draw_dropped(config: AugmentConfig, rng: np.random.Generator, count: int) -> int | None:
    """One modality, never the only one."""
    happens, modality = rng.random() < config.drop_modality, int(rng.integers(count))
    return modality if happens and count > 1 else None


def _factors(span: tuple[float, float], rng: np.random.Generator, count: int) -> list[float]:
    """Factors in a span: half of them below 1 where it reaches both sides (nnU-Net)."""
    low, high = span
    middle = min(max(low, 1.0), high)
    share_below = 0.5 if low < 1 < high else float(high <= 1)
    below, above = rng.uniform(low, middle, count), rng.uniform(middle, high, count)
    return np.where(rng.random(count) < share_below, below, above).tolist()


def _polynomials(config: AugmentConfig, rng: np.random.Generator, count: int) -> list[np.ndarray]:
    """Coefficients [a, b, c] of i^a j^b k^c for each modality, 0 above the total degree."""
    size = intensity.BIAS_ORDER + 1
    largest = config.bias_field_coefficient
    cubes = rng.uniform(-largest, largest, (count, size, size, size))
    return list(cubes * (np.indices((size,) * 3).sum(axis=0) < size))
