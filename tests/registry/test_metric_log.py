"""Metrics reach MLflow once: over outages of the server, lost answers, kills and repeated steps."""

import json
import math
import signal
import subprocess
import sys
import time

import pytest
from fault_proxy import fault_proxy, line_to
from mlflow import MlflowClient
from mlflow.entities import Metric

from raybrats import storage
from raybrats.config import RunConfig, TrackingConfig, TrainConfig
from raybrats.errors import TrackingError
from raybrats.registry import spool, tracking
from raybrats.registry.metric_log import MetricLog, replay
from raybrats.registry.spool import Row
from raybrats.registry.tracking import Run

server = pytest.mark.mlflow
faults = pytest.mark.faults


def new_run(folder, uri):
    place = RunConfig(storage_uri=str(folder))
    return tracking.start(TrainConfig(run=place, tracking=TrackingConfig(uri=uri, experiment="l")))


@pytest.fixture(scope="module")
def local_uri(tmp_path_factory):
    """One database for all runs: making its tables takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('local')}/mlflow.db"


@pytest.fixture(params=["local_uri", pytest.param("mlflow_uri", marks=server)])
def run(request, tmp_path):
    return new_run(tmp_path, request.getfixturevalue(request.param))


@pytest.fixture
def spool_uri(tmp_path):
    return f"{tmp_path}/run/metrics.jsonl"


@pytest.fixture
def served(mlflow_uri, tmp_path):
    """A run at the server."""
    return new_run(tmp_path, mlflow_uri)


@pytest.fixture
def line(served):
    with line_to(served.uri) as line:
        yield line


@pytest.fixture
def through(line, served):
    """The run, as one who reaches the server by the line only."""
    return Run(line.uri, served.run_id)


def until(holds, patience_s=60):
    deadline = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < deadline, "has not come about"
        time.sleep(0.05)


def log_steps(log, steps):
    """Two metrics a step; no call may hold up training."""
    for step in steps:
        began = time.monotonic()
        log.log({"train/loss": 1 / step, "train/lr": 0.1}, step)
        assert time.monotonic() - began < 5


def steps_of(run, key="train/loss"):
    """Every row of the metric that the server has."""
    history = MlflowClient(run.uri).get_metric_history(run.run_id, key)
    return sorted(metric.step for metric in history)


def assert_once(run, steps):
    for key in ("train/loss", "train/lr"):
        assert steps_of(run, key) == list(steps)
    curve = tracking.curves(run)["train/loss"]
    assert curve.values == pytest.approx([1 / step for step in steps])


def rows_of(*steps):
    return [Row("train/loss", 1 / step, 1000 + step, step) for step in steps]


def test_every_metric_arrives(run, spool_uri):
    log = MetricLog(run, spool_uri)
    log_steps(log, range(1, 31))
    log.close()
    assert (log.failed, log.unsent) == ("", 0)
    assert_once(run, range(1, 31))
    assert not storage.exists(spool_uri)


def test_rows_sent_again_change_nothing(run):
    client = MlflowClient(run.uri)
    values = [0.1, math.nan, math.inf, -math.inf]
    rows = [Metric("a", value, 5, step) for step, value in enumerate(values)]
    for sent in (rows, rows, [*rows, Metric("a", 0.2, 6, 4)]):
        client.log_batch(run.run_id, sent)
    assert steps_of(run, "a") == [0, 1, 2, 3, 4]


def test_steps_repeated_after_a_restart_do_not_stand_twice(run, spool_uri):
    for steps in (range(1, 11), range(6, 21), [5, 22, 21]):
        log = MetricLog(run, spool_uri)
        log_steps(log, steps)
        log.close()
        assert log.failed == ""
    assert_once(run, range(1, 23))


def test_more_rows_than_a_request_holds_also_arrive_once(run, spool_uri):
    spool.write(spool_uri, [Row("a", math.nan, 7, step) for step in range(2500)])
    log = MetricLog(run, spool_uri)
    log.close()
    assert log.failed == ""
    assert steps_of(run, "a") == list(range(2500))


@server
@faults
def test_a_server_away_from_the_start_gets_all_rows_when_it_comes(through, line, served, spool_uri):
    line.become("cut")
    log = MetricLog(through, spool_uri)
    log_steps(log, range(1, 11))
    until(lambda: log.failed and storage.exists(spool_uri))
    assert log.unsent == 20
    log_steps(log, range(11, 21))
    assert line.failed
    assert steps_of(served) == []
    line.become("up")
    log.close()
    assert (log.failed, log.unsent) == ("", 0)
    assert_once(served, range(1, 21))
    assert not storage.exists(spool_uri)


@server
@faults
def test_a_server_that_goes_and_comes_back_gets_every_step_once(through, line, served, spool_uri):
    log = MetricLog(through, spool_uri)
    log_steps(log, range(1, 11))
    until(lambda: log.unsent == 0)
    line.become("cut")
    log_steps(log, range(11, 1011))
    until(lambda: log.failed and storage.exists(spool_uri))
    assert line.failed
    line.become("up")
    log_steps(log, range(1011, 1021))
    until(lambda: log.unsent == 0 and not storage.exists(spool_uri))
    assert log.failed == ""
    log.close()
    assert_once(served, range(1, 1021))


@server
@faults
def test_a_server_that_stays_away_leaves_the_spool_to_the_next_log(
    through, line, served, spool_uri
):
    line.become("cut")
    log = MetricLog(through, spool_uri)
    log_steps(log, range(1, 11))
    log.close(timeout_s=1)
    assert log.failed
    assert log.unsent == 20
    assert spool.read(spool_uri)[-1].step == 10
    line.become("up")
    following = MetricLog(through, spool_uri)
    log_steps(following, range(6, 16))
    following.close()
    assert_once(served, range(1, 16))
    assert not storage.exists(spool_uri)


@server
@faults
def test_rows_are_kept_while_a_server_takes_calls_and_never_answers(
    through, line, served, spool_uri
):
    line.become("mute")
    log = MetricLog(through, spool_uri)
    log_steps(log, range(1, 6))
    until(lambda: storage.exists(spool_uri))
    log.close(timeout_s=1)
    assert line.failed
    assert "within 1 s" in log.failed
    assert len(spool.read(spool_uri)) == 10
    following = MetricLog(served, spool_uri)
    following.close()
    assert_once(served, range(1, 6))


@server
@faults
def test_an_answer_that_was_lost_doubles_nothing(served, spool_uri):
    with fault_proxy(served.uri) as proxy:
        log = MetricLog(Run(proxy.endpoint, served.run_id), spool_uri)
        log_steps(log, [1])
        until(lambda: log.unsent == 0)
        proxy.inject([lambda *_: None] * 4)  # no byte of the answer
        log_steps(log, range(2, 21))
        log.close()
        assert [request.fault is not None for request in proxy.seen][:5] == [True] * 4 + [False]
        assert all(request.path.endswith("/log-batch") for request in proxy.seen)
    assert log.failed == ""
    assert_once(served, range(1, 21))


WORKER = """
import sys, time
from raybrats.registry.metric_log import MetricLog
from raybrats.registry.tracking import Run
uri, run_id, spool_uri = sys.argv[1:]
log = MetricLog(Run(uri, run_id), spool_uri)
for step in range(1, 11):
    log.log({"train/loss": 1 / step, "train/lr": 0.1}, step)
