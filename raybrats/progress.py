"""Progress of long work, on stderr: a bar on a terminal, lines where they were asked for."""

import sys
import time

from raybrats.table import shown

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

        self._title, self._total, self._last_s = shown(title), total, -LINE_EVERY_S
        self._first: tuple[int, float] | None = None
        """How much was done when the display began, and until when it was no more: a run that goes
        on had done it before, and its workers take their time to start."""
        console = Console(stderr=True)
        self._bar = None
        if console.is_terminal:
            name = TextColumn("{task.description}", markup=False)
            remark = TextColumn("{task.fields[remark]}", markup=False)
            columns = (name, BarColumn(), MofNCompleteColumn(), Remaining(), remark)
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task(self._title, total=total, remark="")

    def __enter__(self) -> "Display":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def show(self, done: int, remark: str = "") -> None:
        """Shows how much is done; as lines, one every `LINE_EVERY_S` and the last one."""
        now_s = time.monotonic()
        if self._first is None or done <= self._first[0]:
            self._first = done, now_s
        if self._bar:
            self._bar.update(self._task, completed=done, remark=shown(remark))
        elif _lines_wanted and self._is_due(done, now_s):
            self._last_s = now_s
            words = (f"{self._title}: {done}/{self._total}", shown(remark), self._left(done, now_s))
            _write(" ".join(filter(None, words)))

    def say(self, words: str) -> None:
        """Shows something that stays: a line of its own, whenever the last one was."""
        if self._bar:
            from rich.text import Text

            self._bar.console.print(Text(f"{self._title}: {shown(words)}"))
        elif _lines_wanted:
            _write(f"{self._title}: {shown(words)}")

    def _is_due(self, done: int, now_s: float) -> bool:
        return done >= self._total or now_s - self._last_s > LINE_EVERY_S

    def _left(self, done: int, now_s: float) -> str:
        """How long the rest takes at the pace so far, in words; empty where there is none."""
        first_done, first_s = self._first or (done, now_s)
        if not first_done < done < self._total:
            return ""
        left_s = (now_s - first_s) / (done - first_done) * (self._total - done)
        return f"({_duration(left_s)} left)"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _write(line: str) -> None:
    print(line, file=sys.stderr)  # noqa: T201
