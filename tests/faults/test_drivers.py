"""F5, F6, F13 and F21: drivers that are killed, stopped, too many, or without an MLflow server."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fault_proxy import line_to
from mlflow import MlflowClient
from services import http_status, run_job  # noqa: F401

from raybrats.config import override_all
from raybrats.data import storage
from raybrats.errors import RegistrationError, TrackingError, UsageError
from raybrats.progress import watched
from raybrats.train import checkpoint
from raybrats.train.run import train
from raybrats.train.stop import Stop

pytestmark = [pytest.mark.faults, pytest.mark.ray, pytest.mark.mlflow]
ROOT = Path(__file__).parents[2]
STEPS, SAVE_EVERY = 240, 40


def command(config):
    """The options of the job whose driver meets the faults."""
    return [
        *("train", "tiny", "--run.name", "driven", "--run.storage_uri", config.run.storage_uri),
        *("--data.cohort", config.data.cohort, "--data.patch_size", "16", "16", "16"),
        *("--network.widths", "4", "8", "8", "--optim.steps", str(STEPS)),
        *("--validation.every_steps", str(STEPS), "--run.save_every_steps", str(SAVE_EVERY)),
        *("--optim.global_batch", "2", "--tracking.uri", config.tracking.uri),
        *("--tracking.experiment", "drivers", "--tracking.model", "", "--json"),
    ]


def until(condition, seconds=240.0):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it has not come to that"
        time.sleep(0.2)
    return found


def saved(run_uri):
    return [w.step for w in checkpoint.written(run_uri)]


@pytest.fixture(scope="module")
def stopped(base, ray_cluster):
    """A job that is stopped once it has a checkpoint: its steps, its outcome, its seconds."""
    from ray.job_submission import JobSubmissionClient

    client = JobSubmissionClient(ray_cluster.api_url)
    job = client.submit_job(
        entrypoint=f"python jobs/train.py {shlex.join(command(base)[1:])}",
        runtime_env={"working_dir": str(ROOT), "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}},
    )
    run_uri = storage.join(base.run.storage_uri, "driven")
    before = until(lambda: saved(run_uri) or client.get_job_info(job).status.is_terminal())
    assert before is not True, client.get_job_logs(job)[-3000:]
    began = time.monotonic()
    client.stop_job(job)
    until(lambda: client.get_job_info(job).status.is_terminal())
    seconds, logs = time.monotonic() - began, client.get_job_logs(job)
    return run_uri, before, (client.get_job_info(job), logs, seconds, saved(run_uri))


def the_run(base):
    client = MlflowClient(base.tracking.uri)
    (run,) = client.search_runs([client.get_experiment_by_name("drivers").experiment_id])
    return client, run


def test_a_job_that_is_stopped_leaves_a_checkpoint_of_its_last_step(base, stopped):
    """F6: SIGTERM, a checkpoint between two regular ones, the run KILLED, the exit not 0."""
    run_uri, before, (info, logs, seconds, after) = stopped
    print(f"stopped after {seconds:.1f} s: checkpoints {before} before, {after} after")
    assert info.status.value == "STOPPED"
    assert info.driver_exit_code != 0
    assert "interrupted; a run goes on by its --run.name" in logs
    assert max(after) > max(before)
    assert max(after) % SAVE_EVERY, "not one of the regular ones"
    assert the_run(base)[1].info.status == "KILLED"
    assert not storage.exists(storage.join(run_uri, "lease.json"))


def test_a_driver_that_is_killed_is_taken_over_by_the_next(base, ray_cluster, stopped, tmp_path):
    """F5: SIGKILL, and the same command again; one run in MLflow, each step once."""
    run_uri, _, (*_, after) = stopped
    raybrats = [str(Path(sys.executable).with_name("raybrats")), *command(base)]
    environment = {**os.environ, **ray_cluster.of_workers, **ray_cluster.environment}
    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen(raybrats, env=environment, stdout=log, stderr=log)
        killed_at = max(until(lambda: [s for s in saved(run_uri) if s > max(after)]))
        first.send_signal(signal.SIGKILL)
        assert first.wait() == -signal.SIGKILL
    began = time.monotonic()
    second = subprocess.run(raybrats, env=environment, capture_output=True, text=True, timeout=300)
    print(f"killed after step {killed_at}; the same command took {time.monotonic() - began:.0f} s")
    assert second.returncode == 0, second.stderr[-3000:]
    assert checkpoint.newest(run_uri).finished
    client, run = the_run(base)
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [m.step for m in history] == list(range(10, STEPS + 1, 10))


def test_a_second_driver_of_the_same_name_is_refused(base):
    """F21."""
    script = "import sys, time; from raybrats.train import lease\n"
    script += "with lease.held(sys.argv[1], print):\n    print('held', flush=True)\n    input()"
    run_uri = storage.join(base.run.storage_uri, "held")
    holder = subprocess.Popen(
        [sys.executable, "-c", script, run_uri],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match=f"held by process {holder.pid}.*another run.name"):
            train(override_all(base, {"run.name": "held"}))
        assert saved(run_uri) == []
    finally:
        holder.communicate("\n", timeout=30)


def test_without_a_server_a_run_fails_fast_or_goes_on_and_is_told_later(base):
    """F13."""
    with line_to(base.tracking.uri) as line:
        line.become("cut")
        away = {"run.name": "untold", "tracking.uri": line.uri, "tracking.model": "untold"}
        config = override_all(base, away)
        began = time.monotonic()
        with pytest.raises(TrackingError, match=re.escape(line.uri)) as said:
            train(config)
        print(f"refused after {time.monotonic() - began:.1f} s")
        assert time.monotonic() - began < 30, "15 s of trying, and the start of a busy machine"
        assert said.value.exit_code == 6
        assert line.failed, "it was asked"
        optional = override_all(config, {"tracking.required": False})
        with pytest.raises(RegistrationError, match=r"trained and kept in .*--run\.name untold"):
            train(optional)
        run_uri = storage.join(base.run.storage_uri, "untold")
        assert checkpoint.newest(run_uri).finished
        spooled = storage.read_bytes(storage.join(run_uri, "metrics.jsonl")).decode()
        assert '"train/loss"' in spooled
        line.become("up")
        result = train(optional)
    assert result.model.alias == "champion"
    assert result.restarts == 0
    assert not storage.exists(storage.join(run_uri, "metrics.jsonl"))
    client = MlflowClient(base.tracking.uri)
    for name, steps in (("train/loss", [10, 14]), ("val/dice_mean", [7, 14])):
        history = client.get_metric_history(result.mlflow_run_id, name)
        assert [m.step for m in history] == steps


def idle(stop):
    """A run that posts one step, then nothing."""
    stalled = lambda: stop.now("nothing moved")  # noqa: E731
    with watched("training", 10, stall_s=3.0, on_stall=stalled) as board:
        board.post.remote(4, "loss 1.0")
        time.sleep(60)


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_in_which_nothing_moves_is_ended():
    """Whatever hangs: no step for `cluster.stall_s` is the end of the wait."""
    stop, began = Stop(), time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        idle(stop)
    assert 3.0 <= time.monotonic() - began < 30
    assert str(stop.error) == "nothing moved"
