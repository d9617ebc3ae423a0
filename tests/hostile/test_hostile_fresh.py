"""A registered model installs and predicts where there is nothing but what it asks for."""

import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from faulty import SOAK
from safetensors.torch import save

from raybrats.config import DataConfig, NetworkConfig, RunConfig, TrackingConfig, TrainConfig
from raybrats.model.inference import segment
from raybrats.model.network import build, weights_of
from raybrats.phantom.phantom import make_phantom
from raybrats.registry import tracking
from raybrats.registry.register import register
from raybrats.train import checkpoint

USE = """
import sys, mlflow, numpy as np
model = mlflow.pyfunc.load_model(sys.argv[1])
np.save(sys.argv[3], model.predict(np.load(sys.argv[2])))
import raybrats
print(raybrats.__file__)
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not SOAK, reason="installs torch and MLflow anew: make soak")
def test_a_fresh_environment_made_of_the_models_own_requirements_predicts(tmp_path):
    """Packages come from the index that pip is configured with."""
    config = TrainConfig(
        data=DataConfig(patch_size=(16, 16, 16), modalities=("t1ce", "flair")),
        network=NetworkConfig(widths=(4, 8, 8), deep_supervision=1),
        run=RunConfig(name="one", storage_uri=str(tmp_path / "runs")),
        tracking=TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", model="fresh"),
    )
    torch.manual_seed(0)
    network = build(config.network, 2).eval()
    files = {checkpoint.WEIGHTS: save(weights_of(network))}
    scores = dict.fromkeys(("WT", "TC", "ET", "mean"), 0.5)
    version = register(tracking.start(config), config, files, scores, "cases")
    with tracking.default_server(config.tracking.uri):
        uri = f"models:/fresh/{version.version}"
        model = mlflow.artifacts.download_artifacts(uri, dst_path=str(tmp_path / "model"))

    python = str(tmp_path / "fresh" / "bin" / "python")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "fresh")], check=True)
    needs = [line for line in Path(model, "requirements.txt").read_text().split() if line]
    print("requirements:", *needs)
    first = [line for line in needs if line.startswith("torch==")]
    for wanted in (first, ["-r", f"{model}/requirements.txt"]):
        subprocess.run([python, "-m", "pip", "install", "-q", *wanted], check=True)
    image = make_phantom(0, shape=(28, 24, 20))[0][[2, 0]].astype(np.float32)
    np.save(tmp_path / "image.npy", image)
    places = [model, str(tmp_path / "image.npy"), str(tmp_path / "labels.npy")]
    done = subprocess.run(
        [python, "-I", "-c", USE, *places], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    assert str(tmp_path) in done.stdout, "its code is the model's own"
    expected = segment(network, config, image)
    assert len(np.unique(expected)) > 1
    np.testing.assert_array_equal(np.load(places[2]), expected)
