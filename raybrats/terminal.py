"""What a command writes where: its answer on stdout; messages, progress and mistakes on stderr.

Nothing that happens to an output ends the work: it is done, and its code says how it went.
"""

import io
import json
import logging
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TextIO

from raybrats import progress
from raybrats.errors import RaybratsError, redacted
from raybrats.table import shown


@dataclass(frozen=True)
class Answer:
    """What a verb found: the JSON document, and the same as a table."""

    document: Mapping[str, Any]
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    places: Sequence[str] = ()
    """Lines above the title."""


class Output(io.FileIO):
    """A file descriptor that takes everything: after an error, what is written is forgotten."""

    error: OSError | None = None
    """What went wrong with it."""

    def write(self, data: Any, /) -> int:  # noqa: ANN401 - any buffer, which 3.11 has no name for
        """Writes, or forgets."""
        if self.error is None:
            try:
                return super().write(data)
            except OSError as error:
                self.error = error
        return len(data)


def _stream_to(fd: int) -> tuple[TextIO, Output]:
    """A text stream to a descriptor that is not closed with it, and what lies below."""
    raw = Output(fd, "w", closefd=False)
    # What a locale lacks letters for is shown escaped: a name may be any bytes.
    encoding = getattr(sys.__stdout__, "encoding", None)
    text = io.TextIOWrapper(
        io.BufferedWriter(raw), encoding, errors="backslashreplace", line_buffering=True
    )
    return text, raw


def secure() -> None:
    """Makes the standard streams of this process fit for any use: closed ones lead nowhere.

    A descriptor that the shell has closed would else be that of the next file that is opened, a
    database for example, and what is meant for the terminal would be written into it.

    Example:
        >>> secure()  # doctest: +SKIP
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
            os.set_inheritable(fd, True)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - for as long as the process lives
    for fd, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is getattr(sys, f"__{name}__"):  # else somebody else's, as in tests
            if (before := getattr(sys, name)) is not None:
                before.flush()
            setattr(sys, name, _stream_to(fd)[0])
    # Warnings are for those who write programs; as errors they would end libraries' imports.
    if any(rule[0] == "error" for rule in warnings.filters):
        warnings.simplefilter("ignore")
        os.environ.pop("PYTHONWARNINGS", None)  # Ray's processes would inherit it


class _Line(logging.Formatter):
    """A record as one line, without credentials and what a terminal would obey."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(redacted(record.getMessage()))


@contextmanager
def messages_shown() -> Generator[None]:
    """Shows on stderr what raybrats logs, a plain line each, and the progress of its work.

    Example:
        >>> with messages_shown():  # doctest: +SKIP
        ...     logging.getLogger("raybrats.data").warning("left out: BraTS20_Training_355")
    """
    progress.ask_for_lines()
    logger, handler = logging.getLogger("raybrats"), logging.StreamHandler()
    handler.setFormatter(_Line())
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


@contextmanager
def reserved_stdout() -> Generator[TextIO]:
    """The real stdout; whatever else writes to it from then on, in any library, reaches stderr.

    A reader that goes away early (`| head -1`) has what it wants, so that is no error.

    Raises:
        RaybratsError: the answer could not be written: the disk is full, for example.

    Example:
        >>> with reserved_stdout() as stdout:  # doctest: +SKIP
        ...     stdout.write("only this")
    """
    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    stdout, raw = _stream_to(own)
    try:
        yield stdout
        stdout.flush()
        if raw.error is not None and not isinstance(raw.error, BrokenPipeError):
            raise RaybratsError(f"stdout: {raw.error.strerror}; the work is done, its answer lost")
    finally:
        with suppress(OSError):
            os.close(own)


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
        return
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    # As they are: markup, emoji and links within names are names
    console = Console(file=stdout, width=None if stdout.isatty() else 160)
    for line in (*answer.places, answer.title):
        console.print(Text(shown(line)), soft_wrap=True)
    if answer.rows:
        table = Table(*(Column(Text(shown(name)), overflow="fold") for name in answer.columns))
        for row in answer.rows:
            table.add_row(*(Text(shown(str(cell))) for cell in row))
        console.print(table)


def complain(words: str) -> None:
    """One line on stderr, whatever the words hold; no credentials.

    Example:
        >>> complain("s3://bucket/x: does not exist")  # doctest: +SKIP
    """
    sys.stderr.write(f"raybrats: {shown(redacted(words.strip()))}\n")


def unexpected(error: BaseException) -> str:
    """What to say of an error that nobody foresaw, whose traceback is put into a file.

    Example:
        >>> unexpected(KeyError("mean"))  # doctest: +SKIP
        "unexpected KeyError: 'mean'; the traceback is in /tmp/raybrats-x1.txt, please report it"
    """
    kind, (first, *_) = type(error).__name__, str(error).strip().splitlines() or ["no words"]
    text = redacted("".join(traceback.format_exception(error)))
    try:
        fd, path = tempfile.mkstemp(prefix="raybrats-", suffix=".txt")  # nobody else's to read
        with open(fd, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        place = f"the traceback is in {path}, please report it"
    except OSError as full:
        place = f"its traceback could not be kept ({full.strerror}); --debug shows it"
    return f"unexpected {kind}: {first[:300]}; {place}"
