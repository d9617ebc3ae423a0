"""A job on the cluster: placement, Ray Train with its restarts and deadlines, the last words."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.train import UserCallback
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.torch.torch_trainer import TorchTrainer

from raybrats import cluster, storage
from raybrats.config import TrainConfig
from raybrats.errors import RaybratsError, cause_of
from raybrats.runs import gauges
from raybrats.runs.group import Group
from raybrats.runs.job import Job, Outcome
from raybrats.train import checkpoint

CONTROLLER_FAILURES = 3
"""Starts of a worker group that may fail until the run gives up; Ray's default is for ever."""
LEAVE_EARLY_S = 3.0
"""Seconds before a node is taken away that its run starts again without it.

Ray Train looks at its workers every 2 s. If it looks only after the node has gone, it takes what
the other ranks die of for a failure, which counts.
"""
_COLLATERAL = re.compile(
    r"gloo|nccl|DistBackendError|closed by peer|reset by peer|ActorDied|ActorUnavailable", re.I
)
"""Words of what the other ranks die of when one has failed."""


def fit(job: Job, callbacks: Sequence[UserCallback] = ()) -> Outcome:
    """What the workers come to at the end of the run.

    Raises:
        RaybratsError: the cause in a worker, where it was one that a user can act on.

    Example:
        >>> fit(job).step  # doctest: +SKIP
        150
    """
    ended, rejected = _ended(job)
    if ended is not None:
        return ended
    try:
        result = _trainer(job, callbacks).fit()
        # Ray annotates the first version's Result, which has no such field.
        outcome: Outcome = result.return_value  # ty: ignore[missing-attribute]
    except Exception as error:
        raise _cause(error, job) from error
    if outcome.failure is not None:
        raise outcome.failure
    return replace(outcome, rejected=outcome.rejected + rejected)


def work(settings: Mapping[str, Any]) -> Outcome:
    """What a worker comes to; imported where it runs, as torch takes seconds and 250 MB.

    Example:
        >>> work({"job": job})  # doctest: +SKIP
    """
    from raybrats.runs import worker

    return worker.work(settings["job"])


def uses_gpu(config: TrainConfig) -> bool:
    """Whether each worker takes a GPU.

    Example:
        >>> from raybrats.recipes import tiny
        >>> uses_gpu(tiny())
        False
    """
    if config.cluster.device == "auto":
        return cluster.resources()["GPU"] > 0
    return config.cluster.device == "gpu"


def check_fits(config: TrainConfig) -> None:
    """Refuses a run that the cluster can never place.

    Raises:
        ResourcesError: with the figures and the field to change.

    Example:
        >>> check_fits(config)  # doctest: +SKIP
    """
    cluster.check_fits(
        workers=config.cluster.min_workers or config.cluster.workers,
        cpus_per_worker=config.cluster.cpus_per_worker,
        gpu=uses_gpu(config),
        data_cpus=config.data.cpus_per_task,
    )


def spare_cpus(config: TrainConfig, num_at_once: int) -> float:
    """CPUs for the decoding tasks of each worker, where so many runs have the cluster together.

    Example:
        >>> spare_cpus(config, num_at_once=2)  # doctest: +SKIP
        1.5
    """
    workers = config.cluster.workers
    spare = cluster.resources()["CPU"] / num_at_once - workers * config.cluster.cpus_per_worker
    return max(spare, cluster.DATA_CPUS) / workers


class _Trainer(TorchTrainer):
    """A trainer that leaves SIGINT alone: Ray's handler would end this process with code 0."""

    def _register_sigint_handler(self, controller: ActorHandle) -> None:
        """Registers nothing."""


class _Attached(ControllerCallback):
    """Tells the board who controls the run; Ray has no public way to end one from outside."""

    def __init__(self, board: ActorHandle) -> None:
        self._board = board

    def after_controller_start(self, train_run_context: object) -> None:  # noqa: ARG002
        """Runs in Ray Train's controller."""
        self._board.attach.remote(ray.get_runtime_context().current_actor)


