"""What an attempt at a run leaves for the next one: run.json, beside the checkpoints."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter

from raybrats import storage
from raybrats.config import TrainConfig, deciding, differences, digest, override, to_json
from raybrats.data.cohort.case import Case
from raybrats.errors import (
    CheckpointError,
    MissingObjectError,
    RegistrationError,
    StorageError,
    TrackingError,
    UsageError,
)
from raybrats.registry import metric_log, tracking
from raybrats.registry.tracking import Run
from raybrats.train import checkpoint

_LOG = logging.getLogger(__name__)
NAME = "run.json"


@dataclass(frozen=True)
class Record:
    """What run.json holds."""

    mlflow_run_id: str
    """Empty as long as there was no server."""
    digest: str
    """Digest of what decides the weights and how they are scored."""
    cohort: str
    """Digest of the cases, their bytes and their folds."""
    config: Mapping[str, Any]


def read(run_uri: str) -> Record | None:
    """The record of a run; None if there is none.

    Raises:
        CheckpointError: it is damaged.

    Example:
        >>> read("runs/never") is None
        True
    """
    place = storage.join(run_uri, NAME)
    try:
        known = TypeAdapter(Record).validate_json(storage.read_bytes(place), strict=True)
        if all(isinstance(section, Mapping) for section in deciding(known.config).values()):
            return known
    except MissingObjectError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        pass  # it is nothing that _write has written
    raise CheckpointError(f"{place} is damaged; choose another run.name")


def earlier(config: TrainConfig, run_uri: str) -> Record | None:
    """What an earlier attempt at this run left; None if there is none.

    Raises:
        UsageError: `run.resume` forbids or misses it, or it had another configuration.

    Example:
        >>> from raybrats.recipes import tiny
        >>> earlier(tiny(), "runs/never") is None
        True
    """
    known = read(run_uri)
    if known is None:
        if config.run.resume == "must":
            raise UsageError(f"run.resume is must, but there is no run at {run_uri}")
        return None
    if config.run.resume == "never":
        raise UsageError(f"run.resume is never, but {run_uri} exists; choose another run.name")
    if config.run.resume == "must" and not checkpoint.written(run_uri):
        raise UsageError(f"run.resume is must, but {run_uri} has no checkpoint")
    if not config.data.labels:  # those of the cohort's cases, as the earlier attempt has found
        found = str(known.config["data"].get("labels", ""))
        config = override(config, "data.labels", found)
    if known.digest != digest(config):
        fields = ", ".join(differences(known.config, json.loads(to_json(config))) or ["digest"])
        raise UsageError(
            f"{run_uri} was started with another {fields}; choose another run.name, "
            "or the same configuration to resume"
        )
    return known


def check_cohort(known: Record | None, cases: Sequence[Case], run_uri: str) -> None:
    """Refuses to go on with other cases, whose order and folds would be others too.

    Raises:
        UsageError: the cases, their bytes or their folds are not those of the earlier attempt.

    Example:
        >>> check_cohort(Record("", "", cohort="0", config={}), [], "runs/one")
        Traceback (most recent call last):
        ...
        raybrats.errors.UsageError: runs/one was started on another cohort; choose another run.name
    """
    if known is not None and not same_cohort(known, cases):
        raise UsageError(f"{run_uri} was started on another cohort; choose another run.name")


def same_cohort(known: Record, cases: Sequence[Case]) -> bool:
    """Whether the cases, their bytes and their folds are those of a run.

    Example:
        >>> same_cohort(Record("", "", cohort="0", config={}), [])
        False
    """
    return known.cohort == _cohort_digest(cases)


def open_tracking(
    config: TrainConfig,
    run_uri: str,
    known: Record | None,
    cases: Sequence[Case],
    parent: Run | None = None,
    tags: Mapping[str, str] | None = None,
) -> Run:
    """The MLflow run of an earlier attempt, or a new one that later attempts will find.

    Where the server is away and not required, the run has no id, and its metrics wait.

    Raises:
        TrackingError: the server is out of reach, and `tracking.required`.

    Example:
        >>> open_tracking(config, "runs/one", None, cases).run_id  # doctest: +SKIP
        '78aba7e7bf49483c929b383279d8b227'
    """
    uri = parent.uri if parent else tracking.tracking_uri(config)
    run = Run(uri, known.mlflow_run_id if known else "")
    try:
        if run.run_id:
            tracking.resume(run)
            return run
        run = tracking.start(config, parent=parent, tags=tags)
    except TrackingError as error:
        if config.tracking.required:
            raise
        _LOG.warning("%s; metrics wait in %s", error, metrics_uri(run_uri))
    _write(config, run_uri, run, cases)
    return run


def deliver(config: TrainConfig, run_uri: str, run: Run, cases: Sequence[Case]) -> Run:
    """The run once the metrics that waited are sent, when the training is over; it has an id now.

    Raises:
        RegistrationError: the server is still away: trained, but neither logged nor registered.

    Example:
        >>> deliver(config, "runs/one", run, cases).run_id  # doctest: +SKIP
        '78aba7e7bf49483c929b383279d8b227'
    """
    try:
        if not run.run_id:
            run = tracking.start(config)
            _write(config, run_uri, run, cases)
        metric_log.replay(run, metrics_uri(run_uri))
    except (TrackingError, StorageError) as error:
        raise RegistrationError(
            f"{error}; the run is trained and kept in {run_uri}: the same command with "
            f"--run.name {config.run.name} sends its metrics and registers it"
        ) from error
    return run


def metrics_uri(run_uri: str) -> str:
    """Where metrics wait for a server that is away.

    Example:
        >>> metrics_uri("s3://bucket/runs/one")
        's3://bucket/runs/one/metrics.jsonl'
    """
    return storage.join(run_uri, "metrics.jsonl")


def _write(config: TrainConfig, run_uri: str, run: Run, cases: Sequence[Case]) -> None:
    left = Record(run.run_id, digest(config), _cohort_digest(cases), asdict(config))
    place = storage.join(run_uri, NAME)
    storage.write_bytes(place, json.dumps(asdict(left), indent=1).encode())


def _cohort_digest(cases: Sequence[Case]) -> str:
    rows = [[case.case_id, case.fold, *case.digests] for case in cases]
    return storage.digest_of(json.dumps(rows).encode())
