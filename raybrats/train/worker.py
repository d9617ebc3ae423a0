"""What each Ray Train worker runs: its own stream, the loop, its share of the validation."""

import logging
import math
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, field, fields
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel

from raybrats.brats import REGIONS
from raybrats.config import TrainConfig
from raybrats.data.cache import Tally, prepared
from raybrats.data.case import Case
from raybrats.data.prepare import Prepared
from raybrats.data.stream import Share, Stream
from raybrats.model.network import weights_of
from raybrats.registry.tracking import MetricLog
from raybrats.train import checkpoint, loop
from raybrats.train.job import Job

LOG_EVERY_STEPS = 10


@dataclass
class _Pace:
    """Where the time of the steps goes, but for the first one, which waits for the stream."""

    steps: int = 0
    seconds: float = 0.0
    wait_s: float = 0.0
    losses: list[torch.Tensor] = field(default_factory=list)

    def add(self, loss: torch.Tensor, seconds: float, wait_s: float, first: bool) -> None:
        self.losses.append(loss)
        if not first:
            self.steps, self.seconds = self.steps + 1, self.seconds + seconds
            self.wait_s += wait_s

    def figures(self, global_batch: int) -> dict[str, float]:
        seconds = max(self.seconds, 1e-9)
        return {
            "patches_per_s": self.steps * global_batch / seconds,
            "data_wait_fraction": self.wait_s / seconds,
        }


def work(job: Job) -> dict[str, Any]:
    """Trains from the newest good checkpoint to the last step; what was reported last.

    `unsent` tells why metrics did not reach MLflow, if some did not; `uncached` counts the cases
    that a node could not keep.
    """
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(math.ceil(job.config.cluster.cpus_per_worker))
    learner = loop.new_learner(job.config, device)
    metrics = _resume(job, learner, rank)
    if world > 1:
        ids = [device.index] if device.type == "cuda" else None
        learner.network = DistributedDataParallel(learner.bare, device_ids=ids)
    if learner.step >= job.config.optim.steps:
        return {"step": learner.step, **metrics}
    log = MetricLog(job.tracking) if rank == 0 else None
    share = Share(rank, world, learner.step, job.config.optim.steps, job.data_cpus)
    last = _run(job, learner, share, log)
    if log is not None:
        log.close()
        last |= {"unsent": log.failed} if log.failed else {}
    return last


def _run(job: Job, learner: loop.Learner, share: Share, log: MetricLog | None) -> dict[str, float]:
    """Steps, with validation, checkpoint and report every so many of them and at the end."""
    config, pace, last = job.config, _Pace(), {}
    stream = Stream(config, job.train_cases, share)
    batches = iter(stream)
    while learner.step < config.optim.steps:
        began = time.perf_counter()
        batch = next(batches)
        ready = time.perf_counter()
        loss = loop.train_step(learner, batch)
        ended = time.perf_counter()
        pace.add(loss, ended - began, ready - began, first=learner.step == share.start + 1)
        due = learner.step % config.validation.every_steps == 0
        if learner.step % LOG_EVERY_STEPS == 0 or learner.step == config.optim.steps:
            last["uncached"] = _tell(job, learner, pace, log, stream.tally)
        if due or learner.step == config.optim.steps:
            last |= _validate_and_save(job, learner, share, pace, log)
    return last


def _tell(job: Job, learner: loop.Learner, pace: _Pace, log: MetricLog | None, tally: Tally) -> int:
    """Mean loss of all ranks since the last time, and the pace, to MLflow and to the driver.

    Returns the cases that no node could keep in its cache.
    """
    counts = torch.tensor(astuple(tally), dtype=torch.float32, device=learner.device)
    sums = torch.cat([torch.stack(pace.losses).mean()[None], counts])
    pace.losses.clear()
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
        sums[0] /= torch.distributed.get_world_size()
    if log is None:
        return 0
    loss, *totals = sums.tolist()
    figures = pace.figures(job.config.optim.global_batch)
    rate = loop.learning_rate(job.config.optim, learner.step - 1)
    cached = {f"cache/{f.name}": n for f, n in zip(fields(Tally), totals, strict=True)}
    log.log({"train/loss": loss, "train/lr": rate, **figures, **cached}, learner.step)
    if job.board is not None:
        remark = f"loss {loss:.3f}, {figures['patches_per_s']:.1f} patches/s"
        job.board.post.remote(learner.step, remark)
    return int(cached["cache/failed"])


def _validate_and_save(
    job: Job, learner: loop.Learner, share: Share, pace: _Pace, log: MetricLog | None
) -> dict[str, float]:
    mine = _prepared(job.config, job.held_out[share.rank :: share.world])
    scores = _gather(loop.validate(learner, mine), share.world)
    means = loop.mean_scores(scores, REGIONS)
    metrics = {**means, **pace.figures(job.config.optim.global_batch)}
    if log is not None:
        log.log({f"val/dice_{name}": value for name, value in means.items()}, learner.step)
        checkpoint.write(
            job.run_uri,
            job.config,
            step=learner.step,
            weights=weights_of(learner.bare),
            state=learner.state(),
            metrics=metrics,
        )
        checkpoint.prune(job.run_uri)
    reported = {"step": learner.step, **metrics}
    ray.train.report(reported)
    return reported


def _resume(job: Job, learner: loop.Learner, rank: int) -> Mapping[str, float]:
    """Loads the checkpoint that rank 0 chose; the metrics that it was written with."""
    chosen: list[str | None] = [None]
    found = None
    if rank == 0:
        found = checkpoint.newest(job.run_uri)
        chosen = [found.uri if found else None]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(chosen, src=0)
    if chosen[0] is None:
        return {}
    found = found or checkpoint.read(chosen[0])
    learner.restore(found.weights, found.state, found.step)
    return found.metrics


def _prepared(config: TrainConfig, cases: tuple[Case, ...]) -> Iterator[Prepared]:
    """Whole cases, the next one decoded while the network works on this one."""

    def open_one(case: Case) -> Prepared:
        return prepared(case, config.data)[0]

    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = [pool.submit(open_one, case) for case in cases[:1]]
        for following in (*cases[1:], None):
            if not waiting:
                return
            ready = waiting.pop().result()
            if following is not None:
                waiting.append(pool.submit(open_one, following))
            yield ready


def _gather(scores: list[list[float]], world: int) -> list[list[float]]:
    """The scores of all cases of all ranks."""
    if world == 1:
        return scores
    everyone: list[list[list[float]]] = [[] for _ in range(world)]
    torch.distributed.all_gather_object(everyone, scores)
    return [score for rank_scores in everyone for score in rank_scores]
