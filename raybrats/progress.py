"""Progress of long work, on stderr: a bar on a terminal, lines where they were asked for."""

import sys
import time

LINE_EVERY_S = 10.0
"""Seconds between the lines of one display (in a log, a minute is six lines)."""

_lines_wanted = False


def ask_for_lines() -> None:
    """Every display of this process writes plain lines where there is no terminal for a bar.

    The command line and the jobs ask for them; a program that imports raybrats is not written to.

    Example:
        >>> ask_for_lines()  # doctest: +SKIP
    """
    global _lines_wanted
    _lines_wanted = True


class Display:
    """One piece of work: how much of it is done, and a short remark.

    Example:
        >>> with Display("indexing", total=2) as display:
        ...     display.show(1, "BraTS20_Training_001")
    """

    def __init__(self, title: str, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        self._title, self._total, self._last_s = title, total, 0.0
        console = Console(stderr=True)
        self._bar = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            remark = TextColumn("{task.fields[remark]}")
            self._bar = Progress(*columns, Remaining(), remark, console=console)
            self._task = self._bar.add_task(title, total=total, remark="")

    def __enter__(self) -> "Display":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def show(self, done: int, remark: str = "") -> None:
        """Shows how much is done; as lines, one every `LINE_EVERY_S` and the last one."""
        if self._bar:
            self._bar.update(self._task, completed=done, remark=remark)
        elif _lines_wanted and self._is_due(done):
            self._last_s = time.monotonic()
            print(f"{self._title}: {done}/{self._total} {remark}".rstrip(), file=sys.stderr)  # noqa: T201

    def _is_due(self, done: int) -> bool:
        return done >= self._total or time.monotonic() - self._last_s > LINE_EVERY_S
