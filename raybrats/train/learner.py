"""A network while it learns: weights, optimiser, schedule, averages, and the state of them all."""

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raybrats.config import TrainConfig
from raybrats.errors import CheckpointError
from raybrats.model.loss import loss_of
from raybrats.model.network import autocast, load_weights, network_of, weights_of
from raybrats.train.optimizer import new_optimizer, optimizer_mismatches, with_own_kernels
from raybrats.train.verdict import Verdict, read

_PROGRESS = {
    "step": "step",
    "best": "best",
    "validations_since_best": "stale",
    "skipped": "skipped",
    "validated_at": "judged_at",
}
"""Fields of a learner by their names in stored checkpoints, which stay as they were first."""


@dataclass
class Learner:
    """A network while it learns."""

    config: TrainConfig
    device: torch.device
    network: nn.Module
    """The network that is called in training: compiled, in a wrapper, or the bare one."""
    bare: nn.Module
    """The same network without a wrapper."""
    optimizer: torch.optim.Optimizer
    loss: nn.Module
    scaler: torch.amp.GradScaler
    """Scales the loss under fp16; else it does nothing."""
    average: nn.Module | None = None
    """The network with the exponential moving average of the weights, where the run wants one."""
    averaged: int = 0
    """Steps that the average has seen."""
    not_compiled: str = ""
    """Why the network is not compiled, where the run wants it."""
    ddp: DistributedDataParallel | None = None
    """The wrapper in which ranks exchange gradients, where there are several."""
    step: int = 0
    """Steps that were done."""
    best: float = -1.0
    """Highest mean region Dice of a validation so far; below all before the first."""
    validations_since_best: int = 0
    """Validations since the best one."""
    validated_at: int = 0
    """Step of the last validation."""
    skipped: int = 0
    """Steps of the whole run that had no finite gradient."""
    skipped_in_a_row: list[int] = field(default_factory=list)
    """The skipped steps that lie directly before `step`."""
    unread: Verdict | None = None
    """What the last step came to, while the host has not read it."""
    cached: dict[str, float] = field(default_factory=dict)
    """What the node caches were good for over all ranks and attempts, by names that begin so:
    cache/. Counted where the batches come from; kept here, so that a resumed run counts on."""

    @property
    def validated(self) -> nn.Module:
        """The network that is validated and registered."""
        return self.bare if self.average is None else self.average

    def in_memory_format(self, image: Tensor) -> Tensor:
        """The image (batch, modality, i, j, k) in the memory format of the network's weights."""
        if self.config.spatial_dims == 2:  # it takes (batch, modality, i, j) out of this by itself
            return image
        return image.contiguous(memory_format=_memory_format(self.config))

    def autocast(self) -> torch.autocast:
        """The context in which forward pass and loss are computed in the run's precision."""
        return autocast(self.config, self.device)

    def exchange(self, *, on: bool) -> AbstractContextManager[None]:
        """The context of a forward and a backward pass in which ranks exchange gradients or not."""
        return self.ddp.no_sync() if self.ddp is not None and not on else nullcontext()

    def weights(self) -> dict[str, Tensor]:
        """The weights that are validated and registered."""
        return weights_of(self.validated)

    def state(self) -> dict[str, Any]:
        """Everything else that resuming needs, as tensors and plain values."""
        self.settle()
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "torch_rng": torch.get_rng_state(),
        }
        if self.average is not None:
            state["raw_weights"] = weights_of(self.bare)
            state["averaged"] = self.averaged
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        return state

    def progress(self) -> dict[str, float]:
        """The numbers that say how far the learner is, by their names in stored checkpoints."""
        self.settle()
        return {stored: getattr(self, name) for name, stored in _PROGRESS.items()} | self.cached

    def add_validation(self, mean_dice: float) -> None:
        """Counts a validation of the present step, by its mean region Dice."""
        better = mean_dice > self.best
        self.validations_since_best = 0 if better else self.validations_since_best + 1
        self.best, self.validated_at = max(self.best, mean_dice), self.step

    @property
    def skips_itself(self) -> bool:
        """Whether the device itself leaves out a step that has no finite gradient.

        An optimiser in one kernel does; but SGD's would leave its first momenta unset.
        """
        begun = bool(self.optimizer.state) and (self.average is None or self.averaged > 0)
        return begun and bool(self.optimizer.param_groups[0]["fused"])

    def settle(self) -> None:
        """Counts what the last step came to, once the device has said it."""
        if self.unread is None:
            return
        verdict, self.unread = self.unread, None
        if read(verdict):
            self.skipped_in_a_row.clear()
            self.averaged += self.average is not None
        else:
            self.skipped += 1
            self.skipped_in_a_row.append(self.step - 1)

    def add_to_average(self, finite: Tensor | None = None) -> None:
        """Moves the average of the weights, if there is one, by the step that was done.

        torch's AveragedModel does the same, but asks the device three times how often it has.

        Args:
            finite: whether there was a step, where only the device knows.
        """
        if self.average is None:
            return
        if not self.averaged:
            load_weights(self.average, weights_of(self.bare))
            return
        share = 1 - self.config.optim.ema_decay
        averages: list[Tensor] = list(self.average.parameters())
        weights: list[Tensor] = list(self.bare.parameters())
        with torch.no_grad():
            if finite is None:
                torch._foreach_lerp_(averages, weights, share)
            else:
                shares = [finite * share] * len(weights)
                torch._foreach_lerp_(averages, weights, shares)
            for kept, buffer in zip(self.average.buffers(), self.bare.buffers(), strict=True):
                kept.copy_(buffer if finite is None else torch.where(finite, buffer, kept))

    def begin(self, weights: Mapping[str, Tensor]) -> None:
        """Takes over the weights that there are, before the first step."""
        for network in (self.bare, self.validated):
            load_weights(network, weights_of(network) | dict(weights))

    def restore(
        self, weights: Mapping[str, Tensor], state: Mapping[str, Any], progress: Mapping[str, Any]
    ) -> None:
        """Takes over what `weights`, `state` and `progress` gave before.

        Raises:
            CheckpointError: they are of another network or optimiser, or lack a part; with the
                names and shapes that differ.

        Example:
            >>> from raybrats.recipes import tiny
            >>> first, second = (new_learner(tiny(), torch.device("cpu")) for _ in range(2))
            >>> first.step = 7
            >>> second.restore(first.weights(), first.state(), first.progress())
            >>> second.step
            7
        """
        _require_state(self, state, progress)
        load_weights(self.bare, state.get("raw_weights", weights))
        if self.average is not None:
            load_weights(self.average, weights)
            self.averaged = state["averaged"]
        self.optimizer.load_state_dict(with_own_kernels(self.optimizer, state["optimizer"]))
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["torch_rng"])
        if self.device.type == "cuda" and "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        for name, stored in _PROGRESS.items():
            setattr(self, name, progress[stored])
        self.cached = {name: value for name, value in progress.items() if name.startswith("cache/")}


