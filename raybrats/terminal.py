"""What a command writes where: its answer on stdout; messages, progress and mistakes on stderr."""

import json
import logging
import os
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO

from raybrats import progress


@dataclass(frozen=True)
class Answer:
    """What a verb found: the JSON document, and the same as a table."""

    document: Mapping[str, Any]
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]


@contextmanager
def messages_shown() -> Generator[None]:
    """Shows on stderr what raybrats logs, a plain line each, and the progress of its work.

    Example:
        >>> with messages_shown():  # doctest: +SKIP
        ...     logging.getLogger("raybrats.data").warning("left out: BraTS20_Training_355")
    """
    progress.ask_for_lines()
    logger, handler = logging.getLogger("raybrats"), logging.StreamHandler()
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # MLflow gives the root a handler, which would show them once more
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def reserved_stdout() -> TextIO:
    """The real stdout; whatever else writes to it from now on, in any library, reaches stderr.

    Example:
        >>> reserved_stdout().write("only this")  # doctest: +SKIP
    """
    sys.stdout.flush()
    own = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return own


def show(answer: Answer, stdout: TextIO, *, as_json: bool) -> None:
    """Writes the document as JSON, or the title and the table.

    Example:
        >>> show(Answer({"ok": 5}, "5 cases", (), []), sys.stdout, as_json=True)
        {
         "ok": 5
        }
    """
    if as_json:
        stdout.write(json.dumps(answer.document, indent=1) + "\n")
    else:
        from rich.console import Console
        from rich.table import Column, Table

        console = Console(file=stdout, width=None if stdout.isatty() else 160)
        console.print(answer.title, highlight=False, soft_wrap=True)
        if answer.rows:
            table = Table(*(Column(name, overflow="fold") for name in answer.columns))
            for row in answer.rows:
                table.add_row(*(str(cell) for cell in row))
            console.print(table)
    stdout.flush()
