"""train(config) -> Result: an attempt at a run, and the registered model."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from raybrats import storage
from raybrats.config import TrainConfig
from raybrats.data.cohort.usable import split
from raybrats.label_set import LabelSet
from raybrats.recipes import named
from raybrats.registry import register
from raybrats.registry.register import Version
from raybrats.runs.attempt import Attempt, opened
from raybrats.table import table
from raybrats.train import checkpoint


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    run_uri: str
    mlflow_run_id: str
    steps: int
    scores: Mapping[str, float]
    """Dice of each region on the held-out fold, and their mean, of the best checkpoint."""
    patches_per_s: float
    data_wait_fraction: float
    restarts: int
    """How often the workers started again in this attempt."""
    model: Version | None

    def __str__(self) -> str:
        lines = [f"{self.run_uri}, {self.steps} steps"]
        if self.model is not None:
            name, version = self.model.name, self.model.version
            lines[0] += f"; models:/{name}/{version} is {self.model.alias}"
        return "\n".join([*lines, table([*self.scores], [[*self.scores.values()]])])


def train(config: TrainConfig) -> Result:
    """What a run comes to that is trained, tracked and registered.

    It runs in any thread; signals are heeded where that is the main one.

    Raises:
        RaybratsError: a kind for each cause, before any worker starts where that is possible.
        KeyboardInterrupt: by SIGINT, or by SIGTERM after a last checkpoint.

    Example:
        >>> from raybrats.recipes import tiny
        >>> train(tiny()).scores["mean"]  # doctest: +SKIP
        0.72
    """
    config = named(config, datetime.now().strftime("%Y%m%d-%H%M%S"))
    with opened(config) as attempt:
        outcome = attempt.fit()
        version = register_best(attempt)
    return Result(
        run_uri=attempt.uri,
        mlflow_run_id=attempt.tracking.run_id,
        steps=outcome.step,
        scores=best_scores(attempt.uri, attempt.config.labels),
        patches_per_s=outcome.metrics.get("patches_per_s", 0.0),
        data_wait_fraction=outcome.metrics.get("data_wait_fraction", 0.0),
        restarts=outcome.restarts,
        model=version,
    )


def register_best(attempt: Attempt) -> Version | None:
    """The version that the best checkpoint of a run becomes; None where the run wants none.

    Raises:
        RegistrationError: the registry does not take it.

    Example:
        >>> register_best(attempt).alias  # doctest: +SKIP
        'champion'
    """
    config = attempt.config
    if not config.tracking.model:
        return None
    found = checkpoint.best(attempt.uri)
    _, held_out = split(config, attempt.cases)
    digests = "".join(sorted(digest for case in held_out for digest in case.digests))
    scores = _scores(found.metrics, config.labels)
    files = {checkpoint.WEIGHTS: found.files[checkpoint.WEIGHTS]}
    held_out_digest = storage.digest_of(digests.encode())[:16]
    return register.register(attempt.tracking, config, files, scores, held_out_digest)


def best_scores(run_uri: str, labels: LabelSet) -> dict[str, float]:
    """Dice of each region and their mean, of the best checkpoint of a run, by its manifest.

    Raises:
        CheckpointError: none has a validation.

    Example:
        >>> best_scores("runs/one", GLIOMA)["mean"]  # doctest: +SKIP
        0.72
    """
    return _scores(checkpoint.best_written(run_uri).metrics, labels)


def _scores(metrics: Mapping[str, float], labels: LabelSet) -> dict[str, float]:
    return {name: metrics[name] for name in (*labels.region_names, "mean")}
