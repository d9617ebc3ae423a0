"""A learner on its device, among the ranks that train together: DDP, compiled, its precision."""

import os
import warnings

import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from raybrats.config import TrainConfig
from raybrats.errors import UsageError
from raybrats.model.network import heads
from raybrats.train.learner import Learner

_BF16_CAPABILITY = (8, 0)
"""Compute capability from which NVIDIA's GPUs have bf16 (CUDA C++ Programming Guide)."""


def world_size() -> int:
    """The number of ranks that train together.

    Example:
        >>> world_size()
        1
    """
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


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


def choose_kernels(config: TrainConfig) -> None:
    """Has cuDNN look for its fastest kernels, or all of torch take those of the same bits.

    Whole cases have many sizes, and a search for each would take longer than it saves.

    Example:
        >>> choose_kernels(TrainConfig())
        >>> torch.backends.cudnn.benchmark
        True
    """
    steady = config.cluster.deterministic
    torch.backends.cudnn.benchmark = not steady and config.data.sampling != "volume"
    torch.use_deterministic_algorithms(steady, warn_only=True)
    if steady:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as cuBLAS wants it said


def make_ready(learner: Learner) -> None:
    """Chooses kernels, wraps the network for its ranks, and compiles it if the run says so.

    In this order torch splits the graph where DDP's buckets end, and exchanges a bucket while the
    rest is computed. Every rank calls this, or none.

    Example:
        >>> from raybrats.recipes import tiny
        >>> from raybrats.train.learner import new_learner
        >>> learner = new_learner(tiny(), torch.device("cpu"))
        >>> make_ready(learner)
        >>> learner.network is learner.bare
        True
    """
    if learner.device.type == "cuda":
        choose_kernels(learner.config)
    if world_size() > 1:
        ids = [learner.device.index] if learner.device.type == "cuda" else None
        learner.network = learner.ddp = DistributedDataParallel(learner.bare, device_ids=ids)
    if learner.config.cluster.compile:
        _compile(learner)


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
    failed = ""
    try:
        with learner.exchange(on=False):
            with learner.autocast():
                output = heads(compiled(learner.in_memory_format(patch.to(learner.device))))
            torch.stack([head.float().mean() for head in output]).sum().backward()
    except Exception as error:  # whatever a compiler fails with, the network itself still works
        words = " ".join(str(error).split("\n")[:2])  # the first often ends with "raised:"
        failed = f"{type(error).__name__}: {words[:200]}"
    learner.optimizer.zero_grad(set_to_none=True)
    failed = _first_of_all(failed)
    if not failed:
        learner.network = compiled
        return
    learner.not_compiled = (
        f"torch.compile failed ({failed}); "
        "training goes on without it, as with cluster.compile false"
    )
    warnings.warn(learner.not_compiled, stacklevel=3)


def _first_of_all(words: str) -> str:
    """The words of the first rank that has any."""
    everyone = [words]
    if world_size() > 1:
        everyone = [""] * world_size()
        torch.distributed.all_gather_object(everyone, words)
    return next(filter(None, everyone), "")
