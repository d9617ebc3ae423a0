"""The registered model: which version is champion, and that it segments as the network did."""

import os
import subprocess
import sys
from dataclasses import replace

import mlflow
import numpy as np
import pytest
import torch
from faulty import SOAK
from mlflow import MlflowClient
from safetensors.torch import save
from services import free_ports

from raybrats.config import (
    DataConfig,
    NetworkConfig,
    RunConfig,
    TrackingConfig,
    TrainConfig,
)
from raybrats.errors import RegistrationError, TrackingError, UsageError
from raybrats.model.inference import segment
from raybrats.model.network import build, weights_of
from raybrats.phantom.phantom import make_phantom
from raybrats.registry import load, tracking
from raybrats.registry import register as registering
from raybrats.registry.tracking import Run
from raybrats.train import checkpoint

SHAPE = (28, 24, 20)


SERVERS = [*(["sqlite"] if SOAK else []), pytest.param("server", marks=pytest.mark.mlflow)]


@pytest.fixture(scope="module", params=SERVERS)
def config(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    uri = f"sqlite:///{folder}/mlflow.db"
    if request.param == "server":
        uri = request.getfixturevalue("mlflow_uri")
    return TrainConfig(
        recipe="tiny",
        data=DataConfig(patch_size=(16, 16, 16), modalities=("t1ce", "flair")),
        network=NetworkConfig(widths=(4, 8, 8), deep_supervision=1),
        run=RunConfig(name="one", storage_uri=str(folder)),
        tracking=TrackingConfig(uri=uri, experiment=f"package-{request.param}", model="packaged"),
    )


OF_NETWORK = TrainConfig(
    data=DataConfig(modalities=("t1ce", "flair")),
    network=NetworkConfig(widths=(4, 8, 8), deep_supervision=1),
)


def network(seed=0):
    torch.manual_seed(seed)
    return build(NetworkConfig(widths=(4, 8, 8), deep_supervision=1), 2).eval()


def register(config, mean, held_out="cases-1", model=None, seed=0):
    config = replace(config, tracking=replace(config.tracking, model=model or "packaged"))
    run = tracking.start(config)
    scores = {"WT": mean, "TC": mean, "ET": mean, "mean": mean}
    files = {checkpoint.WEIGHTS: save(weights_of(network(seed)))}
    return run, registering.register(run, config, files, scores, held_out)


@pytest.fixture(scope="module")
def history(config):
    """Versions registered one after the other, with the alias that each got at once."""
    offered = ((0.5, "cases-1"), (0.7, "cases-1"), (0.6, "cases-1"), (0.9, "cases-2"))
    return [register(config, mean, held_out, seed=n) for n, (mean, held_out) in enumerate(offered)]


def test_the_first_version_is_champion_and_only_a_better_one_takes_over(history):
    assert [(v.name, v.version, v.alias) for _, v in history] == [
        ("packaged", "1", "champion"),
        ("packaged", "2", "champion"),
        ("packaged", "3", "challenger"),  # worse
        ("packaged", "4", "challenger"),  # scored on other cases
    ]


def test_an_equal_score_does_not_take_over(config):
    versions = [register(config, 0.5, model="equals")[1] for _ in range(2)]
    assert [v.alias for v in versions] == ["champion", "challenger"]


def test_versions_are_listed_newest_first(config, history):
    rows = load.versions(config.tracking.uri, "packaged")
    assert [row["version"] for row in rows] == ["4", "3", "2", "1"]
    assert [row["aliases"] for row in rows] == ["challenger", "", "champion", ""]
    assert [row["dice_mean"] for row in rows] == ["0.900000", "0.600000", "0.700000", "0.500000"]
    assert [row["run_id"] for row in rows] == [run.run_id for run, _ in reversed(history)]
    assert {row["recipe"] for row in rows} == {"tiny"}


def test_a_version_says_what_it_was_scored_on(config, history):
    tags = MlflowClient(config.tracking.uri).get_model_version("packaged", "1").tags
    assert history[0][1].version == "1"
    assert tags.items() >= {"held_out": "cases-1", "recipe": "tiny", "dice_ET": "0.5"}.items()


@pytest.mark.parametrize(("uri", "version"), [("packaged@champion", 2), ("packaged/3", 3)])
def test_a_name_stands_for_one_version(config, history, uri, version):
    assert len(history) == 4
    found = load.resolve(f"models:/{uri}", config.tracking.uri)
    assert found == f"models:/packaged/{version}"


LOAD = """
import sys, numpy as np
from raybrats.registry import load, register
model = load.load(sys.argv[1], sys.argv[2])
image = np.load(sys.argv[3])
np.save(sys.argv[4], model.segment(image).labels)
print(model.name, *model.modalities)
"""


def test_the_model_segments_in_a_bare_process_as_the_network_did(config, history, tmp_path):
    assert history[1][1].alias == "champion"
    image = make_phantom(0, shape=SHAPE)[0][[2, 0]].astype(np.float32)
    np.save(tmp_path / "image.npy", image)
    places = [str(tmp_path / name) for name in ("image.npy", "labels.npy")]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, "models:/packaged@champion", config.tracking.uri, *places],
        env={**os.environ, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["models:/packaged/2", "t1ce", "flair"]
    labels = np.load(tmp_path / "labels.npy")
    expected = segment(network(seed=1), config, image)
    assert labels.dtype == np.uint8
    assert len(np.unique(expected)) > 1
    np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize(
    "uri", ["models:/nobody@champion", "models:/packaged@nobody", "models:/packaged/99"]
)
def test_an_unknown_model_is_an_error_in_one_line(config, history, uri):
    assert len(history) == 4
    for action in (load.resolve, load.load):
        with pytest.raises(TrackingError) as refusal:
            action(uri, config.tracking.uri)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("uri", ["packaged", "s3://bucket/model", "models:/packaged"])
def test_what_is_no_model_uri_is_refused(config, uri):
    with pytest.raises(UsageError, match="models:/NAME"):
        load.resolve(uri, config.tracking.uri)


FOREIGN = """
import mlflow, numpy as np

class Echo(mlflow.pyfunc.PythonModel):
    def predict(self, model_input: np.ndarray) -> np.ndarray:
        return model_input

mlflow.models.set_model(Echo())
"""


def test_a_model_of_another_program_is_refused(config, tmp_path):
    (tmp_path / "foreign.py").write_text(FOREIGN)
    run, name = tracking.start(config), "foreign"
    with tracking.default_server(run.uri), mlflow.start_run(run_id=run.run_id):
        code = str(tmp_path / "foreign.py")
        mlflow.pyfunc.log_model(
            name="model", python_model=code, pip_requirements=[], registered_model_name=name
        )
    with pytest.raises(UsageError, match=r"^models:/foreign/1: not a model that raybrats"):
        load.load("models:/foreign/1", run.uri)


def test_an_unknown_name_has_no_versions(config):
    with pytest.raises(TrackingError, match="nobody"):
        load.versions(config.tracking.uri, "nobody")
    with pytest.raises(UsageError, match="an empty name"):
        load.versions(config.tracking.uri, "")


def test_a_dead_server_is_an_error_in_one_line():
    uri = f"http://127.0.0.1:{free_ports(1)[0]}"
    with pytest.raises(TrackingError, match=r"127\.0\.0\.1") as refusal:
        load.resolve("models:/packaged@champion", uri)
    assert "\n" not in str(refusal.value)
    files = {checkpoint.WEIGHTS: save(weights_of(network()))}
    with pytest.raises(RegistrationError, match="trained, but not registered") as refusal:
        registering.register(Run(uri, "0" * 32), OF_NETWORK, files, {"mean": 0.5}, "cases-1")
    assert "\n" not in str(refusal.value)


def test_a_run_that_the_user_has_open_stays_open_and_gets_nothing(config, tmp_path, monkeypatch):
    """As in a notebook, with MLflow set to a server and an experiment of the user's own."""
    own = f"sqlite:///{tmp_path}/own.db"
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_ID"):  # which MLflow will set
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(mlflow.tracking.fluent, "_active_experiment_id", None)
    run, weights = tracking.start(config), {checkpoint.WEIGHTS: save(weights_of(network()))}
    mlflow.set_tracking_uri(own)
    mlflow.set_experiment("mine")
    with mlflow.start_run() as mine:
        scores = dict.fromkeys(("WT", "TC", "ET", "mean"), 0.5)
        made = replace(OF_NETWORK, tracking=replace(config.tracking, model="notebook"))
        version = registering.register(run, made, weights, scores, "cases-1")
        assert mlflow.active_run().info.run_id == mine.info.run_id
        assert mlflow.get_tracking_uri() == own
    assert MlflowClient(own).get_run(mine.info.run_id).outputs.model_outputs == []
    client = MlflowClient(run.uri)
    found = client.get_model_version("notebook", version.version)
    assert found.run_id == run.run_id
    of_run = client.get_run(run.run_id).info
    model = client.get_logged_model(found.source.removeprefix("models:/"))
    assert model.experiment_id == of_run.experiment_id
    place = client.get_experiment(of_run.experiment_id).artifact_location
    assert model.artifact_location.startswith(place)


def test_the_environment_keeps_naming_the_users_server(config, history, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://users-own")
    load.load(f"models:/packaged/{history[0][1].version}", config.tracking.uri)
    assert tracking.default_uri() == "http://users-own"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    load.load(f"models:/packaged/{history[0][1].version}", config.tracking.uri)
    assert tracking.default_uri().startswith("sqlite:///")
