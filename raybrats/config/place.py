"""Where a run takes place: its cluster, its storage, its tracking."""

import math
from dataclasses import dataclass
from typing import Literal

from raybrats.config.section import Section, require, require_no_secret


@dataclass(frozen=True, kw_only=True)
class ClusterConfig(Section):
    """What the run asks of the Ray cluster."""

    workers: int = 1
    """DDP workers; the most that an elastic run has."""
    min_workers: int = 0
    """Workers with which an elastic run goes on while nodes are missing; 0: with all or none."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Device of each worker; `auto` takes one GPU a worker where the cluster has GPUs."""
    cpus_per_worker: float = 1.0
    """CPUs that each worker reserves; on a CPU as many threads compute. Taking 100 patches (128^3)
    a second from the stream is 0.9 of a core's work (measured)."""
    max_failures: int = 3
    """Restarts of the workers before the run gives up; those after a preemption notice are free."""
    collective_timeout_s: float = 600.0
    """Seconds that a worker waits for the others in a step before it gives up."""
    stall_s: float = 1800.0
    """Seconds without any progress, neither a step nor a validated case, after which the run is
    ended; also the time that workers wait for each other after a validation."""
    grace_s: float = 30.0
    """Seconds that a last checkpoint may take once the driver gets SIGTERM."""
    channels_last: bool = False
    """Whether tensors are laid out with the channels closest; of use where `compile` is on too."""
    deterministic: bool = False
    """Whether a GPU takes only kernels that give the same bits each time, as a CPU's do; else cuDNN
    tries several for the patch size, and takes the fastest."""
    compile: bool = False
    """Whether the network is compiled (torch.compile); where that fails the run goes on without."""

    def __post_init__(self) -> None:
        require(self.workers >= 1, "cluster.workers", ">= 1", self.workers)
        fewest = self.min_workers
        rule = f"in 0..cluster.workers ({self.workers})"
        require(0 <= fewest <= self.workers, "cluster.min_workers", rule, fewest)
        for name in ("collective_timeout_s", "stall_s", "grace_s"):
            require(
                0 < getattr(self, name) < math.inf, f"cluster.{name}", "> 0", getattr(self, name)
            )
        cpus = self.cpus_per_worker
        require(cpus > 0, "cluster.cpus_per_worker", "> 0", cpus)
        require(self.max_failures >= 0, "cluster.max_failures", ">= 0", self.max_failures)


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """Name, place and seed of the run."""

    name: str = ""
    """Name of the run, whose checkpoints lie at <storage_uri>/<name>/checkpoints; empty: recipe
    and time."""
    storage_uri: str = "runs"
    """Local path or s3:// URI under which runs are kept."""
    seed: int = 0
    resume: Literal["never", "auto", "must"] = "auto"
    """Whether the run goes on with an earlier attempt of its name: `never` refuses one, `auto`
    takes one where it is there, `must` requires one."""
    save_every_steps: int = 250
    """Steps between checkpoints, beside those of validations."""
    continue_from: str = ""
    """Run that has ended, or a checkpoint, that a new run goes on from to a later `optim.steps`:
    with its weights, optimiser, averages and step, and the draws that follow. Only length, learning
    rate and schedule may be others; the rate is that of the new schedule at the step."""

    def __post_init__(self) -> None:
        allowed = all(c.isalnum() or c in "-_." for c in self.name) and self.name[:1] != "."
        rule = "letters, digits, '-', '_' and '.', 200 at most"  # a file name has 255 bytes
        require(allowed and len(self.name.encode()) <= 200, "run.name", rule, self.name)
        require_no_secret("run.storage_uri", self.storage_uri)
        require(bool(self.storage_uri), "run.storage_uri", "a path or URI", self.storage_uri)
        require(self.seed >= 0, "run.seed", ">= 0", self.seed)
        require(self.save_every_steps >= 1, "run.save_every_steps", ">= 1", self.save_every_steps)
        source = self.continue_from
        require_no_secret("run.continue_from", source)
        rule = "a run or a checkpoint (of a model there are weights alone: network.init_from)"
        require(not source.startswith("models:"), "run.continue_from", rule, source)


@dataclass(frozen=True, kw_only=True)
class TrackingConfig(Section):
    """Where metrics go and under which name the model is registered."""

    uri: str = ""
    """MLflow server; empty: MLFLOW_TRACKING_URI, else SQLite beside local runs."""
    required: bool = True
    """Whether training stops at the start when the server is out of reach; if not, metrics wait in
    the run's folder."""
    experiment: str = "raybrats"
    model: str = "raybrats"
    """Name of the registered model; empty registers nothing."""

    def __post_init__(self) -> None:
        require_no_secret("tracking.uri", self.uri)
