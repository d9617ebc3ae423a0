"""What the driver tells the workers of a run; the driver itself imports no network."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raybrats.config import TrainConfig
from raybrats.data.cohort.case import Case

if TYPE_CHECKING:  # Ray Train's controller reads this file, and has no use for MLflow
    from ray.actor import ActorHandle

    from raybrats.registry.tracking import Run


@dataclass(frozen=True)
class Job:
    """Everything a worker needs, fixed by the driver."""

    config: TrainConfig
    run_uri: str
    train_cases: tuple[Case, ...]
    held_out: tuple[Case, ...]
    data_cpus: float
    """For the decoding tasks of each worker."""
    tracking: "Run"
    board: "ActorHandle | None" = None


def work(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`worker.work`, imported where it runs: MONAI takes seconds and 250 MB."""
    from raybrats.runs.worker import work

    return work(settings["job"])
