"""Random changes of a whole batch on its device: draw the parameters, then apply them.

Every sample's parameters come from its own draw, so the same draw looks the same on any rank.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raybrats.config import AugmentConfig
from raybrats.data.plan import generator

_PURPOSE = 1
"""Of the random numbers of a draw; placing its patch is 0."""


@dataclass(frozen=True)
class Change:
    """What is done to one patch."""

    mirrored: tuple[bool, bool, bool]
    noise_deviation: float
    brightness: float
    contrast: float
    gamma: float
    noise_seed: int


def draw_change(config: AugmentConfig, seed: int, draw: int) -> Change:
    """The parameters of one draw."""
    rng = generator(seed, draw, _PURPOSE)

    def sometimes(probability: float, span: tuple[float, float], else_value: float) -> float:
        happens, value = rng.random() < probability, rng.uniform(*span)
        return value if happens else else_value

    i, j, k = (bool(flag) for flag in rng.random(3) < config.mirror)
    return Change(
        mirrored=(i, j, k),
        noise_deviation=float(np.sqrt(sometimes(config.noise, config.noise_variance, 0.0))),
        brightness=sometimes(config.brightness, config.brightness_range, 1.0),
        contrast=sometimes(config.contrast, config.contrast_range, 1.0),
        gamma=sometimes(config.gamma, config.gamma_range, 1.0),
        noise_seed=int(rng.integers(2**62)),
    )


def apply_change(
    change: Change, image: Tensor, labels: Tensor, brain: Tensor
) -> tuple[Tensor, Tensor]:
    """Image (modality, i, j, k) and labels (i, j, k) changed; outside the brain stays 0."""
    if change.noise_deviation > 0:
        source = torch.Generator(image.device).manual_seed(change.noise_seed)
        noise = torch.randn(image.shape, generator=source, device=image.device)
        image = image + change.noise_deviation * noise
    image = image * change.brightness
    if change.contrast != 1 or change.gamma != 1:
        image = _contrast_gamma(image, brain, change)
    image = torch.where(brain, image, image.new_zeros(()))
    axes = [axis - 3 for axis in range(3) if change.mirrored[axis]]
    return (image.flip(axes), labels.flip(axes)) if axes else (image, labels)


def augment(
    config: AugmentConfig, seed: int, draws: Tensor, batch: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The (image, labels, brain) of a batch changed sample by sample, each by its own draw."""
    changed = [
        apply_change(draw_change(config, seed, int(draw)), *sample)
        for draw, *sample in zip(draws.tolist(), *batch, strict=True)
    ]
    images, labels = zip(*changed, strict=True)
    return torch.stack(images), torch.stack(labels)


def _contrast_gamma(image: Tensor, brain: Tensor, change: Change) -> Tensor:
    """Per modality: contrast about the brain's mean, then gamma within the brain's range."""
    count = brain.sum().clamp(min=1)
    mean = (image * brain).sum(dim=(1, 2, 3), keepdim=True) / count
    image = (image - mean) * change.contrast + mean
    low = image.where(brain, torch.inf).amin(dim=(1, 2, 3), keepdim=True)
    span = image.where(brain, -torch.inf).amax(dim=(1, 2, 3), keepdim=True) - low
    unit = ((image - low) / span.clamp(min=1e-7)).clamp(0, 1)
    return unit**change.gamma * span + low
