"""F5, F6, F13 and F21: drivers that are killed, stopped, too many, or without an MLflow server."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from faulty import SOAK, Fault, Story, saved, until
from mlflow import MlflowClient
from services import processes

from raybrats import storage
from raybrats.config import override_all
from raybrats.errors import RaybratsError, RegistrationError, TrackingError, UsageError
from raybrats.registry import spool
from raybrats.runs import board, launch, record
from raybrats.runs.run import train
from raybrats.runs.stop import Stop
from raybrats.train import checkpoint

pytestmark = [pytest.mark.faults, pytest.mark.ray, pytest.mark.mlflow]
ROOT = Path(__file__).parents[2]
STEPS, SAVE_EVERY = 400, 40
SIGNALS = (signal.SIGINT, signal.SIGTERM)


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


@pytest.fixture(scope="module")
def raybrats(base, ray_cluster):
    """The same command as a process of this machine, and what it finds in its environment."""
    environment = {**os.environ, **ray_cluster.of_workers, **ray_cluster.environment}
    return [str(Path(sys.executable).with_name("raybrats")), *command(base)], environment


@pytest.fixture(scope="module")
def killed(base, raybrats, tmp_path_factory):
    """A driver that gets SIGKILL once it has a checkpoint: the steps that are saved."""
    words, environment = raybrats
    run_uri = storage.join(base.run.storage_uri, "driven")
    with (tmp_path_factory.mktemp("driver") / "log").open("w") as log:
        driver = subprocess.Popen(words, env=environment, stdout=log, stderr=log)
        until(lambda: saved(run_uri) or driver.poll() is not None)
        driver.send_signal(signal.SIGKILL)
        assert driver.wait() == -signal.SIGKILL, "it was at work"
    return run_uri, saved(run_uri)


@pytest.fixture(scope="module")
def stopped(base, ray_cluster, killed):
    """The same command as a job, at once, which is stopped when it has another checkpoint."""
    from ray.job_submission import JobSubmissionClient

    run_uri, before = killed
    client = JobSubmissionClient(ray_cluster.api_url)
    job = client.submit_job(
        entrypoint=f"python jobs/train.py {shlex.join(command(base)[1:])}",
        runtime_env={"working_dir": str(ROOT), "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}},
    )

    def ended():
        return client.get_job_info(job).status.is_terminal()

    until(lambda: max(saved(run_uri)) > max(before) or ended())
    assert not ended(), client.get_job_logs(job)[-3000:]
    before, began = saved(run_uri), time.monotonic()
    client.stop_job(job)
    until(ended)
    seconds, logs = time.monotonic() - began, client.get_job_logs(job)
    return before, client.get_job_info(job), logs, seconds, saved(run_uri)


def the_run(base):
    client = MlflowClient(base.tracking.uri)
    (run,) = client.search_runs([client.get_experiment_by_name("drivers").experiment_id])
    history = client.get_metric_history(run.info.run_id, "train/loss")
    return run, [m.step for m in history]


def test_a_driver_that_is_killed_is_taken_over_by_the_next(base, killed, stopped):
    """F5: SIGKILL, and the same command again: it goes on, in the same run of MLflow."""
    assert min(stopped[0]) >= max(killed[1]) - SAVE_EVERY, "from where the first one was"
    run, steps = the_run(base)
    print(f"killed with checkpoints {killed[1]}; stopped with {stopped[-1]}")
    assert run.data.params["optim.steps"] == str(STEPS)
    assert steps == list(range(10, max(steps) + 1, 10)), "each step once"
    kept = spool.read(record.metrics_uri(killed[0])) or ()  # what a slow server has yet to take
    waiting = {row.step for row in kept if row.key == "train/loss"}
    assert {*steps, *waiting} >= set(range(10, max(stopped[-1]), 10)), "none lost"


def test_a_job_that_is_stopped_leaves_a_checkpoint_of_its_last_step(base, killed, stopped):
    """F6: SIGTERM, a checkpoint between two regular ones, the run KILLED, the exit not 0."""
    before, info, logs, seconds, after = stopped
    print(f"stopped after {seconds:.1f} s: checkpoints {before} before, {after} after")
    assert info.status.value == "STOPPED"
    assert info.driver_exit_code != 0
    assert "interrupted; a run goes on by its --run.name" in logs
    assert max(after) > max(before)
    assert any(step % SAVE_EVERY for step in after), "one that is not of the regular ones"
    assert the_run(base)[0].info.status == "KILLED"
    assert not storage.exists(storage.join(killed[0], "lease.json"))


@pytest.mark.slow
@pytest.mark.skipif(not SOAK, reason="the third driver of the same run: make soak")
def test_started_a_third_time_it_ends(base, raybrats, killed, stopped):
    words, environment = raybrats
    assert stopped
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert checkpoint.newest(killed[0]).finished
    run, steps = the_run(base)
    assert run.info.status == "FINISHED"
    assert steps == list(range(10, STEPS + 1, 10))


def test_a_second_driver_of_the_same_name_is_refused(base):
    """F21."""
    script = "import sys, time; from raybrats.runs import lease\n"
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


def test_without_a_server_a_run_fails_fast_or_goes_on_and_is_told_later(base, untold):
    """F13."""
    print(f"refused after {untold.refused_s:.1f} s")
    assert untold.refused_s < 30, "15 s of trying, and the start of a busy machine"
    assert isinstance(untold.refusal, TrackingError)
    assert untold.line.uri in str(untold.refusal)
    assert untold.line.failed, "it was asked"
    assert isinstance(untold.outcome, RegistrationError)
    assert "trained and kept in" in str(untold.outcome)
    assert "--run.name untold" in str(untold.outcome)
    assert checkpoint.newest(untold.run_uri).finished
    spool = storage.join(untold.run_uri, "metrics.jsonl")
    assert b'"train/loss"' in storage.read_bytes(spool)
    untold.line.become("up")
    result = train(untold.config)
    assert (result.model.alias, result.restarts) == ("champion", 0)
    assert not storage.exists(spool)
    client = MlflowClient(base.tracking.uri)
    for name, steps in (("train/loss", [10, 14]), ("val/dice_mean", [7, 14])):
        history = client.get_metric_history(result.mlflow_run_id, name)
        assert [m.step for m in history] == steps


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_in_which_nothing_moves_is_noticed(tmp_path):
    """Whatever hangs: no step for `cluster.stall_s` is the end of the wait."""
    stop, ended, began = Stop(), threading.Event(), time.monotonic()
    stalled = lambda: stop.now(RaybratsError("nothing moved"))  # noqa: E731
    with board.followed(str(tmp_path), 10, 3.0, stalled) as shown, stop.ends(ended.set):
        shown.post.remote(4, "loss 1.0")
        assert ended.wait(30)
    assert time.monotonic() - began >= 3.0
    with pytest.raises(RaybratsError, match="nothing moved"):
        stop.check()


@pytest.mark.slow
@pytest.mark.skipif(not SOAK, reason="a run more: make soak")
def test_a_run_that_hangs_is_ended_without_a_signal(base, ray_cluster, tmp_path, monkeypatch):
    """Its workers have left their steps for good, its driver is a thread, its lease another's."""
    story = Story(tmp_path / "story", (Fault("hang", rank=0, step=2),))
    monkeypatch.setattr(launch, "work", story.worker())
    changes = {"run.name": "hanging", "cluster.collective_timeout_s": 300.0}
    config, signalled = override_all(base, changes), []
    run_uri = storage.join(base.run.storage_uri, "hanging")
    place = storage.join(run_uri, "lease.json")
    before = [signal.signal(s, lambda number, _: signalled.append(number)) for s in SIGNALS]
    try:
        with ThreadPoolExecutor(1) as pool:
            training = pool.submit(train, config)
            until(lambda: story.fired() or training.done())
            other = {**json.loads(storage.read_bytes(place)), "token": "another", "host": "far"}
            storage.write_bytes(place, json.dumps(other).encode())
            with pytest.raises(RaybratsError, match=r"taken over by process .* on far"):
                training.result(timeout=120)
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)
    assert len(story.fired()) == 1
    assert signalled == []
    until(lambda: not board.found(run_uri), 30)
    assert json.loads(storage.read_bytes(place))["token"] == "another", "left to its holder"
    until(lambda: not processes(ray_cluster.session, "ray::RayTrainWorker"), 60)
