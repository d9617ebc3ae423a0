"""Registered models are data: what else lies in a registry is neither run nor believed."""

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from faulty import SOAK
from mlflow import MlflowClient
from safetensors.torch import save

from raybrats.config import DataConfig, NetworkConfig, RunConfig, TrackingConfig, TrainConfig
from raybrats.errors import CheckpointError, RegistrationError
from raybrats.model.inference import segment
from raybrats.model.network import build, trained_network, weights_of
from raybrats.registry import load, tracking
from raybrats.registry.register import register
from raybrats.train import checkpoint

NETWORK = NetworkConfig(widths=(4, 8, 8), deep_supervision=1)
EVIL = "import pathlib\npathlib.Path({!r}).touch()\nraise SystemExit('this code was run')\n"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return TrainConfig(
        data=DataConfig(patch_size=(16, 16, 16), modalities=("t1ce", "flair")),
        network=NETWORK,
        run=RunConfig(name="one", storage_uri=str(folder)),
        tracking=TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db", model="data"),
    )


def weights(seed=0):
    torch.manual_seed(seed)
    return weights_of(build(NETWORK, 2).eval())


def registered(config, tensors, mean=0.5, model="data"):
    config = replace(config, tracking=replace(config.tracking, model=model))
    scores = dict.fromkeys(("WT", "TC", "ET", "mean"), mean)
    files = {checkpoint.WEIGHTS: save(tensors)}
    return register(tracking.start(config), config, files, scores, "cases-1")


def folder_of(version, config):
    client = MlflowClient(config.tracking.uri)
    return Path(client.get_model_version_download_uri(version.name, version.version))


def test_requirements_can_be_installed_where_only_releases_are(config):
    version = registered(config, weights(), model="requirements")
    lines = (folder_of(version, config) / "requirements.txt").read_text().split()
    assert {line.partition("==")[0] for line in lines} >= {"torch", "monai", "numpy"}
    assert not [line for line in lines if "+" in line]
    artifacts = Path(config.run.storage_uri, "mlartifacts")
    assert artifacts.stat().st_mode & 0o007 == 0, "not the world's to read"


REGISTERS = """
import sys
sys.path[:0] = sys.argv[2:]
import test_hostile_registry as here
from raybrats.config import RunConfig, TrackingConfig, TrainConfig
config = TrainConfig(
    data=here.DataConfig(patch_size=(16, 16, 16), modalities=("t1ce", "flair")),
    network=here.NETWORK,
    run=RunConfig(name="one", storage_uri=sys.argv[1]),
    tracking=TrackingConfig(uri=f"sqlite:///{sys.argv[1]}/mlflow.db", model="quiet"),
)
here.registered(config, here.weights(), model="quiet")
"""


