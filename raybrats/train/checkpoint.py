"""Checkpoints: written with the manifest last, verified when read, quarantined when damaged.

<run uri>/checkpoints/step-00001250/{weights.safetensors, state.pt, config.json, MANIFEST.json}
"""

import io
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, TypeVar

import torch
from safetensors import torch as safetensors
from torch import Tensor

from raybrats import storage
from raybrats.config import TrainConfig, digest, to_json
from raybrats.errors import ChangedObjectError, CheckpointError, MissingObjectError
from raybrats.train import manifest, parts
from raybrats.train.manifest import CONFIG, STATE, WEIGHTS, Written, place, ranked, written

T = TypeVar("T")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are those that its manifest names."""

    uri: str
    step: int
    metrics: Mapping[str, float]
    """Metrics of the validation at this step; empty if there was none."""
    finished: bool
    """Whether the run ended with it."""
    progress: Mapping[str, Any]
    """What `Learner.progress` gave."""
    config_digest: str
    files: Mapping[str, bytes]
    """Verified bytes by file name."""
    rejected: tuple[str, ...] = ()
    """Newer checkpoints that did not verify, where they are quarantined."""

    @property
    def weights(self) -> dict[str, Tensor]:
        """Tensors of the network, by name.

        Raises:
            CheckpointError: the file holds none.
        """
        return parts.tensors(self.files[WEIGHTS], storage.join(self.uri, WEIGHTS))

    @property
    def state(self) -> dict[str, Any]:
        """Optimiser and random state; only tensors and plain values are unpickled.

        Raises:
            CheckpointError: there is more in the file, or none.
        """
        return parts.state(self.files[STATE], storage.join(self.uri, STATE))


@dataclass(frozen=True)
class TrainedNetwork:
    """A checkpoint without what only resuming needs: its weights and configuration, verified."""

    uri: str
    step: int
    metrics: Mapping[str, float]
    """Metrics of the validation at this step; empty if there was none."""
    files: Mapping[str, bytes]
    """Verified bytes of `weights.safetensors` and `config.json`."""

    @property
    def weights(self) -> dict[str, Tensor]:
        """Tensors of the network, by name.

        Raises:
            CheckpointError: the file holds none.
        """
        return parts.tensors(self.files[WEIGHTS], storage.join(self.uri, WEIGHTS))

    @property
    def config(self) -> TrainConfig:
        """The run that trained it.

        Raises:
            CheckpointError: this version of raybrats does not know such a configuration.
        """
        return parts.config(self.files[CONFIG], storage.join(self.uri, CONFIG))


@dataclass(frozen=True)
class Snapshot:
    """What becomes a checkpoint."""

    step: int
    weights: Mapping[str, Tensor]
    state: Mapping[str, Any]
    """Tensors and plain values: everything else that resuming needs."""
    progress: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    finished: bool = False
    world: int = 1
    mlflow_run_id: str = ""


def write(run_uri: str, config: TrainConfig, snapshot: Snapshot) -> str:
    """Writes a checkpoint, its manifest last, and returns its URI.

    Example:
        >>> write("runs/new", TrainConfig(), Snapshot(50, {"bias": torch.ones(2)}, {}))
        'runs/new/checkpoints/step-00000050'
    """
    uri, buffer = place(run_uri, snapshot.step), io.BytesIO()
    torch.save(dict(snapshot.state), buffer)
    plain = {n: tensor.detach().cpu().contiguous() for n, tensor in snapshot.weights.items()}
    files = {
        WEIGHTS: safetensors.save(plain),
        STATE: buffer.getvalue(),
        CONFIG: to_json(config).encode(),
    }
    for name, data in files.items():
        storage.write_bytes(storage.join(uri, name), data, manifest.MODE)
    facts = {
        "step": snapshot.step,
        "draws": snapshot.step * config.optim.global_batch,
        "config_digest": digest(config),
        "world": snapshot.world,
        "mlflow_run_id": snapshot.mlflow_run_id,
        **_validation_facts(snapshot),
        "files": {n: {"size": len(d), "digest": storage.digest_of(d)} for n, d in files.items()},
    }
    manifest.write(uri, facts)
    return uri


def add_validation(run_uri: str, snapshot: Snapshot) -> str:
    """Adds a validation to the checkpoint of its step: only the manifest is replaced.

    Raises:
        CheckpointError: there is none of that step.

    Example:
        >>> uri = write("runs/add", TrainConfig(), Snapshot(50, {}, {}))
        >>> uri == add_validation("runs/add", Snapshot(50, {}, {}, metrics={"mean": 0.8}))
        True
        >>> best_written("runs/add").metrics
        {'mean': 0.8}
    """
    uri = place(run_uri, snapshot.step)
    manifest.write(uri, manifest.read(uri) | _validation_facts(snapshot))
    return uri


def read(uri: str) -> Checkpoint:
    """A checkpoint with all its files verified against the manifest.

    Raises:
        CheckpointError: the manifest or a file is missing or damaged.

    Example:
        >>> uri = write("runs/read", TrainConfig(), Snapshot(50, {"bias": torch.ones(2)}, {}))
        >>> read(uri).weights
        {'bias': tensor([1., 1.])}
    """
    names = ("step", "metrics", "finished", "progress", "config_digest")
    facts = manifest.read(uri, (*names, "files"))
    files = _each(storage.read_bytes, uri, facts["files"])
    return Checkpoint(uri=uri, files=files, **{name: facts[name] for name in names})


def read_network(uri: str) -> TrainedNetwork:
    """The weights and the configuration of a checkpoint, verified; its other files are not read.

    Raises:
        CheckpointError: the manifest or one of the two files is missing or damaged.

    Example:
        >>> uri = write("runs/net", TrainConfig(), Snapshot(50, {"bias": torch.ones(2)}, {}))
        >>> read_network(uri).config == TrainConfig()
        True
    """
    facts = manifest.read(uri, ("step", "metrics", "files"))
    wanted = {name: facts["files"][name] for name in (WEIGHTS, CONFIG)}
    files = _each(storage.read_bytes, uri, wanted)
    return TrainedNetwork(uri, facts["step"], facts["metrics"], files)


def verify(uri: str) -> None:
    """Reads every file of a checkpoint and compares it with the manifest.

    Raises:
        CheckpointError: one is missing or damaged.

    Example:
        >>> verify(write("runs/sound", TrainConfig(), Snapshot(50, {}, {})))
    """
    _each(storage.verify, uri, manifest.read(uri, ("files",))["files"])


def newest(run_uri: str) -> Checkpoint | None:
    """The newest checkpoint that verifies, or None where there never was any.

    Newer ones that are damaged are quarantined.

    Raises:
        CheckpointError: there were checkpoints, and none can be trusted.

    Example:
        >>> print(newest("runs/unknown"))
        None
    """
    candidates, rejected = manifest.complete(run_uri), []
    for uri in reversed(candidates):
        for tries_left in (1, 0):
            try:
                return replace(read(uri), rejected=tuple(rejected))
            except CheckpointError:
                if not tries_left:  # twice: it was not the way that spoiled it
                    rejected.append(quarantine(uri))
    if candidates or any("/quarantine/" in uri for uri in manifest.objects(run_uri)):
        kept = storage.join(run_uri, "checkpoints", "quarantine")
        raise CheckpointError(f"no checkpoint of {run_uri} verifies; they are kept in {kept}")
    return None


def best(run_uri: str) -> TrainedNetwork:
    """The network with the highest mean region Dice among those whose files verify.

    Raises:
        CheckpointError: there is none.

    Example:
        >>> for step, mean in ((50, 0.8), (100, 0.7)):
        ...     _ = write("runs/best", TrainConfig(), Snapshot(step, {}, {}, {}, {"mean": mean}))
        >>> best("runs/best").step
        50
    """
    for candidate in ranked(written(run_uri)):
        with suppress(CheckpointError):
            return read_network(candidate.uri)
    raise CheckpointError(f"{run_uri} has no checkpoint that verifies")


def best_written(run_uri: str) -> Written:
    """The checkpoint with the highest mean region Dice; only manifests are read.

    Raises:
        CheckpointError: no checkpoint was validated.

    Example:
        >>> _ = write("runs/top", TrainConfig(), Snapshot(50, {}, {}, metrics={"mean": 0.8}))
        >>> best_written("runs/top").metrics["mean"]
        0.8
    """
    for candidate in ranked(written(run_uri)):
        return candidate
    raise CheckpointError(f"{run_uri} has no checkpoint with a validation")


def quarantine(uri: str) -> str:
    """Moves a damaged checkpoint out of the way, where it is kept, and returns its new URI.

    Example:
        >>> quarantine(write("runs/bad", TrainConfig(), Snapshot(50, {}, {})))
        'runs/bad/checkpoints/quarantine/step-00000050'
    """
    folder, _, name = uri.rpartition("/")
    target = storage.join(folder, "quarantine", name)
    places = (f"{target}.{n}" if n > 1 else target for n in count(1))
    free = next(one for one in places if not storage.exists(one))
    storage.rename(uri, free)
    return free


def _validation_facts(snapshot: Snapshot) -> dict[str, Any]:
    """What a validation changes in a manifest."""
    return {
        "finished": snapshot.finished,
        "progress": dict(snapshot.progress),
        "metrics": dict(snapshot.metrics),
    }


def _each(
    action: Callable[..., T], uri: str, files: Mapping[str, Mapping[str, Any]]
) -> dict[str, T]:
    """What `storage.read_bytes` or `storage.verify` returns for each file in a manifest."""
    try:
        return {name: action(storage.join(uri, name), **file) for name, file in files.items()}
    except (ChangedObjectError, MissingObjectError) as error:
        raise CheckpointError(f"damaged checkpoint: {error}") from error
