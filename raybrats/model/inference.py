"""Whole cases through the network: sliding windows, and regions back to labels."""

from collections.abc import Sequence

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from torch import Tensor, nn

from raybrats.brats import ED, ET, NCR, REGIONS
from raybrats.config import TrainConfig
from raybrats.data.batch import Batch, normalise
from raybrats.data.prepare import Prepared, prepare, restore
from raybrats.model.network import heads


def whole_case(prepared: Prepared, device: torch.device) -> Tensor:
    """A prepared case as network input, float32 (1, modality, i, j, k)."""
    empty = torch.zeros(1, dtype=torch.uint8)
    arrays = (prepared.gain, prepared.bias, prepared.background)
    gain, bias, background = (torch.from_numpy(a)[None] for a in arrays)
    image = torch.from_numpy(prepared.image)[None]
    batch = Batch(image, empty, gain, bias, background, empty.long())
    return normalise(batch.to(device))[0]


@torch.inference_mode()
def predict_regions(
    network: nn.Module, image: Tensor, patch_size: Sequence[int], overlap: float
) -> Tensor:
    """Region masks of a whole image, bool (batch, region, i, j, k), by blended sliding windows."""
    logits = sliding_window_inference(
        image,
        roi_size=tuple(patch_size),
        sw_batch_size=1,
        predictor=lambda window: heads(network(window))[0],
        overlap=overlap,
        mode="gaussian",
        sigma_scale=0.125,  # nnU-Net
    )
    assert isinstance(logits, Tensor)
    return logits > 0


def labels_of(regions: Tensor) -> Tensor:
    """Labels uint8 (batch, i, j, k) from nested region masks: WT is ED, over it NCR, over it ET."""
    labels = torch.zeros_like(regions[:, 0], dtype=torch.uint8)
    for region, label in zip(REGIONS, (ED, NCR, ET), strict=True):
        labels[regions[:, REGIONS.index(region)]] = label
    return labels


def segment(network: nn.Module, config: TrainConfig, image: np.ndarray) -> np.ndarray:
    """Labels uint8 (i, j, k) of a raw case (modality, i, j, k) in the orientation of BraTS, LPS.

    Values are those of BraTS 2023: 1 NCR, 2 ED, 3 ET.

    Raises:
        DataError: the image is all background.
    """
    device = next(network.parameters()).device
    prepared = prepare(list(image), None, config.data.normalisation)
    regions = predict_regions(
        network, whole_case(prepared, device), config.data.patch_size, config.validation.overlap
    )
    return restore(labels_of(regions)[0].cpu().numpy(), prepared)
