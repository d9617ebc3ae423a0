"""MedNeXt (arXiv 2303.09975) of MONAI's blocks; a test counts its parameters as its authors do."""

from functools import partial

from monai.networks.blocks.mednext_block import MedNeXtDownBlock
from monai.networks.nets.mednext import MedNeXt
from torch import nn

from raybrats.config import NetworkConfig


def mednext(config: NetworkConfig, dims: int, num_channels: int, num_logits: int) -> nn.Module:
    """A MedNeXt of an image (batch, channel, ...); in training a list of every head's logits.

    Every head has its own resolution: each halves the edges of the finer one. MONAI 1.6 widens a
    block that halves as the finer resolution does, the authors' code (MIC-DKFZ/MedNeXt) as the
    coarser one, which is what is made here; in S they are alike.

    Example:
        >>> import torch
        >>> config = NetworkConfig(name="mednext", widths=(4, 8, 16), deep_supervision=1)
        >>> network = mednext(config, 3, 4, 3)
        >>> [tuple(head.shape) for head in network(torch.zeros(2, 4, 16, 16, 8))]
        [(2, 3, 16, 16, 8), (2, 3, 8, 8, 4)]
    """
    widths, last = config.widths, len(config.widths) - 1
    blocks, expansion = (_each(given, last + 1) for given in (config.blocks, config.expansion))
    coarser = min(config.deep_supervision, last)
    network = MedNeXt(
        spatial_dims=dims,
        init_filters=widths[0],
        in_channels=num_channels,
        out_channels=num_logits,
        kernel_size=config.kernel_size,
        encoder_expansion_ratio=expansion[:-1],
        bottleneck_expansion_ratio=expansion[-1],
        decoder_expansion_ratio=expansion[-2::-1],
        blocks_down=blocks[:-1],
        blocks_bottleneck=blocks[-1],
        blocks_up=blocks[-2::-1],
        deep_supervision=coarser > 0,
        use_residual_connection=True,
    )
    for place in range(last):
        network.down_blocks[place] = MedNeXtDownBlock(
            in_channels=widths[place],
            out_channels=widths[place + 1],
            expansion_ratio=expansion[place + 1],
            kernel_size=config.kernel_size,
            use_residual_connection=True,
            dim=f"{dims}d",
        )
    if coarser:  # MONAI has one at each resolution, the coarsest first; DDP wants gradients for all
        for place in range(last - coarser):
            network.out_blocks[place] = nn.Identity()
        network.register_forward_hook(partial(_finest, 1 + coarser))
    return network


def _each(given: tuple[int, ...], stages: int) -> tuple[int, ...]:
    """One number a resolution; those that follow are as the last."""
    return (*given, *given[-1:] * stages)[:stages]


def _finest(count: int, _network: nn.Module, _images: object, output: object) -> object:
    """So many heads of those that there are in training; else the logits."""
    return list(output[:count]) if isinstance(output, tuple) else output
