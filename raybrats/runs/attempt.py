"""An attempt at a run: what a train, a trial of a sweep and a fold have in common."""

import logging
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial

import ray
from ray.actor import ActorHandle
from ray.train import UserCallback

from raybrats import cluster, storage
from raybrats.config import TrainConfig
from raybrats.data.cohort import index
from raybrats.data.cohort.case import Case
from raybrats.data.cohort.usable import left_out, split, usable, with_labels
from raybrats.errors import RaybratsError, TrackingError
from raybrats.registry import tracking
from raybrats.registry.tracking import Run
from raybrats.runs import board, gauges, launch, lease, record
from raybrats.runs.beginning import beginning, check_code, source_of
from raybrats.runs.job import Job, Outcome
from raybrats.runs.stop import Stop, on_sigterm

_LOG = logging.getLogger(__name__)


@dataclass
class Attempt:
    """A run whose lease is held, and whose record and MLflow run are open."""

    config: TrainConfig
    uri: str
    cases: tuple[Case, ...]
    """Those that can be used, of both sides of the split."""
    tracking: Run
    """Without an id as long as the server is away, where it is not required."""
    stop: Stop
    num_at_once: int = 1
    """Runs that have the cluster together."""

    def fit(self, callbacks: Sequence[UserCallback] = ()) -> Outcome:
        """Trains to the last step, from the newest good checkpoint; registers nothing.

        Progress, restarts, stalls and SIGTERM are watched, and metrics that waited are sent.

        Raises:
            RaybratsError: the cause in a worker, where it was one that a user can act on.
            KeyboardInterrupt: by SIGINT, or by SIGTERM after a last checkpoint.
        """
        name, wanted = self.config.run.name, self.config.cluster
        words = (
            f"run {name}: nothing moved for {wanted.stall_s:g} s (cluster.stall_s), so it was "
            f"ended; --run.name {name} resumes it"
        )
        stalled = partial(self.stop.now, RaybratsError(words))
        with board.followed(self.uri, self.config.optim.steps, wanted.stall_s, stalled) as shown:

            def leave() -> None:
                try:
                    board.save_all([shown], wanted.grace_s)
                finally:
                    self.stop.now(KeyboardInterrupt())

            try:
                with self.stop.ends(partial(board.abort, shown)), on_sigterm(leave):
                    outcome = self._launched(self._job(shown), callbacks)
            except Exception:
                self.stop.check()  # it was we who ended it
                raise
            self.stop.check()  # too late for the workers, but nothing is registered any more
            outcome = replace(outcome, restarts=ray.get(shown.restarts.remote()))
        for remark in self._remarks(outcome):
            _LOG.warning(remark)
        self.tracking = record.deliver(self.config, self.uri, self.tracking, self.cases)
        return outcome

    def _launched(self, job: Job, callbacks: Sequence[UserCallback]) -> Outcome:
        try:
            return launch.fit(job, callbacks)
        except KeyboardInterrupt:
            board.abort(job.board)
            raise

    def _job(self, shown: ActorHandle) -> Job:
        train_cases, held_out = split(self.config, self.cases)
        return Job(
            config=self.config,
            run_uri=self.uri,
            train_cases=tuple(train_cases),
            held_out=tuple(held_out),
            data_cpus=launch.spare_cpus(self.config, self.num_at_once),
            tracking=self.tracking,
            board=shown,
        )

    def _remarks(self, outcome: Outcome) -> Iterator[str]:
        """What did not stop the run, but should be known."""
        if outcome.unsent:
            again = f"the same command with --run.name {self.config.run.name} sends them"
            yield f"some metrics did not reach MLflow ({outcome.unsent}); {again}"
        if outcome.rejected:
            place = storage.join(self.uri, "checkpoints", "quarantine")
            yield (
                f"{outcome.rejected} checkpoints did not verify and lie in {place}; an older one "
                "was used"
            )
        if outcome.uncached:
            yield (
                f"prepared cases could not be kept {outcome.uncached} times: make room, or set "
                "data.cache_dir and data.cache_gb; meanwhile each draw reads its case anew"
            )


@contextmanager
def opened(
    config: TrainConfig,
    cases: Sequence[Case] | None = None,
    *,
    parent: Run | None = None,
    num_at_once: int = 1,
) -> Generator[Attempt]:
    """The attempt at a run, under its lease; its MLflow run is closed at the end.

    Args:
        config: the run, with a name.
        cases: the usable ones; those of `data.cohort` where not given.
        parent: the MLflow run of the sweep that the run is a trial of.
        num_at_once: runs that have the cluster together.

    Raises:
        RaybratsError: a kind for each cause, before any worker starts where that is possible.

    Example:
        >>> with opened(config) as attempt:  # doctest: +SKIP
        ...     outcome = attempt.fit()
    """
    check_code(config)
    uri, stop = run_uri(config), Stop()
    with lease.held(uri, stop.taken_over):
        known = record.earlier(config, uri)
        source = source_of(config, uri) if known is None else None
        if cases is None:
            cases = fitting_cases(config)
        config = with_labels(config, cases)
        record.check_cohort(known, cases, uri)
        tags = beginning(config, uri, cases, source) if known is None else {}
        run = record.open_tracking(config, uri, known, cases, parent, tags)
        attempt = Attempt(config, uri, tuple(cases), run, stop, num_at_once)
        try:
            yield attempt
            stop.check()
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
            if not stop.lost:
                with suppress(TrackingError):  # the first error is the one to tell
                    tracking.finish(attempt.tracking, "KILLED" if interrupted else "FAILED")
            raise
        close(attempt.tracking)


def close(run: Run, status: str = "FINISHED") -> None:
    """Closes an MLflow run whose work is done, and says so where that fails: nothing is lost.

    Example:
        >>> close(attempt.tracking)  # doctest: +SKIP
    """
    try:
        tracking.finish(run, status)
    except TrackingError as error:
        _LOG.warning("the run has ended, but is not closed in MLflow: %s", error)


def run_uri(config: TrainConfig) -> str:
    """Where a run keeps its checkpoints, its lease and its record.

    Example:
        >>> from raybrats.config import RunConfig
        >>> run_uri(TrainConfig(run=RunConfig(name="one", storage_uri="s3://bucket/runs")))
        's3://bucket/runs/one'
    """
    return storage.join(storage.absolute(config.run.storage_uri), config.run.name)


def fitting_cases(config: TrainConfig, *, dashboard: bool = False) -> list[Case]:
    """The usable cases of a run that fits the cluster, which is joined.

    Args:
        config: the run.
        dashboard: as for `cluster.connect`.

    Raises:
        ResourcesError: the run does not fit.
        DataError: too few cases are usable.

    Example:
        >>> fitting_cases(config)[0].case_id  # doctest: +SKIP
        'BraTS20_Training_001'
    """
    uri = config.data.cohort
    # Before Ray is started, for a name may be wrong; a tree is opened on the cluster.
    is_tree = bool(uri) and not uri.endswith(".parquet")
    found = [] if is_tree else index.load(uri)
    if is_tree:
        storage.require(uri)
    cluster.connect(dashboard=dashboard)
    launch.check_fits(config)
    found = index.load(uri) if is_tree else found
    cases = usable(config, found)
    gauges.left_out(config.run.name, len(left_out(config, found)))
    return cases
