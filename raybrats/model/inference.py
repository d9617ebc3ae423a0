"""Whole cases through the network: sliding windows, and regions back to labels."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice, product
from types import EllipsisType

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from raybrats.config import TrainConfig
from raybrats.data.batch import normalise
from raybrats.data.prepare import Prepared, prepare, restore
from raybrats.label_set import GLIOMA, LabelSet
from raybrats.model.network import heads

SIGMA = 1 / 8
"""Deviation of the Gaussian by which windows are blended, in edges of the window (nnU-Net)."""
WINDOWS_AT_ONCE = {"cuda": 2}
"""Windows that a kind of device takes together, else one. Nothing of them is kept to go back, so
two need less memory than a patch in training."""
SLICES_AT_ONCE = 16
"""Slices that a 2-D network takes together: about as many activations as a 128^3 patch has."""


@dataclass(frozen=True)
class Uploaded:
    """A prepared case on the device of a network."""

    prepared: Prepared
    image: Tensor
    """Network input, float32 (1, modality, i, j, k)."""
    labels: Tensor | None
    """Labels 0, 1, 2, ... of the case's label set, uint8 (i, j, k)."""


def uploaded(prepared: Prepared, device: torch.device) -> Uploaded:
    """A prepared case on a device; copies to a GPU are under way when this returns.

    Example:
        >>> from raybrats.phantom.phantom import make_phantom
        >>> prepared = prepare(*make_phantom(0, shape=(24, 24, 20)))
        >>> uploaded(prepared, torch.device("cpu")).image[0].shape == prepared.image.shape
        True
    """

    def moved(array: np.ndarray) -> Tensor:
        # Cached arrays are read-only maps of a file, which torch does not take: one copy of a case.
        tensor = torch.from_numpy(np.array(array))
        if device.type == "cuda":  # from pageable memory the copy would wait for the device
            tensor = tensor.pin_memory()
        return tensor.to(device, non_blocking=True)

    scaling = prepared.scaling.map(lambda numbers: moved(numbers)[None])
    labels = None if prepared.labels is None else moved(prepared.labels)
    return Uploaded(prepared, normalise(moved(prepared.image)[None], scaling)[0], labels)


