"""A run that has ended, or one of its checkpoints -> the first checkpoint of a run that goes on."""

from dataclasses import asdict

from raybrats import storage
from raybrats.config import TrainConfig, differences, override
from raybrats.errors import CheckpointError, UsageError
from raybrats.train import checkpoint, manifest, parts
from raybrats.train.checkpoint import Checkpoint, Snapshot
from raybrats.train.learner import progress_to_continue

MAY_DIFFER = (
    *("optim.steps", "optim.lr", "optim.schedule", "optim.poly_power", "optim.warmup_steps"),
    *("validation.every_steps", "validation.patience", "run.continue_from"),
)
"""Fields in which a run may differ from the one that it goes on from: its length, its learning
rate, which is that of its own schedule from the first step on, and how often it is validated."""


def last_of(uri: str) -> Checkpoint:
    """The checkpoint at a URI, verified, or the last one of the run at it, which has ended.

    Nothing is quarantined: the run is another's.

    Raises:
        UsageError: the run has not ended.
        CheckpointError: the checkpoint is damaged, or there is none.
        StorageError: there is nothing at the URI, or it is out of reach.

    Example:
        >>> _ = checkpoint.write("runs/ended", TrainConfig(), Snapshot(50, {}, {}, finished=True))
        >>> last_of("runs/ended").step
        50
    """
    storage.require(uri)
    if manifest.is_place(uri):
        return checkpoint.read(uri)
    written = manifest.written(uri)
    if not written:
        raise CheckpointError(f"{uri} has no checkpoint to go on from")
    last = written[-1]
    if not last.finished:
        raise UsageError(
            f"{uri} has not ended (step {last.step}): --run.name {storage.name(uri)} goes on with "
            f"it; a new run goes on from a checkpoint such as {last.uri}"
        )
    return checkpoint.read(last.uri)


def check(config: TrainConfig, source: Checkpoint, run_uri: str) -> None:
    """Refuses a new run that does not go on from a checkpoint.

    Args:
        config: the new run.
        source: where the other one has come to.
        run_uri: the new run's.

    Raises:
        UsageError: the new run is not longer, has the name of the other, or differs from it in more
            than `MAY_DIFFER`.

    Example:
        >>> from raybrats.recipes import tiny
        >>> check(tiny(), last_of("runs/one"), "runs/two")  # doctest: +SKIP
    """
    theirs = parts.config(source.files[manifest.CONFIG], source.uri)
    if not config.data.labels:  # those of the cohort, which is compared by itself
        config = override(config, "data.labels", theirs.data.labels)
    differ = [f for f in differences(asdict(theirs), asdict(config)) if f not in MAY_DIFFER]
    if differ:
        raise UsageError(
            f"run.continue_from: {source.uri} was trained with another {', '.join(differ)}; "
            f"only {', '.join(MAY_DIFFER[:-1])} may differ"
        )
    if config.optim.steps <= source.step:
        rule = f"> {source.step}, the step of {source.uri}"
        raise UsageError(f"optim.steps must be {rule}, got {config.optim.steps}")
    if manifest.place(run_uri, source.step) == source.uri:
        raise UsageError(f"run.continue_from: {source.uri} is of this run; choose a new run.name")


def begin(config: TrainConfig, source: Checkpoint, run_uri: str) -> str:
    """Writes what a new run goes on from as its first checkpoint, and returns that one's URI.

    The new run has the step, the weights, the optimiser, the averages and the random state of the
    other; so it sees the draws that follow. Its patience begins anew.

    Raises:
        UsageError: as `check` does.

    Example:
        >>> from raybrats.recipes import tiny
        >>> begin(tiny(), last_of("runs/one"), "runs/two")  # doctest: +SKIP
        'runs/two/checkpoints/step-00000150'
    """
    check(config, source, run_uri)
    snapshot = Snapshot(
        step=source.step,
        weights=source.weights,
        state=source.state,
        progress=progress_to_continue(source.progress),
        metrics=source.metrics,
    )
    return checkpoint.write(run_uri, config, snapshot)
