"""F27 and SIGTERM: the trials of a sweep are attempts like any other run."""

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import ray
from faulty import SOAK, saved, until
from mlflow import MlflowClient
from ray.tune import Result
from services import free_ports, processes

from raybrats import storage
from raybrats.config import override_all, to_json
from raybrats.registry.tracking import Run
from raybrats.runs import record
from raybrats.runs.sweep import Search, _outcome, search
from raybrats.train import checkpoint
from raybrats.train.checkpoint import Snapshot

pytestmark = [pytest.mark.faults, pytest.mark.ray, pytest.mark.mlflow, pytest.mark.slow]
STEPS, SAVE_EVERY = 160, 8
TRIAL = "ray::ImplicitFunc"
"""Title of the process of a trial."""
SOAK_ONLY = pytest.mark.skipif(not SOAK, reason="one of three ways to end: make soak")
SPACE = ["loss.dice_weight=uniform(0.2,0.8)"]


@pytest.fixture(scope="module")
def base(two_workers):
    """One worker a trial, two trials at once, long enough for a fault to befall them."""
    changes = {
        "cluster.workers": 1,
        "cluster.max_failures": 1,
        "optim.steps": STEPS,
        "validation.every_steps": STEPS,
        "run.save_every_steps": SAVE_EVERY,
        "tracking.experiment": "sweeps",
        "tracking.model": "sweeps",
    }
    return override_all(two_workers, changes)


def trials(config):
    """Run URIs of the trials of a sweep that have a record, by their own names."""
    prefix = storage.join(config.run.storage_uri, f"{config.run.name}-")
    found = Path(config.run.storage_uri).glob(f"{config.run.name}-*/run.json")
    return sorted(str(path.parent) for path in found if str(path).startswith(prefix))


def kill_a_trial(config, session, happened):
    """SIGKILL to the process of a trial, which is not that of its workers, with a checkpoint."""
    (run_uri, *_) = until(lambda: [uri for uri in trials(config) if saved(uri)])
    (victim, *_) = processes(session, TRIAL)
    before = (record.read(run_uri).mlflow_run_id, saved(run_uri))
    os.kill(victim, signal.SIGKILL)
    happened.append((run_uri, *before))


def test_what_is_wrong_with_one_trial_at_the_end_loses_no_other(base, tmp_path, caplog):
    """A record that is damaged, and a server that is away when the trials are closed."""
    config = override_all(base, {"run.name": "end", "run.storage_uri": str(tmp_path)})
    away = Run(f"http://127.0.0.1:{free_ports(1)[0]}", "0" * 32)
    shared, good = Search(config, (), away, 1), tmp_path / "end-good"
    checkpoint.write(
        str(good),
        config,
        Snapshot(
            STEPS, {}, {}, metrics=dict.fromkeys(("WT", "TC", "ET", "mean"), 0.5), finished=True
        ),
    )
    facts = {
        "mlflow_run_id": "1" * 32,
        "digest": "",
        "cohort": "",
        "config": json.loads(to_json(config)),
    }
    (good / record.NAME).write_text(json.dumps(facts))
    (tmp_path / "end-damaged").mkdir()
    (tmp_path / "end-damaged" / record.NAME).write_text("[")
    ended = [
        _outcome(shared, Result({"trial_id": name}, None, None, str(tmp_path)))
        for name in ("damaged", "good")
    ]
    assert [(trial.status, trial.score) for trial in ended] == [("failed", None), ("finished", 0.5)]
    assert "run.json is damaged" in ended[0].error
    assert "not closed in MLflow" in caplog.text


@SOAK_ONLY
def test_a_trial_that_is_killed_resumes_in_its_own_mlflow_run(base, ray_cluster):
    config, happened = override_all(base, {"run.name": "kill"}), []
    arguments = (config, ray_cluster.session, happened)
    killer = threading.Thread(target=kill_a_trial, args=arguments, daemon=True)
    killer.start()
    sweep = search(config, SPACE, 1)
    killer.join(30)
    ((run_uri, run_id, steps_before),) = happened
    print(f"killed with checkpoints {steps_before}; {sweep}")
    assert max(steps_before) < STEPS, "it was at work"
    (trial,) = sweep.trials
    assert (trial.status, trial.error) == ("finished", "")
    assert (trial.run_uri, trial.mlflow_run_id) == (run_uri, run_id)
    assert sweep.best.score == trial.score
    assert sweep.model.name == "sweeps"
    client = MlflowClient(config.tracking.uri)
    experiment = client.get_experiment_by_name("sweeps").experiment_id
    parent = client.get_run(run_id).data.tags["mlflow.parentRunId"]
    children = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{parent}'")
    assert [child.info.run_id for child in children] == [run_id], "no second run"
    assert children[0].info.status == client.get_run(parent).info.status == "FINISHED"
    history = client.get_metric_history(run_id, "train/loss")
    assert [m.step for m in history] == list(range(10, STEPS + 1, 10)), "each step once"
    until(lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"], 90)


@contextmanager
def started(config, ray_cluster, num_trials=2):
    """The sweep as another process, which ends with the test; its trials would go on for long."""
    words = [
        *(
            "tune",
            "tiny",
            "--trials",
            str(num_trials),
            "--space",
            *SPACE,
            "--run.name",
            config.run.name,
        ),
        *("--run.storage_uri", config.run.storage_uri, "--data.cohort", config.data.cohort),
        *("--data.patch_size", "16", "16", "16", "--network.widths", "4", "8", "8"),
        *("--cluster.workers", "1", "--optim.steps", "20000", "--run.save_every_steps", "100"),
        *("--validation.every_steps", "20000", "--optim.global_batch", "2"),
        *("--tracking.uri", config.tracking.uri, "--tracking.experiment", "sweeps"),
    ]
    environment = {**os.environ, **ray_cluster.of_workers, **ray_cluster.environment}
    command = [str(Path(sys.executable).with_name("raybrats")), *words]
    group = {"start_new_session": True}  # as in a terminal, whose signals go to all of it
    driver = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, **group)
    try:
        yield driver
    finally:
        with suppress(ProcessLookupError):
            os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()


