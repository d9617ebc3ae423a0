"""Networks and losses of others, made by name and held to what they owe.

`network.name` and `loss.name` are entry points of the groups `raybrats.networks` and
`raybrats.losses`, or `my.module:function`.

A network's function is called with (in_channels, out_channels, spatial_dims, config), config being
the `NetworkConfig`, and returns a `torch.nn.Module`:
- it takes images, float (batch, in_channels, i, j, k), without k where spatial_dims is 2, whose
  edges are multiples of `config.stride`, as `config.widths` has it;
- it returns logits, float (batch, out_channels, ...) on the grid of the images, one a region or one
  a label and the background, as `loss.target` has it; or a list of heads, these first and then
  coarser ones whose edges divide theirs, which count in training only;
- what it draws for its first weights, it draws from torch's generator, which is seeded;
- it can be made on `torch.device("meta")`, for its size is known before memory is taken for it.

A loss's function is called with the `LossConfig` and returns a `torch.nn.Module` without weights of
its own:
- it takes the list of heads that the network gave, float32, finest first, and the labels, uint8
  (batch, i, j, k), 0 being the background;
- it returns a scalar with a gradient, the mean over the batch: it is weighed, so that those of
  ranks and micro-batches of any size add up to the mean over the global batch.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from raybrats.config import LOSSES, NETWORKS, LossConfig, NetworkConfig
from raybrats.errors import UsageError


def network_by_name(
    config: NetworkConfig, dims: int, num_channels: int, num_logits: int
) -> nn.Module:
    """The network that a function of others makes; what it returns is checked at every call.

    Raises:
        UsageError: there is no such function, it fails, or what it makes is no network.

    Example:
        >>> network_by_name(NetworkConfig(name="my.module:network"), 3, 4, 3)  # doctest: +SKIP
        MyNetwork(...)
    """
    made = NETWORKS.make(config.name, num_channels, num_logits, dims, config)
    if not isinstance(made, nn.Module):
        raise UsageError(f"network {config.name}: makes {type(made).__name__}, not a Module")
    made.register_forward_hook(partial(_checked, config.name, num_logits))
    return made


def loss_by_name(config: LossConfig) -> nn.Module:
    """The loss that a function of others makes, called as raybrats' own is.

    Raises:
        UsageError: there is no such function, it fails, or what it makes is no loss.

    Example:
        >>> loss_by_name(LossConfig(name="my.module:loss"))  # doctest: +SKIP
        _OfOthers(...)
    """
    made = LOSSES.make(config.name, config)
    if not isinstance(made, nn.Module):
        raise UsageError(f"loss {config.name}: makes {type(made).__name__}, not a Module")
    if any(weight.requires_grad for weight in made.parameters()):
        raise UsageError(f"loss {config.name}: has weights to learn, which nothing would train")
    return _OfOthers(config.name, made)


class _OfOthers(nn.Module):
    """A loss of others, whose scalar is checked and weighed."""

    def __init__(self, name: str, loss: nn.Module) -> None:
        super().__init__()
        self.name, self.loss = name, loss

    def forward(
        self,
        logits: Sequence[Tensor],
        labels: Tensor,
        *,
        weight: float = 1.0,
        fraction: float = 1.0,  # noqa: ARG002 - of sums over all ranks, which these have none of
    ) -> Tensor:
        found = self.loss([head.float() for head in logits], labels)
        if not (isinstance(found, Tensor) and found.ndim == 0 and found.is_floating_point()):
            raise UsageError(f"loss {self.name}: gives {_shown(found)}, not a scalar")
        if torch.is_grad_enabled() and not found.requires_grad:
            raise UsageError(f"loss {self.name}: gives a scalar without a gradient")
        return found * weight


def _checked(
    name: str, num_logits: int, _network: nn.Module, given: tuple[Tensor, ...], output: object
) -> object:
    """The heads that a network gives for images, in a list if there are several."""
    image, several = given[0], isinstance(output, list | tuple)
    heads = list(output) if isinstance(output, list | tuple) else [output]
    fits = bool(heads) and all(_is_head(head, image, num_logits) for head in heads)
    if not fits or heads[0].shape[2:] != image.shape[2:]:
        due = (len(image), num_logits, *image.shape[2:])
        shown = ", ".join(map(_shown, heads))
        raise UsageError(
            f"network {name}: gives {shown} for images of {tuple(image.shape)}; its first head "
            f"owes {due}, and the edges of others divide that one's"
        )
    return heads if several else output


def _is_head(head: object, image: Tensor, num_logits: int) -> bool:
    """Whether logits fit the images, on their grid or a coarser one."""
    if not (isinstance(head, Tensor) and head.is_floating_point() and head.ndim == image.ndim):
        return False
    edges = zip(image.shape[2:], head.shape[2:], strict=True)
    divide = all(coarse > 0 and fine % coarse == 0 for fine, coarse in edges)
    return head.shape[:2] == (len(image), num_logits) and divide


def _shown(value: object) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
