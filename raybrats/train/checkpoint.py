"""Checkpoints as files with a manifest: written last, verified when read, quarantined when bad.

<run uri>/checkpoints/step-00001250/{weights.safetensors, state.pt, config.json, MANIFEST.json}
"""

import io
import json
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import torch
from safetensors import torch as safetensors
from torch import Tensor

from raybrats import storage
from raybrats.config import TrainConfig, digest, to_json
from raybrats.errors import ChangedObjectError, CheckpointError, MissingObjectError

MANIFEST = "MANIFEST.json"
WEIGHTS, STATE, CONFIG = "weights.safetensors", "state.pt", "config.json"
_FOLDER = re.compile(r"/checkpoints/(step-\d{8})/")
_FINISHED = re.compile(rf"/checkpoints/(step-\d{{8}})/{re.escape(MANIFEST)}$")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are those that its manifest names."""

    uri: str
    step: int
    metrics: Mapping[str, float]
    """Of the validation at this step; empty if there was none."""
    finished: bool
    """Whether the run ended with it."""
    progress: Mapping[str, Any]
    """How far the learner was."""
    config_digest: str
    files: Mapping[str, bytes]
    """Verified bytes by file name."""
    rejected: tuple[str, ...] = ()
    """Newer ones that did not verify, where they lie now."""

    @property
    def weights(self) -> dict[str, Tensor]:
        """Tensors of the network, by name."""
        return safetensors.load(self.files[WEIGHTS])

    @property
    def state(self) -> dict[str, Any]:
        """Optimiser and random state; only tensors and plain values are unpickled.

        Raises:
            CheckpointError: there is more in the file.
        """
        try:
            return torch.load(io.BytesIO(self.files[STATE]), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            place = storage.join(self.uri, STATE)
            raise CheckpointError(f"{place}: more than tensors and plain values") from error


@dataclass(frozen=True)
class Written:
    """What a manifest tells without opening the other files."""

    uri: str
    step: int
    metrics: Mapping[str, float]
    finished: bool


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


def place(run_uri: str, step: int) -> str:
    """Where the checkpoint of a step lies."""
    return storage.join(run_uri, "checkpoints", f"step-{step:08d}")


def write(run_uri: str, config: TrainConfig, snapshot: Snapshot) -> str:
    """Writes a checkpoint, the manifest last; returns its URI."""
    step = snapshot.step
    uri = place(run_uri, step)
    buffer = io.BytesIO()
    torch.save(dict(snapshot.state), buffer)
    plain = {n: tensor.detach().cpu().contiguous() for n, tensor in snapshot.weights.items()}
    files = {
        WEIGHTS: safetensors.save(plain),
        STATE: buffer.getvalue(),
        CONFIG: to_json(config).encode(),
    }
    for name, data in files.items():
        storage.write_bytes(storage.join(uri, name), data)
    manifest = {
        "step": step,
        "draws": step * config.optim.global_batch,
        "config_digest": digest(config),
        "world": snapshot.world,
        "mlflow_run_id": snapshot.mlflow_run_id,
        **_validation_facts(snapshot),
        "files": {n: {"size": len(d), "digest": storage.digest_of(d)} for n, d in files.items()},
    }
    _write_manifest(uri, manifest)
    return uri


def add_validation(run_uri: str, snapshot: Snapshot) -> str:
    """Adds a validation to the checkpoint of its step: the manifest is replaced, and nothing else.

    Raises:
        CheckpointError: there is none of that step.
    """
    uri = place(run_uri, snapshot.step)
    _write_manifest(uri, _facts(uri) | _validation_facts(snapshot))
    return uri


def written(run_uri: str) -> list[Written]:
    """Checkpoints with a readable manifest, oldest first; their files are not verified."""
    found = []
    for uri in _finished(run_uri):
        manifest = _manifest(uri)
        if manifest is not None:
            facts = (manifest["step"], manifest["metrics"], manifest["finished"])
            found.append(Written(uri, *facts))
    return found


def newest(run_uri: str) -> Checkpoint | None:
    """The newest checkpoint that verifies; bad ones on the way are quarantined. None: never any.

    Raises:
        CheckpointError: there were checkpoints, and none can be trusted.
    """
    candidates, rejected = _finished(run_uri), []
    for uri in reversed(candidates):
        for tries_left in (1, 0):
            try:
                return replace(read(uri), rejected=tuple(rejected))
            except CheckpointError:
                if not tries_left:  # twice: it was not the way that spoiled it
                    rejected.append(quarantine(uri))
    if candidates or any("/quarantine/" in uri for uri in _objects(run_uri)):
        place = storage.join(run_uri, "checkpoints", "quarantine")
        raise CheckpointError(f"no checkpoint of {run_uri} verifies; they are kept in {place}")
    return None


def best(run_uri: str) -> Checkpoint:
    """The checkpoint with the highest mean region Dice among those that verify.

    Raises:
        CheckpointError: there is none.
    """
    for candidate in reversed(_ranked(written(run_uri))):
        with suppress(CheckpointError):
            return read(candidate.uri)
    raise CheckpointError(f"{run_uri} has no checkpoint that verifies")


def read(uri: str) -> Checkpoint:
    """A checkpoint with all its files verified against the manifest.

    Raises:
        CheckpointError: the manifest or a file is missing or damaged.
    """
    manifest = _facts(uri)
    with _as_checkpoint_error():
        files = {
            name: storage.read_bytes(
                storage.join(uri, name), size=facts["size"], digest=facts["digest"]
            )
            for name, facts in manifest["files"].items()
        }
    names = ("step", "metrics", "finished", "progress", "config_digest")
    return Checkpoint(uri, *(manifest[name] for name in names), files)


def verify(uri: str) -> None:
    """Does nothing if every file of a checkpoint is the one that its manifest names.

    Raises:
        CheckpointError: one is missing or damaged.
    """
    for name, facts in _facts(uri)["files"].items():
        with _as_checkpoint_error():
            storage.verify(storage.join(uri, name), size=facts["size"], digest=facts["digest"])


def quarantine(uri: str) -> str:
    """Moves a bad checkpoint out of the way, where it is kept; returns its new place."""
    target = _free_place(uri)
    storage.rename(uri, target)
    return target


def prune(run_uri: str, verified: Sequence[str]) -> None:
    """Removes what is older than the two newest that verified, but for the best.

    Also what was never written to the end, if it is older. With fewer than two nothing goes.
    """
    kept = sorted(verified)[-2:]
    if len(kept) < 2:
        return
    best = {w.uri for w in _ranked(written(run_uri))[-1:]}
    folders = {match[1] for uri in _objects(run_uri) if (match := _FOLDER.search(uri))}
    for uri in (storage.join(run_uri, "checkpoints", folder) for folder in sorted(folders)):
        if uri < kept[0] and uri not in best:
            storage.delete(uri)


def _objects(run_uri: str) -> list[str]:
    try:
        return list(storage.list_objects(storage.join(run_uri, "checkpoints")))
    except MissingObjectError:
        return []


def _ranked(found: Sequence[Written]) -> list[Written]:
    """Those with a validation, from the lowest mean region Dice; of equals the later is higher."""
    validated = [w for w in found if "mean" in w.metrics]
    return sorted(validated, key=lambda w: (w.metrics["mean"], w.step))


def _finished(run_uri: str) -> list[str]:
    """Checkpoints that were written to the end, so to their manifest; oldest first."""
    names = sorted(match[1] for uri in _objects(run_uri) if (match := _FINISHED.search(uri)))
    return [storage.join(run_uri, "checkpoints", name) for name in names]


def _validation_facts(snapshot: Snapshot) -> dict[str, Any]:
    """What a validation adds to a checkpoint."""
    return {
        "finished": snapshot.finished,
        "progress": dict(snapshot.progress),
        "metrics": dict(snapshot.metrics),
    }


def _write_manifest(uri: str, manifest: Mapping[str, Any]) -> None:
    sealed = json.dumps({**manifest, "digest": _seal(manifest)}, indent=1)
    storage.write_bytes(storage.join(uri, MANIFEST), sealed.encode())


def _facts(uri: str) -> dict[str, Any]:
    manifest = _manifest(uri)
    if manifest is None:
        raise CheckpointError(f"{uri}: no manifest, or a damaged one")
    return manifest


@contextmanager
def _as_checkpoint_error() -> Iterator[None]:
    try:
        yield
    except (ChangedObjectError, MissingObjectError) as error:
        raise CheckpointError(f"damaged checkpoint: {error}") from error


def _manifest(uri: str) -> dict[str, Any] | None:
    try:
        manifest = json.loads(storage.read_bytes(storage.join(uri, MANIFEST)))
        return manifest if manifest.pop("digest") == _seal(manifest) else None
    except (MissingObjectError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _seal(manifest: Mapping[str, Any]) -> str:
    """Digest of what the manifest says, for nothing else vouches for it."""
    return storage.digest_of(json.dumps(manifest, sort_keys=True).encode())


def _free_place(uri: str) -> str:
    """A free place for a bad checkpoint; an earlier one of the same step stays where it is."""
    folder, _, name = uri.rpartition("/")
    target = storage.join(folder, "quarantine", name)
    places = (f"{target}.{n}" if n > 1 else target for n in count(1))
    return next(free for free in places if not storage.exists(free))
