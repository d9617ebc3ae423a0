"""A network while it learns: weights, optimiser, schedule, averages, and the state of them all."""

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
from raybrats.model.loss import loss_of
from raybrats.model.network import heads, load_weights, network_of, weights_of

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Types that autocast computes in, by `optim.precision`; under fp32 there is no autocast."""
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
    """The network that is called in training: compiled, in a DDP wrapper, or the bare one."""
    bare: nn.Module
    """The same network without a wrapper."""
    optimizer: torch.optim.Optimizer
    loss: nn.Module
    scaler: torch.amp.GradScaler
    """Scales the loss under fp16; else it does nothing."""
    average: AveragedModel | None = None
    """Exponential moving average of the weights, where the run wants one."""
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
    cached: dict[str, float] = field(default_factory=dict)
    """What the node caches were good for over all ranks and attempts, by names that begin so:
    cache/. Counted where the batches come from; kept here, so that a resumed run counts on."""

    @property
    def validated(self) -> nn.Module:
        """The network that is validated and registered."""
        return self.average.module if self.average is not None else self.bare

    def in_memory_format(self, image: Tensor) -> Tensor:
        """The image (batch, modality, i, j, k) in the memory format of the network's weights."""
        if self.config.spatial_dims == 2:  # it takes (batch, modality, i, j) out of this by itself
            return image
        return image.contiguous(memory_format=_memory_format(self.config))

    def autocast(self) -> torch.autocast:
        """The context in which forward pass and loss are computed in the run's precision."""
        precision = self.config.optim.precision
        kind = PRECISIONS.get(precision, torch.bfloat16)
        return torch.autocast(self.device.type, kind, precision in PRECISIONS)

    def weights(self) -> dict[str, Tensor]:
        """The weights that are validated and registered."""
        return weights_of(self.validated)

    def state(self) -> dict[str, Any]:
        """Everything else that resuming needs, as tensors and plain values."""
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
        """The numbers that say how far the learner is, by their names in stored checkpoints."""
        return {stored: getattr(self, name) for name, stored in _PROGRESS.items()} | self.cached

    def add_validation(self, mean_dice: float) -> None:
        """Counts a validation of the present step, by its mean region Dice."""
        better = mean_dice > self.best
        self.validations_since_best = 0 if better else self.validations_since_best + 1
        self.best, self.validated_at = max(self.best, mean_dice), self.step

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
            load_weights(self.average.module, weights)
            self.average.n_averaged.fill_(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
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
    average = None
    if config.optim.ema_decay > 0:
        average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(config.optim.ema_decay))
    learner = Learner(
        config=config,
        device=device,
        network=network,
        bare=network,
        optimizer=_optimizer(config.optim, network),
        loss=loss_of(config).to(device),
        scaler=torch.amp.GradScaler(device.type, enabled=config.optim.precision == "fp16"),
        average=average,
    )
    if config.cluster.compile:
        learner.network = _compiled(learner)
    return learner


def progress_to_continue(progress: Mapping[str, Any]) -> dict[str, Any]:
    """What `Learner.progress` gave, for a new run that goes on from there.

    Caches are counted anew, and so are the validations without a better one.

    Example:
        >>> progress_to_continue({"step": 8, "best": 0.7, "stale": 3, "cache/hits": 5})
        {'step': 8, 'best': 0.7, 'stale': 0}
    """
    kept = {name: value for name, value in progress.items() if name in _PROGRESS.values()}
    return kept | {_PROGRESS["validations_since_best"]: 0}


def world_size() -> int:
    """The number of ranks that train together.

    Example:
        >>> world_size()
        1
    """
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


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
    """The network compiled and tried on a batch, which warms it up; the bare one if that fails."""
    config = learner.config
    compiled = torch.compile(learner.bare, dynamic=False)
    assert isinstance(compiled, nn.Module), "of a module, torch compiles a module"
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


def _require_state(learner: Learner, state: Mapping[str, Any], progress: Mapping[str, Any]) -> None:
    wanted = {"optimizer", "scaler", "torch_rng"}
    if learner.average is not None:
        wanted |= {"raw_weights", "averaged"}
    missing = sorted({*wanted} - set(state)) + sorted({*_PROGRESS.values()} - set(progress))
    mismatches = [f"{name} is missing" for name in missing]
    mismatches += [f"{n} is unknown" for n in sorted(set(state) - wanted - {"cuda_rng"})]
    if not mismatches:
        mismatches = _optimizer_mismatches(learner.optimizer, state["optimizer"])
    if mismatches:
        more = f" and {len(mismatches) - 5} more" if len(mismatches) > 5 else ""
        raise CheckpointError(f"the state does not fit this run: {'; '.join(mismatches[:5])}{more}")


def _optimizer_mismatches(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> list[str]:
    """What of an optimiser's state does not fit this one's parameters."""
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
