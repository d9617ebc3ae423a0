"""The session's servers: each starts when the first test asks for it and ends with the session."""

import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.update(  # before anything imports ray or mlflow
    RAY_AUTH_MODE="token",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_DATA_DISABLE_PROGRESS_BARS="1",
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    OMP_NUM_THREADS="1",
    MLFLOW_DISABLE_TELEMETRY="true",
    NO_PROXY="127.0.0.1,localhost",
)
# Hundreds of processes import the package: its source is compiled once, whatever a machine prefers
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

from services import S3, RayHead, make_bucket, mlflow_server, ray_head, s3_server

from raybrats.config import (
    ClusterConfig,
    DataConfig,
    NetworkConfig,
    OptimConfig,
    RunConfig,
    TrackingConfig,
    TrainConfig,
)
from raybrats.data.cohort.index import index
from raybrats.phantom.phantom import write_phantoms

# A shell starts its background jobs with SIGINT ignored, and so would all that is started here be
signal.signal(signal.SIGINT, signal.default_int_handler)
TESTS = Path(__file__).parent
# No example fails for its time: machines are loaded, and tests of time are elsewhere
UNTIMED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("soak", **UNTIMED)
settings.register_profile("ci", **UNTIMED, max_examples=25)
settings.load_profile("soak" if "RAYBRATS_SOAK" in os.environ else "ci")


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """The S3 server; every client of this process finds it in the environment."""
    from s3fs import S3FileSystem

    with s3_server(tmp_path_factory.mktemp("s3")) as server, pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        for name, value in server.environment().items():
            patch.setenv(name, value)
        S3FileSystem.clear_instance_cache()
        yield server
        S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="session")
def new_bucket(s3: S3) -> Callable[[], str]:
    """Makes a bucket per call and returns its name."""
    return lambda: make_bucket(s3, f"test-{uuid.uuid4().hex[:12]}")


@pytest.fixture
def bucket(new_bucket: Callable[[], str]) -> str:
    """Name of a bucket of this test's own."""
    return new_bucket()


@pytest.fixture(scope="session")
def mlflow_uri(tmp_path_factory: pytest.TempPathFactory, s3: S3) -> Iterator[str]:
    """Tracking URI of the MLflow server, whose artifacts lie in the bucket "mlflow"."""
    make_bucket(s3, "mlflow")
    with mlflow_server(tmp_path_factory.mktemp("mlflow"), s3, "mlflow") as uri:
        yield uri


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory, s3: S3) -> Iterator[RayHead]:
    """The Ray head of four logical CPUs, with this process connected to it.

    Its workers import raybrats, and the modules that hold the tests, from this checkout.
    """
    modules = [folder for folder in sys.path if Path(folder).is_relative_to(TESTS)]
    environment = {
        **s3.environment(),
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), *modules]),
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
        "RAY_metrics_report_interval_ms": "2000" if "RAYBRATS_SOAK" in os.environ else "10000",
        # An idle worker waits for the next test: starting another one costs a second of a core
        "RAY_num_workers_soft_limit": "12",
        "RAY_idle_worker_killing_time_threshold_ms": "60000",
        # One process less a run; nodes go away in the soak alone
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1" if "RAYBRATS_SOAK" in os.environ else "0",
    }
    with (
        ray_head(tmp_path_factory.mktemp("ray"), environment) as head,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in head.environment.items():
            patch.setenv(name, value)
        import ray

        ray.init(address=head.address)
        yield head
        ray.shutdown()


@pytest.fixture(scope="session")
def two_workers(
    tmp_path_factory: pytest.TempPathFactory, ray_cluster: RayHead, mlflow_uri: str
) -> TrainConfig:
    """A run of two workers on five small phantoms; steps, names and what is kept are the test's."""
    assert ray_cluster.address
    folder = tmp_path_factory.mktemp("two_workers")
    write_phantoms(str(folder / "tree"), num_cases=5, shape=(24, 24, 20))
    cohort_uri = str(folder / "cohort.parquet")  # else every driver would index the tree anew
    index(str(folder / "tree"), cohort_uri)
    return TrainConfig(
        recipe="tiny",
        data=DataConfig(cohort=cohort_uri, patch_size=(16, 16, 16)),
        network=NetworkConfig(widths=(4, 8, 8), deep_supervision=1),
        optim=OptimConfig(global_batch=2),
        cluster=ClusterConfig(workers=2, cpus_per_worker=0.5, device="cpu", max_failures=0),
        run=RunConfig(storage_uri=str(folder / "runs")),
        tracking=TrackingConfig(uri=mlflow_uri),
    )


@pytest.fixture(scope="session")
def real_cases() -> Path:
    """Folder of real BraTS cases, which cannot be redistributed."""
    if "RAYBRATS_REAL_CASES" not in os.environ:
        pytest.skip("RAYBRATS_REAL_CASES does not name a folder of real BraTS cases")
    return Path(os.environ["RAYBRATS_REAL_CASES"])
