"""A small run that the faults befall."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from fault_proxy import Line, line_to
from faulty import STEPS

from raybrats.config import TrainConfig, override_all
from raybrats.errors import RaybratsError
from raybrats.runs.run import train


@pytest.fixture(scope="session")
def base(two_workers: TrainConfig) -> TrainConfig:
    """A few steps, a checkpoint after each of them; nothing is registered."""
    changes = {
        "optim.steps": STEPS,
        "optim.ema_decay": 0.5,
        "validation.every_steps": STEPS // 2,
        "cluster.collective_timeout_s": 15.0,
        "run.save_every_steps": 1,
        "tracking.experiment": "faults",
        "tracking.model": "",
    }
    return override_all(two_workers, changes)


@dataclass(frozen=True)
class Untold:
    """A run that no worker of which has met a fault, but MLflow was away from before its start."""

    config: TrainConfig
    line: Line
    refusal: RaybratsError
    """What the run says where the server is required."""
    refused_s: float
    outcome: RaybratsError
    """What it says at its end where the server is not required."""

    @property
    def run_uri(self) -> str:
        return f"{self.config.run.storage_uri}/{self.config.run.name}"


@pytest.fixture(scope="session")
def untold(base: TrainConfig) -> Iterator[Untold]:
    """Its weights are what every other run is to end with."""
    with line_to(base.tracking.uri) as line:
        line.become("cut")
        away = {"run.name": "untold", "tracking.uri": line.uri, "tracking.model": "untold"}
        config, began = override_all(base, away), time.monotonic()
        with pytest.raises(RaybratsError) as refusal:
            train(config)
        refused_s = time.monotonic() - began
        config = override_all(config, {"tracking.required": False})
        with pytest.raises(RaybratsError) as outcome:
            train(config)
        yield Untold(config, line, refusal.value, refused_s, outcome.value)
