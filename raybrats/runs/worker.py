"""What each Ray Train worker runs: its own stream, the loop, its part of the validation."""

import logging
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, fields
from datetime import timedelta

import ray.train
import ray.train.torch
import torch
import torch.distributed
from ray.exceptions import RayError

from raybrats import cluster, storage
from raybrats.config import TrainConfig, digest
from raybrats.data.cache import Tally, prepared
from raybrats.data.cohort.case import Case
from raybrats.data.plan import Plan
from raybrats.data.stream import Assignment, Stream
from raybrats.errors import CheckpointError, DivergedError, RaybratsError, UsageError, cause_of
from raybrats.model.cost import check_memory
from raybrats.model.inference import Uploaded, uploaded
from raybrats.model.loss import loss_of
from raybrats.model.network import num_bytes
from raybrats.runs.agree import agree
from raybrats.runs.job import INITIAL, Job, Outcome
from raybrats.runs.lead import Follower, Lead
from raybrats.train import checkpoint, loop, parts
from raybrats.train.checkpoint import Checkpoint, Written
from raybrats.train.learner import Learner, new_learner
from raybrats.train.loop import Hooks
from raybrats.train.ranks import check_precision, make_ready, world_size

PATCHES_PER_S = 100.0
"""Pace of one GPU for which batches are kept ready: what the nnU-Net network is to reach on an H200
at 128^3."""
STORE_SHARE = 0.25
"""Share of a node's object store that its workers' batches take; Ray Data takes half at most."""


def work(job: Job) -> Outcome:
    """Trains from the newest good checkpoint to the last step.

    Raises:
        RaybratsError: a cause that may have gone when Ray starts the workers again.

    Example:
        >>> work(job).step  # doctest: +SKIP
        150
    """
    try:
        agree(str, lambda _: _check(job.config))
    except UsageError as error:
        return Outcome(failure=error)
    return _work(job)


def _work(job: Job) -> Outcome:
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(math.ceil(job.config.cluster.cpus_per_worker))
    learner = new_learner(job.config, device)
    try:
        found, rejected = _resume(job, learner)
        if found is not None and found.finished:
            return Outcome(learner.step, found.metrics, rejected)
        if found is None and job.config.network.init_from:
            place = storage.join(job.run_uri, INITIAL)
            learner.begin(parts.tensors(storage.read_bytes(place), place))
        make_ready(learner)
        mine = _assignment(job, learner)
        lead = Lead(job, learner, found, rejected) if mine.rank == 0 else Follower()
        return _Worker(job, learner, mine, lead).run()
    except (DivergedError, CheckpointError) as error:  # on all ranks alike
        return Outcome(learner.step, failure=_with_cases(job, learner, error))
    except RayError as error:  # what a task of the stream raised, wrapped
        cause = cause_of(error)
        if cause is None:
            raise
        raise cause from error


def _assignment(job: Job, learner: Learner) -> Assignment:
    """What this rank takes of the plan, and where.

    Its tasks stay on its node if that has this rank's share of the cluster's CPUs.
    """
    context, there = ray.train.get_context(), cluster.this_node()
    near_by = context.get_local_world_size()
    cpus = there["CPU"] / near_by - job.config.cluster.cpus_per_worker
    return Assignment(
        rank=context.get_world_rank(),
        world=context.get_world_size(),
        start=learner.step,
        stop=job.config.optim.steps,
        cpus=job.data_cpus,
        near=cpus >= job.data_cpus,
        patches_per_s=PATCHES_PER_S if learner.device.type == "cuda" else 0.0,
        store_bytes=STORE_SHARE * there["object_store_memory"] / near_by,
    )


class _Worker:
    """One rank of a run."""

    def __init__(self, job: Job, learner: Learner, steps: Assignment, lead: Follower) -> None:
        self._job, self._learner, self._steps, self._lead = job, learner, steps, lead
        self._stream = Stream(job.config, job.train_cases, steps)
        self._cached_before = learner.cached
        # Ranks validate a case more or less, which may take longer than a step may.
        patience = timedelta(seconds=job.config.cluster.stall_s)
        several = steps.world > 1
        self._patient = torch.distributed.new_group(None, patience, "gloo") if several else None

    def run(self) -> Outcome:
        """Trains to the end of the run."""
        hooks = Hooks(self._validate, self._log, self._save, self._lead.check_in)
        failed = True
        try:
            metrics = loop.run(self._learner, self._stream, hooks)
            self._lead.finish()
            failed = False
        finally:
            self._lead.close(failed)
        lead = self._lead
        return Outcome(self._learner.step, metrics, lead.rejected, lead.uncached, lead.unsent)

    def _validate(self) -> list[list[float]]:
        mine = self._job.held_out[self._steps.rank :: self._steps.world]
        return loop.gathered(loop.validate(self._learner, self._opened(mine)), self._patient)

    def _opened(self, cases: tuple[Case, ...]) -> Iterator[Uploaded]:
        """The cases of a validation, which may be long: rank 0 checks in between them."""
        ready = _uploaded(self._job.config, cases, self._learner.device)
        for number, case in enumerate(ready, 1):
            self._lead.remark = f"validating, case {number} of {len(cases)}"
            self._lead.check_in()
            yield case

    def _log(self, figures: Mapping[str, float]) -> None:
        """Figures of steps, for which the ranks add up their tallies, or of a validation."""
        tally = {}
        if "train/loss" in figures:
            before = self._cached_before
            tally = _over_ranks(self._stream.tally, self._learner.device)
            self._learner.cached = {n: before.get(n, 0.0) + count for n, count in tally.items()}
        self._lead.log(figures, tally)

    def _save(self, metrics: Mapping[str, float], finished: bool) -> None:
        """A checkpoint, by rank 0; a validation is reported to Ray Train too, by all."""
        self._lead.save(metrics, finished)
        if metrics:
            ray.train.report({"step": self._learner.step, **metrics})


