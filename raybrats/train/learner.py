"""A network while it learns: weights, optimiser, schedule, averages, and the state of them all."""

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from raybrats.config import OptimConfig, TrainConfig
from raybrats.errors import CheckpointError, UsageError
from raybrats.model.loss import loss_of
from raybrats.model.network import heads, load_weights, network_of, weights_of

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Types that autocast computes in, by `optim.precision`; under fp32 there is no autocast."""
_BF16_CAPABILITY = (8, 0)
"""Compute capability from which NVIDIA's GPUs have bf16 (CUDA C++ Programming Guide)."""
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
        precision = self.config.optim.precision
        kind = PRECISIONS.get(precision, torch.bfloat16)
        return torch.autocast(self.device.type, kind, precision in PRECISIONS)

    def exchange(self, *, on: bool) -> AbstractContextManager[None]:
        """The context of a forward and a backward pass in which ranks exchange gradients or not."""
        return self.ddp.no_sync() if self.ddp is not None and not on else nullcontext()

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
            state["averaged"] = self.averaged
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

    def add_to_average(self) -> None:
        """Moves the average of the weights, if there is one, by the step that was done.

        torch's AveragedModel does the same, but asks the device three times how often it has.
        """
        if self.average is None:
            return
        with torch.no_grad():
            averages, weights = (list(n.parameters()) for n in (self.average, self.bare))
            if self.averaged:
                get_ema_multi_avg_fn(self.config.optim.ema_decay)(averages, weights, self.averaged)
            else:
                load_weights(self.average, weights_of(self.bare))
            for kept, buffer in zip(self.average.buffers(), self.bare.buffers(), strict=True):
                kept.copy_(buffer)
        self.averaged += 1

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
        self.optimizer.load_state_dict(_by_own_kernels(self.optimizer, state["optimizer"]))
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["torch_rng"])
        if self.device.type == "cuda" and "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        for name, stored in _PROGRESS.items():
            setattr(self, name, progress[stored])
        self.cached = {name: value for name, value in progress.items() if name.startswith("cache/")}


def check_precision(config: TrainConfig, device: torch.device) -> None:
    """Refuses a precision that the device has no arithmetic for: torch would emulate it, slowly.

    Raises:
        UsageError: it is bf16 on a GPU below compute capability 8.0 (NVIDIA's table of types).

    Example:
        >>> check_precision(TrainConfig(), torch.device("cpu"))
    """
    if device.type != "cuda" or config.optim.precision != "bf16" or torch.version.hip:
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < _BF16_CAPABILITY:
        raise UsageError(
            f"optim.precision is bf16, for which {torch.cuda.get_device_name(device)} has no "
            f"arithmetic (compute capability {capability[0]}.{capability[1]}); "
            "take --optim.precision fp16"
        )


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
    learner = Learner(
        config=config,
        device=device,
        network=network,
        bare=network,
        # on a CPU torch's own choice, so that runs from before end with the same bits
        optimizer=_optimizer(config.optim, network, fused=device.type == "cuda" or None),
        loss=loss_of(config).to(device),
        scaler=torch.amp.GradScaler(device.type, enabled=config.optim.precision == "fp16"),
        average=average,
    )
    return learner


def make_ready(learner: Learner) -> None:
    """Wraps the network for the ranks that train together, then compiles it if the run says so.

    In this order torch splits the graph where DDP's buckets end, and exchanges a bucket while the
    rest is computed. Every rank calls this, or none.

    Example:
        >>> from raybrats.recipes import tiny
        >>> learner = new_learner(tiny(), torch.device("cpu"))
        >>> make_ready(learner)
        >>> learner.network is learner.bare
        True
    """
    if world_size() > 1:
        ids = [learner.device.index] if learner.device.type == "cuda" else None
        learner.network = learner.ddp = DistributedDataParallel(learner.bare, device_ids=ids)
    if learner.config.cluster.compile:
        _compile(learner)


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


def _optimizer(
    config: OptimConfig, network: nn.Module, *, fused: bool | None
) -> torch.optim.Optimizer:
    """The optimiser of a network; `fused` where one kernel does all that it does to a weight."""
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


def _by_own_kernels(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimiser's state with this one's choice of kernels: it may come from another device."""
    own = {name: optimizer.param_groups[0][name] for name in ("fused", "foreach")}
    return {**state, "param_groups": [{**group, **own} for group in state["param_groups"]]}


def _memory_format(config: TrainConfig) -> torch.memory_format:
    if not config.cluster.channels_last:
        return torch.contiguous_format
    return torch.channels_last_3d if config.spatial_dims == 3 else torch.channels_last


def _compile(learner: Learner) -> None:
    """Compiles the network and tries it on a batch, which warms it up.

    Where that fails on one rank, all go on without: those that compile and those that do not would
    exchange other buckets.
    """
    config = learner.config
    compiled = torch.compile(learner.network, dynamic=False)
    assert isinstance(compiled, nn.Module), "of a module, torch compiles a module"
    most = -(-config.optim.global_batch // world_size())
    size = min(most, config.optim.micro_batch or most)  # of the step's batches: else made anew
    patch = torch.zeros(size, len(config.data.modalities), *config.data.patch_size)
    failed = [""]
    try:
        with learner.exchange(on=False):
            with learner.autocast():
                output = heads(compiled(learner.in_memory_format(patch.to(learner.device))))
            torch.stack([head.float().mean() for head in output]).sum().backward()
    except Exception as error:  # whatever a compiler fails with, the network itself still works
        words = " ".join(str(error).split("\n")[:2])  # the first often ends with "raised:"
        failed = [f"{type(error).__name__}: {words[:200]}"]
    learner.optimizer.zero_grad(set_to_none=True)
    if world_size() > 1:
        mine, failed = failed[0], [""] * world_size()
        torch.distributed.all_gather_object(failed, mine)
    for words in filter(None, failed):
        learner.not_compiled = (
            f"torch.compile failed ({words}); "
            "training goes on without it, as with cluster.compile false"
        )
        warnings.warn(learner.not_compiled, stacklevel=3)
        return
    learner.network = compiled


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
