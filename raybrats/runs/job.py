"""What the driver tells the workers of a run, and what they tell it at the end."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from raybrats.config import TrainConfig
from raybrats.data.cohort.case import Case
from raybrats.errors import RaybratsError

if TYPE_CHECKING:  # Ray Train's controller reads this file, and has no use for MLflow
    from ray.actor import ActorHandle

    from raybrats.registry.tracking import Run


INITIAL = "initial.safetensors"
"""Beside the checkpoints of a run: what it begins with, if it begins with another run's weights."""


@dataclass(frozen=True)
class Job:
    """Everything a worker needs, fixed by the driver."""

    config: TrainConfig
    run_uri: str
    train_cases: tuple[Case, ...]
    held_out: tuple[Case, ...]
    data_cpus: float
    """CPUs for the decoding tasks of each worker."""
    tracking: "Run"
    board: "ActorHandle"


@dataclass(frozen=True)
class Outcome:
    """What the workers of a run came to."""

    step: int = 0
    """The last step that was done."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Scores and pace of the last validation."""
    rejected: int = 0
    """Checkpoints that did not verify."""
    uncached: int = 0
    """Cases that a node could not keep."""
    unsent: str = ""
    """Why some metrics did not reach MLflow; empty if all did."""
    restarts: int = 0
    """How often the workers started again."""
    failure: RaybratsError | None = None
    """What no restart helps; returned, for Ray starts again after what is raised."""
