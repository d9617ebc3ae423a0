"""A registered model, a checkpoint or a run -> the model, loaded; and a model's versions."""

import hashlib
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts, list_artifacts

from raybrats import storage
from raybrats.config import TrainConfig, from_json
from raybrats.errors import CheckpointError, MissingObjectError, UsageError
from raybrats.label_set import LABEL_SETS, LabelSet
from raybrats.registry import package
from raybrats.registry.model import Model, Trained, model_of
from raybrats.registry.server import check_reachable, tracking_errors
from raybrats.registry.tracking import default_server
from raybrats.train import manifest
from raybrats.train.manifest import CONFIG, WEIGHTS

_SCORE = "dice_"
"""How the tags of a version begin that are shown."""
_MOST_CONFIG, _MOST_HEADER = 2**16, 2**20
"""Bytes of a configuration, and of names and shapes in a file of weights: 4 KB and 40 KB."""


def load(
    uri: str, tracking_uri: str, network: str = "", mirror: tuple[int, ...] | None = None
) -> Model:
    """The model behind `models:/name@alias` or `models:/name/version`, a checkpoint or a run.

    Args:
        uri: where it is.
        tracking_uri: MLflow server.
        network: `my.module:function`, if that is the network of the checkpoint; what a checkpoint
            names is imported for no other reason.
        mirror: axes along which windows are also seen mirrored; those of its run, which were those
            of its validation, where not given.

    Raises:
        RaybratsError: as `read` does.
        UsageError: the network is the user's own, and not the one that was named.

    Example:
        >>> model = load("models:/raybrats@champion", "http://mlflow:5000")  # doctest: +SKIP
        >>> labels = model.segment(np.stack([flair, t1, t1ce, t2])).labels  # doctest: +SKIP
    """
    return load_ensemble([uri], tracking_uri, network, mirror)


def load_ensemble(
    uris: Sequence[str],
    tracking_uri: str,
    network: str = "",
    mirror: tuple[int, ...] | None = None,
) -> Model:
    """The models behind some URIs as one, whose probabilities are their mean.

    Thresholds and other rules are those of the first. Arguments are `load`'s.

    Raises:
        RaybratsError: as `load` does.
        UsageError: there is none, one is there twice, or they differ in modalities, preparation,
            labels or target.

    Example:
        >>> folds = [f"models:/raybrats/{number}" for number in (3, 4, 5)]
        >>> load_ensemble(folds, "http://mlflow:5000").name  # doctest: +SKIP
        'models:/raybrats/3,models:/raybrats/4,models:/raybrats/5'
    """
    trained = [read(uri, tracking_uri) for uri in uris]
    names = [one.name for one in trained]
    if not names or len(set(names)) < len(names):
        raise UsageError(f"an ensemble of {', '.join(names) or 'none'}; expected different models")
    return model_of(trained, network, mirror)


def read(uri: str, tracking_uri: str) -> Trained:
    """The network behind `models:/name@alias` or `models:/name/version`, a checkpoint or a run.

    Of a run it is the best checkpoint, or the newest where none was validated; those that do not
    verify are passed over.

    Raises:
        UsageError: a `models:/` URI of another form, or raybrats did not register the model.
        TrackingError: the server is out of reach, or there is no such model.
        CheckpointError: the weights are not those that were registered, or not of their network;
            its network is of a package that is not installed here in its version; the checkpoint
            is damaged, or the run has none that can be loaded.
        StorageError: there is nothing at the URI, or it is out of reach.

    Example:
        >>> read("runs/one", "").name  # doctest: +SKIP
        'runs/one/checkpoints/step-00000150'
    """
    if uri.startswith("models:"):
        return _read_version(uri, tracking_uri)
    uri = storage.absolute(uri)
    try:
        storage.require(uri)
    except MissingObjectError as error:
        kinds = "models:/NAME@ALIAS, models:/NAME/VERSION, a checkpoint, or the folder of a run"
        raise MissingObjectError(f"{error}; expected {kinds}") from error
    return _read_checkpoint(uri) if manifest.is_place(uri) else _read_run(uri)


def label_set(name: str, tracking_uri: str) -> LabelSet:
    """What a registered model tells apart, by its configuration alone.

    Args:
        name: `models:/name/version`.
        tracking_uri: MLflow server.

    Raises:
        TrackingError: the server is out of reach.
        CheckpointError: the configuration is damaged.

    Example:
        >>> label_set("models:/raybrats/3", "http://mlflow:5000").names  # doctest: +SKIP
        ('NCR', 'ED', 'ET')
    """
    return _config(name, tracking_uri).labels


def _config(name: str, tracking_uri: str) -> TrainConfig:
    try:
        return from_json(_file(name, CONFIG, tracking_uri, _MOST_CONFIG))
    except ValueError:
        words = "its configuration is damaged, or of another version of raybrats"
        raise CheckpointError(f"{name}: {words}; take another version") from None


def _read_version(model_uri: str, tracking_uri: str) -> Trained:
    """A registered model, which is data here: code and pickles that a version may hold stay there.

    Its weights and its configuration are read, and the network is raybrats' own.
    """
    name = resolve(model_uri, tracking_uri)
    _, model, version = name.split("/")
    with tracking_errors(tracking_uri):
        tags = MlflowClient(tracking_uri, tracking_uri).get_model_version(model, version).tags
    if "weights_sha256" not in tags:
        raise UsageError(f"{name}: not a model that raybrats registered")
    # torch takes a second, which a look-up of versions need not wait for
    from raybrats.model.network import num_bytes
    from raybrats.train import parts

    package.require_installed(name, tags)
    config = _config(name, tracking_uri)
    package.require_offered(name, tags, config)
    weights = _file(name, WEIGHTS, tracking_uri, num_bytes(config) + _MOST_HEADER)
    if hashlib.sha256(weights).hexdigest() != tags["weights_sha256"]:
        raise CheckpointError(
            f"{name}: its weights are not those that were registered; take another version"
        )
    return Trained(name, config, parts.tensors(weights, name))


