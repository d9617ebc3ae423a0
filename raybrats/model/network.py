"""Networks by name: nnU-Net's two, MONAI's, and those of others."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from raybrats.config import NETWORKS, NetworkConfig, TrainConfig
from raybrats.errors import CheckpointError, UsageError
from raybrats.model.others import network_by_name
from raybrats.model.unet import LEAK, UNet

_ACTIVATIONS = {
    "leaky_relu": ("leakyrelu", {"inplace": True, "negative_slope": LEAK}),
    "relu": ("relu", {"inplace": True}),
}
"""As MONAI wants them said."""
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Types that autocast computes in, by `optim.precision`; under fp32 there is no autocast."""


def num_outputs(config: TrainConfig) -> int:
    """Logits a voxel: one a region, or one a label and one for the background.

    Example:
        >>> from raybrats.recipes import crop128, tiny
        >>> num_outputs(tiny()), num_outputs(crop128())
        (3, 4)
    """
    return len(config.classes) + (config.loss.target == "labels")


def network_of(config: TrainConfig) -> nn.Module:
    """The network of a run, with its first weights.

    Example:
        >>> network_of(TrainConfig(network=NetworkConfig(name="residual"))).training
        True
    """
    modalities, outputs = len(config.data.modalities), num_outputs(config)
    return build(config.network, modalities, config.spatial_dims, outputs)


def build(
    config: NetworkConfig,
    num_modalities: int,
    spatial_dims: int = 3,
    outputs: int = 3,
) -> nn.Module:
    """A network from image (batch, modality, i, j, k) to logits (batch, output, i, j, k).

    With two spatial dimensions it takes every slice by itself.

    Example:
        >>> network = build(NetworkConfig(widths=(4, 8, 8), deep_supervision=0), num_modalities=4)
        >>> network(torch.zeros(1, 4, 16, 16, 8)).shape
        torch.Size([1, 3, 16, 16, 8])
    """
    if config.name in ("plain", "residual"):
        network: nn.Module = UNet(config, spatial_dims, num_modalities, outputs)
    elif config.name in NETWORKS.own:
        network = _of_monai(config, num_modalities, spatial_dims, outputs)
    else:
        network = network_by_name(config, spatial_dims, num_modalities, outputs)
    return network if spatial_dims == 3 else _Planar(network)


class _Planar(nn.Module):
    """A 2-D network that takes the k slices of (batch, modality, i, j, k) one by one."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> list[Tensor]:
        batch, _, _, _, k = image.shape
        slices = image.movedim(-1, 1).flatten(0, 1)
        logits = heads(self.network(slices), axes=4)
        return [head.unflatten(0, (batch, k)).movedim(1, -1) for head in logits]


def _of_monai(
    config: NetworkConfig, num_modalities: int, spatial_dims: int, outputs: int
) -> nn.Module:
    # MONAI takes seconds and 250 MB: those who want none of its networks do not wait for it
    from monai.networks import nets

    from raybrats.model.mednext import mednext

    widths, stages = config.widths, len(config.widths)
    if config.name == "mednext":
        return mednext(config, spatial_dims, num_modalities, outputs)
    if config.name == "dynunet":
        return nets.DynUNet(
            spatial_dims=spatial_dims,
            in_channels=num_modalities,
            out_channels=outputs,
            kernel_size=[3] * stages,
            strides=[1] + [2] * (stages - 1),
            upsample_kernel_size=[2] * (stages - 1),
            filters=widths,
            norm_name=(config.norm, {"affine": True}),
            act_name=_ACTIVATIONS[config.activation],
            deep_supervision=config.deep_supervision > 0,
            deep_supr_num=min(max(1, config.deep_supervision), stages - 2),
            res_block=config.residual_units > 0,
        )
    if config.name == "segresnet":
        return nets.SegResNet(
            spatial_dims=spatial_dims,
            init_filters=widths[0],
            in_channels=num_modalities,
            out_channels=outputs,
            blocks_down=(1, *[2] * (stages - 2), 4),
            blocks_up=(1,) * (stages - 1),
        )
    return nets.UNet(
        spatial_dims=spatial_dims,
        in_channels=num_modalities,
        out_channels=outputs,
        channels=widths,
        strides=(2,) * (stages - 1),
        num_res_units=config.residual_units,
        norm=config.norm,
    )


def heads(output: Tensor | list[Tensor], axes: int = 5) -> list[Tensor]:
    """The logits of every head, finest first: one, or several under deep supervision.

    Each has its own resolution; MONAI's DynUNet stacks its heads, all at full size, along axis 1:
    (batch, head, output, ...).

    Args:
        output: what a network gave.
        axes: how many a single head has.

    Example:
        >>> [tuple(head.shape) for head in heads(torch.zeros(1, 2, 3, 8, 8, 8))]
        [(1, 3, 8, 8, 8), (1, 3, 8, 8, 8)]
    """
    if isinstance(output, list):
        return output
    return list(torch.unbind(output, dim=1)) if output.ndim == axes + 1 else [output]


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """The context in which the network of a run computes, in training and in prediction.

    Example:
        >>> with autocast(TrainConfig(), torch.device("cpu")):
        ...     torch.is_autocast_enabled("cpu")
        False
    """
    precision = config.optim.precision
    kind = PRECISIONS.get(precision, torch.bfloat16)
    return torch.autocast(device.type, kind, precision in PRECISIONS)


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """Every tensor of a network once, by its first name.

    MONAI's DynUNet reaches the same layers by two paths, which `state_dict` lists twice.

    Example:
        >>> {name: tuple(tensor.shape) for name, tensor in weights_of(nn.Linear(3, 2)).items()}
        {'weight': (2, 3), 'bias': (2,)}
    """
    return dict(network.named_parameters()) | dict(network.named_buffers())


def load_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Fills a network with what `weights_of` gave.

    Raises:
        CheckpointError: names or shapes differ.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> load_weights(layer, {"weight": torch.zeros(1, 1), "bias": torch.ones(1)})
        >>> layer(torch.tensor([5.0])).item()
        1.0
    """
    own = weights_of(network)
    mismatches = sorted(set(own) ^ set(weights)) or [
        n for n in own if own[n].shape != weights[n].shape
    ]
    if mismatches:
        raise CheckpointError(
            f"weights of another network: {len(mismatches)} differ, e.g. {mismatches[0]}"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])


