"""Metrics that wait in storage, beside their run: an object of one JSON line a row."""

import json
import logging
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

from raybrats import storage
from raybrats.errors import MissingObjectError


@dataclass(frozen=True, slots=True)
class Row:
    """One value of a metric."""

    key: str
    value: float
    timestamp: int
    """Milliseconds since 1970."""
    step: int


def read(uri: str) -> list[Row] | None:
    """Rows of a spool, without damaged lines; None if there is no spool.

    Raises:
        StorageError: the spool is out of reach.

    Example:
        >>> write("metrics.jsonl", [Row("train/loss", 0.7, 1767225600000, 1)])
        >>> read("metrics.jsonl")
        [Row(key='train/loss', value=0.7, timestamp=1767225600000, step=1)]
    """
    try:
        lines = storage.read_bytes(uri).splitlines()
    except MissingObjectError:
        return None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(_row(line))
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            text = "%s: line %d is damaged and left out (%s: %s)"
            logging.getLogger(__name__).warning(text, uri, number, type(error).__name__, error)
    return rows


def write(uri: str, rows: Sequence[Row]) -> None:
    """Replaces what the spool holds by these rows.

    Raises:
        StorageError: it cannot be written, or is out of reach.

    Example:
        >>> write("metrics.jsonl", [Row("train/loss", 0.7, 1767225600000, 1)])
        >>> print(storage.read_bytes("metrics.jsonl").decode().rstrip())
        {"key": "train/loss", "value": 0.7, "timestamp": 1767225600000, "step": 1}
    """
    text = "".join(json.dumps(asdict(row)) + "\n" for row in rows)
    storage.write_bytes(uri, text.encode())


def remove(uri: str) -> None:
    """Removes the spool, if there is one.

    Raises:
        StorageError: the spool is out of reach.

    Example:
        >>> remove("metrics.jsonl")
        >>> read("metrics.jsonl") is None
        True
    """
    with suppress(MissingObjectError):
        storage.delete(uri)


def _row(line: bytes) -> Row:
    """The row that a line holds."""
    found = json.loads(line)
    key = found["key"]
    if not re.fullmatch(r"[\w./: -]+", key):  # a name that MLflow refuses, and all rows with it
        raise ValueError("not the name of a metric")
    return Row(key, float(found["value"]), int(found["timestamp"]), int(found["step"]))
