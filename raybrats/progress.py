"""Progress of long work: a bar on a terminal, a plain line every few seconds elsewhere (stderr)."""

import sys
import time

LINE_EVERY_S = 10.0


class Display:
    """One line of work: how much of it is done, and a short remark."""

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
        """Shows that so much is done."""
        if self._bar:
            self._bar.update(self._task, completed=done, remark=remark)
        elif done >= self._total or time.monotonic() - self._last_s > LINE_EVERY_S:
            self._last_s = time.monotonic()
            print(f"{self._title}: {done}/{self._total} {remark}".rstrip(), file=sys.stderr)  # noqa: T201