def fitting(
    config: TrainConfig, theirs: TrainConfig, weights: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """What the network of a run can begin with of another run's weights, and what it has anew.

    Only heads are new: those for other labels or regions, or at other resolutions. They are told
    by their shapes, which are others for one output more.

    Raises:
        UsageError: the other run has another network, or lacks a modality.

    Example:
        >>> from raybrats.recipes import tiny
        >>> weights = weights_of(network_of(tiny()))
        >>> kept, new = fitting(tiny(), tiny(), weights)
        >>> len(kept) == len(weights), new
        (True, [])
    """
    modalities, outputs = len(config.data.modalities), num_outputs(config)
    with torch.device("meta"):
        wanted, more = (
            weights_of(build(config.network, modalities, config.spatial_dims, number))
            for number in (outputs, outputs + 1)
        )
    outer = {name for name in wanted if wanted[name].shape != more[name].shape}
    alike = (config.labels, config.loss.target) == (theirs.labels, theirs.loss.target)
    source = {name: tensor for name, tensor in weights.items() if alike or name not in outer}
    if config.data.modalities != theirs.data.modalities:
        first = next(iter(wanted))  # the first layer is the one that sees the image
        source[first] = source[first][:, _channels(config, theirs)].contiguous()
    kept = {n: t for n, t in source.items() if n in wanted and wanted[n].shape == t.shape}
    new = [name for name in wanted if name not in kept]
    others = [name for name in new if name not in outer]
    if others or not kept:
        raise UsageError(f"network.init_from has another network: {[*others, *new][0]} differs")
    return kept, new


def _channels(config: TrainConfig, theirs: TrainConfig) -> list[int]:
    """The places of a run's modalities among those of another run."""
    lacking = [m for m in config.data.modalities if m not in theirs.data.modalities]
    if lacking or config.network.name not in ("plain", "residual", "mednext"):
        has = ", ".join(theirs.data.modalities)
        what = f"no {', '.join(lacking)}" if lacking else f"a {config.network.name} for {has}"
        raise UsageError(f"network.init_from has {what}; it was trained on {has}")
    return [theirs.data.modalities.index(m) for m in config.data.modalities]


def num_bytes(config: TrainConfig) -> int:
    """Bytes of the weights of a run's network, which is not made.

    Raises:
        CheckpointError: there can be no such network.
        UsageError: it is one of others, which cannot be made here.

    Example:
        >>> from raybrats.recipes import tiny
        >>> num_bytes(tiny())
        1407308
    """
    try:
        with torch.device("meta"):
            network = network_of(config)
    except UsageError:  # of a network of others, which has words of its own
        raise
    except (RuntimeError, ValueError, MemoryError) as error:  # RecursionError is of the first kind
        raise CheckpointError(f"a network that cannot be: {config.network}"[:300]) from error
    return sum(tensor.nbytes for tensor in weights_of(network).values())


def trained_network(
    config: TrainConfig, weights: Mapping[str, Tensor], device: str = ""
) -> nn.Module:
    """The network of a run with its weights, for inference.

    Args:
        config: the run.
        weights: as `weights_of` gave them.
        device: where it is; a GPU where there is one, if not given.

    Raises:
        CheckpointError: the weights are those of another network, which is then not made.

    Example:
        >>> from raybrats.recipes import tiny
        >>> weights = weights_of(network_of(tiny()))
        >>> trained_network(tiny(), weights).training
        False
    """
    due, found = num_bytes(config), sum(tensor.nbytes for tensor in weights.values())
    if due > found:  # before memory is taken for what a configuration may claim
        raise CheckpointError(f"weights of another network: {found} bytes, not {due}")
    network = network_of(config)
    load_weights(network, weights)
    return network.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
