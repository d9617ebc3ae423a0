"""Search over fields of a run: a trial is an attempt at a run with some of them overridden."""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import ray.tune
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import BasicVariantGenerator
from ray.tune.search.sample import Domain

from raybrats import cluster, storage
from raybrats.config import TrainConfig, override_all
from raybrats.data.cohort.case import Case
from raybrats.errors import CheckpointError, RaybratsError, TrackingError, UsageError, cause_of
from raybrats.recipes import named
from raybrats.registry import tracking
from raybrats.registry.register import Version
from raybrats.registry.tracking import Run
from raybrats.runs import board, launch, lease, record
from raybrats.runs.attempt import Attempt, close, fitting_cases, opened, run_uri
from raybrats.runs.beginning import check_code
from raybrats.runs.run import register_best
from raybrats.runs.space import space_of
from raybrats.runs.stop import Stop, on_sigterm
from raybrats.runs.watching import Shown, Stopped
from raybrats.table import table
from raybrats.train import checkpoint


@dataclass(frozen=True)
class Trial:
    """One point of the search and what it came to."""

    overrides: Mapping[str, Any]
    status: str
    """finished, pruned or failed."""
    score: float | None
    """Mean region Dice on the held-out fold, of its best checkpoint."""
    mlflow_run_id: str
    run_uri: str
    error: str = ""


@dataclass(frozen=True)
class Sweep:
    """All trials, the best of them, and the model that it became."""

    best: Trial
    trials: tuple[Trial, ...]
    model: Version | None

    def __str__(self) -> str:
        columns = ("trial", "mean Dice", *self.best.overrides)
        rows = [(t.status, t.score, *t.overrides.values()) for t in self.trials]
        return f"best mean Dice {self.best.score:.3f}\n{table(columns, rows)}"


@dataclass(frozen=True)
class Search:
    """What the trials of a sweep share."""

    config: TrainConfig
    """Every trial's, but for what it overrides and its name."""
    cases: tuple[Case, ...]
    parent: Run
    num_at_once: int

    def trial_config(self, overrides: Mapping[str, Any], trial_id: str) -> TrainConfig:
        """The configuration of a trial, which follows from its id alone."""
        name = f"{self.config.run.name}-{trial_id}"
        return override_all(self.config, {**overrides, "run.name": name})


def search(
    config: TrainConfig, space: Mapping[str, Domain] | Sequence[str], num_trials: int
) -> Sweep:
    """What the trials of a search come to; poor ones are stopped early (ASHA), the best registered.

    Args:
        config: what all trials have in common.
        space: samplers by dotted field, or words like "loss.dice_weight=uniform(0.2, 0.8)".
        num_trials: points of the space that are tried.

    Raises:
        RaybratsError: a kind for each cause; if every trial fails, the cause of the first.
        KeyboardInterrupt: by SIGINT or SIGTERM, after a last checkpoint of each trial.

    Example:
        >>> from raybrats.recipes import tiny
        >>> search(tiny(), ["optim.lr=loguniform(1e-3, 1e-1)"], 4).best.score  # doctest: +SKIP
        0.74
    """
    config = named(config, datetime.now().strftime("%Y%m%d-%H%M%S"))
    # Trials run elsewhere, where relative paths mean nothing; the server is that of the parent.
    places = {name: getattr(config.run, name) for name in ("storage_uri", "continue_from")}
    config = override_all(
        config, {f"run.{name}": storage.absolute(uri) for name, uri in places.items() if uri}
    )
    tracking.tracking_uri(config)  # there is one
    domains = space_of(space, config)
    if not config.tracking.required:
        raise UsageError("tracking.required must be true in a sweep, which compares by MLflow")
    if num_trials < 1:
        raise UsageError(f"--trials must be >= 1, got {num_trials}")
    check_code(config)
    stop = Stop()
    with lease.held(run_uri(config), stop.taken_over):
        cases = tuple(fitting_cases(config, dashboard=True))
        at_once = _concurrency(config, num_trials)
        parent = tracking.start(config, tags={"raybrats.kind": "sweep"})
        shared = Search(config, cases, parent, at_once)
        try:
            trials = _run(shared, domains, num_trials, stop)
            best, version = _registered(shared, trials)
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
            with suppress(TrackingError):  # the first error is the one to tell
                tracking.finish(parent, "KILLED" if interrupted else "FAILED")
            raise
        close(parent)
    return Sweep(best, trials, version)


def _concurrency(config: TrainConfig, num_trials: int) -> int:
    """Trials that fit the cluster side by side; Tune itself does not count their workers."""
    have, workers = cluster.resources(), config.cluster.workers
    spare = max(cluster.DATA_CPUS, config.data.cpus_per_task)
    fitting = have["CPU"] / (workers * config.cluster.cpus_per_worker + spare)
    if launch.uses_gpu(config):
        fitting = min(fitting, have["GPU"] / workers)
    return max(1, min(num_trials, math.floor(fitting)))


