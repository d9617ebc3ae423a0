"""Ending a run from outside: by SIGTERM, a lost lease or a stall, after a checkpoint where one can.

No signal is sent to this process, which may be a notebook or a server: whoever waits for the run
is woken by the end of its workers.
"""

import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

from raybrats.errors import RaybratsError


class Stop:
    """Why work is to end before it is done, and how it is ended."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        """The reason, which the one who does the work raises; the first one counts."""
        self.lost = False
        """Whether the run belongs to another driver now."""
        self._end: Callable[[], None] | None = None
        self._turn = threading.Lock()

    def now(self, error: BaseException, *, lost: bool = False) -> None:
        """Ends the work, from any thread."""
        with self._turn:
            self.error, self.lost = self.error or error, self.lost or lost
            end = self._end
        if end is not None:
            end()

    def taken_over(self, words: str) -> None:
        """Ends the work, for the run belongs to another driver now."""
        self.now(RaybratsError(words), lost=True)

    def check(self) -> None:
        """Does nothing unless the work is to end.

        Raises:
            BaseException: the reason.
        """
        if self.error is not None:
            raise self.error

    @contextmanager
    def ends(self, end: Callable[[], None]) -> Generator[None]:
        """Within it the work is ended by this call; at once, where that is due already."""
        with self._turn:
            self._end, due = end, self.error is not None
        if due:
            end()
        try:
            yield
        finally:
            with self._turn:
                self._end = None


@contextmanager
def on_sigterm(leave: Callable[[], None]) -> Generator[None]:
    """Within it SIGTERM calls a function, once and from another thread, whose end is waited for.

    So what comes after knows why the work has ended, even where the same signal has ended it: one
    to a group of processes reaches its parts too. Signals are the main thread's, so outside it
    nothing is changed. Entered after Ray has started, which puts its own handler there.

    Example:
        >>> with on_sigterm(lambda: print("asked to leave")):
        ...     pass
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    leaving = threading.Thread(target=leave, daemon=True)

    def start(_number: int, _frame: FrameType | None) -> None:
        if leaving.ident is None:  # the first time
            leaving.start()

    before = signal.signal(signal.SIGTERM, start)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
        if leaving.ident is not None:
            leaving.join()