@pytest.mark.skipif(not SOAK, reason="a process and a database more: make soak")
def test_mlflow_says_nothing_of_what_it_registers(tmp_path):
    """In a process of its own, for what MLflow imports late turns its words on again."""
    here = Path(__file__).parent
    words = [str(tmp_path), str(here), str(here.parent)]
    done = subprocess.run(
        [sys.executable, "-c", REGISTERS, *words], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "uccessfully" not in done.stderr + done.stdout
    assert "reated version" not in done.stderr + done.stdout


def test_code_and_pickles_of_a_model_are_never_run(config, tmp_path):
    version = registered(config, weights(), model="evil")
    folder, canary = folder_of(version, config), tmp_path / "canary"
    code = [*folder.rglob("*.py")]
    assert code, "it brings code, for those who load it without raybrats"
    for path in code:
        path.write_text(EVIL.format(str(canary)))
    (folder / "python_model.pkl").write_bytes(
        b"cposix\nsystem\n(S'touch " + bytes(canary) + b"'\ntR."
    )
    model = load.load(f"models:/evil/{version.version}", config.tracking.uri)
    image = np.zeros((2, 20, 20, 20), np.float32)
    image[:, 4:16, 4:16, 4:16] = np.arange(12, dtype=np.float32)
    expected = segment(trained_network(config, weights()), config, image)
    assert np.array_equal(model.segment(image).labels, expected)
    assert not canary.exists()


def test_weights_that_were_exchanged_are_refused(config):
    version = registered(config, weights(), model="exchanged")
    place = folder_of(version, config) / "artifacts" / checkpoint.WEIGHTS
    place.write_bytes(save(weights(seed=1)))
    with pytest.raises(CheckpointError, match=f"exchanged/{version.version}: its weights are not"):
        load.load(f"models:/exchanged/{version.version}", config.tracking.uri)


def test_a_configuration_that_is_none_is_refused(config):
    version = registered(config, weights(), model="config")
    (folder_of(version, config) / "artifacts" / checkpoint.CONFIG).write_bytes(b"\xff[[[")
    with pytest.raises(CheckpointError, match="its configuration is damaged") as said:
        load.load(f"models:/config/{version.version}", config.tracking.uri)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_never_registered(config, value):
    tensors = {name: tensor.detach().clone() for name, tensor in weights().items()}
    next(iter(tensors.values())).view(-1)[0] = value
    with pytest.raises(RegistrationError, match="is not finite"):
        registered(config, tensors)


@pytest.mark.parametrize("tensors", [{}, {"other": torch.ones(3)}])
def test_weights_of_another_network_are_never_registered(config, tensors):
    with pytest.raises(RegistrationError, match="do not load"):
        registered(config, tensors)


def test_a_tie_does_not_take_over_however_many_digits_it_has(config):
    """The champion's score was kept with six digits, which this one is above."""
    mean = 0.1234564999
    versions = [registered(config, weights(seed), mean, "ties") for seed in (0, 1)]
    assert [version.alias for version in versions] == ["champion", "challenger"]


def test_a_file_larger_than_its_network_is_not_fetched(config):
    """A sparse file of 4 GB, whose digest is not taken either."""
    version = registered(config, weights(), model="larger")
    place = folder_of(version, config) / "artifacts" / checkpoint.WEIGHTS
    with place.open("r+b") as file:
        file.truncate(4 * 2**30)
    with pytest.raises(
        CheckpointError, match=r"larger/1: weights\.safetensors has 4294967296 bytes"
    ):
        load.load(f"models:/larger/{version.version}", config.tracking.uri)


@pytest.mark.parametrize("widths", [[10**9] * 3, [10**5] * 3, [64, 64, 64]])
def test_a_network_larger_than_its_weights_is_not_made(config, widths):
    name = f"claims{widths[0]}"
    version = registered(config, weights(), model=name)
    place = folder_of(version, config) / "artifacts" / checkpoint.CONFIG
    text = place.read_text()
    place.write_text(json.dumps(json.loads(text) | {"network": {"widths": widths}}))
    with pytest.raises(CheckpointError, match="network") as said:
        load.load(f"models:/{name}/{version.version}", config.tracking.uri)
    assert "\n" not in str(said.value)


def test_bytes_that_are_no_weights_are_refused_though_their_digest_fits(config):
    version = registered(config, weights(), model="fits")
    place, data = folder_of(version, config) / "artifacts" / checkpoint.WEIGHTS, b"[" * 1000
    place.write_bytes(data)
    client = MlflowClient(config.tracking.uri)
    tag = ("weights_sha256", hashlib.sha256(data).hexdigest())
    client.set_model_version_tag("fits", version.version, *tag)
    with pytest.raises(CheckpointError, match=r"fits/1: not a file of weights") as said:
        load.load(f"models:/fits/{version.version}", config.tracking.uri)
    assert "\n" not in str(said.value)


def test_a_score_that_somebody_else_wrote_is_listed_and_not_beaten(config):
    version = registered(config, weights(), model="odd")
    client = MlflowClient(config.tracking.uri)
    client.set_model_version_tag("odd", version.version, "dice_mean", "much")
    assert load.versions(config.tracking.uri, "odd")[0]["dice_mean"] == "much"
    assert registered(config, weights(seed=1), 0.9, model="odd").alias == "challenger"
