"""A whole image through the network: overlapping windows, mirrored and blended; or its slices."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice, product
from types import EllipsisType

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from raybrats.config import PredictionConfig, TrainConfig
from raybrats.data.prepare import Prepared
from raybrats.model.network import autocast, heads

SIGMA = 1 / 8
"""Deviation of the Gaussian by which windows are blended, in edges of the window (nnU-Net)."""
SLICES_AT_ONCE = 16
"""Slices that a 2-D network takes together: about as many activations as a 128^3 patch has."""
DEVICE_SHARE = 0.5
"""Share of a GPU's free memory that the sums of a case may take; the other half is for the windows.
Larger sums are kept on the host."""
Window = tuple[EllipsisType | slice, ...]


@dataclass(frozen=True)
class Blend:
    """What a network says of an image: sums of weighted logits, and of the weights.

    The sign and the greatest of a voxel's logits are those of their sums.
    """

    total: Tensor
    """float32 (batch, output, i, j, k); 0 where no window was."""
    weight: Tensor
    """float32 (i, j, k); 0 where no window was."""


@torch.inference_mode()
def blend_windows(
    network: nn.Module,
    image: Tensor,
    config: TrainConfig,
    at_once: int = 1,
) -> Blend:
    """The logits of an image (batch, modality, i, j, k) by sliding windows.

    Windows lie as nnU-Net lays them, evenly from edge to edge, and are blended with the weights of
    a Gaussian. Those that touch no brain, which is where the image is not 0, are left out.

    Besides the image it takes 4 x (outputs + 1) bytes a voxel, on the host where a GPU has too
    little left, and what the network takes for its windows.

    Args:
        network: the network.
        image: its input, on its device.
        config: its run, of which patch, stride, precision and prediction count.
        at_once: windows that it sees together.

    Example:
        >>> from raybrats.recipes import tiny
        >>> network = nn.Conv3d(4, 3, kernel_size=1)
        >>> blend_windows(network, torch.ones(1, 4, 9, 9, 7), tiny()).total.shape
        torch.Size([1, 3, 9, 9, 7])
    """
    size, shape = _window_size(config, image.shape[2:]), image.shape[2:]
    room = [max(0, n - edge) for n, edge in zip(size, shape, strict=True)]
    if any(room):
        image = pad(image, [n for r in reversed(room) for n in (r // 2, r - r // 2)])
    windows = iter(_touching(image, list(_windows(image.shape[2:], size, config.prediction))))
    blend = _gaussian(size, image.device)
    weight, total = image.new_zeros(0), image.new_zeros(0)
    while group := list(islice(windows, at_once)):
        seen = torch.cat([image[window] for window in group])
        logits = _seen(network, seen, config)
        if not total.numel():
            place = _place(image, logits.shape[1])
            total = torch.zeros((len(image), logits.shape[1], *image.shape[2:]), device=place)
            weight, blend = torch.zeros(image.shape[2:], device=place), blend.to(place)
        for window, found in zip(group, logits.split(len(image)), strict=True):
            total[window] += blend * found.to(total.device)
            weight[window] += blend
    inside = [slice(r // 2, r // 2 + edge) for r, edge in zip(room, shape, strict=True)]
    weight *= 2 ** len(_mirrored(config))
    return Blend(total[(..., *inside)], weight[(..., *inside)])


@torch.inference_mode()
def blend_slices(
    network: nn.Module, image: Tensor, config: TrainConfig, prepared: Prepared
) -> Blend:
    """The logits of every slice of a case's box, resized in its whole frame as in training.

    Example:
        >>> import numpy as np
        >>> from raybrats.config import DataConfig
        >>> from raybrats.data.prepare import prepare
        >>> case = prepare([np.pad(np.ones((9, 9, 7), np.int16), 1)])
        >>> config = TrainConfig(data=DataConfig(sampling="slices", patch_size=(32, 32, 1)))
        >>> network = nn.Conv3d(1, 3, kernel_size=1)
        >>> blend_slices(network, torch.ones(1, 1, 9, 9, 7), config, case).total.shape
        torch.Size([1, 3, 9, 9, 7])
    """
    depth, size = image.shape[4], config.data.patch_size
    frame = image.new_zeros(1, image.shape[1], *prepared.shape[:2], depth)
    within = (..., prepared.box[0], prepared.box[1], slice(None))
    frame[within] = image
    small = _resized_brain(frame, (size[0], size[1], depth))
    logits = [_seen(network, piece, config) for piece in small.split(SLICES_AT_ONCE, dim=4)]
    total = _resized(torch.cat(logits, dim=4), frame.shape[2:])[within]
    return Blend(total, total.new_full(total.shape[2:], 2 ** len(_mirrored(config))))


def _window_size(config: TrainConfig, shape: Sequence[int]) -> Sequence[int]:
    """A window's edges: the patch's, or the image's, up to a multiple of the network's stride."""
    stride = config.network.stride
    whole = config.data.sampling == "volume"
    return [-(-edge // stride) * stride for edge in shape] if whole else config.data.patch_size


def _mirrored(config: TrainConfig) -> list[int]:
    """Axes of (batch, channel, i, j, k) along which windows are mirrored."""
    return [2 + axis for axis in config.prediction.mirror if axis < config.spatial_dims]


def _seen(network: nn.Module, window: Tensor, config: TrainConfig) -> Tensor:
    """The logits of a window, summed over all its mirror images."""
    axes = _mirrored(config)
    with autocast(config, window.device):
        total = heads(network(window))[0].float()
        for count in range(1, len(axes) + 1):
            for turned in combinations(axes, count):
                total = total + heads(network(window.flip(turned)))[0].float().flip(turned)
    return total


def _touching(image: Tensor, windows: list[Window]) -> list[Window]:
    """The windows with a voxel that is not 0; all of them where there is none."""
    brain = (image != 0).any(dim=1)
    touched = torch.stack([brain[window].any() for window in windows]).tolist()
    return [w for w, is_brain in zip(windows, touched, strict=True) if is_brain] or windows


def _windows(
    shape: Sequence[int], size: Sequence[int], prediction: PredictionConfig
) -> Iterator[Window]:
    """The windows that cover an image, as indices of (..., i, j, k)."""
    starts = []
    for edge, n in zip(shape, size, strict=True):
        steps = math.ceil((edge - n) / (n * (1 - prediction.overlap)))
        starts.append([round((edge - n) * step / max(1, steps)) for step in range(steps + 1)])
    for corner in product(*starts):
        yield (..., *(slice(at, at + n) for at, n in zip(corner, size, strict=True)))


def _place(image: Tensor, outputs: int) -> torch.device:
    """Where the sums of an image are kept: its device, or the host where that has too little."""
    if image.device.type != "cuda":
        return image.device
    free, _ = torch.cuda.mem_get_info(image.device)
    free += torch.cuda.memory_reserved(image.device) - torch.cuda.memory_allocated(image.device)
    due = 4 * (outputs * len(image) + 1) * math.prod(image.shape[2:])
    return image.device if due < DEVICE_SHARE * free else torch.device("cpu")


def _gaussian(size: Sequence[int], device: torch.device) -> Tensor:
    """A Gaussian around the middle voxel of a window, 1 there."""
    blend = torch.ones((), device=device)
    for edge in size:
        at = torch.arange(edge, device=device) - edge // 2
        blend = blend[..., None] * torch.exp(-0.5 * (at / (SIGMA * edge)) ** 2)
    return blend


def _resized_brain(frame: Tensor, size: Sequence[int]) -> Tensor:
    """The frame resized as by `patch.cut_slice`: linear among brain voxels, the edge nearest."""
    brain = (frame != 0).any(dim=1, keepdim=True).float()
    weight = _resized(brain, size)
    kept = (interpolate(brain, size=tuple(size), mode="nearest-exact") > 0) & (weight > 0)
    return torch.where(kept, _resized(frame, size) / weight.clamp(min=1e-6), 0.0)


def _resized(image: Tensor, size: Sequence[int]) -> Tensor:
    return interpolate(image, size=tuple(size), mode="trilinear", align_corners=False)
