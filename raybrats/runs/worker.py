"""What each Ray Train worker runs: its own stream, the loop, its share of the validation."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple, fields
from datetime import timedelta
from typing import Any, TypeVar

import ray.train
import ray.train.torch
import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel

from raybrats import errors
from raybrats.config import TrainConfig, digest
from raybrats.data.cache import Tally, prepared
from raybrats.data.cohort.case import Case
from raybrats.data.plan import Plan
from raybrats.data.prepare import Prepared
from raybrats.data.stream import Share, Stream
from raybrats.errors import CheckpointError, DivergedError, RaybratsError
from raybrats.registry.metric_log import MetricLog
from raybrats.runs import gauges, record
from raybrats.runs.job import Job
from raybrats.runs.stop import Wish
from raybrats.train import checkpoint, loop
from raybrats.train.checkpoint import Checkpoint, Written
from raybrats.train.learner import Learner, new_learner
from raybrats.train.loop import Hooks
from raybrats.train.saver import Saver

T = TypeVar("T")
POST_EVERY_S = 1.0
"""Between two words to the driver, who takes silence for a stall."""


def work(job: Job) -> dict[str, Any]:
    """Trains from the newest good checkpoint to the last step; what was reported last.

    `unsent` tells why metrics did not reach MLflow, if some did not; `uncached` counts the cases
    that a node could not keep; `rejected` the checkpoints that did not verify. What no restart
    helps is returned as `failed`, its kind and its words, so that Ray does not try again.
    """
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(math.ceil(job.config.cluster.cpus_per_worker))
    learner = new_learner(job.config, device)
    try:
        found, rejected = _resume(job, learner, rank)
        if found is not None and found.finished:
            return {"step": learner.step, "rejected": rejected, **found.metrics}
        if world > 1:
            ids = [device.index] if device.type == "cuda" else None
            learner.network = DistributedDataParallel(learner.network, device_ids=ids)
        share = Share(rank, world, learner.step, job.config.optim.steps, job.data_cpus)
        with _Worker(job, learner, share, (found, rejected)) as worker:
            return worker.run()
    except (DivergedError, CheckpointError) as error:  # on all ranks alike
        return {"failed": (type(error).__name__, _with_cases(job, learner, error))}


class _AloneError(Exception):
    """An error that the other ranks do not have: Ray ends them, and starts all again."""


class _Worker:
    """One rank of a run; rank 0 also logs, saves and listens to the driver."""

    def __init__(
        self, job: Job, learner: Learner, share: Share, resumed: tuple[Written | None, int]
    ) -> None:
        self._job, self._learner, self._share = job, learner, share
        self._stream = Stream(job.config, job.train_cases, share)
        self._first = share.rank == 0
        found, rejected = resumed
        self._extra: dict[str, Any] = {"rejected": rejected}
        self._remark, self._posted_s = "", 0.0
        # Shares of a validation differ by a case, which may take longer than a step may.
        patience = timedelta(seconds=job.config.cluster.stall_s)
        several = share.world > 1
        self._patient = torch.distributed.new_group(None, patience, "gloo") if several else None
        if self._first:
            self._log = MetricLog(job.tracking, record.metrics_uri(job.run_uri))
            # What a checkpoint has behind it is not trained again, so its metrics are safe first.
            run_id, settle = job.tracking.run_id, self._log.settle
            self._saver = Saver(job.run_uri, run_id, found, first=settle)
            self._wish = Wish(job.board)
            self._gauges = gauges.Gauges(job.config.run.name, rejected)

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *error: object) -> None:
        if self._first:
            self._wish.close()
            self._log.close()
            if error[0] is None:
                self._saver.close()

    def run(self) -> dict[str, Any]:
        """Trains to the end of the run; the metrics of the last validation, and what was odd."""
        hooks = Hooks(self._validate, self._tell, self._save, self._heed)
        metrics = loop.run(self._learner, self._stream, hooks)
        if self._first:
            self._log.close()
            self._extra |= {"unsent": self._log.failed} if self._log.failed else {}
        return {"step": self._learner.step, **metrics, **self._extra}

    def _validate(self) -> list[list[float]]:
        mine = self._job.held_out[self._share.rank :: self._share.world]
        return loop.gathered(loop.validate(self._learner, self._heeding(mine)), self._patient)

    def _heeding(self, cases: tuple[Case, ...]) -> Iterator[Prepared]:
        """The cases of a validation; it may be long, so the driver is heeded between them."""
        for number, case in enumerate(_prepared(self._job.config, cases), 1):
            self._remark = f"validating, case {number} of {len(cases)}"
            self._heed()
            yield case

    def _tell(self, figures: Mapping[str, float]) -> None:
        """Figures to MLflow, to the driver and to those who watch the cluster."""
        if "train/loss" not in figures:
            if self._first:
                self._log.log(figures, self._learner.step)
            return
        tally = _over_ranks(self._stream.tally, self._learner.device)
        if not self._first:
            return
        cached = {f"cache/{name}": count for name, count in tally.items()}
        self._extra["uncached"] = int(tally["failed"])
        self._log.log({**figures, **cached}, self._learner.step)
        self._gauges.show(figures, tally)
        loss, speed = figures["train/loss"], figures["patches_per_s"]
        self._remark = f"loss {loss:.3f}, {speed:.1f} patches/s"

    def _save(self, metrics: Mapping[str, float], finished: bool) -> None:
        """A checkpoint, by rank 0; after a validation Ray Train is told too."""
        if self._first:
            with _alone():
                self._saver.save(self._learner, metrics, finished)
                if metrics:  # a sweep may end this trial by what it reports: its score comes first
                    self._saver.wait()
            self._extra["rejected"] += self._gauges.reject(self._saver.rejected)
        if metrics:
            ray.train.report({"step": self._learner.step, **metrics})

    def _heed(self) -> None:
        """Saves at once if the driver is about to stop, or a node of the run about to go."""
        if not self._first:
            return
        now_s = time.monotonic()
        if self._job.board is not None and now_s - self._posted_s > POST_EVERY_S:
            self._posted_s = now_s
            self._job.board.post.remote(self._learner.step, self._remark)
        if reason := self._wish.due():
            with _alone():
                for _ in range(2):  # one may fail
                    self._saver.save(self._learner, {})
                    self._saver.wait()
            self._wish.granted(self._saver.saved, reason)


@contextmanager
def _alone() -> Iterator[None]:
    try:
        yield
    except RaybratsError as error:
        raise _AloneError(f"rank 0: {error}") from error


def _resume(job: Job, learner: Learner, rank: int) -> tuple[Written | None, int]:
    """Loads the checkpoint that rank 0 chose; what it is, and how many newer ones were bad.

    Raises:
        RaybratsError: there were some, and none can be trusted, reached or fits; on all ranks.
    """
    found, told = None, _told(lambda: None)
    if rank == 0:
        told = _told(lambda: checkpoint.newest(job.run_uri))
        found = told[1]
    chosen = [(told[0], found.uri if found else "", len(found.rejected) if found else 0)]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(chosen, src=0)
    ((error, uri, rejected),) = chosen
    if uri and not error:
        error, found = _told(lambda: _restored(job.config, learner, found or checkpoint.read(uri)))
    errors_of_all = [error]
    if torch.distributed.is_initialized():
        errors_of_all = [None] * loop.world_size()
        torch.distributed.all_gather_object(errors_of_all, error)
    for kind, words in filter(None, errors_of_all):
        raise getattr(errors, kind)(words)
    resumed = Written(found.uri, found.step, found.metrics, found.finished) if found else None
    return resumed, rejected


def _told(action: Callable[[], T]) -> tuple[tuple[str, str] | None, T | None]:
    """The kind and the words of an action's error, or else what it returns."""
    try:
        return None, action()
    except RaybratsError as error:
        return (type(error).__name__, str(error)), None


