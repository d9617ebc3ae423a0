"""Ranks as processes without Ray, over the same draws: what a run does between two faults."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from raybrats.config import (
    AugmentConfig,
    DataConfig,
    NetworkConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    ValidationConfig,
)
from raybrats.data.batch import Batch, collate
from raybrats.data.patch import PatchRule, draw_patch, to_row
from raybrats.data.plan import Plan
from raybrats.data.prepare import Prepared, prepare
from raybrats.model.inference import uploaded
from raybrats.phantom.phantom import make_phantom
from raybrats.train import checkpoint, loop
from raybrats.train.learner import Learner, new_learner
from raybrats.train.loop import Hooks
from raybrats.train.ranks import make_ready
from raybrats.train.saver import Saver
from raybrats.train.step import train_step

CPU = torch.device("cpu")
SIZE = (16, 16, 16)
CONFIG = TrainConfig(
    data=DataConfig(patch_size=SIZE),
    augment=AugmentConfig(rotation=0.0, scale=0.0, elastic=0.0),
    network=NetworkConfig(widths=(4, 8, 8), deep_supervision=1),
    optim=OptimConfig(lr=1e-2, steps=12, global_batch=2),
    validation=ValidationConfig(every_steps=6),
    run=RunConfig(save_every_steps=2),
)

CASES = [prepare(*make_phantom(index, shape=(32, 32, 24))) for index in range(5)]

_FORKS = multiprocessing.get_context("forkserver")
# torch and MONAI are imported once, not in every rank; so is what an optimiser imports when made
_FORKS.set_forkserver_preload(["raybrats.train.saver", "torch._dynamo"])


def together(world: int, function: Callable[..., None], *arguments: Any) -> list[int]:
    """Runs function(rank, world, cases, *arguments) in as many processes; their exit codes."""
    processes = [
        _FORKS.Process(target=function, args=(rank, world, CASES, *arguments))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        if process.is_alive():
            process.kill()
            raise TimeoutError(f"rank {processes.index(process)} of {world} has not ended")
    return [process.exitcode for process in processes]


def batches(config: TrainConfig, cases: list[Prepared], ranks: tuple[int, int, int]) -> Iterator:
    """What the stream gives a rank, made in this process: (rank, world, first step)."""
    rank, world, start = ranks
    plan = Plan(len(cases), config.optim.global_batch, config.run.seed)
    rule = PatchRule(config.data, config.data.patch_size, config.run.seed, config.classes)
    steps = plan.visits(rank=rank, world=world, start=start, stop=config.optim.steps)
    for visits in steps:
        rows = []
        for visit in visits:
            case, (draw,) = cases[visit.case], visit.draws
            patch = draw_patch(case, rule, draw=draw, case=visit.case, ordinal=visit.ordinal)
            rows.append(to_row(case, patch, draw))
        yield collate(rows)


def train_rank(
    rank: int,
    world: int,
    cases: list[Prepared],
    folder: Path,
    config: TrainConfig,
    kill_at: int = 0,
) -> None:
    """A rank of a run below `folder`; killed after step `kill_at`, whatever it is doing beside.

    It appends a line to <folder>/history-<rank> for each batch, the step and its draws, and one to
    <folder>/losses-<rank> for each step, its loss over all ranks.
    """
    torch.set_num_threads(1)
    if world > 1:
        meeting = f"file://{folder}/meeting-{world}-{kill_at}"
        torch.distributed.init_process_group(
            "gloo", init_method=meeting, rank=rank, world_size=world
        )
    learner = new_learner(config, CPU)
    found = checkpoint.newest(str(folder))
    if found is not None:
        learner.restore(found.weights, found.state, found.progress)
    if world > 1:
        torch.distributed.barrier()  # nobody writes before all have read
    make_ready(learner)
    saver = Saver(str(folder), resumed=found)
    loop.LOG_EVERY_STEPS = 1
    given = batches(config, cases, (rank, world, learner.step))
    hooks = _hooks(learner, rank, (cases, folder, saver), kill_at)
    loop.run(learner, _noted(given, learner.step, folder / f"history-{rank}"), hooks)
    saver.close()


def _noted(given: Iterator[Batch], start: int, history: Path) -> Iterator[Batch]:
    for step, batch in enumerate(given, start):
        with history.open("a") as lines:
            lines.write(f"{step} {' '.join(map(str, batch.draw.tolist()))}\n")
        yield batch


def _hooks(
    learner: Learner, rank: int, around: tuple[list[Prepared], Path, Saver], kill_at: int
) -> Hooks:
    cases, folder, saver = around

    def log(figures: Mapping[str, float]) -> None:
        if "train/loss" in figures:
            with (folder / f"losses-{rank}").open("a") as lines:
                lines.write(f"{learner.step - 1} {figures['train/loss']!r}\n")

    def save(metrics: Mapping[str, float], finished: bool) -> None:
        if rank == 0:
            saver.save(learner, metrics, finished)

    def check_in() -> None:
        if kill_at and learner.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def validate() -> list[list[float]]:
        mine = [uploaded(case, CPU) for case in cases[:1][rank:]]
        return loop.gathered(loop.validate(learner, mine))

    return Hooks(validate, log, save, check_in)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of the newest checkpoint of a run."""
    found = checkpoint.newest(str(folder))
    assert found is not None, "the run has a checkpoint"
    return found.weights


def losses(folder: Path) -> dict[int, float]:
    """Of each step, the last time that it was done."""
    lines = (line.split() for line in (folder / "losses-0").read_text().splitlines())
    return {int(step): float(loss) for step, loss in lines}


def draws(folder: Path, world: int, stop: int) -> list[list[int]]:
    """The draws of each step over all ranks, in order, as the surviving weights have seen them."""
    done: dict[int, dict[int, list[int]]] = {}
    for rank in range(world):
        for line in (folder / f"history-{rank}").read_text().splitlines():
            step, *seen = map(int, line.split())
            done.setdefault(step, {})[rank] = seen
    return [sorted(chain.from_iterable(done[step].values())) for step in range(stop)]


def steps(config: TrainConfig, count: int) -> tuple[Learner, list[float]]:
    """A learner after so many steps in this process, and their losses."""
    learner, given = new_learner(config, CPU), batches(config, CASES, (0, 1, 0))
    return learner, [float(train_step(learner, next(given))) for _ in range(count)]