def _run(
    shared: Search, domains: Mapping[str, Domain], num_trials: int, stop: Stop
) -> tuple[Trial, ...]:
    """The trials as they ended; all of them soon, once the sweep is to stop."""
    tuner = _tuner(shared, domains, num_trials, stop)

    def leave() -> None:
        try:
            board.save_all(board.found(f"{run_uri(shared.config)}-"), shared.config.cluster.grace_s)
        finally:
            stop.now(KeyboardInterrupt())

    # In a thread Tune puts up no signal handlers of its own, after which it would go on to the end.
    try:
        with ThreadPoolExecutor(max_workers=1) as pool, on_sigterm(leave):
            fitting = pool.submit(tuner.fit)
            try:
                results = fitting.result()
            except KeyboardInterrupt:  # SIGINT; a second one waits for no checkpoint
                leave()
                results = fitting.result()
    except Exception:
        stop.check()  # it was we who ended it
        raise
    trials = tuple(_outcome(shared, results[n]) for n in range(len(results)))
    stop.check()
    return trials


def _tuner(
    shared: Search, domains: Mapping[str, Domain], num_trials: int, stop: Stop
) -> tune.Tuner:
    config, every = shared.config, shared.config.validation.every_steps
    trainable = tune.with_parameters(_run_trial, shared=shared)
    return tune.Tuner(
        tune.with_resources(trainable, {"CPU": 0.01}),
        param_space=dict(domains),
        tune_config=tune.TuneConfig(
            metric="mean",
            mode="max",
            num_samples=num_trials,
            search_alg=BasicVariantGenerator(
                max_concurrent=shared.num_at_once, random_state=config.run.seed
            ),
            # One step more than there are: a trial at its end ends by itself.
            scheduler=ASHAScheduler(
                time_attr="step",
                max_t=config.optim.steps + 1,
                grace_period=min(every, config.optim.steps),
                reduction_factor=2,
            ),
        ),
        run_config=tune.RunConfig(
            name=config.run.name,
            **storage.for_ray(storage.join(config.run.storage_uri, "tune")),
            # Of the trial's own process, whose loss is as that of a worker; what a trial raises
            # is reported, so that it is not tried again.
            failure_config=tune.FailureConfig(max_failures=config.cluster.max_failures),
            callbacks=[Shown(num_trials)],
            stop=Stopped(stop),
            verbose=0,
        ),
    )


def _run_trial(overrides: dict[str, Any], shared: Search) -> None:
    """Runs in a Tune trial: an attempt at a run with these fields, below the sweep's MLflow run."""
    shared.parent.enter()
    trial = shared.trial_config(overrides, tune.get_context().get_trial_id())
    at_once = shared.num_at_once
    try:
        with opened(trial, shared.cases, parent=shared.parent, num_at_once=at_once) as attempt:
            attempt.fit([TuneReportCallback()])
    except RaybratsError as error:  # a step of 0 lies before every comparison with other trials
        tune.report({"step": 0, "mean": -1.0, "error": str(error)})


def _outcome(shared: Search, result: ray.tune.Result) -> Trial:
    """A trial as its files tell it; its MLflow run is closed.

    What is wrong with one trial's files or its MLflow run loses none of the others.
    """
    overrides, reported = dict(result.config or {}), result.metrics or {}
    error = str(reported.get("error", ""))
    if result.error is not None:
        cause = cause_of(result.error) or result.error
        error = (str(cause).strip().splitlines() or [type(cause).__name__])[-1]
    if "trial_id" not in reported:  # it never began
        return Trial(overrides, "failed" if error else "pruned", None, "", "", error)
    uri = run_uri(shared.trial_config(overrides, reported["trial_id"]))
    run_id, score, ended = "", None, False
    try:
        known = record.read(uri)
        run_id = known.mlflow_run_id if known else ""
        ended = any(written.finished for written in checkpoint.written(uri))
        score = checkpoint.best_written(uri).metrics["mean"]
    except CheckpointError as damage:  # that there is no score is one, too, and no error
        error = error or (str(damage) if not run_id else "")
    status = "finished" if ended else "failed" if error else "pruned"
    closing = {"finished": "FINISHED", "failed": "FAILED", "pruned": "KILLED"}[status]
    if run_id:
        close(Run(shared.parent.uri, run_id), closing)
    return Trial(overrides, status, score, run_id, uri, error)


def _registered(shared: Search, trials: Sequence[Trial]) -> tuple[Trial, Version | None]:
    """The best trial, and the version that it became.

    Raises:
        RaybratsError: every trial failed.
    """
    scored = [trial for trial in trials if trial.score is not None]
    if not scored:
        raise RaybratsError(f"every trial failed; the first: {trials[0].error}")
    best = max(scored, key=lambda trial: trial.score or 0.0)
    chosen = override_all(shared.config, {**best.overrides, "run.name": storage.name(best.run_uri)})
    run = Run(shared.parent.uri, best.mlflow_run_id)
    return best, register_best(Attempt(chosen, best.run_uri, shared.cases, run, Stop()))
