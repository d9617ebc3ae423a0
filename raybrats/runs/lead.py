"""What rank 0 does besides training: it logs, saves, and listens to the driver."""

import threading
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager

import ray
import ray.exceptions
from ray.actor import ActorHandle
from ray.train.v2._internal.execution.context import get_train_context

from raybrats.errors import RaybratsError
from raybrats.registry.metric_log import MetricLog
from raybrats.runs import gauges, record
from raybrats.runs.job import Job
from raybrats.train.checkpoint import Written
from raybrats.train.learner import Learner
from raybrats.train.saver import Saver

POST_EVERY_S = 1.0
"""Seconds between two posts to the driver, who takes silence for a stall."""
LOOK_EVERY_S = 0.5
"""Seconds between two looks at whether the driver wants a checkpoint."""
_FP32 = "optim.precision fp32: convolutions multiply in TF32 on a GPU, as is torch's default"


class Rank0Error(Exception):
    """An error that the other ranks do not have: Ray ends them, and starts all again."""

    def __init__(self, cause: RaybratsError) -> None:
        super().__init__(cause)
        self.cause = cause

    def __str__(self) -> str:
        return f"rank 0: {self.cause}"


class Follower:
    """What any other rank does besides training: nothing."""

    remark = ""
    rejected = uncached = 0
    unsent = ""

    def log(self, figures: Mapping[str, float], tally: Mapping[str, float]) -> None:
        """Logs nothing."""

    def save(self, metrics: Mapping[str, float], finished: bool) -> None:
        """Saves nothing."""

    def check_in(self) -> None:
        """Does nothing: rank 0 is heard for all."""

    def finish(self) -> None:
        """Has nothing to send."""

    def close(self, failed: bool) -> None:
        """Has nothing to close."""


class Lead(Follower):
    """What rank 0 does besides training."""

    def __init__(self, job: Job, learner: Learner, resumed: Written | None, rejected: int) -> None:
        """Takes over from the checkpoint that the run goes on from, and what was rejected."""
        self.remark = ""
        """What the driver shows."""
        self.rejected, self.uncached, self.unsent = rejected, 0, ""
        self._learner, self._board, self._posted_s = learner, job.board, 0.0
        run = job.tracking
        run.enter()
        self._log = MetricLog(run, record.metrics_uri(job.run_uri))
        # What a checkpoint has behind it is not trained again, so its metrics are safe first.
        self._saver = Saver(job.run_uri, run.run_id, resumed, first=self._log.flush)
        self._requests = Requests(job.board)
        self._gauges = gauges.Gauges(job.config.run.name, rejected)
        if resumed is not None:
            self._board.tell.remote(f"resumed at step {resumed.step}")
        if learner.device.type == "cuda" and job.config.optim.precision == "fp32":
            self._board.tell.remote(_FP32)
        if job.config.cluster.compile:
            self._log.log({"train/compiled": float(not learner.not_compiled)}, learner.step)
            if learner.not_compiled:
                self._board.tell.remote(learner.not_compiled)

    def log(self, figures: Mapping[str, float], tally: Mapping[str, float]) -> None:
        """Figures to MLflow; those of steps to the driver and to those who watch the cluster too.

        Args:
            figures: of the last steps, or of a validation.
            tally: what the node caches were good for in this attempt; empty with a validation.
        """
        self._log.log({**figures, **(self._learner.cached if tally else {})}, self._learner.step)
        if tally:
            self.uncached = int(tally["cache/failed"])
            self._gauges.show(figures, tally)
            loss, speed = figures["train/loss"], figures["patches_per_s"]
            self.remark = f"loss {loss:.3f}, {speed:.1f} patches/s"
        else:
            dice = ", ".join(f"{k.rpartition('_')[2]} {v:.3f}" for k, v in figures.items())
            self.remark = f"validated: Dice {dice}"
            self._board.tell.remote(f"step {self._learner.step}: Dice {dice}")

    def save(self, metrics: Mapping[str, float], finished: bool) -> None:
        """Starts a checkpoint; that of a validation is waited for.

        Raises:
            Rank0Error: several in a row could not be written.
        """
        with _alone():
            self._saver.save(self._learner, metrics, finished)
            if metrics:  # a sweep may end this trial by what it reports: its score comes first
                self._saver.wait()
        self.rejected += self._gauges.reject(self._saver.rejected)

    def check_in(self) -> None:
        """Posts to the driver; saves at once if it is about to stop, or a node about to go.

        Raises:
            Rank0Error: the checkpoint could not be written.
        """
        now_s = time.monotonic()
        if now_s - self._posted_s > POST_EVERY_S:
            self._posted_s = now_s
            self._board.post.remote(self._learner.step, self.remark)
        if self._requests.due():
            with _alone():
                for _ in range(2):  # one may fail
                    self._saver.save(self._learner, {})
                    self._saver.wait()
            if self._saver.saved == self._learner.step:  # else the next step tries again
                self._requests.answer(self._saver.saved)

    def finish(self) -> None:
        """Sends the metrics that wait, or says why they do."""
        self._log.close()
        self.unsent = self._log.failed

    def close(self, failed: bool) -> None:
        """Ends the threads; the last checkpoint is waited for, unless the run has failed."""
        self._requests.close()
        self._log.close()
        if not failed:
            self._saver.close()


class Requests:
    """Whether a checkpoint is wanted now: by the driver, or because a node is to be taken away."""

    def __init__(self, board: ActorHandle) -> None:
        """Looks at the board from a thread."""
        self._board, self._asked, self._ended = board, threading.Event(), threading.Event()
        self._notice: object = None
        threading.Thread(target=self._watch, daemon=True).start()

    def due(self) -> bool:
        """Whether one is, once for each request."""
        if self._asked.is_set():
            return True
        # Ray's public `get_preemption_info` is a barrier of all ranks handing on what rank 0 knows.
        # That is all that is needed: it saves alone, while the others wait in their next step.
        notice = get_train_context().preemption_context.preemption_info
        if notice is not None and notice != self._notice:
            self._notice = notice
            return True
        return False

    def answer(self, step: int) -> None:
        """Tells the driver, if it has asked, that the checkpoint is there."""
        if self._asked.is_set():
            self._asked.clear()
            self._board.saved.remote(step)

    def close(self) -> None:
        """Stops looking."""
        self._ended.set()

    def _watch(self) -> None:
        asked = False
        while not self._ended.wait(LOOK_EVERY_S):
            try:
                requested = ray.get(self._board.checkpoint_requested.remote(), timeout=30)
            except (ray.exceptions.GetTimeoutError, ray.exceptions.ActorUnavailableError):
                continue  # the network comes back, or the driver has gone
            except ray.exceptions.RayError:  # the driver has gone, and this worker will
                return
            if requested and not asked:
                self._asked.set()
            asked = requested


@contextmanager
def _alone() -> Generator[None]:
    try:
        yield
    except RaybratsError as error:
        raise Rank0Error(error) from error
