"""Checkpoint -> registered model: code, safetensors and configuration; champion or challenger."""

import hashlib
import importlib.metadata
import importlib.util
import tempfile
import warnings
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import mlflow
import numpy as np
from mlflow import MlflowClient
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema, TensorSpec
from mlflow.utils.logging_utils import disable_logging, enable_logging
from safetensors import SafetensorError
from safetensors import torch as safetensors

from raybrats.config import NETWORKS, TrainConfig, to_json
from raybrats.errors import CheckpointError, RegistrationError, TrackingError, UsageError
from raybrats.registry.package import TAG
from raybrats.registry.server import tracking_errors
from raybrats.registry.tracking import Run, default_server
from raybrats.train import checkpoint

CHAMPION, CHALLENGER = "champion", "challenger"
_REQUIREMENTS = {
    **{name: name for name in ("torch", "monai", "numpy", "numba", "safetensors")},
    "pydantic": "pydantic",
    "cc3d": "connected-components-3d",
}
"""Modules that the registered model's code imports, and the packages that they are of."""


@dataclass(frozen=True)
class Version:
    """One version of a registered model."""

    name: str
    version: str
    """Its number, which MLflow keeps as text."""
    alias: str
    """Champion or challenger; empty if a version registered earlier has lost its alias since."""


def register(
    run: Run,
    config: TrainConfig,
    files: Mapping[str, bytes],
    scores: Mapping[str, float],
    held_out: str,
    gain: Mapping[str, float] | None = None,
) -> Version:
    """Registers weights as a new version: champion if it beats the present one, else challenger.

    Versions are compared by mean region Dice, and only where they were scored on the same
    held-out cases; otherwise the present champion stays. The same weights of the same run are not
    registered twice.

    Args:
        run: MLflow run that trained the weights.
        config: its configuration, which is registered with the weights.
        files: files of its checkpoint, of which the weights are used.
        scores: Dice of each region, and their mean under `mean`; none if it was not scored.
        held_out: digest of the cases that were scored.
        gain: what the rules of its prediction section gained in Dice, cross-validated, by region
            and `mean`, where they were fitted; the version's tags `prediction_gain_WT` and so on.

    Raises:
        RegistrationError: the registry does not take it, or its network is of others and of no
            installed package; the checkpoint stays in storage.

    Example:
        >>> best = checkpoint.best("s3://bucket/runs/one")  # doctest: +SKIP
        >>> register(run, config, best.files, scores, held_out="0f3a")  # doctest: +SKIP
        Version(name='raybrats', version='3', alias='champion')
    """
    name = config.tracking.model
    try:
        package = NETWORKS.package(config.network.name)
        with tracking_errors(run.uri):
            client = MlflowClient(run.uri, registry_uri=run.uri)
            weights = hashlib.sha256(files[checkpoint.WEIGHTS]).hexdigest()
            _check_weights(config, files[checkpoint.WEIGHTS])
            if (earlier := _find_version(client, name, run, weights)) is not None:
                return earlier
            number = _upload(client, run, config, files, package)
            # in full: the next one is compared with it, and a tie does not take over
            tags = {f"dice_{region}": repr(float(value)) for region, value in scores.items()}
            tags |= {"held_out": held_out, "recipe": config.recipe}
            tags |= {f"prediction_gain_{name}": repr(float(v)) for name, v in (gain or {}).items()}
            tags |= {TAG: package} if package else {}
            for key, value in tags.items():
                client.set_model_version_tag(name, number, key, value)
            alias = _choose_alias(client, name, scores.get("mean"), held_out)
            client.set_registered_model_alias(name, alias, number)
            # This tag comes last: a later attempt takes it for the sign that all of this is done.
            client.set_model_version_tag(name, number, "weights_sha256", weights)
    except (TrackingError, UsageError) as error:
        raise RegistrationError(f"trained, but not registered: {error}") from error
    return Version(name, number, alias)


