"""Where the time of steps goes: by the host's clock, or on a GPU by the device's own."""

import time
from dataclasses import dataclass
from typing import NamedTuple

import torch

Mark = float | torch.cuda.Event


class Marks(NamedTuple):
    """Moments of one step: seconds of the host, or events of a GPU."""

    begin: Mark
    """Its batch is there."""
    gradient: Mark
    """Its gradient is."""
    fetched: Mark
    """The batch that follows has been asked for."""
    end: Mark
    """Its weights are new."""


@dataclass
class Pace:
    """Where the time of some steps goes; the wait for the very first batch is not in it.

    Example:
        >>> pace = Pace(global_batch=4)
        >>> for _ in range(2):
        ...     pace.add(seconds=0.5, wait_s=0.1)
        >>> pace.figures()
        {'patches_per_s': 8.0, 'step_s': 0.5, 'data_wait_fraction': 0.2}
    """

    global_batch: int
    """Patches of a step, over all ranks."""
    steps: int = 0
    seconds: float = 0.0
    """Seconds that the steps took together."""
    wait_s: float = 0.0
    """Seconds of them in which there was no batch."""

    def add(self, seconds: float, wait_s: float) -> None:
        """Counts a step."""
        self.steps, self.seconds = self.steps + 1, self.seconds + seconds
        self.wait_s += wait_s

    def figures(self) -> dict[str, float]:
        """Patches a second of all ranks, seconds a step, and the fraction of them spent waiting."""
        seconds = max(self.seconds, 1e-9)
        return {
            "patches_per_s": self.steps * self.global_batch / seconds,
            "step_s": self.seconds / max(self.steps, 1),
            "data_wait_fraction": self.wait_s / seconds,
        }


class Watch:
    """Times the steps of a device, which is not waited for before figures are wanted.

    On a GPU what counts as waiting is what the device itself waited: between the end of a step and
    the begin of the next, for a batch or for the host; and between gradient and update.

    Example:
        >>> watch = Watch(torch.device("cpu"), global_batch=4)
        >>> watch.add(Marks(1.0, 1.75, 1.75, 2.0), wait_s=0.5)
        >>> watch.whole()["data_wait_fraction"], watch.recent()["patches_per_s"]
        (0.5, 4.0)
    """

    def __init__(self, device: torch.device, global_batch: int) -> None:
        self._device, self._batch = device, global_batch
        self._steps: list[tuple[Mark | None, Marks, float]] = []  # since the last look
        self._end: Mark | None = None
        self._whole, self._recent = Pace(global_batch), Pace(global_batch)
        self._began_s = 0.0

    def mark(self) -> Mark:
        """This moment, in the order of what the device has been given."""
        self._began_s = self._began_s or time.perf_counter()
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        return torch.cuda.current_stream(self._device).record_event(event)

    def add(self, marks: Marks, wait_s: float) -> None:
        """Counts a step; a CPU waited so long for the batch that follows."""
        self._steps.append((self._end, marks, wait_s))
        self._end = marks.end

    def pause(self) -> None:
        """Before the next step comes something else: a validation, say."""
        self._end = None

    def whole(self) -> dict[str, float]:
        """The pace of all steps so far, and that with all that was done between them."""
        self._look()
        clock_s = max(time.perf_counter() - self._began_s, 1e-9)
        overall = self._whole.steps * self._batch / clock_s
        return {**self._whole.figures(), "patches_per_s_overall": overall}

    def recent(self) -> dict[str, float]:
        """The pace of the steps since this was asked last."""
        self._look()
        recent, self._recent = self._recent, Pace(self._batch)
        return recent.figures()

    def _look(self) -> None:
        steps, self._steps = self._steps, []
        for before, marks, wait_s in steps:
            seconds, waited = between(marks.begin, marks.end), wait_s
            if self._device.type == "cuda":
                gap = between(before, marks.begin) if before is not None else 0.0
                seconds, waited = gap + seconds, gap + between(marks.gradient, marks.fetched)
            for pace in (self._whole, self._recent):
                pace.add(seconds, waited)


def between(first: Mark, second: Mark) -> float:
    """Seconds from one mark to a later one of the same device, which is waited for.

    Example:
        >>> between(1.5, 2.0)
        0.5
    """
    if isinstance(first, torch.cuda.Event) and isinstance(second, torch.cuda.Event):
        second.synchronize()
        return first.elapsed_time(second) / 1e3
    assert isinstance(first, float), "moments of one device"
    assert isinstance(second, float), "moments of one device"
    return second - first
