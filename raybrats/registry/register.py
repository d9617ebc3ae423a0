"""Checkpoint -> registered model: code, safetensors and configuration; champion or challenger."""

import hashlib
import importlib.metadata
import importlib.util
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlflow
import numpy as np
from mlflow import MlflowClient
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec

import raybrats
from raybrats.config import TrainConfig, to_json
from raybrats.errors import RegistrationError, TrackingError
from raybrats.registry.tracking import Run, default_server, tracking_errors
from raybrats.train import checkpoint

CHAMPION, CHALLENGER = "champion", "challenger"
_NEEDS = ("torch", "monai", "numpy", "numba", "safetensors", "pydantic")
"""What the packaged code imports."""


@dataclass(frozen=True)
class Version:
    """A registered model version."""

    name: str
    version: str
    alias: str


def register(
    run: Run,
    config: TrainConfig,
    files: Mapping[str, bytes],
    scores: Mapping[str, float],
    held_out: str,
) -> Version:
    """Registers weights as a new version: champion if it beats the present one, else challenger.

    Versions are compared by mean region Dice, and only where they were scored on the same
    held-out cases (`held_out`: a digest of them); otherwise the present champion stays. The same
    weights of the same run are not registered twice.

    Raises:
        RegistrationError: the registry does not take it; the checkpoint stays in storage.
    """
    name = config.tracking.model
    try:
        with tracking_errors(run.uri):
            client = MlflowClient(run.uri, registry_uri=run.uri)
            weights = hashlib.sha256(files[checkpoint.WEIGHTS]).hexdigest()
            if (earlier := _registered(client, name, run, weights)) is not None:
                return earlier
            number = _log(run, config, files)
            tags = {f"dice_{region}": f"{value:.6f}" for region, value in scores.items()}
            tags |= {"held_out": held_out, "recipe": config.recipe}
            for key, value in tags.items():
                client.set_model_version_tag(name, number, key, value)
            alias = _alias(client, name, scores["mean"], held_out)
            client.set_registered_model_alias(name, alias, number)
            # Last, for it says that all of this is done: a later attempt looks for it.
            client.set_model_version_tag(name, number, "weights_sha256", weights)
    except TrackingError as error:
        raise RegistrationError(f"trained, but not registered: {error}") from error
    return Version(name, number, alias)


def _log(run: Run, config: TrainConfig, files: Mapping[str, bytes]) -> str:
    """Uploads the model and makes it a version; its number."""
    shape = (len(config.data.modalities), -1, -1, -1)
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.float32), shape)]),
        outputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1))]),
    )
    with (
        default_server(run.uri),
        tempfile.TemporaryDirectory() as folder,
        mlflow.start_run(run_id=run.run_id),
        warnings.catch_warnings(),
    ):
        # An input example would be segmented at once, and the signature is given.
        warnings.filterwarnings("ignore", message=".*[Ii]nput example")
        weights, settings = Path(folder, checkpoint.WEIGHTS), Path(folder, checkpoint.CONFIG)
        weights.write_bytes(files[checkpoint.WEIGHTS])
        settings.write_text(to_json(config))
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(__file__).with_name("pyfunc_model.py")),
            artifacts={"weights": str(weights), "config": str(settings)},
            code_paths=[str(Path(raybrats.__file__).parent)],
            pip_requirements=[f"{p}=={importlib.metadata.version(p)}" for p in _pinned(_NEEDS)],
            signature=signature,
            metadata={
                "modalities": list(config.data.modalities),
                "drop_modality": config.augment.drop_modality,
            },
            registered_model_name=config.tracking.model,
        )
    return str(info.registered_model_version)


def _registered(client: MlflowClient, name: str, run: Run, weights: str) -> Version | None:
    """The version that these weights of this run already have."""
    for found in client.search_model_versions(f"name = '{name}' and run_id = '{run.run_id}'"):
        if found.tags.get("weights_sha256") == weights:
            # A search leaves the aliases out (MLflow 3.17), so the version is asked for itself.
            aliases = client.get_model_version(name, found.version).aliases
            return Version(name, str(found.version), (*aliases, "")[0])
    return None


def _pinned(names: Sequence[str]) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name)]


def _alias(client: MlflowClient, name: str, score: float, held_out: str) -> str:
    aliases = client.get_registered_model(name).aliases
    if CHAMPION not in aliases:
        return CHAMPION
    tags = client.get_model_version(name, aliases[CHAMPION]).tags
    comparable = tags.get("held_out") == held_out
    return CHAMPION if comparable and score > float(tags["dice_mean"]) else CHALLENGER
