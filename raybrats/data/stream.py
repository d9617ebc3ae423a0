"""The plan of one rank through Ray Data: opened and cut as cluster tasks, batched in the worker.

Each worker opens its own stream from the step at which it starts, so no row is lost or repeated.
Cases are opened and cut in one task, so none is sent through the store whole, and order is kept.
"""

import json
import math
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import ray
import ray.data
from ray.data import Dataset, ExecutionOptions, ExecutionResources
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raybrats.config import TrainConfig
from raybrats.data.cache import Tally, prepared
from raybrats.data.cohort.case import Case, from_row
from raybrats.data.patch import PatchRule, Row, draw_patch, to_row, volume_size
from raybrats.data.plan import Plan, Visit

if TYPE_CHECKING:
    from raybrats.data.batch import Batch

T = TypeVar("T")

VISITS_AT_ONCE = 2048
"""Visits of one Ray dataset; a run hands over its visits in such pieces (0.7 ms each, measured)."""
BLOCK_BYTES = 8 * 2**20
"""Bytes that travel at once, unless one patch is larger: a block of one row is not copied."""
PATCHES_A_TASK = 16
"""Most patches of a task, which are about 64 MiB at most: a task costs Ray 10 ms, and is lost whole
if it is stopped."""
BATCHES_AHEAD = 2
"""Batches that are put together, and the least that are kept ready, in front of the step."""
TASK_BYTES = 600 * 2**20
"""Memory of a task: its process, 200 MB; what it keeps of freed memory, 128; its crop and block."""


@dataclass(frozen=True)
class Assignment:
    """The part of the plan that one rank takes.

    Example:
        >>> Assignment(rank=0, world=2, start=1250, stop=2000, cpus=6.0).stop
        2000
    """

    rank: int
    world: int
    start: int
    """First step."""
    stop: int
    """Step after the last."""
    cpus: float
    """CPUs that this rank's tasks may take together."""
    near: bool = False
    """Whether the tasks stay on this node, so that no patch crosses the network."""
    patches_per_s: float = 0.0
    """Pace of the device; its patches of a second are kept ready."""
    store_bytes: float = math.inf
    """Bytes of this node's object store that they may take."""


