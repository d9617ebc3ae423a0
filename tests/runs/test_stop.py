"""Ending work from another thread, without a signal to the process."""

import os
import signal
import threading
import time

import pytest

from raybrats.errors import RaybratsError
from raybrats.runs.stop import Stop, on_sigterm


def test_a_stop_ends_the_work_and_says_why():
    stop, ended = Stop(), threading.Event()
    threading.Timer(0.1, stop.taken_over, ["taken over"]).start()
    with stop.ends(ended.set):
        assert ended.wait(20)
    with pytest.raises(RaybratsError, match="taken over"):
        stop.check()
    assert stop.lost


def test_work_that_begins_after_its_stop_ends_at_once():
    stop, ended = Stop(), []
    stop.now(RaybratsError("nothing moved"))
    with stop.ends(lambda: ended.append(True)):
        assert ended == [True]


def test_the_first_reason_counts_and_ended_work_is_left_alone():
    stop, ended = Stop(), []
    with stop.ends(lambda: ended.append(True)):
        stop.now(RaybratsError("first"))
    stop.now(KeyboardInterrupt())
    assert ended == [True]
    with pytest.raises(RaybratsError, match="first"):
        stop.check()


def test_without_a_stop_nothing_is_raised():
    Stop().check()


def test_sigterm_is_heard_once_in_the_main_thread():
    asked, before = threading.Semaphore(0), signal.getsignal(signal.SIGTERM)
    with on_sigterm(asked.release):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
    assert asked.acquire(timeout=20)
    assert not asked.acquire(timeout=0.2)
    assert signal.getsignal(signal.SIGTERM) is before


def test_other_threads_leave_the_signals_alone():
    seen, before = [], signal.getsignal(signal.SIGTERM)

    def work():
        with on_sigterm(lambda: None):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
