"""What befalls the workers of a run in the tests: a real fault at a step of a rank, once."""

import ctypes
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

SOAK = "RAYBRATS_SOAK" in os.environ
STEPS = 14
"""Of the small run that most faults befall."""

KINDS: dict[str, Callable[[], object]] = {
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGSEGV": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "os._exit": lambda: os._exit(3),
    # a call into C that keeps the interpreter's lock: no thread of the process runs any more
    "GIL": lambda: ctypes.PyDLL(None).sleep(1000),
    "hang": lambda: time.sleep(1000),
    "raise": lambda: (_ for _ in ()).throw(RuntimeError("this rank has had enough")),
}


@dataclass(frozen=True)
class Fault:
    """What happens to a rank directly after a step."""

    kind: str
    rank: int
    step: int


@dataclass(frozen=True)
class Story:
    """The faults of a run, and where it is written down what happened."""

    folder: Path
    faults: tuple[Fault, ...] = ()
    step_s: float = 0.0
    """Least seconds a step, so that faults from outside find the run at work."""

    def worker(self) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
        """What Ray Train runs instead of `raybrats.runs.launch.work`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return partial(_work, self)

    def fired(self) -> dict[str, float]:
        """When each fault happened, in seconds since the epoch."""
        return {f.name: f.stat().st_mtime for f in sorted(self.folder.glob("fired-*"))}

    def attempts(self) -> list[tuple[int, int, float]]:
        """World, first step and time of the first step of each worker group, by rank 0."""
        lines = (self.folder / "attempts").read_text().splitlines()
        return [(int(w), int(s), float(t)) for w, s, t in map(str.split, lines)]

    def steps(self) -> list[int]:
        """Every step that rank 0 has done, those done again included."""
        return [int(line) for line in (self.folder / "steps").read_text().split()]


def _work(story: Story, settings: Mapping[str, Any]) -> dict[str, Any]:
    import ray.train

    from raybrats.runs.launch import work
    from raybrats.train import loop

    context, update, begun = ray.train.get_context(), loop.update, []
    rank, world = context.get_world_rank(), context.get_world_size()

    def updated(learner: Any) -> None:
        update(learner)
        if rank == 0:
            if not begun:
                _note(story.folder / "attempts", f"{world} {learner.step} {time.time()}")
            _note(story.folder / "steps", str(learner.step))
        begun.append(learner.step)
        time.sleep(story.step_s)
        for number, fault in enumerate(story.faults):
            if (fault.rank, fault.step) == (rank, learner.step) and _first(story, number, fault):
                KINDS[fault.kind]()

    loop.update = updated
    return work(settings)


def _first(story: Story, number: int, fault: Fault) -> bool:
    try:
        (story.folder / f"fired-{number}-{fault.kind}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _note(file: Path, line: str) -> None:
    with file.open("a") as lines:
        lines.write(f"{line}\n")


def until(condition: Callable[[], Any], seconds: float = 240.0) -> Any:
    """What the condition comes to, once that is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it has not come to that"
        time.sleep(0.2)
    return found


def saved(run_uri: str) -> list[int]:
    """Steps of the checkpoints of a run."""
    from raybrats.train import checkpoint

    return [written.step for written in checkpoint.written(run_uri)]
