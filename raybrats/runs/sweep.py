"""Search over fields of a run: a trial is a train run with some of them overridden."""

import ast
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

import ray.tune
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import BasicVariantGenerator
from ray.tune.search.sample import Domain

from raybrats import cluster, storage
from raybrats.config import TrainConfig, override, override_all
from raybrats.data.cohort import index
from raybrats.data.cohort.case import Case
from raybrats.errors import (
    CheckpointError,
    RaybratsError,
    TrackingError,
    UsageError,
)
from raybrats.progress import Display
from raybrats.recipes import named
from raybrats.registry import tracking
from raybrats.registry.register import Version
from raybrats.registry.tracking import Run
from raybrats.runs import launch, record
from raybrats.runs import run as runs
from raybrats.train import checkpoint

_SAMPLERS = {
    "uniform": tune.uniform,
    "loguniform": tune.loguniform,
    "quniform": tune.quniform,
    "randint": tune.randint,
    "choice": tune.choice,
}


_FIXED = ("cluster.", "run.", "tracking.", "data.cohort", "data.fold", "optim.steps", "validation.")
"""Fields that decide where trials run and how they are compared."""


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


def search(config: TrainConfig, space: Sequence[str], num_trials: int) -> Sweep:
    """Runs the trials, stops the poor ones early (ASHA) and registers the best.

    Raises:
        RaybratsError: a kind for each cause; if every trial fails, the cause of the first.
    """
    config = named(config, datetime.now().strftime("%Y%m%d-%H%M%S"))
    # Trials run elsewhere, where relative paths and this process' environment mean nothing.
    uris = {
        "run.storage_uri": storage.absolute(config.run.storage_uri),
        "tracking.uri": tracking.tracking_uri(config),
    }
    config = override_all(config, uris)
    domains = parse_space(space, config)
    if not config.tracking.required:
        raise UsageError("tracking.required must be true in a sweep, which compares by MLflow")
    if num_trials < 1:
        raise UsageError(f"--trials must be >= 1, got {num_trials}")
    cluster.connect(dashboard=True)
    at_once = _concurrency(config, num_trials)
    cases = runs.usable(config, index.load(config.data.cohort))
    parent = tracking.start(config, tags={"raybrats.kind": "sweep"})
    try:
        results = _fit(config, domains, (num_trials, at_once), (cases, parent))
        trials = tuple(_outcome(config, parent, result) for result in results)
        scored = [trial for trial in trials if trial.score is not None]
        if not scored:
            raise RaybratsError(f"every trial failed; the first: {trials[0].error}")
        best = max(scored, key=lambda trial: trial.score or 0.0)
        chosen = _trial_config(config, best.overrides, storage.name(best.run_uri))
        child = Run(parent.uri, best.mlflow_run_id)
        version = runs.register_best(chosen, best.run_uri, cases, child)
    except BaseException:
        with suppress(TrackingError):  # the first error is the one to tell
            tracking.finish(parent, "FAILED")
        raise
    tracking.finish(parent)
    return Sweep(best, trials, version)


def parse_space(space: Sequence[str], config: TrainConfig) -> dict[str, Domain]:
    """Samplers by dotted field from words like "loss.dice_weight=uniform(0.2, 0.8)".

    Raises:
        UsageError: a word that is not understood, or a sample that does not fit its field.
    """
    domains: dict[str, Domain] = {}
    for word in space:
        match = re.fullmatch(r"\s*([\w.]+)\s*=\s*(\w+)\((.*)\)\s*", word, re.DOTALL)
        if not match or match[2] not in _SAMPLERS:
            kinds = ", ".join(_SAMPLERS)
            raise UsageError(f"--space {word!r}: expected FIELD=KIND(...), KIND one of {kinds}")
        try:
            arguments = ast.literal_eval(f"({match[3]},)")
            domain = _SAMPLERS[match[2]](*arguments)
            samples = domain.categories if match[2] == "choice" else [domain.sample()]
            if not samples:
                raise ValueError("nothing to choose from")
        except (SyntaxError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"--space {word!r}: {error}") from None
        if match[1].startswith(_FIXED):
            raise UsageError(f"--space {word!r}: {match[1]} is the same for all trials")
        for sample in samples:
            override(config, match[1], sample)
        domains[match[1]] = domain
    if not domains:
        raise UsageError('give at least one --space, e.g. "loss.dice_weight=uniform(0.2,0.8)"')
    return domains