def _check_weights(config: TrainConfig, data: bytes) -> None:
    """Refuses weights that would predict nothing, whatever the manifest beside them says.

    Raises:
        RegistrationError: they are not finite, or not those of the configured network.
    """
    from raybrats.model.network import trained_network  # torch takes seconds; a start needs none

    try:
        weights = safetensors.load(data)
        trained_network(config, weights, "cpu")  # a driver's GPU may be full of other work
    except (SafetensorError, CheckpointError) as error:
        raise RegistrationError(f"not registered, for its weights do not load: {error}") from error
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise RegistrationError(f"not registered, for {name} of its weights is not finite")


def _upload(
    client: MlflowClient, run: Run, config: TrainConfig, files: Mapping[str, bytes], package: str
) -> str:
    """Uploads the model, makes it a version and returns its number."""
    shape = (len(config.data.modalities), -1, -1, -1)
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.float32), shape)]),
        outputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1))]),
    )
    with (
        default_server(run.uri),
        tempfile.TemporaryDirectory() as folder,
        warnings.catch_warnings(),
        _quiet(),
    ):
        # An input example would be segmented at once, and the signature is given.
        warnings.filterwarnings("ignore", message=".*[Ii]nput example")
        weights, settings = Path(folder, checkpoint.WEIGHTS), Path(folder, checkpoint.CONFIG)
        weights.write_bytes(files[checkpoint.WEIGHTS])
        settings.write_text(to_json(config))
        # pyfunc.log_model takes the active run and experiment, which may be the user's own.
        found = client.get_run(run.run_id)
        logged = client.create_logged_model(
            found.info.experiment_id, "model", run.run_id, params=found.data.params
        )
        info = Model.log(
            artifact_path=None,
            name="model",
            model_id=logged.model_id,
            flavor=mlflow.pyfunc,
            run_id=run.run_id,
            python_model=str(Path(__file__).with_name("pyfunc_model.py")),
            artifacts={"weights": str(weights), "config": str(settings)},
            code_paths=[str(Path(__file__).parents[1])],
            pip_requirements=[*_requirements(), *([package] if package else [])],
            signature=signature,
            metadata={
                "modalities": list(config.data.modalities),
                "drop_modality": config.augment.drop_modality,
            },
            registered_model_name=config.tracking.model,
        )
    return str(info.registered_model_version)


def _requirements() -> Iterator[str]:
    """Those of raybrats' own code, as they are installed here."""
    for package in (
        _REQUIREMENTS[name] for name in _REQUIREMENTS if importlib.util.find_spec(name)
    ):
        # the local part, as of 2.13.0+cpu, names a build that an index may not have
        yield f"{package}=={importlib.metadata.version(package).partition('+')[0]}"


@contextmanager
def _quiet() -> Generator[None]:
    """Within it MLflow prints nothing of what it registers, for which nobody has asked here."""
    # Its import, which MLflow puts off, ends with turning the words on again.
    importlib.import_module("mlflow.types.responses")
    disable_logging()
    try:
        yield
    finally:
        enable_logging()


def _find_version(client: MlflowClient, name: str, run: Run, weights: str) -> Version | None:
    """The version that weights of this digest and this run already have, if any."""
    for found in client.search_model_versions(f"name = '{name}' and run_id = '{run.run_id}'"):
        if found.tags.get("weights_sha256") == weights:
            # A search leaves the aliases out (MLflow 3.17), so the version is asked for itself.
            aliases = client.get_model_version(name, found.version).aliases
            return Version(name, str(found.version), (*aliases, "")[0])
    return None


def _choose_alias(client: MlflowClient, name: str, score: float | None, held_out: str) -> str:
    """Champion if there is none, or if the score beats its own on the same cases."""
    if score is None:
        return CHALLENGER
    aliases = client.get_registered_model(name).aliases
    if CHAMPION not in aliases:
        return CHAMPION
    tags = client.get_model_version(name, aliases[CHAMPION]).tags
    if tags.get("held_out") != held_out:
        return CHALLENGER
    with suppress(KeyError, ValueError):  # somebody else has written it, who keeps the name
        return CHAMPION if score > float(tags["dice_mean"]) else CHALLENGER
    return CHALLENGER
