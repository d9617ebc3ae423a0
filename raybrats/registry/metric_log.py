"""Metrics on their way to MLflow: none lost, none twice, and never in the way of a step."""

import threading
import time
from collections.abc import Mapping, Sequence

from mlflow import MlflowClient, MlflowException
from mlflow.entities import Metric

from raybrats.errors import StorageError
from raybrats.registry import spool
from raybrats.registry.server import check_reachable, one_line, tracking_errors
from raybrats.registry.spool import Row
from raybrats.registry.tracking import Run

_BATCH = 1000
"""Rows in a request: MLflow takes no more."""
_RETRY_S = 3.0
"""Seconds from a refusal to the next try; the client's own three tries take another 3 s where
nothing listens."""
_LATE_S = 2.0
"""Age of a row in seconds that shows that the server is behind: a healthy one needs 0.05 s."""
_MIN_PAUSE_S, _MAX_PAUSE_S, _PAUSE_RATIO = 5.0, 60.0, 20
"""Limits of the pause between two writes of the spool, and how many times as long as the last write
it is: writing 300 000 rows, of an outage over a whole run, takes 2.3 s of a processor."""
_LAST_WRITE_S = 30.0
"""Seconds given to the spool's last write when the log is closed."""

_PERMANENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""Refusals that no later try will change: no such run, a deleted run, a wrong name."""


class MetricLog:
    """Log that sends metrics from one thread, and from another spools what cannot be sent.

    Example:
        >>> log = MetricLog(Run("http://mlflow:5000", run_id=""), "runs/one/metrics.jsonl")
        >>> log.log({"train/loss": 0.7, "train/lr": 0.01}, step=1)
        >>> log.close()
        >>> log.unsent, log.failed
        (2, 'there was no server when the run began')
    """

    def __init__(self, run: Run, spool_uri: str) -> None:
        """Takes over what an earlier log of the run has left in the spool.

        Raises:
            StorageError: the spool is out of reach.
        """
        self._run, self._spool_uri = run, spool_uri
        self._spooled = spool.read(spool_uri)
        self._unsent = list(self._spooled or ())
        self._send_error = self._spool_error = ""
        self._closing, self._ended = False, threading.Event()
        self._changed, self._spool_lock = threading.Condition(), threading.Lock()
        self._sender = threading.Thread(target=self._send, daemon=True)
        self._spooler = threading.Thread(target=self._spool, daemon=True)
        self._sender.start()
        self._spooler.start()

    @property
    def unsent(self) -> int:
        """Number of rows that wait to be sent."""
        return len(self._unsent)

    @property
    def failed(self) -> str:
        """Reason why rows wait, and why the spool does not hold them; empty if none waits."""
        reasons = (self._send_error, self._spool_error) if self._unsent else ()
        return "; ".join(filter(None, reasons))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Takes metrics and returns at once; of a step logged twice the first value counts."""
        now_ms = int(time.time() * 1000)
        with self._changed:
            self._unsent += [Row(key, float(v), now_ms, step) for key, v in metrics.items()]
            self._changed.notify_all()

    def flush(self, patience_s: float = 1.0) -> None:
        """Makes sure that a kill loses nothing logged so far: it is sent, or else in the spool."""
        with self._changed:
            self._changed.wait_for(lambda: self._send_error or not self._unsent, patience_s)
            sent = not self._unsent
        if not sent:
            self._write_spool(everything=True)

    def close(self, timeout_s: float = 60.0) -> None:
        """Sends what waits; what the server has not taken by then stays in the spool."""
        if self._closing:
            return
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._sender.join(timeout_s)
        self._ended.set()
        self._spooler.join(_LAST_WRITE_S)
        if self._unsent and not self._send_error:
            self._send_error = f"the server has not taken them within {timeout_s:g} s"

    def _send(self) -> None:
        """Sends rows, batch by batch, until the log is closed and everything is sent."""
        if not self._run.run_id:
            return self._update("there was no server when the run began")
        remote = None
        while not self._ended.is_set() and (batch := self._next_batch()):
            try:
                remote = remote or _RemoteRun(self._run)
                remote.send_new(batch)
                self._update(num_sent=len(batch))
            except Exception as error:  # training goes on without its metrics, and says so
                self._update(one_line(error))
                if isinstance(error, MlflowException) and error.error_code in _PERMANENT:
                    return None
                self._ended.wait(_RETRY_S)
        return None

    def _next_batch(self) -> list[Row]:
        """Rows that wait, once there are some; none once the log is closed and all are sent."""
        with self._changed:
            self._changed.wait_for(lambda: self._unsent or self._closing)
            return self._unsent[:_BATCH]

    def _update(self, send_error: str = "", num_sent: int = 0) -> None:
        """Tells those who wait for the sender what has come of its last try."""
        with self._changed:
            self._send_error = send_error
            del self._unsent[:num_sent]
            self._changed.notify_all()

    def _spool(self) -> None:
        """Writes the spool now and then while the server is behind, and once at the end."""
        pause_s = _MIN_PAUSE_S
        while not self._ended.wait(pause_s):
            start = time.monotonic()
            self._write_spool(everything=False)
            took_s = time.monotonic() - start
            pause_s = min(max(_MIN_PAUSE_S, _PAUSE_RATIO * took_s), _MAX_PAUSE_S)
        self._write_spool(everything=True)

    def _write_spool(self, *, everything: bool) -> None:
        """Makes the spool hold what waits: everything, or only if the server is behind."""
        with self._spool_lock:
            with self._changed:
                rows = list(self._unsent)
            late = rows and abs(time.time() - rows[0].timestamp / 1000) > _LATE_S
            try:
                if rows and (late or everything) and rows != self._spooled:
                    spool.write(self._spool_uri, rows)
                    self._spooled = rows
                elif not rows and self._spooled is not None:
                    spool.remove(self._spool_uri)
                    self._spooled = None
                self._spool_error = ""
            except StorageError as error:
                self._spool_error = str(error)