class _Restarts(UserCallback):
    """Tells the driver and the cluster's metrics why the workers start again."""

    def __init__(self, run: str, board: ActorHandle) -> None:
        self._run, self._board = run, board

    def after_exception(
        self,
        run_context: object,  # noqa: ARG002 - Ray calls it so
        worker_exceptions: Mapping[int, Exception],
    ) -> None:
        """Runs in Ray Train's controller."""
        gauges.restarted(self._run)
        rank, words = _root(worker_exceptions)
        self._board.restart.remote(f"worker {rank} failed: {words}")


def _ended(job: Job) -> tuple[Outcome | None, int]:
    """What a run came to that has ended already, and how many damaged checkpoints were found."""
    saved = checkpoint.written(job.run_uri)
    if not (saved and saved[-1].finished):
        return None, 0
    last = checkpoint.newest(job.run_uri)
    rejected = len(last.rejected) if last else 0
    if not (last and last.finished):
        return None, rejected
    return Outcome(last.step, last.metrics, rejected), rejected


def _trainer(job: Job, callbacks: Sequence[UserCallback]) -> _Trainer:
    config, wanted = job.config, job.config.cluster
    gpu, timeout_s = uses_gpu(config), wanted.collective_timeout_s
    # Patience of Ray Train's own barriers, where ranks wait for the checkpoint of a validation, and
    # with a worker that does not answer. Ray's defaults are for ever and 10 minutes.
    os.environ["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] = str(wanted.stall_s)
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(timeout_s)
    watching = (_Restarts(config.run.name, job.board), _Attached(job.board))
    attempt = datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    elastic = (wanted.min_workers, max(wanted.min_workers, _most_workers(config)))
    return _Trainer(
        work,
        train_loop_config={"job": job},
        torch_config=Group(backend="nccl" if gpu else "gloo", timeout_s=int(timeout_s)),
        scaling_config=ScalingConfig(
            num_workers=elastic if wanted.min_workers else wanted.workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": wanted.cpus_per_worker, **({"GPU": 1.0} if gpu else {})},
        ),
        run_config=RunConfig(
            # Ray's own index of a run can be damaged for good, so every attempt gets a new one;
            # what to resume from is decided by checkpoint.py.
            name=f"{config.run.name}-{attempt}",
            **storage.for_ray(storage.join(job.run_uri, "ray")),
            failure_config=FailureConfig(
                max_failures=wanted.max_failures,
                controller_failure_limit=CONTROLLER_FAILURES,
                preemption_grace_s=-LEAVE_EARLY_S,
            ),
            # Ray takes those of its own kinds too, though it annotates users' ones only.
            callbacks=[*callbacks, *watching],  # ty: ignore[invalid-argument-type]
        ),
    )


def _most_workers(config: TrainConfig) -> int:
    """Workers that leave CPUs for decoding: Ray's elastic policy would give them all away."""
    wanted = config.cluster
    spare = max(cluster.DATA_CPUS, config.data.cpus_per_task)
    fitting = (cluster.resources()["CPU"] - spare) / wanted.cpus_per_worker
    return min(wanted.workers, int(fitting))


def _root(failures: Mapping[int, Exception]) -> tuple[int, str]:
    """The rank that failed first, as far as the words tell, and the line that says why."""
    lines = {rank: _line(error) for rank, error in failures.items()}
    rank = min(lines, key=lambda rank: (bool(_COLLATERAL.search(lines[rank])), rank))
    return rank, lines[rank]


def _line(error: BaseException) -> str:
    first, *more = str(error).strip().splitlines() or ["no words"]
    words = f"{first} {more[0].strip()}" if more and first.endswith(":") else first
    return f"{type(error).__name__}: {words}"[:300]


def _cause(error: Exception, job: Job) -> RaybratsError:
    """The worker's own error that a user can act on, else one that says where the run stopped."""
    failures = getattr(error, "worker_failures", None) or {0: error}
    for failure in failures.values():
        if (cause := cause_of(failure)) is not None:
            return cause
    saved = checkpoint.written(job.run_uri)
    place = f"step {saved[-1].step} of {job.config.optim.steps}" if saved else "no checkpoint yet"
    rank, words = _root(failures)
    return RaybratsError(
        f"run {job.config.run.name} stopped ({place}): worker {rank}: {words}; "
        f"--run.name {job.config.run.name} resumes it"
    )
