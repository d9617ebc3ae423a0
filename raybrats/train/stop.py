"""Ending a run from outside: SIGTERM after a checkpoint, a lost lease, a stall."""

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


class Stop:
    """Ends the work of the main thread by KeyboardInterrupt, and remembers why."""

    def __init__(self) -> None:
        self.error: RaybratsError | None = None
        """Why, if not because somebody interrupted it."""

    def now(self, words: str) -> None:
        """Ends it with an error of these words."""
        self.error = RaybratsError(words)
        os.kill(os.getpid(), signal.SIGINT)


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

    def told(*_: object) -> None:
        threading.Thread(target=leave, daemon=True).start()

    before = signal.signal(signal.SIGTERM, told)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
