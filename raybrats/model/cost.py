"""What a step of a run costs, found without a device: nothing is computed, only shapes are."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from raybrats.config import TrainConfig
from raybrats.errors import UsageError
from raybrats.model.loss import loss_of
from raybrats.model.network import heads, network_of

_KEPT_A_WEIGHT = {"sgd": 1, "adamw": 2}
"""Numbers that an optimiser keeps of each weight."""


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
    counted = {torch.ops.aten.convolution_backward: _backward}
    with torch.device("meta"), FlopCounterMode(display=False, custom_mapping=counted) as operations:
        network = network_of(config).train()
        loss, kept = _forward(config, network, size or config.data.patch_size)
        loss.backward()
    return Cost(
        parameters=sum(p.numel() for p in network.parameters()),
        gflop=operations.get_total_flops() / 1e9,
        activation_bytes=kept,
    )


@dataclass(frozen=True)
class Memory:
    """What a step holds at the end of its forward pass, in the precision of its run.

    Its peak is above: convolutions have work space, and gradients of activations come to be.
    """

    fixed_bytes: int
    """Of weights, gradients, what the optimiser keeps of each weight, and the average."""
    patch_bytes: int
    """Of what the forward pass keeps of a patch for the backward one."""

    def of(self, patches: int) -> int:
        """Bytes with so many patches at once."""
        return self.fixed_bytes + patches * self.patch_bytes


def memory(config: TrainConfig) -> Memory:
    """The least memory that a rank of a run needs.

    Example:
        >>> from raybrats.recipes import tiny
        >>> memory(tiny()).fixed_bytes == 351_827 * 4 * 4  # AdamW keeps two numbers a weight
        True
    """
    half = config.optim.precision != "fp32"
    # autocast wants a device that computes; a fake one of that kind has shapes only
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, half):
        network = network_of(config).train()
        _, kept = _forward(config, network, config.data.patch_size)
    copies = 2 + _KEPT_A_WEIGHT[config.optim.name] + (config.optim.ema_decay > 0)
    return Memory(
        fixed_bytes=sum(p.numel() for p in network.parameters()) * 4 * copies,
        patch_bytes=kept,
    )


def check_memory(config: TrainConfig, device_bytes: int, ranks: int = 1) -> None:
    """Refuses a run whose step a device cannot hold.

    Args:
        config: the run.
        device_bytes: all that the device has.
        ranks: among which the batch is divided.

    Raises:
        UsageError: with what it needs, and the field that makes it fit.

    Example:
        >>> from raybrats.recipes import nnunet
        >>> check_memory(nnunet(), device_bytes=140_000_000_000)
        >>> check_memory(nnunet(), device_bytes=4_000_000_000)
        Traceback (most recent call last):
        ...
        raybrats.errors.UsageError: a step holds 4.5 GB at least, and the GPU has 4.0; take ...
    """
    needs = memory(config)
    all_at_once = -(-config.optim.global_batch // ranks)
    patches = min(all_at_once, config.optim.micro_batch or all_at_once)
    if needs.of(patches) <= device_bytes:
        return
    left = device_bytes - needs.fixed_bytes
    fitting = left // needs.patch_bytes
    advice = f"--optim.micro_batch {fitting}"
    if fitting < 1:
        stride = config.network.stride
        scale = max(left / needs.patch_bytes, 0) ** (1 / 3)
        size = [int(edge * scale) // stride * stride for edge in config.data.patch_size]
        advice = "smaller --network.widths"
        if min(size) >= max(8, 2 * stride):  # 8 is the least; one voxel has no deviation
            advice = f"--data.patch_size {' '.join(map(str, size))}"
    raise UsageError(
        f"a step holds {needs.of(patches) / 1e9:.1f} GB at least, and the GPU has "
        f"{device_bytes / 1e9:.1f}; take {advice}"
    )


def _forward(config: TrainConfig, network: nn.Module, shape: Sequence[int]) -> tuple[Tensor, int]:
    """The loss of one draw, and the bytes that are kept to go back, but for weights."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    weights = {p.untyped_storage()._cdata for p in network.parameters()}
    image, labels = torch.empty(1, len(config.data.modalities), *shape), torch.empty(1, *shape)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(config)(heads(network(image)), labels)
    return loss, sum(number for key, number in kept.items() if key not in weights)


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