def _read_checkpoint(uri: str) -> Trained:
    from raybrats.train import checkpoint  # torch

    found = checkpoint.read_network(uri)
    return Trained(uri, found.config, found.weights)


def _read_run(run_uri: str) -> Trained:
    written = manifest.written(run_uri)
    problem = "it has none"
    for candidate in (*manifest.ranked(written), *reversed(written)):
        try:
            return _read_checkpoint(candidate.uri)
        except CheckpointError as error:
            problem = str(error)
    raise CheckpointError(f"{run_uri}: no checkpoint that can be loaded ({problem})")


def resolve(model_uri: str, tracking_uri: str) -> str:
    """The URI of a model with its alias replaced by the version that it stands for now.

    Raises:
        UsageError: the URI is not of that form.
        TrackingError: the server is out of reach, or there is no such model.

    Example:
        >>> resolve("models:/raybrats@champion", "http://mlflow:5000")  # doctest: +SKIP
        'models:/raybrats/3'
    """
    match = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", model_uri)
    if match is None:
        raise UsageError(f"{model_uri!r}: expected models:/NAME@ALIAS or models:/NAME/VERSION")
    name, alias, number = match.groups()
    check_reachable(tracking_uri)
    with tracking_errors(tracking_uri):
        client = MlflowClient(tracking_uri, tracking_uri)
        if alias:
            number = client.get_model_version_by_alias(name, alias).version
        else:
            client.get_model_version(name, number)
    return f"models:/{name}/{number}"


def run_id_of(model_uri: str, tracking_uri: str) -> str:
    """Id of the MLflow run that a `models:/name/version` came from; empty if it has none.

    Raises:
        TrackingError: the server is out of reach, or there is no such version.

    Example:
        >>> run_id_of("models:/raybrats/3", "http://mlflow:5000")  # doctest: +SKIP
        '9c1c71ab3fe94d5c8c2a54f6d4e1f0b7'
    """
    name, _, version = model_uri.removeprefix("models:/").partition("/")
    check_reachable(tracking_uri)
    with tracking_errors(tracking_uri):
        found = MlflowClient(tracking_uri, tracking_uri).get_model_version(name, version)
    return str(found.run_id or "")


def versions(tracking_uri: str, name: str) -> list[dict[str, str]]:
    """Every version of a registered model, newest first: number, aliases, Dice, recipe, run.

    Raises:
        UsageError: the name is empty.
        TrackingError: the server is out of reach, or there is no model of that name.

    Example:
        >>> newest = versions("http://mlflow:5000", "raybrats")[0]  # doctest: +SKIP
        >>> newest["version"], newest["aliases"], newest["dice_mean"]  # doctest: +SKIP
        ('3', 'champion', '0.873214')
    """
    if not name:
        raise UsageError("an empty name; give that of a registered model")
    check_reachable(tracking_uri)
    with tracking_errors(tracking_uri):
        client = MlflowClient(tracking_uri, tracking_uri)
        aliases: dict[str, list[str]] = {}
        for alias, number in client.get_registered_model(name).aliases.items():
            aliases.setdefault(str(number), []).append(alias)
        found = client.search_model_versions(f"name = '{name}'")
    scores = {key for v in found for key in v.tags if key.startswith(_SCORE)}
    scores = _in_order(scores | {f"{_SCORE}mean"})
    rows = [
        {
            "version": str(v.version),
            "aliases": ", ".join(aliases.get(str(v.version), [])),
            **{key: _rounded(v.tags.get(key, "")) for key in scores},
            "recipe": v.tags.get("recipe", ""),
            "run_id": v.run_id or "",
        }
        for v in found
    ]
    return sorted(rows, key=lambda row: -int(row["version"]))


def _in_order(scores: set[str]) -> list[str]:
    """The tags in the order of the known regions, then any others, and the mean last."""
    regions = [name for labels in LABEL_SETS.values() for name in labels.region_names]
    known = [_SCORE + name for name in dict.fromkeys(regions)]
    others = sorted(scores.difference(known, (f"{_SCORE}mean",)))
    return [name for name in (*known, *others, f"{_SCORE}mean") if name in scores]


def _rounded(score: str) -> str:
    with suppress(ValueError):  # none, or what somebody else has written there
        return f"{float(score):.6f}"
    return score


def _file(name: str, file: str, tracking_uri: str, limit: int) -> bytes:
    """A file of a version, and nothing else that the version holds.

    Raises:
        CheckpointError: it is larger than it may be, and not fetched.
    """
    with (
        TemporaryDirectory() as folder,
        default_server(tracking_uri),
        tracking_errors(tracking_uri),
    ):
        held = list_artifacts(f"{name}/artifacts", tracking_uri=tracking_uri)
        sizes = {each.path.rpartition("/")[2]: each.file_size or 0 for each in held}
        if sizes.get(file, 0) > limit:
            words = f"{file} has {sizes[file]} bytes where {limit} would be many"
            raise CheckpointError(f"{name}: {words}; take another version")
        uri = f"{name}/artifacts/{file}"
        path = download_artifacts(uri, dst_path=folder, tracking_uri=tracking_uri)
        return Path(path).read_bytes()
