"""The optimiser of a run: its kernels, its state, and the rate of each step."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from raybrats.config import OptimConfig


def learning_rate(config: OptimConfig, step: int) -> float:
    """The rate of a step: it rises over the warm-up, then falls to 0 at the end of the run.

    Example:
        >>> config = OptimConfig(lr=0.1, steps=1000, warmup_steps=10)
        >>> [round(learning_rate(config, step), 4) for step in (0, 9, 10, 505, 1000)]
        [0.01, 0.1, 0.1, 0.0536, 0.0]
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    if config.schedule == "cosine":
        return config.lr * (1 + math.cos(math.pi * done)) / 2
    return config.lr * (1 - done) ** config.poly_power


def new_optimizer(
    config: OptimConfig, network: nn.Module, *, fused: bool | None
) -> torch.optim.Optimizer:
    """The optimiser of a network.

    Args:
        config: its kind and numbers.
        network: the network.
        fused: whether one kernel does all that it does to a weight; None: as torch chooses.

    Example:
        >>> type(new_optimizer(OptimConfig(name="sgd"), nn.Linear(1, 1), fused=None)).__name__
        'SGD'
    """
    if config.name == "sgd":
        return torch.optim.SGD(
            network.parameters(),
            config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=True,
            fused=fused,
        )
    return torch.optim.AdamW(
        network.parameters(), config.lr, weight_decay=config.weight_decay, fused=fused
    )


def with_own_kernels(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimiser's state with this one's choice of kernels: it may come from another device.

    Example:
        >>> on_gpu, here = (
        ...     new_optimizer(OptimConfig(), nn.Linear(1, 1), fused=fused) for fused in (True, None)
        ... )
        >>> with_own_kernels(here, on_gpu.state_dict())["param_groups"][0]["fused"] is None
        True
    """
    own = {name: optimizer.param_groups[0][name] for name in ("fused", "foreach")}
    return {**state, "param_groups": [{**group, **own} for group in state["param_groups"]]}


def optimizer_mismatches(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> list[str]:
    """What of an optimiser's state does not fit this one's parameters.

    Example:
        >>> two, one = (nn.Linear(1, 1), nn.Linear(1, 1, bias=False))
        >>> kept, other = (new_optimizer(OptimConfig(), n, fused=None) for n in (two, one))
        >>> optimizer_mismatches(other, kept.state_dict())
        ['optimizer has 2 tensors, not 1']
    """
    parameters: Sequence[Tensor] = [p for g in optimizer.param_groups for p in g["params"]]
    own, saved = optimizer.state_dict()["param_groups"][0], state["param_groups"][0]
    mismatches = [f"optimizer.{name}" for name in sorted(set(own) ^ set(saved))]
    if len(saved["params"]) != len(parameters):
        return [*mismatches, f"optimizer has {len(saved['params'])} tensors, not {len(parameters)}"]
    for number, kept in state["state"].items():
        due = tuple(parameters[number].shape)
        for name, tensor in kept.items():
            if isinstance(tensor, Tensor) and tensor.ndim and tuple(tensor.shape) != due:
                mismatches.append(
                    f"optimizer {name} of tensor {number}: {tuple(tensor.shape)}, not {due}"
                )
    return mismatches
