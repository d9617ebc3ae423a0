"""One MLflow run: parameters without secrets, curves, parents and children, servers in trouble."""

import json
import socket
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric

from raybrats.config import (
    DataConfig,
    LossConfig,
    RunConfig,
    TrackingConfig,
    TrainConfig,
    from_json,
)
from raybrats.errors import TrackingError, UsageError
from raybrats.registry import tracking
from raybrats.registry.tracking import Run


@pytest.fixture(scope="module", params=["sqlite", pytest.param("server", marks=pytest.mark.mlflow)])
def config(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    uri = f"sqlite:///{folder}/mlflow.db"
    if request.param == "server":
        uri = request.getfixturevalue("mlflow_uri")
    return TrainConfig(
        recipe="tiny",
        loss=LossConfig(dice_weight=0.25),
        run=RunConfig(name="one", storage_uri=str(folder)),
        tracking=TrackingConfig(uri=uri, experiment=f"tracking-{request.param}"),
    )


def test_a_run_tells_its_recipe_and_parameters(config):
    run = tracking.start(config, tags={"note": "first"})
    found = MlflowClient(config.tracking.uri).get_run(run.run_id)
    assert found.data.params == tracking.parameters(config)
    assert found.data.params["loss.dice_weight"] == "0.25"
    assert found.data.tags["raybrats.recipe"] == "tiny"
    assert found.data.tags["note"] == "first"
    assert (found.info.run_name, found.info.status) == ("one", "RUNNING")


def test_a_run_ends_and_goes_on(config):
    run, client = tracking.start(config), MlflowClient(config.tracking.uri)
    for status in ("FINISHED", "FAILED", "KILLED"):
        tracking.finish(run, status)
        assert client.get_run(run.run_id).info.status == status
        tracking.resume(run)
        assert client.get_run(run.run_id).info.status == "RUNNING"


def test_a_run_below_a_parent(config):
    parent = tracking.start(config)
    child = tracking.start(config, parent=parent)
    tags = MlflowClient(config.tracking.uri).get_run(child.run_id).data.tags
    assert tags["mlflow.parentRunId"] == parent.run_id


def test_of_a_step_that_stands_twice_the_later_value_counts(config):
    run = tracking.start(config)
    rows = [Metric("dice", value, at_ms, 2) for at_ms, value in ((1, 0.1), (2, 0.2))]
    MlflowClient(config.tracking.uri).log_batch(
        run.run_id, [*reversed(rows), Metric("dice", 0.8, 1, 1)]
    )
    curve = tracking.curves(run)["dice"]
    assert curve.steps == (1, 2)
    assert curve.values == pytest.approx((0.8, 0.2))


def test_the_run_keeps_its_configuration(config):
    run = tracking.start(config)
    stored = MlflowClient(config.tracking.uri).download_artifacts(run.run_id, "config.json")
    assert from_json(Path(stored).read_text()) == config


def test_an_unknown_run_is_an_error_in_one_line(config):
    unknown = Run(config.tracking.uri, "0" * 32)
    for action in (tracking.resume, tracking.finish, tracking.curves):
        with pytest.raises(TrackingError, match="0000") as refusal:
            action(unknown)
        assert "\n" not in str(refusal.value)


@pytest.mark.faults
@pytest.mark.parametrize("accepts", [False, True], ids=["dead", "mute"])
def test_a_server_out_of_reach_is_soon_an_error_in_one_line_without_its_password(
    accepts, monkeypatch
):
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        if accepts:
            mute.listen()
        uri = f"http://user:hush@127.0.0.1:{mute.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        began = time.monotonic()
        with pytest.raises(TrackingError, match=r"127\.0\.0\.1.*tracking\.uri") as refusal:
            tracking.start(TrainConfig())
        assert time.monotonic() - began < 15
    assert "\n" not in str(refusal.value)
    assert "hush" not in str(refusal.value)


def test_a_server_in_trouble_is_asked_three_times():
    asked = []

    class Trouble(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(503)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Trouble) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        run = Run(f"http://127.0.0.1:{server.server_port}", "0" * 32)
        with pytest.raises(TrackingError) as refusal:
            tracking.resume(run)
        server.shutdown()
    assert len(asked) == 3
    assert "\n" not in str(refusal.value)


def test_parameters_say_nothing_about_places_and_people():
    config = TrainConfig(
        data=DataConfig(cohort="s3://bucket/cohort.parquet"),
        run=RunConfig(name="one", storage_uri="s3://private/runs"),
        tracking=TrackingConfig(uri="http://host:5000"),
    )
    rows = tracking.parameters(config)
    assert not any(name.startswith(("tracking.", "run.storage")) for name in rows)
    assert "private" not in json.dumps(rows)
    assert rows["data.cohort"] == "s3://bucket/cohort.parquet"
    assert rows["optim.steps"] == str(config.optim.steps)


@pytest.mark.parametrize(
    ("section", "field"),
    [(DataConfig, "cohort"), (RunConfig, "storage_uri"), (TrackingConfig, "uri")],
)
def test_credentials_in_a_uri_are_refused_and_not_repeated(section, field):
    with pytest.raises(UsageError, match="without credentials") as refused:
        section(**{field: "s3://key:hush@bucket/place"})
    assert "hush" not in str(refused.value)


def test_runs_on_object_storage_need_a_server(monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UsageError, match=r"tracking\.uri"):
        tracking.default_uri("s3://bucket/runs")
    assert tracking.default_uri(str(tmp_path)) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there")
    assert tracking.default_uri("s3://bucket/runs") == "http://there"
    own = TrainConfig(tracking=TrackingConfig(uri="http://own"))
    assert tracking.tracking_uri(own) == "http://own"