def _check(config: TrainConfig) -> None:
    """Looks whether this worker has what the run wants.

    Raises:
        UsageError: it lacks the precision, the memory, or a network or a loss of others.
    """
    device = ray.train.torch.get_device()
    check_precision(config, device)
    if config.of_others:
        _import(config)
    elif device.type == "cuda" and config.data.sampling != "volume" and not config.cluster.compile:
        # Sizes of whole cases are not known before; a compiler may keep less.
        there = torch.cuda.get_device_properties(device).total_memory
        check_memory(config, there, world_size())


def _import(config: TrainConfig) -> None:
    """Finds the network and the loss of a run where they are of others.

    Raises:
        UsageError: this node lacks one; it says how it comes to have it.
    """
    try:
        num_bytes(config)
        loss_of(config)
    except UsageError as error:
        words = "a worker has what is installed on its node and what its job brings"
        raise UsageError(f"{error}; {words}: ray job submit --working-dir .") from error


def _resume(job: Job, learner: Learner) -> tuple[Written | None, int]:
    """Loads the checkpoint that rank 0 chose; what it is, and how many newer ones were bad.

    Raises:
        RaybratsError: there were some, and none can be trusted, reached or fits; on all ranks.
    """
    held: list[Checkpoint] = []

    def choose() -> tuple[str, int]:
        found = checkpoint.newest(job.run_uri)
        if found is None and job.config.run.continue_from:
            raise CheckpointError(f"{job.run_uri} has lost the checkpoint that it goes on from")
        if found is None:
            return "", 0
        held.append(found)
        return found.uri, len(found.rejected)

    def restore(choice: tuple[str, int]) -> None:
        if choice[0] and not held:
            held.append(checkpoint.read(choice[0]))
        for found in held:
            if found.config_digest != digest(job.config):
                raise CheckpointError(f"{found.uri} was written with another configuration")
            learner.restore(found.weights, found.state, found.progress)

    _, rejected = agree(choose, restore)
    resumed = [Written(c.uri, c.step, c.metrics, c.finished) for c in held]
    return (resumed or [None])[0], rejected


def _with_cases(job: Job, learner: Learner, error: RaybratsError) -> RaybratsError:
    """The error; of a run that diverged it names the cases that it saw last."""
    if not isinstance(error, DivergedError) or not learner.skipped_in_a_row:
        return error
    config, cases = job.config, job.train_cases
    batch, draws = config.optim.global_batch, config.data.patches_per_case
    plan = Plan(len(cases), batch, config.run.seed, draws)
    numbers = {case for step in learner.skipped_in_a_row[-3:] for case in plan.cases(step)}
    names = ", ".join(cases[number].case_id for number in sorted(numbers)[:8])
    return DivergedError(f"{error} (cases of its last steps: {names})")


def _over_ranks(tally: Tally, device: torch.device) -> dict[str, float]:
    """What the node caches were good for, over all ranks, by the names of the metrics."""
    counts = torch.tensor(astuple(tally), dtype=torch.float32, device=device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(counts)
    names = (f"cache/{part.name}" for part in fields(Tally))
    return dict(zip(names, counts.tolist(), strict=True))


def _uploaded(
    config: TrainConfig, cases: tuple[Case, ...], device: torch.device
) -> Iterator[Uploaded]:
    """Whole cases, the next one decoded and copied while the network works on this one."""

    def open_one(case: Case) -> Uploaded:
        return uploaded(prepared(case, config.data)[0], device)

    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = [pool.submit(open_one, case) for case in cases[:1]]
        for following in (*cases[1:], None):
            if not waiting:
                return
            ready = waiting.pop().result()
            if following is not None:
                waiting.append(pool.submit(open_one, following))
            yield ready