class Stream:
    """The batches of one rank, in the order of the plan, one a step.

    Example:
        >>> stream = Stream(config, cases, Assignment(0, 1, 0, 100, 4.0))  # doctest: +SKIP
        >>> next(iter(stream)).image.shape  # doctest: +SKIP
        torch.Size([2, 4, 128, 128, 128])
    """

    def __init__(self, config: TrainConfig, cases: Sequence[Case], assignment: Assignment) -> None:
        self.tally = Tally()
        """Tally of the look-ups in the nodes' caches so far."""
        self._config, self._assignment = config, assignment
        self._cases = [json.dumps(asdict(case)) for case in cases]
        self._task = PatchTask(config, cases)
        self._plan = Plan(
            len(cases), config.optim.global_batch, config.run.seed, config.data.patches_per_case
        )
        self._size = len(range(assignment.rank, config.optim.global_batch, assignment.world))
        self._batch_bytes = self._size * self._task.patch_bytes

    def __iter__(self) -> "Iterator[Batch]":
        """Opens the stream anew; closing the iterator ends its tasks."""
        from torch import cuda  # not in tasks: torch makes them slow to start

        pin = self._config.cluster.device != "cpu" and cuda.is_available()
        batches = self._batches(pin=pin)
        # A CPU has no core for another thread, and memory that two share costs twice the faults.
        for batch, tally in in_a_thread(batches, BATCHES_AHEAD) if pin else batches:
            self.tally += tally
            yield batch

    def _batches(self, *, pin: bool) -> "Generator[tuple[Batch, Tally]]":
        """Each batch, with the tally of the look-ups since the one before."""
        from raybrats.data.batch import collate

        mine = self._assignment
        windows = self._plan.visits(
            rank=mine.rank, world=mine.world, start=mine.start, stop=mine.stop
        )
        for num_draws, visits in _pieces(windows, max(1, VISITS_AT_ONCE // self._size)):
            rows = self._rows(visits)
            while window := list(islice(rows, self._size * num_draws)):
                tally = Tally()
                for row in window:
                    tally += Tally(*row.pop("tally").tolist())
                for place in range(num_draws):
                    yield collate(window[place::num_draws], pin=pin), tally
                    tally = Tally()

    def visit_row(self, visit: Visit) -> dict:
        """The row of a visit, with all of its case, so that a task need not know the cohort."""
        return {**asdict(visit), "row": self._cases[visit.case]}

    def batches_ahead(self) -> int:
        """Batches that are kept ready on this node."""
        mine = self._assignment
        if wanted := self._config.data.prefetch_batches:
            return wanted
        fitting = min(mine.store_bytes / self._batch_bytes, mine.patches_per_s / self._size)
        return max(BATCHES_AHEAD, int(fitting))

    def _rows(self, visits: list[Visit]) -> Iterator[dict[str, np.ndarray]]:
        """One row a draw, visit by visit; its arrays are views of shared memory."""
        patches_a_block = max(1, BLOCK_BYTES // self._task.patch_bytes)
        blocks = self._dataset(visits).iter_batches(
            batch_size=None,
            batch_format="numpy",
            prefetch_batches=-(-self.batches_ahead() * self._size // patches_a_block),
        )
        for block in blocks:
            for place in range(len(block["draw"])):
                yield {str(name): column[place] for name, column in block.items()}

    def _dataset(self, visits: list[Visit]) -> Dataset:
        """The rows of some visits, which tasks make when they are asked for."""
        patch_bytes, cpus_per_task = self._task.patch_bytes, self._config.data.cpus_per_task
        num_draws = len(visits[0].draws)
        together = min(PATCHES_A_TASK, -(-(2**26) // patch_bytes)) // num_draws
        num_tasks = -(-len(visits) // max(1, together))
        rows = ray.data.from_items(
            [self.visit_row(visit) for visit in visits], override_num_blocks=num_tasks
        )
        where: dict[str, Any] = {}
        if self._assignment.near:
            here = ray.get_runtime_context().get_node_id()
            where["scheduling_strategy"] = NodeAffinitySchedulingStrategy(
                here, soft=True, _spill_on_unavailable=True
            )
        rows = rows.flat_map(self._task, num_cpus=cpus_per_task, memory=TASK_BYTES, **where)
        context, cpus = rows.context, max(self._assignment.cpus, cpus_per_task)
        context.target_max_block_size = block_bytes = max(BLOCK_BYTES, patch_bytes)
        window_bytes = num_draws * self._batch_bytes
        # else tasks run ahead of a slow consumer until half of the object store is full
        limit_bytes = 2 * (window_bytes + 2 * block_bytes * cpus / cpus_per_task)
        limit_bytes += self.batches_ahead() * self._batch_bytes
        limit = ExecutionResources(cpu=cpus, object_store_memory=limit_bytes)
        context.execution_options = ExecutionOptions(preserve_order=True, resource_limits=limit)
        context.enable_progress_bars = False
        context.raise_original_map_exception = True  # else its kind is lost, and only words arrive
        context.memory_usage_poll_interval_s = None  # else every task starts a thread to read smaps
        context.execution_no_progress_timeout_s = -1  # a long validation takes no rows: not a hang
        return rows


class PatchTask:
    """What a Ray task runs: a visit of a case -> one row a draw, its patch and its scaling.

    Example:
        >>> task = PatchTask(config, cases)  # doctest: +SKIP
        >>> next(task(stream.visit_row(visit)))["image"].shape  # doctest: +SKIP
        (4, 128, 128, 128)
    """

    def __init__(self, config: TrainConfig, cases: Sequence[Case]) -> None:
        self._data, size = config.data, config.data.patch_size
        if config.data.sampling == "volume":
            size = volume_size([case.box for case in cases], config.network.stride)
        self._rule = PatchRule(config.data, size, config.run.seed, config.classes)
        self.patch_bytes = int(np.prod(size)) * (2 * len(config.data.modalities) + 1)
        """Bytes of a patch, image and labels."""

    def __call__(self, visit: dict) -> Iterator[Row]:
        """The rows of a visit, of which the first has the tally of its look-up."""
        case, ordinal = int(visit["case"]), int(visit["ordinal"])
        opened, tally = prepared(from_row(json.loads(visit["row"])), self._data)
        assert opened.labels is not None, "training cases have labels"
        for place, draw in enumerate(visit["draws"]):
            patch = draw_patch(
                opened, self._rule, draw=int(draw), case=case, ordinal=ordinal + place
            )
            yield {**to_row(opened, patch, int(draw)), "tally": np.array(astuple(tally))}
            tally = Tally()


def in_a_thread(items: Generator[T], ahead: int) -> Generator[T]:
    """The items of a generator that runs in a thread, so many of them before they are wanted.

    Example:
        >>> list(in_a_thread((n * n for n in range(4)), ahead=2))
        [0, 1, 4, 9]
    """
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")

    def following() -> T | None:
        return next(items, None)

    try:
        waiting = deque(pool.submit(following) for _ in range(ahead))
        while (item := waiting.popleft().result()) is not None:
            waiting.append(pool.submit(following))
            yield item
    finally:
        for future in waiting:
            future.cancel()
        pool.submit(items.close)  # where it runs, once it has come to what it is at
        pool.shutdown(wait=False)


def _pieces(
    windows: Iterator[tuple[Visit, ...]], at_once: int
) -> Iterator[tuple[int, list[Visit]]]:
    """Windows put together while their visits have the same number of draws."""
    window = next(windows, None)
    while window is not None:
        num_draws, piece = len(window[0].draws), []
        while window is not None and len(window[0].draws) == num_draws and len(piece) < at_once:
            piece.append(window)
            window = next(windows, None)
        yield num_draws, [visit for visits in piece for visit in visits]