def statuses(config, run_ids):
    """Those of some trials, and of the sweep above them."""
    client = MlflowClient(config.tracking.uri)
    runs = [client.get_run(run_id) for run_id in run_ids]
    (parent,) = {run.data.tags["mlflow.parentRunId"] for run in runs}
    return {run.info.status for run in (*runs, client.get_run(parent))}


def test_an_interrupted_sweep_saves_what_its_trials_have(base, ray_cluster):
    """Ctrl-C: SIGINT to the driver's group of processes."""
    config = override_all(base, {"run.name": "interrupt"})
    with started(config, ray_cluster, num_trials=2 if SOAK else 1) as driver:
        before = until(lambda: {uri: max(saved(uri)) for uri in trials(config) if saved(uri)})
        os.killpg(driver.pid, signal.SIGINT)
        _, said = driver.communicate(timeout=240)
        assert driver.returncode == 130, said[-3000:]
        assert [line for line in said.splitlines() if "interrupted" in line]
        assert "Traceback" not in said
        assert all(max(saved(uri)) > step for uri, step in before.items())
        assert statuses(config, [record.read(uri).mlflow_run_id for uri in before]) == {"KILLED"}


@SOAK_ONLY
def test_a_sweep_that_is_stopped_before_its_trials_begin_is_killed_too(base, ray_cluster):
    config = override_all(base, {"run.name": "early"})
    with started(config, ray_cluster) as driver:
        client = MlflowClient(config.tracking.uri)

        def begun():
            found = client.get_experiment_by_name("sweeps")
            name = "attributes.run_name = 'early'"
            return found and client.search_runs([found.experiment_id], name)

        parent, *_ = until(begun)
        driver.send_signal(signal.SIGTERM)
        _, said = driver.communicate(timeout=240)
        assert driver.returncode == 130, said[-3000:]
        assert len([line for line in said.splitlines() if line.startswith("raybrats: ")]) == 1, said
        assert client.get_run(parent.info.run_id).info.status == "KILLED"


@SOAK_ONLY
def test_a_sweep_outlives_a_killed_trial_and_is_stopped_with_checkpoints(base, ray_cluster):
    """SIGKILL to a trial, then SIGTERM to the driver, which is another process."""
    config = override_all(base, {"run.name": "stop"})
    with started(config, ray_cluster) as driver:

        def moved(since):
            """The newest checkpoint of each of two trials, once it is another than it was."""
            assert driver.poll() is None, driver.stderr.read()[-3000:]
            found = {uri: max(saved(uri), default=0) for uri in trials(config)}
            return found if sum(step > since.get(u, 0) for u, step in found.items()) == 2 else {}

        begun = until(lambda: moved({}))
        runs_before = {uri: record.read(uri).mlflow_run_id for uri in begun}
        first = processes(ray_cluster.session, TRIAL)
        os.kill(first[0], signal.SIGKILL)
        until(lambda: set(processes(ray_cluster.session, TRIAL)) - set(first))
        before = until(lambda: moved(begun))
        driver.send_signal(signal.SIGTERM)
        _, said = driver.communicate(timeout=120)
        after = {uri: max(saved(uri)) for uri in trials(config)}
        print(f"at first {begun}, after the kill {before}, after the end {after}")
        assert driver.returncode == 130, said[-3000:]
        assert "interrupted" in said
        assert all(step > before[uri] for uri, step in after.items())
        assert {uri: record.read(uri).mlflow_run_id for uri in after} == runs_before
        client = MlflowClient(config.tracking.uri)
        runs = [client.get_run(run_id) for run_id in runs_before.values()]
        assert {run.info.status for run in runs} == {"KILLED"}
        (parent,) = {run.data.tags["mlflow.parentRunId"] for run in runs}
        assert client.get_run(parent).info.status == "KILLED"
        children = client.search_runs(
            [runs[0].info.experiment_id], f"tags.mlflow.parentRunId = '{parent}'"
        )
        assert {run.info.run_id for run in children} == set(runs_before.values()), "no further run"
        until(lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"], 90)
