"""A small run that the faults befall."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from fault_proxy import Line, line_to
from faulty import STEPS
from services import RayHead

from raybrats.config import (
    ClusterConfig,
    DataConfig,
    NetworkConfig,
    OptimConfig,
    RunConfig,
    TrackingConfig,
    TrainConfig,
    ValidationConfig,
    override_all,
)
from raybrats.data.phantom import write_phantoms
from raybrats.errors import RaybratsError
from raybrats.train.run import train


@pytest.fixture(scope="session")
def base(
    tmp_path_factory: pytest.TempPathFactory, ray_cluster: RayHead, mlflow_uri: str
) -> TrainConfig:
    """Two workers, a few steps, a checkpoint after each of them; nothing is registered."""
    assert ray_cluster.address
    folder = tmp_path_factory.mktemp("faults")
    write_phantoms(str(folder / "tree"), num_cases=5, shape=(24, 24, 20))
    return TrainConfig(
        recipe="tiny",
        data=DataConfig(cohort=str(folder / "tree"), patch_size=(16, 16, 16)),
        network=NetworkConfig(widths=(4, 8, 8), deep_supervision=1),
        optim=OptimConfig(steps=STEPS, global_batch=2, ema_decay=0.5),
        validation=ValidationConfig(every_steps=STEPS // 2),
        cluster=ClusterConfig(
            workers=2,
            cpus_per_worker=0.5,
            device="cpu",
            max_failures=0,
            collective_timeout_s=15.0,
        ),
        run=RunConfig(storage_uri=str(folder / "runs"), save_every_steps=1),
        tracking=TrackingConfig(uri=mlflow_uri, experiment="faults", model=""),
    )


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
