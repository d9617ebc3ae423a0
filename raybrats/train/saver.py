"""Checkpoints written behind the training: one at a time, verified, and only then older ones go."""

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch

from raybrats import storage
from raybrats.config import TrainConfig
from raybrats.errors import CheckpointError, DivergedError, StorageError
from raybrats.train import checkpoint, manifest
from raybrats.train.checkpoint import Checkpoint, Snapshot, Written
from raybrats.train.copies import copied
from raybrats.train.learner import Learner
from raybrats.train.ranks import world_size

_LOG = logging.getLogger(__name__)
TRIES = 3
"""Checkpoints in a row that may fail before the run stops: three intervals are at risk then."""


class Saver:
    """A saver takes a copy of the learner and writes it while the training goes on.

    Example:
        >>> from raybrats.recipes import tiny
        >>> from raybrats.train.learner import new_learner
        >>> saver = Saver("runs/saved")
        >>> saver.save(new_learner(tiny(), torch.device("cpu")), metrics={"mean": 0.1})
        >>> saver.close()
        >>> saver.saved
        0
    """

    def __init__(
        self,
        run_uri: str,
        mlflow_run_id: str = "",
        resumed: Checkpoint | Written | None = None,
        first: Callable[[], None] = lambda: None,
    ) -> None:
        """A saver for a run.

        Args:
            run_uri: below which the checkpoints lie.
            mlflow_run_id: the MLflow run that each names.
            resumed: the checkpoint from which the run goes on.
            first: called before each checkpoint is written.
        """
        self.rejected = 0
        """Checkpoints that did not read back as they were written."""
        self.saved = resumed.step if resumed else -1
        """Step of the newest checkpoint that verified; its validation is added to its manifest."""
        self._run_uri, self._mlflow_run_id, self._before = run_uri, mlflow_run_id, first
        self._verified = [resumed.uri] if resumed else []
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._failed, self._step = 0, -1
        self._copy: Any = None
        """The last copy, whose memory serves the next: new memory costs twice the copying."""

    def save(self, learner: Learner, metrics: Mapping[str, float], finished: bool = False) -> None:
        """Starts a checkpoint once the one before is written; the last of a run is waited for.

        Raises:
            StorageError: several in a row could not be written, or the last one of the run.
            DivergedError: the weights are not finite; nothing is written.
        """
        if learner.step in (self.saved, self._step) and not metrics:
            return
        self.wait()
        self._step = learner.step
        self._copy = copied((learner.weights(), learner.state()), self._copy)
        if learner.device.type == "cuda":
            torch.cuda.current_stream(learner.device).synchronize()
        weights, state = self._copy
        snapshot = Snapshot(
            step=learner.step,
            weights=weights,
            state=state,
            progress=learner.progress(),
            metrics=dict(metrics),
            finished=finished,
            world=world_size(),
            mlflow_run_id=self._mlflow_run_id,
        )
        self._writing = self._pool.submit(self._write, learner.config, snapshot)
        if finished:
            self.wait()

    def wait(self) -> None:
        """Waits until nothing is being written; raises as `save` does."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Waits for what is being written, and ends the thread that writes."""
        self.wait()
        self._pool.shutdown()

    def _write(self, config: TrainConfig, snapshot: Snapshot) -> None:
        for name, tensor in snapshot.weights.items():
            if not torch.isfinite(tensor).all():
                raise DivergedError(
                    f"{name} is not finite at step {snapshot.step}, so it was not saved; "
                    f"{self._run_uri} goes on from the checkpoint before with a lower optim.lr"
                )
        self._before()
        # Another step comes in an interval; neither the last one nor a validation comes again.
        wanted = snapshot.finished or bool(snapshot.metrics)
        while not self._attempt(config, snapshot) and wanted:
            continue

    def _attempt(self, config: TrainConfig, snapshot: Snapshot) -> bool:
        """Writes and verifies a checkpoint; False: it failed, and older ones are as they were."""
        uri = checkpoint.place(self._run_uri, snapshot.step)
        has_weights = snapshot.step == self.saved  # they are there, and good
        try:
            if has_weights:
                checkpoint.add_validation(self._run_uri, snapshot)
            else:
                checkpoint.write(self._run_uri, config, snapshot)
            checkpoint.verify(uri)
        except (StorageError, CheckpointError) as error:
            _LOG.warning("checkpoint of step %d: %s", snapshot.step, error)
            self._failed, self._step = self._failed + 1, -1
            with suppress(StorageError):  # what is left of it has no manifest that holds
                self._discard(uri, error, has_weights)
            if self._failed >= TRIES:
                raise
            return False
        self._failed, self.saved = 0, snapshot.step
        self._verified = [*[u for u in self._verified if u != uri][-1:], uri]
        try:
            manifest.prune(self._run_uri, self._verified)
        except StorageError as error:  # more are kept than need be
            _LOG.warning("older checkpoints stay: %s", error)
        return True

    def _discard(self, uri: str, error: Exception, has_weights: bool) -> None:
        if isinstance(error, CheckpointError):
            self.rejected, self.saved = self.rejected + 1, -1
            checkpoint.quarantine(uri)
        elif not has_weights and not storage.is_remote(uri):  # room on a disk that may be full
            storage.delete(uri)
