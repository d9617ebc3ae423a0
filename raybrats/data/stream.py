"""The plan of one rank through Ray Data: opened and cut as cluster tasks, batched in the worker.

Each worker opens its own stream from the step at which it starts, so no row is lost or repeated.
Cases are opened and cut in one task, so none is sent through the store whole, and order is kept.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import ray.data
from ray.data import DataContext, ExecutionOptions, ExecutionResources

from raybrats.config import TrainConfig
from raybrats.data.cache import Tally, prepared
from raybrats.data.cohort.case import Case, from_row
from raybrats.data.patch import PatchRule, draw_patch, volume_size
from raybrats.data.plan import Plan, Visit

if TYPE_CHECKING:
    from torch import Tensor

    from raybrats.data.batch import Batch

VISITS_AT_ONCE = 2048
"""In one Ray dataset; a run hands its visits over in such pieces (0.7 ms a visit, measured)."""
BLOCK_BYTES = 8 * 2**20
"""Of what travels at once, unless one patch is larger: a block of one row is not copied."""
PATCHES_A_TASK = 16
"""At most, and about 64 MiB: a task costs Ray 10 ms, and is lost whole if it is stopped."""
TASK_BYTES = 600 * 2**20
"""Memory of a task: its process, 200 MB; what it keeps of freed memory, 128; its crop and block."""


@dataclass(frozen=True)
class Share:
    """What one rank takes of the plan."""

    rank: int
    world: int
    start: int
    """First step."""
    stop: int
    """One past the last step."""
    cpus: float
    """CPUs that this rank's tasks may take together."""


class Stream:
    """The batches of one rank, in the order of the plan; one a step."""

    def __init__(self, config: TrainConfig, cases: Sequence[Case], share: Share) -> None:
        self.tally = Tally()
        """What the node caches were good for so far."""
        self._config, self._share = config, share
        self._cases = [json.dumps(asdict(case)) for case in cases]
        self._task = PatchTask(config, cases)
        self._plan = Plan(
            len(cases), config.optim.global_batch, config.run.seed, config.data.patches_per_case
        )

    def __iter__(self) -> "Iterator[Batch]":
        """Opens the stream anew; closing the iterator ends its tasks."""
        share = self._share
        size = len(range(share.rank, self._config.optim.global_batch, share.world))
        windows = self._plan.visits(
            rank=share.rank, world=share.world, start=share.start, stop=share.stop
        )
        for num_draws, visits in _pieces(windows, max(1, VISITS_AT_ONCE // size)):
            rows = self._rows(visits)
            while window := list(islice(rows, size * num_draws)):
                for row in window:
                    self.tally += Tally(*row.pop("tally").tolist())
                for place in range(num_draws):
                    yield _batch(window[place::num_draws], self._config.cluster.device != "cpu")

    def visit_row(self, visit: Visit) -> dict:
        """What a task is told of a visit: all of its case, so that it need not know the cohort."""
        return {**asdict(visit), "row": self._cases[visit.case]}

    def _rows(self, visits: list[Visit]) -> Iterator[dict[str, np.ndarray]]:
        """One row a draw, visit by visit; its arrays are views of shared memory."""
        data, patch_bytes = self._config.data, self._task.patch_bytes
        together = min(PATCHES_A_TASK, -(-(2**26) // patch_bytes)) // len(visits[0].draws)
        num_tasks = -(-len(visits) // max(1, together))
        rows = ray.data.from_items(
            [self.visit_row(visit) for visit in visits], override_num_blocks=num_tasks
        )
        rows = rows.flat_map(self._task, num_cpus=data.cpus_per_task, memory=TASK_BYTES)
        rows.context.target_max_block_size = block_bytes = max(BLOCK_BYTES, patch_bytes)
        num_parallel = max(1.0, self._share.cpus / data.cpus_per_task)
        window_bytes = len(visits[0].draws) * patch_bytes * self._plan.global_batch
        # else tasks run ahead of a slow consumer until half of the object store is full
        limit_bytes = 2 * (window_bytes + 2 * block_bytes * num_parallel)
        _settle(rows.context, self._share, data.cpus_per_task, limit_bytes)
        ahead = data.prefetch_batches * self._config.optim.global_batch // self._share.world
        blocks = rows.iter_batches(
            batch_size=None,
            batch_format="numpy",
            prefetch_batches=-(-ahead // max(1, BLOCK_BYTES // patch_bytes)),
        )
        for block in blocks:
            for place in range(len(block["draw"])):
                yield {name: column[place] for name, column in block.items()}


class PatchTask:
    """Runs in a Ray task: a visit of a case -> one row a draw, its patch and its normalisation."""

    def __init__(self, config: TrainConfig, cases: Sequence[Case]) -> None:
        self._data, size = config.data, config.data.patch_size
        if config.data.sampling == "volume":
            size = volume_size([case.box for case in cases], config.network.stride)
        self._rule = PatchRule(config.data, size, config.run.seed)
        self.patch_bytes = int(np.prod(size)) * (2 * len(config.data.modalities) + 1)

    def __call__(self, visit: dict) -> Iterator[dict[str, np.ndarray | int]]:
        """Rows of arrays in memory order, (modality, k, j, i)."""
        case, turn = int(visit["case"]), int(visit["turn"])
        opened, tally = prepared(from_row(json.loads(visit["row"])), self._data)
        assert opened.labels is not None, "training cases have labels"
        for place, draw in enumerate(visit["draws"]):
            image, labels = draw_patch(
                opened, self._rule, draw=int(draw), case=case, turn=turn + place
            )
            yield {
                "image": image.transpose(0, 3, 2, 1),
                "labels": labels.T,
                "gain": opened.gain,
                "bias": opened.bias,
                "low": opened.low,
                "high": opened.high,
                "background": opened.background,
                "draw": int(draw),
                "tally": np.array(astuple(tally)),
            }
            tally = Tally()


def _batch(rows: Sequence[dict[str, np.ndarray]], pin: bool) -> "Batch":
    """The rows put together: the one copy that is made of a patch in this process."""
    from raybrats.data.batch import Batch  # not for the tasks, which torch makes larger and later

    columns = {name: _column([row[name] for row in rows], pin) for name in rows[0]}
    columns["image"] = columns["image"].permute(0, 1, 4, 3, 2)
    columns["labels"] = columns["labels"].permute(0, 3, 2, 1)
    return Batch(**columns)


def _column(values: Sequence[np.ndarray], pin: bool) -> "Tensor":
    """Page-locked where there is a GPU, so that the copy to it runs beside the step."""
    import torch

    first = np.asarray(values[0])
    kind = torch.from_numpy(np.empty(0, first.dtype)).dtype
    pinned = pin and torch.cuda.is_available()
    column = torch.empty((len(values), *first.shape), dtype=kind, pin_memory=pinned)
    np.stack(values, out=column.numpy())
    return column


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


def _settle(context: DataContext, share: Share, cpus_per_task: float, limit_bytes: float) -> None:
    limit = ExecutionResources(cpu=max(share.cpus, cpus_per_task), object_store_memory=limit_bytes)
    context.execution_options = ExecutionOptions(preserve_order=True, resource_limits=limit)
    context.enable_progress_bars = False
    context.memory_usage_poll_interval_s = None  # else every task starts a thread to read smaps
    context.execution_no_progress_timeout_s = -1  # a long validation takes no rows: not a hang
