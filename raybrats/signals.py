"""SIGTERM as an interruption: the work unwinds, and its end says so, as after Ctrl-C."""

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def sigterm_interrupts() -> Generator[None]:
    """Within it SIGTERM raises KeyboardInterrupt in the main thread, once: cleaning up may take.

    Signals are the main thread's, so outside it nothing is changed; a SIGTERM that this process
    was started to ignore stays ignored.

    Example:
        >>> try:
        ...     with sigterm_interrupts():
        ...         signal.raise_signal(signal.SIGTERM)
        ... except KeyboardInterrupt as error:
        ...     print("interrupted by", error)
        interrupted by SIGTERM
    """
    if not _is_ours():
        yield
        return
    heard = False

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        nonlocal heard
        if not heard:
            heard = True
            raise KeyboardInterrupt("SIGTERM")

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


@contextmanager
def handlers_kept() -> Generator[None]:
    """Within it a library may handle SIGTERM; where the program did already, it does so again.

    Ray sets two handlers: one of Python, and below it one that prints a native stack and aborts.

    Example:
        >>> before = signal.signal(signal.SIGTERM, print)
        >>> with handlers_kept():
        ...     _ = signal.signal(signal.SIGTERM, signal.SIG_DFL)
        >>> signal.signal(signal.SIGTERM, before) is print
        True
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and before not in (None, signal.SIG_DFL):
            signal.signal(signal.SIGTERM, before)


@contextmanager
def sigterm_spares_children() -> Generator[None]:
    """Within it processes are started that SIGTERM does not reach; here it comes afterwards.

    One to a group of processes, as of a job's time limit, would else end what this one needs for
    leaving in order. Children inherit the mask of signals, and end with their parent or by SIGKILL.

    Example:
        >>> import subprocess
        >>> with sigterm_spares_children():
        ...     child = subprocess.Popen(["sh", "-c", "kill -TERM $$; exit 7"])
        >>> child.wait()
        7
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _is_ours() -> bool:
    is_main = threading.current_thread() is threading.main_thread()
    return is_main and signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN
