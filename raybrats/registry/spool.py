"""Metrics that wait in storage, beside their run: an object of one JSON line a row."""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from raybrats import storage
from raybrats.errors import MissingObjectError


@dataclass(frozen=True, slots=True)
class Row:
    """A value of a metric."""

    key: str
    value: float
    timestamp: int
    """Milliseconds since 1970."""
    step: int


def read(uri: str) -> list[Row] | None:
    """The rows in a spool, without damaged lines; None if there is no spool.

    Raises:
        StorageError: the spool is out of reach.
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
    """Puts the rows in the place of what the spool held."""
    text = "".join(json.dumps(asdict(row)) + "\n" for row in rows)
    storage.write_bytes(uri, text.encode())


def remove(uri: str) -> None:
    """Does away with the spool, if there is one."""
    try:
        storage.delete(uri)
    except MissingObjectError:
        return


def _row(line: bytes) -> Row:
    found = json.loads(line)
    key = found["key"]
    if not re.fullmatch(r"[\w./: -]+", key):  # a name that MLflow refuses, and all rows with it
        raise ValueError("not the name of a metric")
    return Row(key, float(found["value"]), int(found["timestamp"]), int(found["step"]))
