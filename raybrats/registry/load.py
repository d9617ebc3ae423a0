"""models:/name@alias -> version -> loaded model; and the list of versions."""

import re
from dataclasses import dataclass
from typing import Any

import mlflow
from mlflow import MlflowClient

from raybrats.errors import UsageError
from raybrats.registry.tracking import default_server, spoken_to


@dataclass(frozen=True)
class Model:
    """A loaded model."""

    name: str
    """`models:/name/version`, whichever way it was looked up."""
    modalities: tuple[str, ...]
    predict: Any
    """Raw case, float32 (modality, i, j, k) -> labels uint8 (i, j, k)."""
    takes_incomplete: bool
    """Whether it was trained with modalities dropped, so that one may be missing."""


def load(model_uri: str, tracking_uri: str) -> Model:
    """The model behind `models:/name@alias` or `models:/name/version`.

    Raises:
        UsageError: the URI is not of that form.
        TrackingError: the server is out of reach, or there is no such model.
    """
    name = resolve(model_uri, tracking_uri)
    with spoken_to(tracking_uri), default_server(tracking_uri):
        loaded = mlflow.pyfunc.load_model(name)
    said = loaded.metadata.metadata
    dropped = said.get("drop_modality", 0) > 0
    return Model(name, tuple(said["modalities"]), loaded.predict, dropped)


def resolve(model_uri: str, tracking_uri: str) -> str:
    """The URI with an alias replaced by the version that it stands for now.

    Raises:
        UsageError: the URI is not of that form.
        TrackingError: the server is out of reach, or there is no such model.
    """
    match = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", model_uri)
    if match is None:
        raise UsageError(f"{model_uri!r}: expected models:/NAME@ALIAS or models:/NAME/VERSION")
    name, alias, number = match.groups()
    with spoken_to(tracking_uri):
        client = MlflowClient(tracking_uri, tracking_uri)
        if alias:
            number = client.get_model_version_by_alias(name, alias).version
        else:
            client.get_model_version(name, number)
    return f"models:/{name}/{number}"


def run_of(model_uri: str, tracking_uri: str) -> str:
    """The MLflow run that a `models:/name/version` came from.

    Raises:
        TrackingError: there is no such version.
    """
    name, _, version = model_uri.removeprefix("models:/").partition("/")
    with spoken_to(tracking_uri):
        found = MlflowClient(tracking_uri, tracking_uri).get_model_version(name, version)
    return str(found.run_id or "")


def versions(tracking_uri: str, name: str) -> list[dict[str, str]]:
    """Every version of a registered model, newest first: number, aliases, Dice, recipe, run."""
    with spoken_to(tracking_uri):
        client = MlflowClient(tracking_uri, tracking_uri)
        aliases: dict[str, list[str]] = {}
        for alias, number in client.get_registered_model(name).aliases.items():
            aliases.setdefault(str(number), []).append(alias)
        found = client.search_model_versions(f"name = '{name}'")
    rows = [
        {
            "version": str(v.version),
            "aliases": ", ".join(aliases.get(str(v.version), [])),
            **{k: v.tags.get(k, "") for k in ("dice_WT", "dice_TC", "dice_ET", "dice_mean")},
            "recipe": v.tags.get("recipe", ""),
            "run_id": v.run_id or "",
        }
        for v in found
    ]
    return sorted(rows, key=lambda row: -int(row["version"]))
