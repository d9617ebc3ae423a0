"""The plan of one rank through Ray Data: opened and cut as cluster tasks, batched in the worker.

Each worker opens its own stream from the step at which it starts, so no row is lost or repeated.
One visit of a case is one task, and one draw one block: order is kept, and a case is never sent
through the store whole.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
import ray.data
import torch
from ray.data import DataContext, ExecutionOptions, ExecutionResources
from ray.data.collate_fn import NumpyBatchCollateFn

from raybrats.config import TrainConfig
from raybrats.data.batch import Batch
from raybrats.data.cache import Tally, prepared
from raybrats.data.case import Case
from raybrats.data.patch import PatchRule, draw_patch, volume_size
from raybrats.data.plan import Plan, Visit

VISITS_AT_ONCE = 2048
"""In one Ray dataset; a run hands its visits over in such pieces (0.7 ms a visit, measured)."""
TASK_BYTES = 256 * 2**20
"""Memory of a task beside its patches: four modalities of 240x240x155 inflated, and their crop."""


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
        self._plan = Plan(
            len(cases), config.optim.global_batch, config.run.seed, config.data.patches_per_case
        )
        self._task = PatchTask(config, tuple(cases))

    def __iter__(self) -> Iterator[Batch]:
        """Opens the stream anew; closing the iterator ends its tasks."""
        share, size = self._share, self._config.optim.global_batch // self._share.world
        windows = self._plan.visits(
            rank=share.rank, world=share.world, start=share.start, stop=share.stop
        )
        for num_draws, visits in _pieces(windows, max(1, VISITS_AT_ONCE // size)):
            for rows in self._blocks([asdict(visit) for visit in visits], size * num_draws):
                self.tally += Tally(*rows.pop("tally").sum(axis=0).tolist())
                for place in range(num_draws):
                    yield _batch(rows, slice(place, None, num_draws))

    def _blocks(self, visits: list[dict], num_rows: int) -> Iterator[dict[str, np.ndarray]]:
        """The rows of as many steps as each visit has draws, visit by visit."""
        data = self._config.data
        rows = ray.data.from_items(visits, override_num_blocks=len(visits))
        rows = rows.flat_map(self._task, num_cpus=data.cpus_per_task, memory=TASK_BYTES)
        _settle(rows.context, self._share, data.cpus_per_task)
        yield from rows.iter_torch_batches(
            batch_size=num_rows, prefetch_batches=data.prefetch_batches, collate_fn=_Columns()
        )


class PatchTask:
    """Runs in a Ray task: a visit of a case -> one row a draw, its patch and its normalisation."""

    def __init__(self, config: TrainConfig, cases: tuple[Case, ...]) -> None:
        self._config, self._cases = config, cases
        size = config.data.patch_size
        if config.data.sampling == "volume":
            size = volume_size([case.box for case in cases], config.network.stride)
        self._rule = PatchRule(config.data, size, config.run.seed)

    def __call__(self, visit: dict) -> Iterator[dict[str, np.ndarray | int]]:
        """Rows of arrays in memory order, (modality, k, j, i)."""
        case, turn = int(visit["case"]), int(visit["turn"])
        opened, tally = prepared(self._cases[case], self._config.data)
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
                "draw": draw,
                "tally": np.array([getattr(tally, f.name) for f in fields(Tally)]),
            }
            tally = Tally()


class _Columns(NumpyBatchCollateFn):
    """Columns as arrays of our own: those of one block are read-only views of shared memory."""

    def __call__(self, columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: _own(column) for name, column in columns.items()}


def _own(column: np.ndarray) -> np.ndarray:
    return column if column.flags.writeable else column.copy()


def _batch(rows: dict[str, np.ndarray], which: slice) -> Batch:
    columns = {name: torch.from_numpy(column[which]) for name, column in rows.items()}
    columns["image"] = columns["image"].permute(0, 1, 4, 3, 2)
    columns["labels"] = columns["labels"].permute(0, 3, 2, 1)
    return Batch(**columns)


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


def _settle(context: DataContext, share: Share, cpus_per_task: float) -> None:
    limit = ExecutionResources(cpu=max(share.cpus, cpus_per_task))
    context.execution_options = ExecutionOptions(preserve_order=True, resource_limits=limit)
    context.enable_progress_bars = False
    context.target_max_block_size = 32 * 2**20  # about one patch: a block of one row is not copied
    context.memory_usage_poll_interval_s = None  # else every task starts a thread to read smaps
    context.execution_no_progress_timeout_s = 300
