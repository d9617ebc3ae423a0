"""Metrics that wait in storage, beside their run: an object of one JSON line a row."""

import json
import logging
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from posixpath import normpath

from raybrats import storage
from raybrats.errors import MissingObjectError

_MOST = 2**63
"""Whole numbers of a database end below it."""


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
    rows, damaged = [], []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(_row(line))
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            damaged.append(f"line {number} is damaged and left out ({type(error).__name__})")
    if damaged:
        more = f", and {len(damaged) - 1} more" if damaged[1:] else ""
        logging.getLogger(__name__).warning("%s: %s%s", uri, damaged[0], more)
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
    row = Row(found["key"], float(found["value"]), int(found["timestamp"]), int(found["step"]))
    # What MLflow or its database refuses, and all rows with it
    plain = re.fullmatch(r"[\w./: -]{1,250}", row.key) and normpath(row.key) == row.key
    if not plain or row.key.startswith(("/", "..")) or row.key == ".":
        raise ValueError("not the name of a metric")
    if not (0 <= row.timestamp < _MOST and 0 <= row.step < _MOST):
        raise ValueError("not a time or a step")
    return row
