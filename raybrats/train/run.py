"""train(config) -> Result: cohort, placement, Ray Train, and the registered model."""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import ray.train
from ray.train import FailureConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from raybrats import cluster, errors
from raybrats.brats import REGIONS
from raybrats.config import TrainConfig
from raybrats.data import cohort, index, storage
from raybrats.data.cohort import Case
from raybrats.errors import DataError, RaybratsError, TrackingError
from raybrats.progress import watched
from raybrats.recipes import named
from raybrats.registry import package, tracking
from raybrats.registry.package import Version
from raybrats.registry.tracking import Run
from raybrats.train import checkpoint, record
from raybrats.train.job import Job, work

if TYPE_CHECKING:
    from ray.actor import ActorHandle

COLLECTIVE_TIMEOUT_S = 600
"""Until a rank that waits for a dead one gives up; longer than validating one share takes."""


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
    model: Version | None


def train(config: TrainConfig) -> Result:
    """Trains, tracks and registers one network.

    Raises:
        RaybratsError: a kind for each cause, before any worker starts where that is possible.
    """
    config = _with_name(config)
    run_uri = storage.join(storage.absolute(config.run.storage_uri), config.run.name)
    known = record.earlier(config, run_uri)
    cluster.connect()
    check_fits(config)
    cases = usable(config, index.load(config.data.cohort))
    record.check_cohort(known, cases, run_uri)
    run = record.open_tracking(config, run_uri, known, cases)
    try:
        with watched(f"training {config.run.name}", config.optim.steps) as board:
            metrics = fit(make_job(config, cases, run, board=board))
        for remark in _remarks(metrics):
            print(remark, file=sys.stderr)  # noqa: T201
        version = register_best(config, run_uri, cases, run)
    except BaseException as error:
        with suppress(TrackingError):  # the first error is the one to tell
            tracking.finish(run, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    tracking.finish(run)
    return Result(
        run_uri=run_uri,
        mlflow_run_id=run.run_id,
        steps=int(metrics["step"]),
        scores=best_scores(run_uri),
        patches_per_s=float(metrics.get("patches_per_s", 0.0)),
        data_wait_fraction=float(metrics.get("data_wait_fraction", 0.0)),
        model=version,
    )


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
    workers = config.cluster.workers
    spare = cluster.resources()["CPU"] / share - workers * config.cluster.cpus_per_worker
    return Job(
        config=config,
        run_uri=storage.join(storage.absolute(config.run.storage_uri), config.run.name),
        train_cases=tuple(train_cases),
        held_out=tuple(held_out),
        data_cpus=max(spare, cluster.DATA_CPUS) / workers,
        tracking=run,
        board=board,
    )


def fit(job: Job, callbacks: Sequence[UserCallback] = ()) -> dict[str, Any]:
    """Runs the workers to the last step and returns what rank 0 reported last.

    Raises:
        RaybratsError: the cause in a worker, where it was one that a user can act on.
    """
    config = job.config
    saved = checkpoint.written(job.run_uri)
    if saved and saved[-1].step >= config.optim.steps:
        last = checkpoint.newest(job.run_uri)  # unless it is damaged, there is nothing to do
        if last and last.step >= config.optim.steps:
            return {"step": last.step, **last.metrics}
    gpu = uses_gpu(config)
    resources = {"CPU": config.cluster.cpus_per_worker, **({"GPU": 1.0} if gpu else {})}
    attempt = datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    trainer = TorchTrainer(
        work,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S),
        scaling_config=ScalingConfig(
            num_workers=config.cluster.workers, use_gpu=gpu, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            # Ray's own index of a run can be damaged for good, so every attempt gets a new one;
            # what to resume from is decided by checkpoint.py.
            name=f"{config.run.name}-{attempt}",
            **storage.for_ray(storage.join(job.run_uri, "ray")),
            failure_config=FailureConfig(
                max_failures=config.cluster.max_failures, controller_failure_limit=3
            ),
            callbacks=list(callbacks),
        ),
    )
    try:
        result = trainer.fit()
    except Exception as error:
        raise _cause(error, job) from error
    return dict(result.return_value)


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
        workers=config.cluster.workers,
        cpus_per_worker=config.cluster.cpus_per_worker,
        gpu=uses_gpu(config),
        data_cpus=config.data.cpus_per_task,
    )


def _with_name(config: TrainConfig) -> TrainConfig:
    return named(config, datetime.now().strftime("%Y%m%d-%H%M%S"))


def _remarks(metrics: Mapping[str, Any]) -> Iterator[str]:
    """What did not stop the run, but should be known."""
    if "unsent" in metrics:
        yield f"some metrics did not reach MLflow: {metrics['unsent']}"
    if metrics.get("uncached"):
        times = int(metrics["uncached"])
        yield (
            f"prepared cases could not be kept {times} times: make room, or set data.cache_dir and "
            "data.cache_gb; meanwhile each draw reads its case anew"
        )


def _first(config: TrainConfig, cases: Sequence[Case]) -> list[Case]:
    limit = config.validation.max_cases
    return list(cases[:limit] if limit else cases)


def _cause(error: BaseException, job: Job) -> RaybratsError:
    """The worker's own error that a user can act on, else one that says where the run stopped.

    Ray Data and Ray Train hand on what a task raised as the text of its traceback only.
    """
    texts = [str(failure) for failure in getattr(error, "worker_failures", {}).values()]
    texts.append(str(error))
    for text in texts:
        for kind, words in reversed(re.findall(r"^raybrats\.errors\.(\w+): (.+)$", text, re.M)):
            return getattr(errors, kind, RaybratsError)(words)
    saved = checkpoint.written(job.run_uri)
    place = f"step {saved[-1].step} of {job.config.optim.steps}" if saved else "no checkpoint yet"
    lines = texts[0].strip().splitlines() or [repr(error)]
    told = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Exit)\b", line)]
    return RaybratsError(
        f"run {job.config.run.name} stopped ({place}): {(told or lines)[-1][:300]}; "
        f"--run.name {job.config.run.name} resumes it"
    )
