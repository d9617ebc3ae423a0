"""A step of networks and losses of others on a small image, before a run asks for a cluster."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from raybrats.config import LOSSES, NETWORKS, TrainConfig
from raybrats.errors import RaybratsError, UsageError, first_line
from raybrats.model.loss import loss_of
from raybrats.model.network import heads, network_of, num_bytes

BATCH = 2
"""Images that are tried."""


def rehearse(config: TrainConfig) -> None:
    """Tries what of a run's network and loss is of others, so that a run does not end by it.

    Raises:
        UsageError: it is not there, fails, or gives what `raybrats.model.others` does not allow.

    Example:
        >>> from raybrats.recipes import tiny
        >>> rehearse(tiny())  # nothing of it is
    """
    if not config.of_others:
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        own = config.network.name in NETWORKS.own
        logits = _of_own(config) if own else _of_guest(config)
        if config.loss.name not in LOSSES.own:
            _try_loss(config, logits)


def _of_guest(config: TrainConfig) -> list[Tensor]:
    """The heads of a network of others, which is tried both ways on the CPU."""
    name, several = config.network.name, config.cluster.workers > 1
    network = network_of(config)
    try:
        num_bytes(config)
    except UsageError as error:
        raise UsageError(f'{error}; it must be made on torch.device("meta") too') from error
    try:
        found = heads(network.train()(_image(config)))
        torch.stack([head.float().mean() for head in found]).sum().backward()
        with torch.inference_mode():
            heads(network.eval()(_image(config)))
    except RaybratsError:
        raise
    except Exception as error:  # whatever the code of others raises
        raise UsageError(f"network {name}: {first_line(error)}") from error
    without = _without_gradient(network)
    if several and without:
        raise UsageError(
            f"network {name}: no gradient reaches {without[0]} ({len(without)} in all), which "
            "several workers need; leave it out, or set its requires_grad to false"
        )
    return [head.detach() for head in found]


def _of_own(config: TrainConfig) -> list[Tensor]:
    """Something of the shapes of the heads of a network of raybrats, which is not computed."""
    with torch.device("meta"):
        found = heads(network_of(config).train()(_image(config)))
    return [torch.randn(head.shape) for head in found]


def _try_loss(config: TrainConfig, logits: Sequence[Tensor]) -> None:
    """A loss and its gradient, on labels that are all background but for one voxel."""
    given = [head.clone().requires_grad_() for head in logits]
    labels = torch.zeros(BATCH, *given[0].shape[2:], dtype=torch.uint8)
    labels[:, 0, 0, 0] = 1
    try:
        loss_of(config)(given, labels).backward()
    except RaybratsError:
        raise
    except Exception as error:  # whatever the code of others raises
        raise UsageError(f"loss {config.loss.name}: {first_line(error)}") from error
    without = [number for number, head in enumerate(given) if head.grad is None]
    if without and config.cluster.workers > 1:
        raise UsageError(
            f"loss {config.loss.name}: no gradient reaches head {without[0]} of {len(given)}, "
            "which several workers need; lower network.deep_supervision"
        )


def _image(config: TrainConfig) -> Tensor:
    """Small images: two cells of the coarsest grid along each edge, if a patch has two."""
    edges = [min(edge, 2 * config.network.stride) for edge in config.data.patch_size]
    return torch.rand(BATCH, len(config.data.modalities), *edges)


def _without_gradient(network: nn.Module) -> list[str]:
    parameters = network.named_parameters()
    return [name for name, each in parameters if each.requires_grad and each.grad is None]
