"""Ending the main thread from another, whatever the shell has done to its signals."""

import signal
import subprocess
import sys
import threading
import time

import pytest

from raybrats.errors import RaybratsError
from raybrats.runs.stop import Stop, interruptible

SCRIPT = """
import threading, time
from raybrats.runs.stop import Stop, interruptible
stop = Stop()
try:
    with interruptible():
        threading.Timer(0.2, stop.now, ["nothing moved"]).start()
        time.sleep(20)
except KeyboardInterrupt:
    print(stop.error)
"""


def end(stop):
    with interruptible():
        threading.Timer(0.2, stop.taken_over, ["taken over"]).start()
        time.sleep(20)


def test_a_stop_from_another_thread_ends_the_wait_of_the_main_thread():
    stop = Stop()
    with pytest.raises(KeyboardInterrupt):
        end(stop)
    assert isinstance(stop.error, RaybratsError)
    assert (str(stop.error), stop.lost) == ("taken over", True)


def test_it_does_so_in_a_process_that_a_shell_has_started_in_the_background():
    """There SIGINT is ignored."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert (done.stdout, done.returncode) == ("nothing moved\n", 0), done.stderr


def test_the_signal_is_left_as_it_was():
    before = signal.getsignal(signal.SIGINT)
    with interruptible():
        assert signal.getsignal(signal.SIGINT) is before
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible():
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