def new_learner(config: TrainConfig, device: torch.device) -> Learner:
    """A learner at step 0, whose initial weights follow from the seed.

    Example:
        >>> from raybrats.recipes import tiny
        >>> learner = new_learner(tiny(), torch.device("cpu"))
        >>> learner.step, type(learner.network).__name__
        (0, 'UNet')
    """
    torch.manual_seed(config.run.seed)
    network = network_of(config)
    # ty: torch declares `memory_format` for tensors only.
    network = network.to(device, memory_format=_memory_format(config))  # ty: ignore[no-matching-overload]
    average = copy.deepcopy(network) if config.optim.ema_decay > 0 else None
    return Learner(
        config=config,
        device=device,
        network=network,
        bare=network,
        # on a CPU torch's own choice, so that runs from before end with the same bits
        optimizer=new_optimizer(config.optim, network, fused=device.type == "cuda" or None),
        loss=loss_of(config).to(device),
        scaler=torch.amp.GradScaler(device.type, enabled=config.optim.precision == "fp16"),
        average=average,
    )


def progress_to_continue(progress: Mapping[str, Any]) -> dict[str, Any]:
    """What `Learner.progress` gave, for a new run that goes on from there.

    Caches are counted anew, and so are the validations without a better one.

    Example:
        >>> progress_to_continue({"step": 8, "best": 0.7, "stale": 3, "cache/hits": 5})
        {'step': 8, 'best': 0.7, 'stale': 0}
    """
    kept = {name: value for name, value in progress.items() if name in _PROGRESS.values()}
    return kept | {_PROGRESS["validations_since_best"]: 0}


def _memory_format(config: TrainConfig) -> torch.memory_format:
    if not config.cluster.channels_last:
        return torch.contiguous_format
    return torch.channels_last_3d if config.spatial_dims == 3 else torch.channels_last


def _require_state(learner: Learner, state: Mapping[str, Any], progress: Mapping[str, Any]) -> None:
    wanted = {"optimizer", "scaler", "torch_rng"}
    if learner.average is not None:
        wanted |= {"raw_weights", "averaged"}
    missing = sorted({*wanted} - set(state)) + sorted({*_PROGRESS.values()} - set(progress))
    mismatches = [f"{name} is missing" for name in missing]
    mismatches += [f"{n} is unknown" for n in sorted(set(state) - wanted - {"cuda_rng"})]
    if not mismatches:
        mismatches = optimizer_mismatches(learner.optimizer, state["optimizer"])
    if mismatches:
        more = f" and {len(mismatches) - 5} more" if len(mismatches) > 5 else ""
        raise CheckpointError(f"the state does not fit this run: {'; '.join(mismatches[:5])}{more}")