time.sleep(600)
"""


@server
@faults
def test_the_rows_of_a_worker_killed_while_the_server_is_away_arrive_once(
    through, line, served, spool_uri
):
    line.become("cut")
    words = [through.uri, through.run_id, spool_uri]
    with subprocess.Popen([sys.executable, "-c", WORKER, *words]) as worker:
        until(lambda: storage.exists(spool_uri))
        worker.kill()
    assert worker.returncode == -signal.SIGKILL
    assert line.failed
    log = MetricLog(through, spool_uri)
    log_steps(log, range(6, 16))
    line.become("up")
    log.close()
    assert log.failed == ""
    assert_once(served, range(1, 16))
    assert not storage.exists(spool_uri)


@server
@faults
def test_what_was_flushed_survives_a_kill(through, line, spool_uri):
    log = MetricLog(through, spool_uri)
    log_steps(log, [1, 2])
    until(lambda: log.unsent == 0)
    log.flush()
    assert not storage.exists(spool_uri)
    line.become("cut")
    log_steps(log, [3, 4])
    log.flush()
    assert [row.step for row in spool.read(spool_uri)] == [3, 3, 4, 4]
    log.close(timeout_s=0)


def test_without_a_run_metrics_wait_until_they_are_replayed(run, spool_uri):
    for steps in (range(1, 11), range(6, 16)):
        log = MetricLog(Run(run.uri, ""), spool_uri)
        log_steps(log, steps)
        log.close()
        assert "no server" in log.failed
    assert log.unsent == 40
    assert replay(run, spool_uri) == 30
    assert_once(run, range(1, 16))
    assert replay(run, spool_uri) == 0


def test_a_replay_sends_only_what_the_run_lacks(run, spool_uri):
    MlflowClient(run.uri).log_metric(run.run_id, "train/loss", 1.0, timestamp=1, step=1)
    spool.write(spool_uri, rows_of(1, 2, 3))
    assert replay(run, spool_uri) == 2
    assert steps_of(run) == [1, 2, 3]


@server
@faults
def test_a_replay_to_a_server_that_is_away_is_an_error_and_keeps_the_spool(
    through, line, spool_uri
):
    spool.write(spool_uri, rows_of(1))
    line.become("cut")
    with pytest.raises(TrackingError, match=r"127\.0\.0\.1") as refusal:
        replay(through, spool_uri)
    assert line.failed
    assert "\n" not in str(refusal.value)
    assert spool.read(spool_uri) == rows_of(1)


@pytest.mark.parametrize(
    "damage",
    [
        b'{"key": "train/loss", "val',
        b"\xff\xfe\x00",
        b"[1, 2]",
        b"null",
        b'{"key": "train/loss", "value": "much", "timestamp": 1, "step": 2}',
        b'{"key": "train/l?ss", "value": 1, "timestamp": 1, "step": 2}',
        b'{"key": 7, "value": 1, "timestamp": 1, "step": 2}',
        b'{"key": "train/loss", "value": 1, "timestamp": 1, "step": Infinity}',
    ],
)
def test_a_damaged_line_is_left_out_with_a_warning(damage, local_uri, tmp_path, spool_uri, caplog):
    run = new_run(tmp_path, local_uri)
    spool.write(spool_uri, rows_of(1, 2, 3))
    lines = storage.read_bytes(spool_uri).splitlines()
    lines[1] = damage
    storage.write_bytes(spool_uri, b"\n".join(lines))
    log = MetricLog(run, spool_uri)
    assert f"{spool_uri}: line 2 is damaged" in caplog.text
    log.close()
    assert (log.failed, steps_of(run)) == ("", [1, 3])
    assert not storage.exists(spool_uri)


def test_the_spool_is_one_json_object_a_line(spool_uri):
    rows = [*rows_of(1), Row("val/dice_WT", math.inf, 5, 9)]
    spool.write(spool_uri, rows)
    lines = storage.read_bytes(spool_uri).splitlines()
    assert json.loads(lines[0]) == {
        "key": "train/loss",
        "value": 1.0,
        "timestamp": 1001,
        "step": 1,
    }
    assert spool.read(spool_uri) == rows
    spool.remove(spool_uri)
    spool.remove(spool_uri)
    assert spool.read(spool_uri) is None


@pytest.mark.s3
def test_a_spool_on_object_storage(bucket, local_uri, tmp_path):
    run = new_run(tmp_path, local_uri)
    spool_uri = f"s3://{bucket}/runs/one/metrics.jsonl"
    log = MetricLog(Run(run.uri, ""), spool_uri)
    log_steps(log, range(1, 6))
    log.close()
    assert len(spool.read(spool_uri)) == 10
    log = MetricLog(run, spool_uri)
    log_steps(log, range(4, 9))
    log.close()
    assert_once(run, range(1, 9))
    assert not storage.exists(spool_uri)


def test_a_run_that_the_server_does_not_know_stops_nothing(run, spool_uri):
    began = time.monotonic()
    log = MetricLog(Run(run.uri, "0" * 32), spool_uri)
    log_steps(log, [1])
    log.close()
    assert time.monotonic() - began < 30
    assert "0000" in log.failed
    assert log.unsent == len(spool.read(spool_uri)) == 2


def test_a_spool_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "run").touch()
    log = MetricLog(Run("http://there", ""), f"{tmp_path}/run/metrics.jsonl")
    log_steps(log, [1])
    log.close()
    assert "no server" in log.failed
    assert f"{tmp_path}/run/metrics.jsonl: cannot be written" in log.failed
    assert "\n" not in log.failed
