"""A board between the driver of a run and its workers: how far they are, and what is asked of them.

It is an actor with a name, so that whoever knows the URI of a run finds its board.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import cast

import ray
import ray.exceptions
from ray.actor import ActorHandle
from ray.util import list_named_actors
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raybrats.progress import Display

_LOG = logging.getLogger(__name__)
_NAME_FREE_S = 30.0
"""Seconds that the board of an attempt that was killed may take to end."""
_ANSWER_S = 60.0
"""Seconds that a board may take to answer."""
_ABORT_S = 30.0
"""Seconds that Ray Train's controller has to end its workers."""


class Board:
    """The actor; every method returns at once."""

    def __init__(self) -> None:
        self._state, self._posts, self._restarts = (0, ""), 0, 0
        self._requested, self._saved_step = False, -1
        self._told: list[str] = []
        self._controller: ActorHandle | None = None
        self._aborted = False

    def post(self, done: int, remark: str) -> None:
        """Rank 0 is so far."""
        self._state, self._posts = (done, remark), self._posts + 1

    def tell(self, words: str) -> None:
        """Rank 0 has something to say that is not to be missed."""
        self._told.append(words)

    def read(self, heard: int = 0) -> tuple[tuple[int, str], int, list[str]]:
        """The last post, how many there were, and what was told after so many words."""
        return self._state, self._posts, self._told[heard:]

    def restart(self, why: str) -> None:
        """The workers start again."""
        self._state, self._restarts = (self._state[0], f"starting again, {why}"), self._restarts + 1

    def restarts(self) -> int:
        """How often the workers started again."""
        return self._restarts

    def request_checkpoint(self) -> None:
        """Somebody wants a checkpoint now, because the run is to end."""
        self._requested = True

    def checkpoint_requested(self) -> bool:
        """Whether somebody does."""
        return self._requested

    def saved(self, step: int) -> None:
        """The requested checkpoint is there, and of this step."""
        self._saved_step = step

    def saved_step(self) -> int:
        """The step of the requested checkpoint; -1 until it is there."""
        return self._saved_step

    def attach(self, controller: ActorHandle) -> None:
        """Ray Train's controller of the run is this one; it ends at once if the run shall."""
        self._controller = controller
        if self._aborted:
            controller.abort.remote()

    def abort(self) -> ActorHandle | None:
        """The run shall end; its controller, whose end is to be waited for, if there is one."""
        self._aborted = True
        return self._controller


@contextmanager
def followed(
    run_uri: str,
    total_steps: int,
    stall_s: float = math.inf,
    on_stall: Callable[[], None] = lambda: None,
) -> Generator[ActorHandle]:
    """A board for the workers of a run; what they post is displayed here.

    Args:
        run_uri: the run; its last part is the title of the display.
        total_steps: what is posted when all is done.
        stall_s: seconds without a new post after which `on_stall` is called, once.
        on_stall: is called from another thread.

    Example:
        >>> with followed("runs/one", 150) as board:  # doctest: +SKIP
        ...     board.post.remote(75, "loss 0.4")
    """
    board, ended = _new(run_uri), threading.Event()

    def follow(display: Display) -> None:
        shown, heard, told, since_s = None, 0, 0, time.monotonic()
        last = False
        while not last:
            last = ended.wait(1.0)  # once more after the end, for the last words
            try:
                state, posts, news = _read(board, told) or (shown, heard, [])
            except ray.exceptions.RayError:  # the cluster is going down; the run itself says why
                return
            for words in news:
                display.say(words)
            told += len(news)
            if state is not None and state != shown:
                display.show(*state)
            if posts != heard:
                since_s = time.monotonic()
            shown, heard = state, posts
            if not last and time.monotonic() - since_s > stall_s:
                on_stall()
                return

    title = f"training {run_uri.rstrip('/').rpartition('/')[2]}"
    with Display(title, total_steps) as display:
        thread = threading.Thread(target=follow, args=(display,), daemon=True)
        thread.start()
        try:
            yield board
        finally:
            ended.set()
            thread.join(timeout=5)
            ray.kill(board)


def _read(board: ActorHandle, told: int) -> tuple[tuple[int, str], int, list[str]] | None:
    """What a board has; None where it does not answer now, for a machine was asleep, say."""
    with suppress(ray.exceptions.GetTimeoutError, ray.exceptions.ActorUnavailableError):
        return ray.get(board.read.remote(told), timeout=_ANSWER_S)
    return None


def found(prefix: str) -> list[ActorHandle]:
    """The boards of the runs that train in this job and whose URIs start so.

    Example:
        >>> found("s3://bucket/runs/sweep-")  # doctest: +SKIP
        []
    """
    boards = []
    for name in list_named_actors():
        if name.startswith(_name(prefix)):
            with suppress(ValueError):  # it has ended meanwhile
                boards.append(ray.get_actor(name))
    return boards


def abort(board: ActorHandle) -> None:
    """Ends the workers of a run, whatever they are doing.

    Example:
        >>> abort(board)  # doctest: +SKIP
    """
    with suppress(ray.exceptions.RayError):  # that a controller has ended comes as an error
        controller = ray.get(board.abort.remote(), timeout=_ABORT_S)
        if controller is not None:
            try:
                ray.get(controller.abort.remote(), timeout=_ABORT_S)
            except ray.exceptions.GetTimeoutError:
                _LOG.warning("the workers did not end within %g s and are killed", _ABORT_S)
                ray.kill(controller)


def save_all(boards: list[ActorHandle], grace_s: float) -> None:
    """Asks the workers of each board for a checkpoint and waits for all of them, so long at most.

    Example:
        >>> save_all([board], grace_s=30.0)  # doctest: +SKIP
    """
    until, waiting = time.monotonic() + grace_s, list(boards)
    for board in boards:
        board.request_checkpoint.remote()
    while waiting and time.monotonic() < until:
        for board in list(waiting):
            with suppress(ray.exceptions.GetTimeoutError, ray.exceptions.ActorUnavailableError):
                try:
                    if ray.get(board.saved_step.remote(), timeout=1.0) >= 0:
                        waiting.remove(board)
                except ray.exceptions.ActorDiedError:  # its run has ended
                    waiting.remove(board)
        time.sleep(0.1)


def _new(run_uri: str) -> ActorHandle:
    """A board with the name of the run, once that is free: an earlier one may still be ending."""
    # beside the driver, whose end is the run's: another node may be taken away
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(Board).options(num_cpus=0, scheduling_strategy=here, name=_name(run_uri))
    until = time.monotonic() + _NAME_FREE_S
    while True:
        try:
            return cast(ActorHandle, actor.remote())
        except ValueError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


def _name(run_uri: str) -> str:
    return f"raybrats board of {run_uri}"
