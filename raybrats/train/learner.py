"""A network while it learns: weights, optimiser, schedule, averages, and the state of all that."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from raybrats.config import OptimConfig, TrainConfig
from raybrats.errors import CheckpointError
from raybrats.model.loss import RegionLoss
from raybrats.model.network import build, heads, load_weights, weights_of

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
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
    """Called in training: compiled, or a DDP wrapper, or the bare one."""
    bare: nn.Module
    """The same network without a wrapper."""
    optimizer: torch.optim.Optimizer
    loss: RegionLoss
    scaler: torch.amp.GradScaler
    """Of the loss, under fp16; else it does nothing."""
    average: AveragedModel | None = None
    """Exponential moving average of the weights, where the run wants one."""
    step: int = 0
    best: float = -1.0
    """Highest mean region Dice of a validation so far; below all before the first."""
    validations_since_best: int = 0
    """Validations since the best one."""
    validated_at: int = 0
    """Step of the last validation."""
    skipped: int = 0
    """Steps that had no finite gradient, of the whole run."""
    skipped_in_a_row: list[int] = field(default_factory=list)
    """Those of them that lie directly before `step`."""

    @property
    def validated(self) -> nn.Module:
        """The network that is validated and registered."""
        return self.average.module if self.average is not None else self.bare

    def in_memory_format(self, image: Tensor) -> Tensor:
        """The image (batch, modality, i, j, k) as it lies best in memory for the network."""
        if self.config.spatial_dims == 2:  # it takes (batch, modality, i, j) out of this by itself
            return image
        return image.contiguous(memory_format=_memory_format(self.config))

    def autocast(self) -> torch.autocast:
        """The precision of forward and loss."""
        precision = self.config.optim.precision
        kind = PRECISIONS.get(precision, torch.bfloat16)
        return torch.autocast(self.device.type, kind, precision in PRECISIONS)

    def weights(self) -> dict[str, Tensor]:
        """The weights that are validated and registered."""
        return weights_of(self.validated)

    def state(self) -> dict[str, Any]:
        """Everything else that resuming needs; tensors and plain values."""
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "torch_rng": torch.get_rng_state(),
        }
        if self.average is not None:
            state["raw_weights"] = weights_of(self.bare)
            state["averaged"] = int(self.average.n_averaged)
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        return state

    def progress(self) -> dict[str, float]:
        """How far it is: what a validation changes of it."""
        return {stored: getattr(self, name) for name, stored in _PROGRESS.items()}

    def restore(
        self, weights: Mapping[str, Tensor], state: Mapping[str, Any], progress: Mapping[str, Any]
    ) -> None:
        """Continues from a checkpoint.

        Raises:
            CheckpointError: it is of another network or optimiser, or lacks a part; with the
                names and shapes that differ.
        """
        _require_state(self, state)
        load_weights(self.bare, state.get("raw_weights", weights))
        if self.average is not None:
            load_weights(self.average.module, weights)
            self.average.n_averaged.fill_(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["torch_rng"])
        if self.device.type == "cuda" and "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        for name, stored in _PROGRESS.items():
            setattr(self, name, progress[stored])


def new_learner(config: TrainConfig, device: torch.device) -> Learner:
    """A learner at step 0; its initial weights follow from the seed."""
    torch.manual_seed(config.run.seed)
    network = build(config.network, len(config.data.modalities), config.spatial_dims)
    network = network.to(device, memory_format=_memory_format(config))
    average = None
    if config.optim.ema_decay > 0:
        average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(config.optim.ema_decay))
    learner = Learner(
        config=config,
        device=device,
        network=network,
        bare=network,
        optimizer=_optimizer(config.optim, network),
        loss=RegionLoss(config.loss),
        scaler=torch.amp.GradScaler(device.type, enabled=config.optim.precision == "fp16"),
        average=average,
    )
    if config.cluster.compile:
        learner.network = _compiled(learner)
    return learner


def world_size() -> int:
    """Ranks that train together."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def learning_rate(config: OptimConfig, step: int) -> float:
    """The rate of a step: up over the warm-up, then down to 0 at the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    if config.schedule == "cosine":
        return config.lr * (1 + math.cos(math.pi * done)) / 2
    return config.lr * (1 - done) ** config.poly_power


def _optimizer(config: OptimConfig, network: nn.Module) -> torch.optim.Optimizer:
    if config.name == "sgd":
        return torch.optim.SGD(
            network.parameters(),
            config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=True,
        )
    return torch.optim.AdamW(network.parameters(), config.lr, weight_decay=config.weight_decay)


def _memory_format(config: TrainConfig) -> torch.memory_format:
    if not config.cluster.channels_last:
        return torch.contiguous_format
    return torch.channels_last_3d if config.spatial_dims == 3 else torch.channels_last


def _compiled(learner: Learner) -> nn.Module:
    """The network compiled and tried on a batch, which also warms it up; else as it is."""
    config = learner.config
    compiled = torch.compile(learner.bare, dynamic=False)
    most = -(-config.optim.global_batch // world_size())
    size = min(most, config.optim.micro_batch or most)  # of the step's batches: else made anew
    patch = torch.zeros(size, len(config.data.modalities), *config.data.patch_size)
    try:
        with learner.autocast():
            output = heads(compiled(learner.in_memory_format(patch.to(learner.device))))
        torch.stack([head.float().mean() for head in output]).sum().backward()
    except Exception as error:  # whatever a compiler fails with, the network itself still works
        words = str(error).strip().splitlines() or [""]
        warnings.warn(
            f"torch.compile failed ({type(error).__name__}: {words[0][:200]}); "
            "training goes on without it, as with cluster.compile false",
            stacklevel=2,
        )
        compiled = learner.bare
    learner.optimizer.zero_grad(set_to_none=True)
    return compiled


def _require_state(learner: Learner, state: Mapping[str, Any]) -> None:
    wanted = {"optimizer", "scaler", "torch_rng"}
    if learner.average is not None:
        wanted |= {"raw_weights", "averaged"}
    mismatches = [f"{name} is missing" for name in sorted(wanted - set(state))]
    mismatches += [f"{n} is unknown" for n in sorted(set(state) - wanted - {"cuda_rng"})]
    if not mismatches:
        mismatches = _optimizer_mismatches(learner.optimizer, state["optimizer"])
    if mismatches:
        more = f" and {len(mismatches) - 5} more" if len(mismatches) > 5 else ""
        raise CheckpointError(f"the state does not fit this run: {'; '.join(mismatches[:5])}{more}")


def _optimizer_mismatches(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> list[str]:
    """What an optimiser's state has that this one's parameters do not fit."""
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
