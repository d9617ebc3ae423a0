"""predictions.json: whose predictions a folder holds, and what their labels are."""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

from raybrats import storage
from raybrats.errors import DataError, MissingObjectError, UsageError
from raybrats.label_set import label_set_of

NAME = "predictions.json"
_VERSION = r"models:/[^/@]+/\d+"


@dataclass(frozen=True)
class Origin:
    """Which model has written a folder of predictions."""

    model: str
    """`models:/name/version`."""
    labels: str = ""
    """What it tells apart, as `raybrats.label_set.label_set_of` reads it."""


def record(out_uri: str, origin: Origin, there: Sequence[str]) -> None:
    """Records the model beside its predictions, so that two models never mix in one folder.

    Args:
        out_uri: the folder.
        origin: the model.
        there: names of predictions that are already in it.

    Raises:
        UsageError: the folder holds predictions of another model, or of nobody knows which.
        DataError: it does not say of which.

    Example:
        >>> record("segmented", Origin("models:/raybrats/3"), [])
        >>> read("segmented").model
        'models:/raybrats/3'
    """
    try:
        before = read(out_uri).model
    except MissingObjectError:
        if there:
            words = f"{there[0]} and no {NAME} that says whose it is; choose another --out"
            raise UsageError(f"{out_uri} holds {words}") from None
        storage.write_bytes(storage.join(out_uri, NAME), json.dumps(asdict(origin)).encode())
        return
    if before != origin.model:
        raise UsageError(f"{out_uri} holds predictions of {before}; choose another --out")


def read(out_uri: str) -> Origin:
    """What `record` has written beside the predictions of a folder.

    Raises:
        MissingObjectError: there is no record.
        DataError: it is damaged.

    Example:
        >>> storage.write_bytes("segmented/predictions.json", b'{"model": "models:/raybrats/3"}')
        >>> read("segmented")
        Origin(model='models:/raybrats/3', labels='')
    """
    place = storage.join(out_uri, NAME)
    data = storage.read_bytes(place)
    with suppress(ValueError, LookupError, TypeError, RecursionError):
        found = json.loads(data)
        model, labels = found["model"], found.get("labels", "")
        if re.fullmatch(_VERSION, model) and label_set_of(labels):
            return Origin(model, labels)
    raise DataError(f"{place} is damaged: whose predictions they are is lost; choose another --out")
