"""Rows of gpu_step.py: a configuration of the step, driven through the loop of a real run."""

import functools
import gc
import itertools
import resource
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, Self

import step
import torch
from gpu_profile import Recorder, busy_ms, by_kind

from raybrats.config import AugmentConfig, TrainConfig
from raybrats.data.batch import Batch
from raybrats.errors import first_line
from raybrats.train import loop, ranks
from raybrats.train.learner import Learner, new_learner

DRAWS = 64
"""Batches that differ in their draws, and so in how they are augmented, before they come again."""
PROFILED = 4
"""Steps of which a row notes the kernels."""
NO_TIME = "left out: no time (--budget-s)"
NEEDS_GPU = "left out: needs a GPU"


@dataclass(frozen=True)
class Row:
    """One configuration."""

    precision: str = "bf16"
    compiled: bool = False
    last: bool = False
    """Whether the channels lie closest (channels_last_3d)."""
    batch: int = 2
    augmented: bool = False

    @property
    def name(self) -> str:
        """What the tables call it."""
        words = ["compiled" if self.compiled else "eager", self.precision]
        words += ["channels_last"] * self.last + [f"batch {self.batch}"]
        return " ".join(words + ["augmented"] * self.augmented)

    def config(self, edge: int) -> TrainConfig:
        """The real recipe with it."""
        config = step.settings("nnunet", edge, self.batch, self.precision, augmented=self.augmented)
        cluster = replace(config.cluster, channels_last=self.last, compile=self.compiled)
        return replace(config, cluster=cluster)


@dataclass
class Session:
    """What the parts share: options, the time that is left, and what was found."""

    options: Namespace
    device: torch.device
    until: float = 0.0
    """When the part that runs has to be done, by `time.perf_counter`."""
    found: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """Rows of each part by their names."""
    part: str = ""
    """The part that runs."""
    best: tuple[float, Row, Learner] | None = None
    """Patches a second of the fastest row so far, that row, and its learner."""

    @property
    def gpu(self) -> bool:
        """Whether this is the real thing."""
        return self.device.type == "cuda"

    @property
    def left_s(self) -> float:
        """Seconds that the part has."""
        return self.until - time.perf_counter()

    def row(self, name: str, call: Callable[[], dict[str, Any]], need_s: float = 2.0) -> None:
        """Adds a row, or the words of why there is none."""
        began = time.perf_counter()
        if self.left_s < need_s:
            row: dict[str, Any] = {"words": NO_TIME}
        else:
            try:
                row = call()
            except Exception as error:  # whatever it cannot do is its result
                row = {"words": first_line(error)}
                error.__traceback__ = None  # it would hold the memory of what failed
            row["took_s"] = time.perf_counter() - began
        self.found.setdefault(self.part, {})[name] = row
        shown = {key: value for key, value in row.items() if not isinstance(value, dict)}
        print(f"{self.part}: {name}: {shown}", file=sys.stderr, flush=True)


