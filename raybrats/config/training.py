"""How long and how fast it learns, and how it is validated."""

import math
from dataclasses import dataclass
from typing import Literal

from raybrats.config.section import Section, require


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Section):
    """Optimiser, its schedule and the length of the run."""

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = 3e-4
    weight_decay: float = 1e-4
    momentum: float = 0.99
    """Nesterov momentum of SGD (nnU-Net: 0.99)."""
    schedule: Literal["poly", "cosine"] = "poly"
    """Shape of the fall of the learning rate to 0 at the last step."""
    poly_power: float = 0.9
    """Exponent of `lr * (1 - step / steps) ** power` (nnU-Net: 0.9)."""
    warmup_steps: int = 0
    """Steps at the start over which the learning rate rises from 0."""
    clip_norm: float = 12.0
    """Norm to which a larger gradient is scaled down (nnU-Net: 12)."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type to which forward pass and loss are autocast; fp16 scales the loss. Under fp32 the
    convolutions of a GPU use TF32, which is torch's default."""
    steps: int = 250_000
    """Optimiser steps of the whole run."""
    global_batch: int = 2
    """Patches a step, over all workers."""
    micro_batch: int = 0
    """Patches that a worker takes at once; the gradients of several are added up. 0: all."""
    ema_decay: float = 0.0
    """Decay of the averages of the weights over steps, which are then what is validated and
    registered; 0 averages nothing."""
    max_skipped: int = 20
    """Steps in a row without a finite gradient, each of them skipped, after which the run stops;
    fp16 finds its scale in 16 at most."""

    def __post_init__(self) -> None:
        require(0 < self.lr < math.inf, "optim.lr", "> 0", self.lr)
        require(0 < self.momentum < 1, "optim.momentum", "in 0..1", self.momentum)
        require(self.weight_decay >= 0, "optim.weight_decay", ">= 0", self.weight_decay)
        require(self.poly_power >= 0, "optim.poly_power", ">= 0", self.poly_power)
        require(self.clip_norm > 0, "optim.clip_norm", "> 0", self.clip_norm)
        require(self.steps >= 1, "optim.steps", ">= 1", self.steps)
        require(self.global_batch >= 1, "optim.global_batch", ">= 1", self.global_batch)
        warm, decay = self.warmup_steps, self.ema_decay
        require(0 <= warm < self.steps, "optim.warmup_steps", "in 0..optim.steps", warm)
        require(self.micro_batch >= 0, "optim.micro_batch", ">= 0", self.micro_batch)
        require(0 <= decay < 1, "optim.ema_decay", "in 0..1", decay)
        require(self.max_skipped >= 1, "optim.max_skipped", ">= 1", self.max_skipped)


@dataclass(frozen=True, kw_only=True)
class ValidationConfig(Section):
    """How often the held-out cases are segmented whole; how is the prediction's."""

    every_steps: int = 2_500
    """Steps between validations; each also writes a checkpoint, and so does the end."""
    max_cases: int = 0
    """Held-out cases that are used, the first in cohort order; 0 uses all."""
    patience: int = 0
    """Validations in a row without a better mean region Dice after which the run ends; 0: never."""

    def __post_init__(self) -> None:
        require(self.patience >= 0, "validation.patience", ">= 0", self.patience)
        require(self.every_steps >= 1, "validation.every_steps", ">= 1", self.every_steps)
        require(self.max_cases >= 0, "validation.max_cases", ">= 0", self.max_cases)