def replay(run: Run, spool_uri: str) -> int:
    """Sends what a spool holds, removes it, and returns how many rows the run did not have yet.

    Raises:
        StorageError: the spool is out of reach.
        TrackingError: the server is out of reach or does not take them; the spool stays.

    Example:
        >>> replay(run, "s3://bucket/runs/one/metrics.jsonl")  # doctest: +SKIP
        30
    """
    rows = spool.read(spool_uri)
    if rows is None:
        return 0
    check_reachable(run.uri)
    with tracking_errors(run.uri):
        remote = _RemoteRun(run)
        sent = sum(remote.send_new(rows[at : at + _BATCH]) for at in range(0, len(rows), _BATCH))
    spool.remove(spool_uri)
    return sent


class _RemoteRun:
    """A run at its server, and the steps that it has of each metric.

    Rows sent again because an answer was lost change nothing: the primary key of MLflow's table is
    (run, key, value, timestamp, step), and a row that is there is passed over, NaN and infinities
    too (measured: MLflow 3.17 on SQLite without a server, on PostgreSQL behind one; a test holds
    it). But a step that training repeats has a timestamp of its own and would stand twice.
    """

    def __init__(self, run: Run) -> None:
        """Asks which metrics the run has, so that a new run is asked for no history."""
        self._client, self._run_id = MlflowClient(run.uri), run.run_id
        self._names = set(self._client.get_run(run.run_id).data.metrics)
        self._steps: dict[str, set[int]] = {}

    def send_new(self, rows: Sequence[Row]) -> int:
        """Sends the rows whose steps the run does not have; returns how many."""
        new: dict[tuple[str, int], Metric] = {}
        for row in rows:
            if row.step not in self._steps_of(row.key):
                metric = Metric(row.key, row.value, row.timestamp, row.step)
                new.setdefault((row.key, row.step), metric)
        self._client.log_batch(self._run_id, metrics=list(new.values()))
        for key, step in new:
            self._steps[key].add(step)
        return len(new)

    def _steps_of(self, key: str) -> set[int]:
        """Steps of a metric that the server has; asked for once."""
        if key not in self._steps:
            there = key in self._names
            history = self._client.get_metric_history(self._run_id, key) if there else ()
            self._steps[key] = {metric.step for metric in history}
        return self._steps[key]
