"""Random changes of a batch on its device: draw the parameters, then apply them.

Every sample's parameters come from its own draw, and every sample is computed by itself, so the
same draw looks the same, to the bit, on any rank and in any batch.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from raybrats.config import AugmentConfig
from raybrats.data.augment import intensity, local
from raybrats.data.augment.axes import transposed, turned
from raybrats.data.augment.change import Change, draw_change
from raybrats.data.augment.resample import resample


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

    def together(step: intensity.Step, values: tuple) -> None:
        for run in _runs(values, image.device):
            step(image[run], brain[0], values[run])

    def each(step: local.Step, values: tuple) -> None:
        for modality in [n for n, value in enumerate(values) if value is not None]:
            step(image[modality], brain[0], values[modality])

    keeps = change.contrast_keeps_range
    stretch = intensity.stretch_keeping_range if keeps else intensity.stretch
    bend = intensity.bend_keeping_moments if change.gamma_keeps_moments else intensity.bend
    together(intensity.shade, change.bias_field)
    together(intensity.add_noise, change.noise if change.noise_before_blur else ())
    together(intensity.blur, change.blur)
    each(local.median, change.median)
    together(intensity.add_noise, () if change.noise_before_blur else change.noise)
    together(intensity.brighten, change.brightness)
    together(intensity.lift, change.brightness_added)
    together(stretch, change.contrast)
    together(intensity.coarsen, change.low_resolution)
    together(intensity.on_negative(bend), change.inverted_gamma)
    together(bend, change.gamma)
    each(local.blank, change.blank_rectangles)
    each(local.shine, change.brightness_gradient)
    each(local.bend_locally, change.local_gamma)
    each(local.sharpen, change.sharpening)
    if change.dropped is not None:
        image[change.dropped].zero_()
    image.masked_fill_(~brain, 0)
    for part in (image, labels):
        _orient(change, part)


def _runs(values: Sequence[Any], device: torch.device) -> Iterator[slice]:
    """Places of neighbouring values that are not None; on a CPU each is a run of its own.

    There a kernel costs nothing to launch, and what four modalities (128^3) take for a moment is so
    large that it comes from the system each time: gamma took 1.6 times as long (measured).
    """
    alone = device.type == "cpu"
    for _, run in groupby(range(len(values)), lambda n: n if alone or values[n] is None else -1):
        places = list(run)
        if values[places[0]] is not None:
            yield slice(places[0], places[-1] + 1)


def _orient(change: Change, patch: Tensor) -> None:
    """Turns, transposes and mirrors (..., i, j, k) in place.

    nnU-Net turns and transposes before it changes intensities. Those treat all axes alike, so any
    outcome is as likely here, and the brain need not follow.
    """
    moved = patch
    if change.rotate90 is not None:
        moved = turned(moved, *change.rotate90)
    if change.transpose is not None:
        moved = transposed(moved, change.transpose)
    axes = [axis - 3 for axis in range(3) if change.mirrored[axis] and patch.shape[axis - 3] > 1]
    if axes:
        moved = moved.flip(axes)
    if moved is not patch:
        patch.copy_(moved)
