"""Ending a run from outside: by SIGTERM, a notice, a lost lease or a stall, after a checkpoint."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from raybrats.errors import RaybratsError

if TYPE_CHECKING:
    from ray.actor import ActorHandle


WISH_EVERY_S = 0.5
"""Between two looks of a worker at whether the driver wants a checkpoint."""


class Stop:
    """Ends the work of the main thread by KeyboardInterrupt, and remembers why."""

    def __init__(self) -> None:
        self.error: RaybratsError | None = None
        """Why, if not because somebody interrupted it."""
        self.lost = False
        """Whether the run is another driver's now."""

    def now(self, words: str) -> None:
        """Ends it with an error of these words."""
        self.error = RaybratsError(words)
        os.kill(os.getpid(), signal.SIGINT)

    def taken_over(self, words: str) -> None:
        """Ends it, for the run is another driver's now."""
        self.lost = True
        self.now(words)


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGINT interrupts, also where a shell has started this process in the background."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def on_sigterm(board: "ActorHandle", grace_s: float) -> Iterator[None]:
    """SIGTERM asks for a checkpoint, waits for it so many seconds at most, then interrupts.

    Entered after Ray has started, which puts its own handler there.
    """
    if threading.current_thread() is not threading.main_thread():  # signals are not ours
        yield
        return

    def leave() -> None:
        import ray

        until = time.monotonic() + grace_s
        with suppress(ray.exceptions.RayError):
            board.wish.remote()
            while time.monotonic() < until and ray.get(board.kept.remote(), timeout=grace_s) < 0:
                time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    leaving = threading.Thread(target=leave, daemon=True)

    def told(*_: object) -> None:
        if leaving.ident is None:  # the first time
            leaving.start()

    before = signal.signal(signal.SIGTERM, told)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Wish:
    """Whether a checkpoint is wanted now: by the driver, or because a node is to be taken away."""

    def __init__(self, board: "ActorHandle | None") -> None:
        self._board, self._asked, self._ended = board, threading.Event(), threading.Event()
        self._notice: object = None
        threading.Thread(target=self._watch, daemon=True).start()

    def due(self) -> str:
        """Why a checkpoint is due, once for each reason; empty if none is."""
        if self._asked.is_set():
            self._asked.clear()
            return "stop"
        notice = _preemption()
        if notice is not None and notice != self._notice:
            self._notice = notice
            return "preemption notice"
        return ""

    def granted(self, step: int, reason: str) -> None:
        """Tells the driver that the checkpoint is there."""
        if self._board is not None:
            self._board.saved.remote(step, reason)

    def close(self) -> None:
        """Stops looking."""
        self._ended.set()

    def _watch(self) -> None:
        import ray

        asked = False
        while self._board is not None and not self._ended.wait(WISH_EVERY_S):
            try:
                wished = ray.get(self._board.wished.remote(), timeout=30)
            except ray.exceptions.GetTimeoutError:
                continue
            except ray.exceptions.RayError:  # the driver has gone, and this worker will
                return
            if wished and not asked:
                self._asked.set()
            asked = wished


def _preemption() -> object:
    """Ray Train's notice that a node of this run is to be taken away; None without one.

    Ray's public `get_preemption_info` is a barrier of all ranks. It hands on what rank 0 knows,
    which is all that is needed: rank 0 saves alone, while the others wait in their next step.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info
