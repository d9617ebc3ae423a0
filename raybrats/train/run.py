"""train(config) -> Result: cohort, placement, Ray Train, and the registered model."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import ray

from raybrats import cluster
from raybrats.brats import REGIONS
from raybrats.config import TrainConfig
from raybrats.data import cohort, index, storage
from raybrats.data.cohort import Case
from raybrats.errors import DataError, TrackingError
from raybrats.progress import watched
from raybrats.recipes import named
from raybrats.registry import package, tracking
from raybrats.registry.package import Version
from raybrats.registry.tracking import Run
from raybrats.train import checkpoint, gauges, launch, lease, record
from raybrats.train.job import Job
from raybrats.train.stop import Stop, interruptible, on_sigterm

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
    cases = usable(config, index.load(config.data.cohort))
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


def usable(config: TrainConfig, cases: Sequence[Case]) -> list[Case]:
    """The cases that training can use.

    Raises:
        DataError: more are bad than `data.max_bad_fraction`, or a side of the split is empty.
    """
    lenient = config.augment.drop_modality > 0
    cases = cohort.judged(cases, config.data.modalities)
    bad = cohort.quarantined(cases, allow_incomplete=lenient)
    if len(bad) > config.data.max_bad_fraction * len(cases):
        named_ones = "; ".join(f"{c.case_id} ({c.reason})" for c in bad[:3])
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise DataError(
            f"{len(bad)} of {len(cases)} cases cannot be used: {named_ones}{more}; "
            "repair them, or leave them out with data.max_bad_fraction"
        )
    if bad:
        print(f"left out: {', '.join(c.case_id for c in bad)}", file=sys.stderr)  # noqa: T201
        gauges.left_out(config.run.name, len(bad))
    good = cohort.trainable(cases, allow_incomplete=lenient)
    if not good:
        raise DataError(f"{config.data.cohort}: no case has labels; training needs them")
    for side, chosen in zip(("training", "validation"), split(config, good), strict=True):
        if not chosen:
            subjects = len({c.subject for c in good})
            raise DataError(
                f"data.fold {config.data.fold} leaves no case for {side}: the cohort has "
                f"{subjects} subjects; choose another fold, or -1 for all cases on both sides"
            )
    return good


def split(config: TrainConfig, cases: Sequence[Case]) -> tuple[list[Case], list[Case]]:
    """Training and held-out cases of the fold; fold -1 has all of them on both sides."""
    if config.data.fold == -1:
        return list(cases), _first(config, cases)
    held_out = [case for case in cases if case.fold == config.data.fold]
    return [case for case in cases if case.fold != config.data.fold], _first(config, held_out)


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
    return package.register(run, config, files, scores, storage.digest_of(digests.encode())[:16])


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


def _first(config: TrainConfig, cases: Sequence[Case]) -> list[Case]:
    limit = config.validation.max_cases
    return list(cases[:limit] if limit else cases)
