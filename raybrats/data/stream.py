"""The plan of one rank through Ray Data: decoded and cut as cluster tasks, batched in the worker.

Each worker opens its own stream from the step at which it starts, so no row is lost or repeated.
One draw is one task and one block: order is kept, and a case is never sent through the store whole.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import ray.data
import torch
from ray.data import DataContext, ExecutionOptions, ExecutionResources
from ray.data.collate_fn import NumpyBatchCollateFn

from raybrats.config import TrainConfig
from raybrats.data.batch import Batch
from raybrats.data.cohort import Case, prepare_case
from raybrats.data.patch import PatchRule, choose_corner, cut
from raybrats.data.plan import Plan, generator

ROWS_AT_ONCE = 2048
"""Draws in one Ray dataset; a run hands its draws over in such pieces (0.7 ms a draw, measured)."""


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
    """CPUs that this rank's decoding tasks may take together."""


def open_stream(config: TrainConfig, cases: Sequence[Case], share: Share) -> Iterator[Batch]:
    """The batches of one rank, in the order of the plan; one a step."""
    plan = Plan(len(cases), config.optim.global_batch, config.run.seed)
    draws = plan.draws(rank=share.rank, world=share.world, start=share.start, stop=share.stop)
    batch_size = config.optim.global_batch // share.world
    piece = max(1, ROWS_AT_ONCE // batch_size) * batch_size
    task = _PatchTask(config, tuple(cases), plan)
    while rows := [{"draw": draw} for draw in islice(draws, piece)]:
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
        dataset = dataset.map(task, num_cpus=config.data.cpus_per_task)
        _settle(dataset.context, share, config.data.cpus_per_task)
        yield from dataset.iter_torch_batches(
            batch_size=batch_size,
            prefetch_batches=config.data.prefetch_batches,
            collate_fn=_ToBatch(),
        )


class _PatchTask:
    """Runs in a Ray task: one draw -> one patch with its normalisation."""

    def __init__(self, config: TrainConfig, cases: tuple[Case, ...], plan: Plan) -> None:
        self._config, self._cases, self._plan = config, cases, plan

    def __call__(self, row: dict[str, int]) -> dict[str, np.ndarray | int]:
        data, draw = self._config.data, int(row["draw"])
        case = self._cases[self._plan.case_of(draw)]
        prepared = prepare_case(case, data.modalities, data.normalisation)
        assert prepared.labels is not None, "training cases have labels"
        rule = PatchRule(data.patch_size, data.foreground_share)
        corner = choose_corner(prepared.labels, rule, generator(self._plan.seed, draw, 0))
        image, labels = cut(prepared, corner, data.patch_size)
        return {
            "image": image,
            "labels": labels,
            "gain": prepared.gain,
            "bias": prepared.bias,
            "background": prepared.background,
            "draw": draw,
        }


class _ToBatch(NumpyBatchCollateFn):
    """Columns to tensors; copied where the column is a read-only view of shared memory."""

    def __call__(self, columns: dict[str, np.ndarray]) -> Batch:
        return Batch(**{name: torch.from_numpy(_own(column)) for name, column in columns.items()})


def _own(column: np.ndarray) -> np.ndarray:
    return column if column.flags.writeable else column.copy()


def _settle(context: DataContext, share: Share, cpus_per_task: float) -> None:
    limit = ExecutionResources(cpu=max(share.cpus, cpus_per_task))
    context.execution_options = ExecutionOptions(preserve_order=True, resource_limits=limit)
    context.enable_progress_bars = False
    context.target_max_block_size = 32 * 2**20  # about one patch: a block of one row is not copied
    context.execution_no_progress_timeout_s = 300