def _concurrency(config: TrainConfig, num_trials: int) -> int:
    """Trials that fit the cluster side by side; Tune itself does not count their workers."""
    launch.check_fits(config)
    have, workers = cluster.resources(), config.cluster.workers
    spare = max(cluster.DATA_CPUS, config.data.cpus_per_task)
    fitting = have["CPU"] / (workers * config.cluster.cpus_per_worker + spare)
    if launch.uses_gpu(config):
        fitting = min(fitting, have["GPU"] / workers)
    return max(1, min(num_trials, math.floor(fitting)))


def _fit(
    config: TrainConfig,
    domains: Mapping[str, Domain],
    counts: tuple[int, int],
    shared: tuple[Sequence[Case], Run],
) -> list[ray.tune.Result]:
    num_trials, at_once = counts
    validations = math.ceil(config.optim.steps / config.validation.every_steps)
    trainable = tune.with_parameters(_run_trial, config=config, shared=shared, at_once=at_once)
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"CPU": 0.01}),
        param_space=dict(domains),
        tune_config=tune.TuneConfig(
            metric="mean",
            mode="max",
            num_samples=num_trials,
            search_alg=BasicVariantGenerator(max_concurrent=at_once, random_state=config.run.seed),
            # One validation more than there are: a trial at its end ends by itself.
            scheduler=ASHAScheduler(max_t=validations + 1, grace_period=1, reduction_factor=2),
        ),
        run_config=tune.RunConfig(
            name=config.run.name,
            **storage.for_ray(storage.join(config.run.storage_uri, "tune")),
            failure_config=tune.FailureConfig(max_failures=0),  # retries belong to Ray Train
            callbacks=[_Shown(num_trials)],
            verbose=0,
        ),
    )
    return list(tuner.fit())


def _run_trial(
    overrides: dict[str, Any],
    config: TrainConfig,
    shared: tuple[Sequence[Case], Run],
    at_once: int,
) -> None:
    """Runs in a Tune trial: trains with these fields, below the sweep's MLflow run."""
    cases, parent = shared
    trial_id = tune.get_context().get_trial_id()
    trial = _trial_config(config, overrides, f"{config.run.name}-{trial_id}")
    run_uri = storage.join(storage.absolute(trial.run.storage_uri), trial.run.name)
    run = record.open_tracking(trial, run_uri, None, cases, parent)
    launch.fit(runs.make_job(trial, cases, run, share=at_once), [TuneReportCallback()])


def _trial_config(config: TrainConfig, overrides: Mapping[str, Any], name: str) -> TrainConfig:
    return override_all(config, {**overrides, "run.name": name})


def _outcome(config: TrainConfig, parent: Run, result: ray.tune.Result) -> Trial:
    """A trial as its files tell it; its MLflow run is closed."""
    name = f"{config.run.name}-{(result.metrics or {})['trial_id']}"
    run_uri = storage.join(storage.absolute(config.run.storage_uri), name)
    run_id = (record.read(run_uri) or {"mlflow_run_id": ""})["mlflow_run_id"]
    try:
        score = runs.best_scores(run_uri)["mean"]
    except CheckpointError:
        score = None
    ended = any(written.finished for written in checkpoint.written(run_uri))
    status = "finished" if ended else "failed" if result.error else "pruned"
    closing = {"finished": "FINISHED", "failed": "FAILED", "pruned": "KILLED"}[status]
    if run_id:
        tracking.finish(Run(parent.uri, run_id), closing)
    error = str(result.error).strip().splitlines()[-1] if result.error else ""
    overrides = dict(result.config or {})
    return Trial(overrides, status, score, run_id, run_uri, error)


class _Shown(tune.Callback):
    """Progress of the sweep: trials ended, and the latest score."""

    def __init__(self, num_trials: int) -> None:
        self._num_trials, self._ended = num_trials, 0

    def setup(self, **_: object) -> None:
        """Starts the display here, for Tune copies the callback before and a bar has locks."""
        self._display = Display("sweep", self._num_trials).__enter__()

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "_display"}

    def on_experiment_end(self, **_: object) -> None:
        """All trials have ended."""
        self._display.__exit__()

    def on_trial_result(self, **event: object) -> None:
        """A trial has validated."""
        trial, result = cast("Any", event["trial"]), cast("dict", event["result"])
        score = f"step {result.get('step')}: mean Dice {result.get('mean', 0):.3f}"
        self._display.show(self._ended, f"trial {trial.trial_id}, {score}")

    def on_trial_complete(self, **event: object) -> None:
        """A trial has ended or was stopped."""
        self._ended += 1
        self._display.show(self._ended, f"trial {cast('Any', event['trial']).trial_id} ended")

    on_trial_error = on_trial_complete
