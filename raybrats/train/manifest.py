"""Manifests of checkpoints: what is known of them, and which are kept, without other files.

The manifest is written last, so a checkpoint that has one is complete. It names size and digest of
every file and carries a digest of itself, for nothing else vouches for it.

<run uri>/checkpoints/step-00001250/MANIFEST.json
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from raybrats import storage
from raybrats.errors import CheckpointError, MissingObjectError

MANIFEST = "MANIFEST.json"
WEIGHTS, STATE, CONFIG = "weights.safetensors", "state.pt", "config.json"
"""The other files of a checkpoint."""
MODE = 0o660
"""Mode of its files, less what the umask takes: weights can tell of those they were made of."""
_FOLDER = re.compile(r"/checkpoints/(step-\d{8})/")
_DAMAGED = MissingObjectError, ValueError, LookupError, TypeError, AttributeError, RecursionError
"""What the bytes of a manifest may raise that were not written as one."""
_COMPLETE = re.compile(rf"/checkpoints/(step-\d{{8}})/{re.escape(MANIFEST)}$")


@dataclass(frozen=True)
class Written:
    """A checkpoint as its manifest describes it; its other files are not verified."""

    uri: str
    step: int
    metrics: Mapping[str, float]
    """Metrics of the validation at this step; empty if there was none."""
    finished: bool
    """Whether the run ended with it."""


def place(run_uri: str, step: int) -> str:
    """The URI of a step's checkpoint.

    Example:
        >>> place("s3://bucket/runs/one", 1250)
        's3://bucket/runs/one/checkpoints/step-00001250'
    """
    return storage.join(run_uri, "checkpoints", f"step-{step:08d}")


def is_place(uri: str) -> bool:
    """Whether a URI is that of a checkpoint, whether there is one or not, and not that of a run.

    Example:
        >>> is_place("runs/one/checkpoints/step-00000150"), is_place("runs/one")
        (True, False)
    """
    return storage.name(uri.rpartition("/")[0]) == "checkpoints"


def run_of(uri: str) -> str:
    """The URI of the run that a checkpoint is of.

    Example:
        >>> run_of("s3://bucket/runs/one/checkpoints/step-00001250")
        's3://bucket/runs/one'
    """
    return uri.rpartition("/checkpoints/")[0]


def write(uri: str, facts: Mapping[str, Any]) -> None:
    """Writes the manifest of the checkpoint at a URI, or replaces it as a whole.

    Example:
        >>> write("runs/seal/checkpoints/step-00000050", {"step": 50})
        >>> read("runs/seal/checkpoints/step-00000050")
        {'step': 50}
    """
    sealed = json.dumps({**facts, "digest": _seal(facts)}, indent=1)
    storage.write_bytes(storage.join(uri, MANIFEST), sealed.encode(), MODE)


def read(uri: str, parts: Sequence[str] = ()) -> dict[str, Any]:
    """The facts in the manifest of the checkpoint at a URI, the parts that are named among them.

    Raises:
        CheckpointError: there is no manifest, it does not match its own digest, or it lacks a part.

    Example:
        >>> read("runs/seal/checkpoints/step-99999999")
        Traceback (most recent call last):
        raybrats.errors.CheckpointError: ...step-99999999: no manifest, or a damaged one
    """
    try:
        facts = json.loads(storage.read_bytes(storage.join(uri, MANIFEST)))
        sealed = facts.pop("digest") == _seal(facts)
    except _DAMAGED:
        sealed = False
    if not sealed:
        raise CheckpointError(f"{uri}: no manifest, or a damaged one")
    for part in parts:  # anybody can seal what lacks something
        if part not in facts or not _fits(part, facts[part]):
            raise CheckpointError(f"{uri}: a damaged manifest, without {part!r} as it should be")
    return facts


def written(run_uri: str) -> list[Written]:
    """The complete checkpoints of a run whose manifest can be read, oldest first.

    Example:
        >>> facts = {"step": 50, "metrics": {"mean": 0.8}, "finished": False}
        >>> write(place("runs/list", 50), facts)
        >>> written("runs/list")
        [Written(uri='runs/list/checkpoints/step-00000050', step=50, metrics=..., finished=False)]
    """
    found = []
    for uri in complete(run_uri):
        with suppress(CheckpointError):
            facts = read(uri, ("step", "metrics", "finished"))
            found.append(Written(uri, facts["step"], facts["metrics"], facts["finished"]))
    return found


def ranked(found: Sequence[Written]) -> list[Written]:
    """The validated checkpoints, the highest mean region Dice first; of equals the later first.

    Example:
        >>> scores = {1: {"mean": 0.7}, 2: {"mean": 0.9}, 3: {"mean": 0.7}, 4: {}}
        >>> [w.step for w in ranked([Written("", s, m, False) for s, m in scores.items()])]
        [2, 3, 1]
    """
    validated = [w for w in found if not math.isnan(w.metrics.get("mean", math.nan))]
    return sorted(validated, key=lambda w: (w.metrics["mean"], w.step), reverse=True)


def complete(run_uri: str) -> list[str]:
    """The URIs of the checkpoints that have a manifest, oldest first.

    Example:
        >>> write(place("runs/whole", 50), {"step": 50})
        >>> complete("runs/whole")
        ['runs/whole/checkpoints/step-00000050']
    """
    return _matching(run_uri, _COMPLETE)


def folders(run_uri: str) -> list[str]:
    """The URIs of all checkpoints, also of those without a manifest, oldest first.

    Example:
        >>> storage.write_bytes("runs/half/checkpoints/step-00000050/state.pt", b"")
        >>> folders("runs/half"), complete("runs/half")
        (['runs/half/checkpoints/step-00000050'], [])
    """
    return _matching(run_uri, _FOLDER)


def objects(run_uri: str) -> list[str]:
    """The URIs of all files below the checkpoints of a run; none where there is no run.

    Example:
        >>> objects("runs/none")
        []
    """
    try:
        return list(storage.list_objects(storage.join(run_uri, "checkpoints")))
    except MissingObjectError:
        return []


def prune(run_uri: str, verified: Sequence[str]) -> None:
    """Removes what is older than the two newest that verified, but for the best.

    Incomplete ones go too, if they are older. With fewer than two verified nothing goes.

    Example:
        >>> for step in (1, 2, 3):
        ...     write(place("runs/old", step), {"step": step, "metrics": {}, "finished": False})
        >>> prune("runs/old", complete("runs/old"))
        >>> [w.step for w in written("runs/old")]
        [2, 3]
    """
    kept = sorted(verified)[-2:]
    if len(kept) < 2:
        return
    best = {w.uri for w in ranked(written(run_uri))[:1]}
    for uri in folders(run_uri):
        if uri < kept[0] and uri not in best:
            storage.delete(uri)


def _matching(run_uri: str, pattern: re.Pattern[str]) -> list[str]:
    names = {match[1] for uri in objects(run_uri) if (match := pattern.search(uri))}
    return [storage.join(run_uri, "checkpoints", name) for name in sorted(names)]


def _seal(facts: Mapping[str, Any]) -> str:
    return storage.digest_of(json.dumps(facts, sort_keys=True).encode())


def _fits(part: str, value: object) -> bool:
    """Whether a part of a manifest is of its kind."""
    if part == "finished":
        return isinstance(value, bool)
    if part == "step":
        return _is_size(value)
    if part == "config_digest":
        return isinstance(value, str)
    if not isinstance(value, dict):
        return False
    if part == "files":
        return value.keys() == {WEIGHTS, STATE, CONFIG} and all(map(_is_file, value.values()))
    return all(type(figure) in (int, float) for figure in value.values())


def _is_file(facts: object) -> bool:
    whole = isinstance(facts, dict) and facts.keys() == {"size", "digest"}
    return whole and _is_size(facts["size"]) and isinstance(facts["digest"], str)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63