def _restored(config: TrainConfig, learner: Learner, found: Checkpoint) -> Checkpoint:
    _require_same(config, found)
    learner.restore(found.weights, found.state, found.progress)
    return found


def _require_same(config: TrainConfig, found: Checkpoint) -> None:
    if found.config_digest != digest(config):
        raise CheckpointError(f"{found.uri} was written with another configuration")


def _with_cases(job: Job, learner: Learner, error: RaybratsError) -> str:
    """The error's words, and which cases a diverged run saw last."""
    if not isinstance(error, DivergedError) or not learner.skipped_in_a_row:
        return str(error)
    config, cases = job.config, job.train_cases
    batch, draws = config.optim.global_batch, config.data.patches_per_case
    plan = Plan(len(cases), batch, config.run.seed, draws)
    numbers = {case for step in learner.skipped_in_a_row[-3:] for case in plan.cases(step)}
    names = ", ".join(cases[number].case_id for number in sorted(numbers)[:8])
    return f"{error} (cases of its last steps: {names})"


def _over_ranks(tally: Tally, device: torch.device) -> dict[str, float]:
    """What the node caches were good for, over all ranks."""
    counts = torch.tensor(astuple(tally), dtype=torch.float32, device=device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(counts)
    return dict(zip((f.name for f in fields(Tally)), counts.tolist(), strict=True))


def _prepared(config: TrainConfig, cases: tuple[Case, ...]) -> Iterator[Prepared]:
    """Whole cases, the next one decoded while the network works on this one."""

    def open_one(case: Case) -> Prepared:
        return prepared(case, config.data)[0]

    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = [pool.submit(open_one, case) for case in cases[:1]]
        for following in (*cases[1:], None):
            if not waiting:
                return
            ready = waiting.pop().result()
            if following is not None:
                waiting.append(pool.submit(open_one, following))
            yield ready
