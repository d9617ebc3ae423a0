"""What a step of a run costs, found without a device: nothing is computed, only shapes are."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from raybrats.config import TrainConfig
from raybrats.model.loss import loss_of
from raybrats.model.network import heads, network_of


@dataclass(frozen=True)
class Cost:
    """Of one draw, forward and backward, in fp32."""

    parameters: int
    gflop: float
    """10^9 operations, a multiplication and an addition being two."""
    activation_bytes: int
    """Bytes that the forward pass keeps for the backward one, loss included."""

    def __str__(self) -> str:
        gigabytes = self.activation_bytes / 1e9
        return f"{self.parameters:,} parameters, {self.gflop:,.0f} GFLOP, {gigabytes:.2f} GB"


def cost(config: TrainConfig, size: tuple[int, int, int] | None = None) -> Cost:
    """What one draw of a run costs.

    Args:
        config: the run.
        size: shape of the draw in voxels; that of a patch where not given.

    Example:
        >>> from raybrats.recipes import tiny
        >>> print(cost(tiny()))
        351,827 parameters, 3 GFLOP, 0.02 GB
    """
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    shape = size or config.data.patch_size
    counted = {torch.ops.aten.convolution_backward: _backward}
    with torch.device("meta"), FlopCounterMode(display=False, custom_mapping=counted) as operations:
        network = network_of(config).train()
        weights = {p.untyped_storage()._cdata for p in network.parameters()}
        image, labels = torch.empty(1, len(config.data.modalities), *shape), torch.empty(1, *shape)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = loss_of(config)(heads(network(image)), labels)
        loss.backward()
    return Cost(
        parameters=sum(p.numel() for p in network.parameters()),
        gflop=operations.get_total_flops() / 1e9,
        activation_bytes=sum(n for key, n in kept.items() if key not in weights),
    )


def _backward(
    grad: Sequence[int],
    image: Sequence[int],
    kernel: Sequence[int],
    *settings: object,
    out_shape: Sequence[object],
    **_: object,
) -> int:
    """Operations of a convolution's gradients: of image and kernel each as many as forward.

    torch 2.13 counts those of the kernel of a depthwise convolution once for each channel.
    """
    transposed, wanted = bool(settings[4]), sum(gradient is not None for gradient in out_shape[:2])
    return wanted * conv_flop_count([*image], [*kernel], [*grad], transposed)
