"""Progress of long work: a bar on a terminal, a plain line every few seconds elsewhere (stderr)."""

import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.actor import ActorHandle

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


class _Board:
    """Actor between the driver and a worker: how far it is, and whether it shall save and stop."""

    def __init__(self) -> None:
        self._state, self._posts = (0, ""), 0
        self._wished, self._saved, self._restarts = False, -1, 0

    def post(self, done: int, remark: str) -> None:
        self._state, self._posts = (done, remark), self._posts + 1

    def read(self) -> tuple[tuple[int, str], int]:
        return self._state, self._posts

    def restart(self, why: str) -> None:
        self._state, self._restarts = (self._state[0], f"starting again, {why}"), self._restarts + 1

    def restarts(self) -> int:
        return self._restarts

    def wish(self) -> None:
        self._wished = True

    def wished(self) -> bool:
        return self._wished

    def saved(self, step: int, reason: str) -> None:
        """The worker has a checkpoint of this step, for the driver's wish or for a notice."""
        self._saved = step if reason == "stop" else self._saved

    def kept(self) -> int:
        return self._saved


@contextmanager
def watched(
    title: str, total: int, stall_s: float = math.inf, on_stall: Callable[[], None] = lambda: None
) -> "Iterator[ActorHandle]":
    """A board for a worker elsewhere in the cluster; what it posts is displayed here.

    Args:
        title: of the display.
        total: of what is posted when all is done.
        stall_s: seconds without a new post after which `on_stall` is called, once.
        on_stall: called from another thread.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as Affinity

    # beside the driver, whose end is the run's: another node may be taken away
    here = Affinity(ray.get_runtime_context().get_node_id(), soft=False)
    board = ray.remote(num_cpus=0, scheduling_strategy=here)(_Board).remote()
    ended = threading.Event()

    def follow(display: Display) -> None:
        shown, heard, since_s = None, 0, time.monotonic()
        while not ended.wait(1.0):
            try:
                state, posts = ray.get(board.read.remote())
            except ray.exceptions.RayError:  # the cluster is going down; the run itself says why
                return
            if state != shown:
                display.show(*state)
            if posts != heard:
                since_s = time.monotonic()
            shown, heard = state, posts
            if time.monotonic() - since_s > stall_s:
                on_stall()
                return

    with Display(title, total) as display:
        thread = threading.Thread(target=follow, args=(display,), daemon=True)
        thread.start()
        try:
            yield board
        finally:
            ended.set()
            thread.join(timeout=5)
            ray.kill(board)