@torch.inference_mode()
def predict_case(
    network: nn.Module, config: TrainConfig, case: Uploaded, at_once: int = 0
) -> Tensor:
    """Labels of a case, uint8 (1, i, j, k).

    The network sees pieces as in training: patches, slices, or the whole case.

    Args:
        network: the network.
        config: its run.
        case: the case, on its device.
        at_once: windows that it sees together; 0: as many as that kind of device takes.

    Example:
        >>> from raybrats.phantom.phantom import make_phantom
        >>> from raybrats.recipes import tiny
        >>> prepared = prepare(*make_phantom(0, shape=(24, 24, 20)))
        >>> network, case = nn.Conv3d(4, 3, kernel_size=1), uploaded(prepared, torch.device("cpu"))
        >>> predict_case(network, tiny(), case)[0].shape == prepared.image.shape[1:]
        True
    """
    image, stride = case.image, config.network.stride
    validation, sampling = config.validation, config.data.sampling
    size: Sequence[int] = config.data.patch_size
    if sampling == "slices":
        return decoded(config, _predict_slices(network, config, case.prepared, image))
    if sampling == "volume":
        size = [-(-edge // stride) * stride for edge in image.shape[2:]]
    logits = predict_logits(
        network,
        image,
        size,
        validation.overlap,
        mirror=validation.mirror,
        at_once=at_once or WINDOWS_AT_ONCE.get(image.device.type, 1),
    )
    return decoded(config, logits)


@torch.inference_mode()
def predict_logits(
    network: nn.Module,
    image: Tensor,
    patch_size: Sequence[int],
    overlap: float,
    *,
    mirror: bool = False,
    at_once: int = 1,
) -> Tensor:
    """Logits of a whole image (batch, output, i, j, k), by blended sliding windows.

    Windows lie as nnU-Net lays them, evenly from edge to edge. Their logits are summed with the
    weights of a Gaussian; the sums are not divided by their weights, for neither the sign nor the
    greatest logit of a voxel depends on that.

    Example:
        >>> network = nn.Conv3d(4, 3, kernel_size=1)
        >>> predict_logits(network, torch.zeros(1, 4, 9, 9, 7), (8, 8, 8), overlap=0.5).shape
        torch.Size([1, 3, 9, 9, 7])
    """
    size, shape = tuple(patch_size), image.shape[2:]
    room = [max(0, n - edge) for n, edge in zip(size, shape, strict=True)]
    padded = pad(image, [n for r in reversed(room) for n in (r // 2, r - r // 2)])
    blend = _gaussian(size, image.device)
    total: Tensor | None = None
    windows = _windows(padded.shape[2:], size, overlap)
    while group := list(islice(windows, at_once)):
        seen = torch.cat([padded[window] for window in group])
        logits = _seen(network, seen, (2, 3, 4) if mirror else ()).split(len(image))
        if total is None:
            total = logits[0].new_zeros(*logits[0].shape[:2], *padded.shape[2:])
        for window, found in zip(group, logits, strict=True):
            total[window] += blend * found
    assert total is not None, "an image has a window"
    inside = [slice(r // 2, r // 2 + edge) for r, edge in zip(room, shape, strict=True)]
    return total[(..., *inside)]


def _seen(network: nn.Module, window: Tensor, axes: Sequence[int]) -> Tensor:
    """The logits of a window, summed over all its mirror images along some axes."""
    total = heads(network(window))[0].float()
    for count in range(1, len(axes) + 1):
        for turned in combinations(axes, count):
            total = total + heads(network(window.flip(turned)))[0].float().flip(turned)
    return total


def _windows(
    shape: Sequence[int], size: Sequence[int], overlap: float
) -> Iterator[tuple[EllipsisType | slice, ...]]:
    """The windows that cover an image, as indices of (batch, channel, i, j, k)."""
    starts = []
    for edge, n in zip(shape, size, strict=True):
        steps = math.ceil((edge - n) / (n * (1 - overlap)))
        starts.append([round((edge - n) * step / max(1, steps)) for step in range(steps + 1)])
    for corner in product(*starts):
        yield (..., *(slice(at, at + n) for at, n in zip(corner, size, strict=True)))


def _gaussian(size: Sequence[int], device: torch.device) -> Tensor:
    """A Gaussian around the middle voxel of a window, 1 there."""
    blend = torch.ones((), device=device)
    for edge in size:
        at = torch.arange(edge, device=device) - edge // 2
        blend = blend[..., None] * torch.exp(-0.5 * (at / (SIGMA * edge)) ** 2)
    return blend


def _predict_slices(
    network: nn.Module, config: TrainConfig, prepared: Prepared, image: Tensor
) -> Tensor:
    """Logits of every slice of the box, resized in its whole frame as in training."""
    depth, size = image.shape[4], config.data.patch_size
    frame = image.new_zeros(1, image.shape[1], *prepared.shape[:2], depth)
    within = (..., prepared.box[0], prepared.box[1], slice(None))
    frame[within] = image
    small = _resized_brain(frame, (size[0], size[1], depth))
    axes = (2, 3) if config.validation.mirror else ()
    logits = [_seen(network, piece, axes) for piece in small.split(SLICES_AT_ONCE, dim=4)]
    return _resized(torch.cat(logits, dim=4), frame.shape[2:])[within]


def _resized_brain(frame: Tensor, size: Sequence[int]) -> Tensor:
    """The frame resized as by `patch.cut_slice`: linear among brain voxels, the edge nearest."""
    brain = (frame != 0).any(dim=1, keepdim=True).float()
    weight = _resized(brain, size)
    kept = (interpolate(brain, size=tuple(size), mode="nearest-exact") > 0) & (weight > 0)
    return torch.where(kept, _resized(frame, size) / weight.clamp(min=1e-6), 0.0)


def _resized(image: Tensor, size: Sequence[int]) -> Tensor:
    return interpolate(image, size=tuple(size), mode="trilinear", align_corners=False)


def decoded(config: TrainConfig, logits: Tensor) -> Tensor:
    """Labels uint8 (batch, i, j, k) of what the network of a run says.

    Example:
        >>> from raybrats.recipes import crop128
        >>> logits = torch.tensor([0.1, -1.0, 2.0, 0.3]).view(1, 4, 1, 1, 1)
        >>> decoded(crop128(), logits).item()
        2
    """
    if config.loss.target == "labels":
        return logits.argmax(dim=1).to(torch.uint8)
    return labels_of(logits > 0, config.labels)


def labels_of(regions: Tensor, known: LabelSet = GLIOMA) -> Tensor:
    """Labels uint8 (batch, i, j, k) of regions, painted one over the other.

    In glioma that is ED in WT, over it NCR in TC, over it ET.

    Example:
        >>> regions = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 1]]) > 0  # WT, TC, ET
        >>> labels_of(regions.view(1, 3, 3, 1, 1)).flatten()
        tensor([1, 2, 3], dtype=torch.uint8)
    """
    labels = torch.zeros_like(regions[:, 0], dtype=torch.uint8)
    for place, region in enumerate(known.regions):
        labels[regions[:, place]] = region.painted
    return labels


def segment(network: nn.Module, config: TrainConfig, image: np.ndarray) -> np.ndarray:
    """Labels uint8 (i, j, k) of a raw case (modality, i, j, k) in the orientation of BraTS, LPS.

    Values are 1, 2, ... for the labels of its set, which for glioma are those of BraTS 2023.

    Raises:
        DataError: the image is all background.

    Example:
        >>> from raybrats.phantom.phantom import make_phantom
        >>> from raybrats.recipes import tiny
        >>> image, _ = make_phantom(0, shape=(24, 24, 20))
        >>> segment(nn.Conv3d(4, 3, kernel_size=1), tiny(), image).shape
        (24, 24, 20)
    """
    device = next(network.parameters()).device
    prepared = prepare(list(image), None, config.data.normalisation, config.data.percentiles)
    labels = predict_case(network, config, uploaded(prepared, device))
    return restore(labels[0].cpu().numpy(), prepared)
