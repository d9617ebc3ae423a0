"""A small run that the faults befall."""

import pytest
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
)
from raybrats.data.phantom import write_phantoms


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
