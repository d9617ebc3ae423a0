"""train(config) -> Result: cohort, placement, Ray Train, and the registered model."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import ray

from raybrats import cluster, storage
from raybrats.brats import REGIONS
from raybrats.config import TrainConfig
from raybrats.data.cohort import index
from raybrats.data.cohort.case import Case
from raybrats.data.cohort.usable import left_out, split, usable
from raybrats.errors import TrackingError
from raybrats.progress import watched
from raybrats.recipes import named
from raybrats.registry import register, tracking
from raybrats.registry.register import Version
from raybrats.registry.tracking import Run
from raybrats.runs import gauges, launch, lease, record
from raybrats.runs.job import Job
from raybrats.runs.stop import Stop, interruptible, on_sigterm
from raybrats.train import checkpoint

if TYPE_CHECKING:
    from ray.actor import ActorHandle


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    run_uri: str
    mlflow_run_id: str
    steps: int
    scores: Mapping[str, float]
    """Dice of WT, TC and ET on the held-out fold, and their mean, of the best checkpoint."""
    patches_per_s: float
    data_wait_fraction: float
    restarts: int
    """Of the workers, in this attempt."""
    model: Version | None


def train(config: TrainConfig) -> Result:
    """Trains, tracks and registers one network.

    Raises:
        RaybratsError: a kind for each cause, before any worker starts where that is possible.
        KeyboardInterrupt: by SIGINT, or by SIGTERM after a last checkpoint.
    """
    config = _with_name(config)
    run_uri, stop = _run_uri(config), Stop()
    try:
        with interruptible(), lease.held(run_uri, stop.taken_over):
            return _train(config, run_uri, stop)
    except KeyboardInterrupt:
        if stop.error is not None:
            raise stop.error from None
        raise


def _train(config: TrainConfig, run_uri: str, stop: Stop) -> Result:
    known = record.earlier(config, run_uri)
    cluster.connect()
    launch.check_fits(config)
    found = index.load(config.data.cohort)
    cases = usable(config, found)
    gauges.left_out(config.run.name, len(left_out(config, found)))
    record.check_cohort(known, cases, run_uri)
    run = record.open_tracking(config, run_uri, known, cases)
    try:
        metrics = _fit(config, cases, run, stop)
        for remark in _remarks(config, metrics):
            print(remark, file=sys.stderr)  # noqa: T201
        run = record.settle_tracking(config, run_uri, run, cases)
        version = register_best(config, run_uri, cases, run)
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt | SystemExit) and not stop.error
        if not stop.lost:
            with suppress(TrackingError):  # the first error is the one to tell
                tracking.finish(run, "KILLED" if interrupted else "FAILED")
        raise
    try:
        tracking.finish(run)
    except TrackingError as error:
        print(f"trained and registered, but not closed in MLflow: {error}", file=sys.stderr)  # noqa: T201
    return Result(
        run_uri=run_uri,
        mlflow_run_id=run.run_id,
        steps=int(metrics["step"]),
        scores=best_scores(run_uri),
        patches_per_s=float(metrics.get("patches_per_s", 0.0)),
        data_wait_fraction=float(metrics.get("data_wait_fraction", 0.0)),
        restarts=int(metrics.get("restarts", 0)),
        model=version,
    )


def _fit(config: TrainConfig, cases: Sequence[Case], run: Run, stop: Stop) -> dict[str, Any]:
    """The workers, watched: progress, restarts, stalls and SIGTERM."""
    name, wanted = config.run.name, config.cluster
    words = f"run {name}: nothing moved for {wanted.stall_s:g} s (cluster.stall_s), so it was ended"

    def stalled() -> None:
        stop.now(f"{words}; --run.name {name} resumes it")

    title = f"training {name}"
    with (
        watched(title, config.optim.steps, wanted.stall_s, stalled) as board,
        on_sigterm(board, wanted.grace_s),
    ):
        metrics = launch.fit(make_job(config, cases, run, board=board))
        return {**metrics, "restarts": ray.get(board.restarts.remote())}


def make_job(
    config: TrainConfig,
    cases: Sequence[Case],
    run: Run,
    *,
    board: "ActorHandle | None" = None,
    share: int = 1,
) -> Job:
    """What the workers of a run are told; `share` runs have the cluster together."""
    train_cases, held_out = split(config, cases)
    return Job(
        config=config,
        run_uri=_run_uri(config),
        train_cases=tuple(train_cases),
        held_out=tuple(held_out),
        data_cpus=launch.spare_cpus(config, share),
        tracking=run,
        board=board,
    )


def register_best(
    config: TrainConfig, run_uri: str, cases: Sequence[Case], run: Run
) -> Version | None:
    """Registers the best checkpoint of a run, if the run wants a registered model.

    Raises:
        RegistrationError: the registry does not take it.
    """
    if not config.tracking.model:
        return None
    found = checkpoint.best(run_uri)
    _, held_out = split(config, cases)
    digests = "".join(sorted(digest for case in held_out for digest in case.digests))
    scores = {name: found.metrics[name] for name in (*REGIONS, "mean")}
    files = {checkpoint.WEIGHTS: found.files[checkpoint.WEIGHTS]}
    return register.register(run, config, files, scores, storage.digest_of(digests.encode())[:16])


def best_scores(run_uri: str) -> dict[str, float]:
    """Dice of each region and their mean, of the best checkpoint of a run."""
    metrics = checkpoint.best(run_uri).metrics
    return {name: metrics[name] for name in (*REGIONS, "mean")}


def _with_name(config: TrainConfig) -> TrainConfig:
    return named(config, datetime.now().strftime("%Y%m%d-%H%M%S"))


def _run_uri(config: TrainConfig) -> str:
    return storage.join(storage.absolute(config.run.storage_uri), config.run.name)


def _remarks(config: TrainConfig, metrics: Mapping[str, Any]) -> Iterator[str]:
    """What did not stop the run, but should be known."""
    if "unsent" in metrics:
        again = f"the same command with --run.name {config.run.name} sends them"
        yield f"some metrics did not reach MLflow ({metrics['unsent']}); {again}"
    if metrics.get("rejected"):
        place = storage.join(_run_uri(config), "checkpoints", "quarantine")
        count = int(metrics["rejected"])
        yield f"{count} checkpoints did not verify and lie in {place}; an older one was used"
    if metrics.get("uncached"):
        times = int(metrics["uncached"])
        yield (
            f"prepared cases could not be kept {times} times: make room, or set data.cache_dir and "
            "data.cache_gb; meanwhile each draw reads its case anew"
        )
