"""Metrics on their way to MLflow: none lost, none twice, and never in the way of a step."""

import threading
import time
from collections.abc import Mapping, Sequence

from mlflow import MlflowClient, MlflowException
from mlflow.entities import Metric

from raybrats.errors import StorageError
from raybrats.registry import spool
from raybrats.registry.spool import Row
from raybrats.registry.tracking import Run, check_reachable, one_line, tracking_errors

_BATCH = 1000
"""Rows a request: MLflow takes no more."""
_BACK_OFF_S = 3.0
"""After a refusal; the client's own three tries take another 3 s where nothing listens."""
_LATE_S = 2.0
"""Age of a row that shows that the server does not take them: a healthy one needs 0.05 s."""
_KEEP_EVERY_S, _KEEP_AT_LEAST_EVERY_S, _KEEP_SHARE = 5.0, 60.0, 20
"""Pause between two writes of the spool, and how many times longer than the last write it is:
writing 300 000 rows, of an outage over a whole run, takes 2.3 s of a processor."""
_LAST_WRITE_S = 30.0
"""Wait for the spool's last write when the log is closed."""

_FINAL = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""Refusals that no later try will change: no such run, a deleted run, a wrong name."""


class MetricLog:
    """Sends metrics from one thread, and from another keeps in storage what cannot be sent."""

    def __init__(self, run: Run, spool_uri: str) -> None:
        """Takes over what an earlier log of the run has left in the spool.

        Raises:
            StorageError: the spool is out of reach.
        """
        self._run, self._spool_uri = run, spool_uri
        self._kept = spool.read(spool_uri)
        self._unsent = list(self._kept or ())
        self._refusal = self._trouble = ""
        self._closing, self._over = False, threading.Event()
        self._changed, self._keeping = threading.Condition(), threading.Lock()
        self._sender = threading.Thread(target=self._send, daemon=True)
        self._keeper = threading.Thread(target=self._keep_on, daemon=True)
        self._sender.start()
        self._keeper.start()

    @property
    def unsent(self) -> int:
        """Rows that wait."""
        return len(self._unsent)

    @property
    def failed(self) -> str:
        """Why rows wait, and why the spool does not hold them; empty if none does."""
        reasons = (self._refusal, self._trouble) if self._unsent else ()
        return "; ".join(filter(None, reasons))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Hands metrics over; returns at once. Of a step logged twice the first value counts."""
        now_ms = int(time.time() * 1000)
        with self._changed:
            self._unsent += [Row(key, float(v), now_ms, step) for key, v in metrics.items()]
            self._changed.notify_all()

    def settle(self, patience_s: float = 1.0) -> None:
        """Makes sure that a kill loses nothing logged so far: it is sent, or else in the spool."""
        with self._changed:
            self._changed.wait_for(lambda: self._refusal or not self._unsent, patience_s)
            settled = not self._unsent
        if not settled:
            self._keep(everything=True)

    def close(self, timeout_s: float = 60.0) -> None:
        """Sends what waits; what the server has not taken by then stays in the spool."""
        if self._closing:
            return
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._sender.join(timeout_s)
        self._over.set()
        self._keeper.join(_LAST_WRITE_S)
        if self._unsent and not self._refusal:
            self._refusal = f"the server has not taken them within {timeout_s:g} s"

    def _send(self) -> None:
        if not self._run.run_id:
            return self._note("there was no server when the run began")
        receiver = None
        while not self._over.is_set() and (rows := self._next()):
            try:
                receiver = receiver or _Receiver(self._run)
                receiver.take(rows)
                self._note(sent=len(rows))
            except Exception as error:  # training goes on without its metrics, and says so
                self._note(one_line(error))
                if isinstance(error, MlflowException) and error.error_code in _FINAL:
                    return None
                self._over.wait(_BACK_OFF_S)
        return None

    def _next(self) -> list[Row]:
        """Waits for rows; none once the log is closed and everything sent."""
        with self._changed:
            self._changed.wait_for(lambda: self._unsent or self._closing)
            return self._unsent[:_BATCH]

    def _note(self, refusal: str = "", sent: int = 0) -> None:
        with self._changed:
            self._refusal = refusal
            del self._unsent[:sent]
            self._changed.notify_all()

    def _keep_on(self) -> None:
        pause_s = _KEEP_EVERY_S
        while not self._over.wait(pause_s):
            began = time.monotonic()
            self._keep(everything=False)
            pause_s = max(_KEEP_EVERY_S, _KEEP_SHARE * (time.monotonic() - began))
            pause_s = min(pause_s, _KEEP_AT_LEAST_EVERY_S)
        self._keep(everything=True)

    def _keep(self, everything: bool) -> None:
        """Makes the spool what waits: everything, or only if the server is behind."""
        with self._keeping:
            with self._changed:
                rows = list(self._unsent)
            late = rows and abs(time.time() - rows[0].timestamp / 1000) > _LATE_S
            try:
                if rows and (late or everything) and rows != self._kept:
                    spool.write(self._spool_uri, rows)
                    self._kept = rows
                elif not rows and self._kept is not None:
                    spool.remove(self._spool_uri)
                    self._kept = None
                self._trouble = ""
            except StorageError as error:
                self._trouble = str(error)


def replay(run: Run, spool_uri: str) -> int:
    """Sends what a spool holds, removes it, and returns how many rows the run did not have yet.

    Raises:
        StorageError: the spool is out of reach.
        TrackingError: the server is out of reach or does not take them; the spool stays.
    """
    rows = spool.read(spool_uri)
    if rows is None:
        return 0
    check_reachable(run.uri)
    with tracking_errors(run.uri):
        receiver = _Receiver(run)
        sent = sum(receiver.take(rows[at : at + _BATCH]) for at in range(0, len(rows), _BATCH))
    spool.remove(spool_uri)
    return sent


class _Receiver:
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

    def take(self, rows: Sequence[Row]) -> int:
        """Sends the rows whose steps the run does not have; returns how many."""
        new: dict[tuple[str, int], Metric] = {}
        for row in rows:
            if row.step not in self._known(row.key):
                metric = Metric(row.key, row.value, row.timestamp, row.step)
                new.setdefault((row.key, row.step), metric)
        self._client.log_batch(self._run_id, metrics=list(new.values()))
        for key, step in new:
            self._steps[key].add(step)
        return len(new)

    def _known(self, key: str) -> set[int]:
        if key not in self._steps:
            there = key in self._names
            history = self._client.get_metric_history(self._run_id, key) if there else ()
            self._steps[key] = {metric.step for metric in history}
        return self._steps[key]
