"""A job on the cluster: placement, Ray Train with its restarts and deadlines, the last words."""

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray.train import FailureConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from raybrats import cluster, errors, storage
from raybrats.config import TrainConfig
from raybrats.errors import RaybratsError
from raybrats.runs import gauges
from raybrats.runs.job import Job, work
from raybrats.train import checkpoint

if TYPE_CHECKING:
    from ray.actor import ActorHandle

CONTROLLER_FAILURES = 3
"""Starts of a worker group that may fail until the run gives up; Ray's default is for ever."""
_COLLATERAL = re.compile(
    r"gloo|nccl|DistBackendError|closed by peer|reset by peer|ActorDied|ActorUnavailable", re.I
)
"""What the other ranks die of when one has failed."""


def fit(job: Job, callbacks: Sequence[UserCallback] = ()) -> dict[str, Any]:
    """Runs the workers to the end of the run and returns what rank 0 reported last.

    Raises:
        RaybratsError: the cause in a worker, where it was one that a user can act on.
        KeyboardInterrupt: as it came; the workers have ended.
    """
    ended, rejected = _ended(job)
    if ended is not None:
        return ended
    trainer = _trainer(job, callbacks)
    try:
        result = trainer.fit()
    except KeyboardInterrupt:
        trainer.abort()
        raise
    except Exception as error:
        raise _cause(error, job) from error
    found = dict(result.return_value)
    if "failed" in found:
        kind, words = found["failed"]
        raise getattr(errors, kind, RaybratsError)(words)
    return {**found, "rejected": found.get("rejected", 0) + rejected}


def uses_gpu(config: TrainConfig) -> bool:
    """Whether each worker takes a GPU."""
    if config.cluster.device == "auto":
        return cluster.resources()["GPU"] > 0
    return config.cluster.device == "gpu"


def check_fits(config: TrainConfig) -> None:
    """Refuses a run that the cluster can never place.

    Raises:
        ResourcesError: with the figures and the field to change.
    """
    cluster.check_fits(
        workers=config.cluster.min_workers or config.cluster.workers,
        cpus_per_worker=config.cluster.cpus_per_worker,
        gpu=uses_gpu(config),
        data_cpus=config.data.cpus_per_task,
    )


def spare_cpus(config: TrainConfig, share: int) -> float:
    """CPUs for the decoding tasks of each worker; `share` runs have the cluster together."""
    workers = config.cluster.workers
    spare = cluster.resources()["CPU"] / share - workers * config.cluster.cpus_per_worker
    return max(spare, cluster.DATA_CPUS) / workers


class _Trainer(TorchTrainer):
    """A trainer that leaves SIGINT alone: Ray's handler would end this process with code 0."""

    _controller: "ActorHandle | None" = None

    def _register_sigint_handler(self, controller: "ActorHandle") -> None:
        self._controller = controller

    def abort(self) -> None:
        """Ends the workers."""
        if self._controller is not None:
            with suppress(ray.exceptions.RayError):  # that it has ended comes as an error
                ray.get(self._controller.abort.remote(), timeout=30)


class _Restarts(UserCallback):
    """Tells the driver and the cluster's metrics why the workers start again."""

    def __init__(self, run: str, board: "ActorHandle | None") -> None:
        self._run, self._board = run, board

    def after_exception(
        self,
        run_context: object,  # noqa: ARG002 - Ray calls it so
        worker_exceptions: Mapping[int, Exception],
    ) -> None:
        """Runs in Ray Train's controller."""
        gauges.restarted(self._run)
        if self._board is not None:
            rank, words = _root({r: str(e) for r, e in worker_exceptions.items()})
            self._board.restart.remote(f"worker {rank} failed: {words}")


def _ended(job: Job) -> tuple[dict[str, Any] | None, int]:
    """What a run came to that has ended already, and how many damaged checkpoints were found."""
    saved = checkpoint.written(job.run_uri)
    if not (saved and saved[-1].finished):
        return None, 0
    last = checkpoint.newest(job.run_uri)
    rejected = len(last.rejected) if last else 0
    if not (last and last.finished):
        return None, rejected
    return {"step": last.step, "rejected": rejected, **last.metrics}, rejected


def _trainer(job: Job, callbacks: Sequence[UserCallback]) -> _Trainer:
    config, wanted = job.config, job.config.cluster
    gpu, timeout_s = uses_gpu(config), wanted.collective_timeout_s
    # Of Ray Train's own barriers, where ranks wait for the checkpoint of a validation, and of a
    # worker that does not answer. Ray's defaults are for ever and 10 minutes.
    os.environ["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] = str(wanted.stall_s)
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(timeout_s)
    attempt = datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    elastic = (wanted.min_workers, max(wanted.min_workers, _most_workers(config)))
    return _Trainer(
        work,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=int(timeout_s)),
        scaling_config=ScalingConfig(
            num_workers=elastic if wanted.min_workers else wanted.workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": wanted.cpus_per_worker, **({"GPU": 1.0} if gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            # Ray's own index of a run can be damaged for good, so every attempt gets a new one;
            # what to resume from is decided by checkpoint.py.
            name=f"{config.run.name}-{attempt}",
            **storage.for_ray(storage.join(job.run_uri, "ray")),
            failure_config=FailureConfig(
                max_failures=wanted.max_failures, controller_failure_limit=CONTROLLER_FAILURES
            ),
            callbacks=[*callbacks, _Restarts(config.run.name, job.board)],
        ),
    )


def _most_workers(config: TrainConfig) -> int:
    """Workers that leave CPUs for decoding: Ray's elastic policy would give them all away."""
    wanted = config.cluster
    spare = max(cluster.DATA_CPUS, config.data.cpus_per_task)
    fitting = (cluster.resources()["CPU"] - spare) / wanted.cpus_per_worker
    return min(wanted.workers, int(fitting))


def _root(failures: Mapping[int, str]) -> tuple[int, str]:
    """The rank that failed first, as far as the words tell, and the line that says why."""
    ranked = sorted(failures.items(), key=lambda item: bool(_COLLATERAL.search(_line(item[1]))))
    rank, text = ranked[0] if ranked else (0, "")
    return rank, _line(text)


def _line(text: str) -> str:
    lines = text.strip().splitlines() or ["no words"]
    told = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Exit)\b", line)]
    return (told or lines)[-1][:300]


def _cause(error: BaseException, job: Job) -> RaybratsError:
    """The worker's own error that a user can act on, else one that says where the run stopped.

    Ray Data and Ray Train hand on what a task raised as the text of its traceback only.
    """
    failures = {rank: str(e) for rank, e in getattr(error, "worker_failures", {}).items()}
    for text in (*failures.values(), str(error)):
        for kind, words in reversed(re.findall(r"^raybrats\.errors\.(\w+): (.+)$", text, re.M)):
            return getattr(errors, kind, RaybratsError)(words)
    saved = checkpoint.written(job.run_uri)
    place = f"step {saved[-1].step} of {job.config.optim.steps}" if saved else "no checkpoint yet"
    rank, words = _root(failures or {0: str(error)})
    return RaybratsError(
        f"run {job.config.run.name} stopped ({place}): worker {rank}: {words}; "
        f"--run.name {job.config.run.name} resumes it"
    )
