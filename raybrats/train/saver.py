"""Checkpoints written behind the training: one at a time, verified, and only then older ones go."""

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from raybrats import storage
from raybrats.config import TrainConfig
from raybrats.errors import CheckpointError, DivergedError, StorageError
from raybrats.train import checkpoint, manifest
from raybrats.train.checkpoint import Checkpoint, Snapshot, Written
from raybrats.train.learner import Learner, world_size

_LOG = logging.getLogger(__name__)
TRIES = 3
"""Checkpoints in a row that may fail until the run stops: by then three intervals are at risk."""


class Saver:
    """Takes a copy of the learner and writes it while the training goes on."""

    def __init__(
        self,
        run_uri: str,
        mlflow_run_id: str = "",
        resumed: Checkpoint | Written | None = None,
        first: Callable[[], None] = lambda: None,
    ) -> None:
        """Of a run that goes on from `resumed`; `first` is called before each is written."""
        self.rejected = 0
        """Checkpoints that did not read back as they were written."""
        self.saved = resumed.step if resumed else -1
        """Step of the newest one that verified; a validation of it is added to what is there."""
        self._run_uri, self._mlflow_run_id, self._before = run_uri, mlflow_run_id, first
        self._verified = [resumed.uri] if resumed else []
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._failed, self._step = 0, -1
        self._copy: Any = None
        """Of the last one; its memory serves the next, for new memory costs twice the copy."""

    def save(self, learner: Learner, metrics: Mapping[str, float], finished: bool = False) -> None:
        """Starts a checkpoint, once the one before is done; the last one is waited for.

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
        """Returns when nothing is being written; raises as `save` does."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Waits for what is being written."""
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
        while not self._written(config, snapshot) and snapshot.finished:
            continue

    def _written(self, config: TrainConfig, snapshot: Snapshot) -> bool:
        """Whether it verified; else older ones are as they were, and the next save tries anew."""
        uri = checkpoint.place(self._run_uri, snapshot.step)
        only_validated = snapshot.step == self.saved  # the weights are there, and good
        try:
            if only_validated:
                checkpoint.add_validation(self._run_uri, snapshot)
            else:
                checkpoint.write(self._run_uri, config, snapshot)
            checkpoint.verify(uri)
        except (StorageError, CheckpointError) as error:
            _LOG.warning("checkpoint of step %d: %s", snapshot.step, error)
            self._failed, self._step = self._failed + 1, -1
            with suppress(StorageError):  # of what is left of it; it has no manifest that holds
                self._clear(uri, error, only_validated)
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

    def _clear(self, uri: str, error: Exception, only_validated: bool) -> None:
        if isinstance(error, CheckpointError):
            self.rejected, self.saved = self.rejected + 1, -1
            checkpoint.quarantine(uri)
        elif not only_validated and not storage.is_remote(uri):  # room on a disk that may be full
            storage.delete(uri)


def copied(state: Any, kept: Any) -> Any:  # noqa: ANN401 - a tree of what an optimiser keeps
    """The same tree with copies of its tensors on the CPU, in the memory of `kept` where it fits.

    Copies from a GPU are under way when this returns.
    """
    if isinstance(state, Tensor):
        if not (isinstance(kept, Tensor) and kept.shape == state.shape):
            kept = torch.empty_like(state, device="cpu", pin_memory=state.is_cuda)
        return kept.copy_(state.detach(), non_blocking=True)
    if isinstance(state, Mapping):
        before = kept if isinstance(kept, Mapping) else {}
        return {name: copied(value, before.get(name)) for name, value in state.items()}
    if isinstance(state, list | tuple):
        before = kept if isinstance(kept, list | tuple) else ()
        pairs = zip_longest(state, before[: len(state)])
        return type(state)(copied(value, old) for value, old in pairs)
    return state
