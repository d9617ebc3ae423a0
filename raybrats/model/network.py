"""MONAI networks by name."""

import torch
from monai.networks.nets import DynUNet, SegResNet, UNet
from torch import Tensor, nn

from raybrats.brats import REGIONS
from raybrats.config import NetworkConfig


def build(config: NetworkConfig, num_modalities: int) -> nn.Module:
    """A network from image (batch, modality, i, j, k) to logits (batch, region, i, j, k)."""
    widths, stages = config.widths, len(config.widths)
    if config.name == "dynunet":
        return DynUNet(
            spatial_dims=3,
            in_channels=num_modalities,
            out_channels=len(REGIONS),
            kernel_size=[3] * stages,
            strides=[1] + [2] * (stages - 1),
            upsample_kernel_size=[2] * (stages - 1),
            filters=widths,
            norm_name=("INSTANCE", {"affine": True}),
            act_name=("leakyrelu", {"inplace": True, "negative_slope": 0.01}),
            deep_supervision=config.deep_supervision > 0,
            deep_supr_num=max(1, config.deep_supervision),
            res_block=config.residual_units > 0,
        )
    if config.name == "segresnet":
        return SegResNet(
            spatial_dims=3,
            init_filters=widths[0],
            in_channels=num_modalities,
            out_channels=len(REGIONS),
            blocks_down=(1, *[2] * (stages - 2), 4),
            blocks_up=(1,) * (stages - 1),
        )
    return UNet(
        spatial_dims=3,
        in_channels=num_modalities,
        out_channels=len(REGIONS),
        channels=widths,
        strides=(2,) * (stages - 1),
        num_res_units=config.residual_units,
        norm="INSTANCE",
    )


def heads(output: Tensor) -> list[Tensor]:
    """The logits of every head, finest first: one, or several under deep supervision.

    MONAI's DynUNet stacks its heads, all at full size, along axis 1: (batch, head, region, ...).
    """
    return list(torch.unbind(output, dim=1)) if output.ndim == 6 else [output]