@contextmanager
def replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    """A module's attribute with another value."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def compiler(device: torch.device) -> AbstractContextManager[None]:
    """Has a CPU's rehearsal trace what it is to compile, and run that as it stands."""
    if device.type == "cuda":
        return ExitStack()
    return replaced(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


def made(row: Row, session: Session) -> Learner:
    """A learner of a configuration, wrapped and compiled as that of a run."""
    learner = new_learner(row.config(session.options.edge), session.device)
    with warnings.catch_warnings(), compiler(session.device), ExitStack() as stack:
        warnings.simplefilter("ignore")
        if session.options.no_search:  # a search leaves its results for as long as torch lives
            stack.enter_context(replaced(ranks, "choose_kernels", lambda _: None))
        ranks.make_ready(learner)
    return learner


def cleared(device: torch.device) -> None:
    """Frees what the row before has left."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def waited_for(device: torch.device) -> None:
    """Returns once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@functools.cache
def batches(size: int, edge: int) -> Sequence[Batch]:
    """Batches of the same patches, whose draws differ; page-locked for a GPU."""
    first = step.random_batch(size, edge)
    draws = [first.draw + turn * size for turn in range(DRAWS)]
    draws = [draw.pin_memory() if torch.cuda.is_available() else draw for draw in draws]
    return [replace(first, draw=draw) for draw in draws]


class _EnoughError(Exception):
    """Ends the loop."""


def driven(
    learner: Learner, warm: int, steps: int, around: AbstractContextManager[Any]
) -> dict[str, float]:
    """Steps of the loop, of which those after the warm ones run within a context.

    Returns:
        Means of the figures that the loop has logged within.
    """
    config, every = learner.config, min(loop.LOG_EVERY_STEPS, steps)
    warm, steps = (-(-count // every) * every for count in (warm, steps))
    numbers, figures = itertools.count(1), []
    learner.step = 0  # figures come at its multiples
    feed = itertools.cycle(batches(config.optim.global_batch, config.data.patch_size[0]))
    with ExitStack() as stack:

        def check_in() -> None:
            done = next(numbers) - warm
            if done == 0:
                figures.clear()
                stack.enter_context(around)
            if done == steps:
                raise _EnoughError

        hooks = loop.Hooks(lambda: [[0.0] * 3], figures.append, lambda *_: None, check_in)
        with suppress(_EnoughError), replaced(loop, "LOG_EVERY_STEPS", every):
            loop.run(learner, feed, hooks)
    learner.settle()
    return {name: fmean(each[name] for each in figures) for name in figures[0]}


class Clocked:
    """A context that times what is done within on the device, and what it costs the host."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._now = device, step.clock(device)
        self.seconds = self.host_s = 0.0

    def __enter__(self) -> Self:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        self.seconds, self.host_s = -self._now(), -time.process_time()
        return self

    def __exit__(self, *of: object) -> None:
        self.seconds += self._now()
        self.host_s += time.process_time()


def peaks(device: torch.device) -> dict[str, float]:
    """Most memory since the last clock began; of a CPU the largest resident set so far."""
    if device.type != "cuda":
        return {"GB": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9}
    return {
        "GB": torch.cuda.max_memory_allocated(device) / 1e9,
        "reserved_GB": torch.cuda.max_memory_reserved(device) / 1e9,
    }


def paced(learner: Learner, session: Session) -> dict[str, Any]:
    """Pace and memory of a learner's steps, and what its kernels were."""
    options, clock = session.options, Clocked(session.device)
    figures = driven(learner, options.warmup, options.steps, clock)
    size, steps = learner.config.optim.global_batch, counted(options.steps)
    found: dict[str, Any] = {
        "patches/s": size * steps / clock.seconds,
        "ms": 1e3 * clock.seconds / steps,
        "host_ms": 1e3 * clock.host_s / steps,
        "waits": figures["data_wait_fraction"],
        **peaks(session.device),
    }
    recorder = Recorder(session.device)
    driven(learner, 1, PROFILED, recorder)
    kinds = {kind: ms / PROFILED for kind, ms in by_kind(recorder.kernels).items()}
    found["kinds"] = kinds
    if session.gpu and kinds:
        found["idle"] = max(0.0, 1 - busy_ms(recorder.kernels) / PROFILED / found["ms"])
    if learner.not_compiled:
        found["words"] = learner.not_compiled[:200]
    elif learner.config.cluster.compile and not session.gpu:
        found["words"] = "traced (aot_eager), not compiled: a CPU's rehearsal"
    return found


def counted(steps: int) -> int:
    """Steps that `driven` makes of so many: whole intervals between figures.

    Example:
        >>> counted(2), counted(20), counted(25)
        (2, 20, 30)
    """
    every = min(loop.LOG_EVERY_STEPS, steps)
    return -(-steps // every) * every


def seconds_of(call: Callable[[], object], device: torch.device, times: int = 3) -> float:
    """Mean seconds of a call, after one that warms it up."""
    call()
    now = step.clock(device)
    began = now()
    for _ in range(times):
        call()
    return (now() - began) / times


def fastest(session: Session, *, on: bool = False) -> tuple[Row, Learner]:
    """The fastest configuration so far and its learner; where none was timed, the likely one."""
    if session.best is None:
        row = Row(compiled=session.gpu, last=session.gpu, batch=session.options.batches[0])
        session.best = (0.0, row, made(row, session))
    _, row, learner = session.best
    row = replace(row, augmented=on)
    augment = AugmentConfig() if on else step.STILL
    learner.config = replace(learner.config, augment=augment)
    return row, learner
