"""The Ray cluster of this process: joining it, and whether a request fits it."""

import logging
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from raybrats.errors import ResourcesError, cause_of

T = TypeVar("T")
R = TypeVar("R")

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Task workers that idle, as during a validation, are not ended after a second: new ones would
    # import everything again (measured: half of the patches a second).
    "RAY_idle_worker_killing_time_threshold_ms": "600000",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    # Keeps CUDA_VISIBLE_DEVICES of tasks that ask for no GPU.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # A worker group that cannot start fails after a minute instead of being retried for ever.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    # Workers keep the driver's working directory, so relative paths mean the same there.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}

DATA_CPUS = 1.0
"""CPUs that a run leaves to Ray Data at least; without any, Ray waits in silence."""


def connect(*, dashboard: bool = False, verbose: bool = False) -> None:
    """Joins the cluster of RAY_ADDRESS or of this job, else starts one on this machine.

    Args:
        dashboard: start it with a local cluster; Ray Tune asks it for the state of ended trials.
        verbose: pass the workers' own output on to this process.

    Raises:
        ResourcesError: the cluster of RAY_ADDRESS does not answer.

    Example:
        >>> connect()  # doctest: +SKIP
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False  # progress.py shows it
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    try:
        ray.init(
            address=address,
            logging_level=logging.ERROR,
            log_to_driver=verbose,
            # may only be given for a cluster that is started here
            include_dashboard=None if address else dashboard,
        )
    except (ConnectionError, RuntimeError) as error:
        words = str(error).splitlines()[0]
        raise ResourcesError(f"Ray cluster {address or 'on this machine'}: {words}") from error
    _protect_token()


def check_fits(*, workers: int, cpus_per_worker: float, gpu: bool, data_cpus: float) -> None:
    """Refuses a request that the cluster can never grant.

    Args:
        workers: those of one run.
        cpus_per_worker: what each reserves.
        gpu: whether each also takes one GPU.
        data_cpus: what one decoding task takes; `DATA_CPUS` are left at least.

    Raises:
        ResourcesError: with the figures and the field to change.

    Example:
        >>> check_fits(workers=64, cpus_per_worker=8, gpu=True, data_cpus=0.5)  # doctest: +SKIP
        Traceback (most recent call last):
        ...
        raybrats.errors.ResourcesError: 64 workers with one GPU each, but the cluster has 8 ...
    """
    have = resources()
    spare = max(DATA_CPUS, data_cpus)
    cpus = workers * cpus_per_worker + spare
    if gpu and workers > have["GPU"]:
        raise ResourcesError(
            f"{workers} workers with one GPU each, but the cluster has {have['GPU']:g} GPUs; "
            "lower cluster.workers or set cluster.device to cpu"
        )
    if cpus > have["CPU"]:
        raise ResourcesError(
            f"{workers} workers x {cpus_per_worker:g} CPUs + {spare:g} for decoding make {cpus:g}, "
            f"but the cluster has {have['CPU']:g} CPUs; "
            "lower cluster.workers or cluster.cpus_per_worker"
        )


def resources() -> dict[str, float]:
    """CPUs and GPUs of the whole cluster.

    Example:
        >>> resources()  # doctest: +SKIP
        {'CPU': 16.0, 'GPU': 1.0}
    """
    import ray

    total = ray.cluster_resources()
    return {kind: float(total.get(kind, 0.0)) for kind in ("CPU", "GPU")}


def each(
    function: Callable[[T], R], items: Sequence[T], *, num_cpus: float, memory: int
) -> Iterator[R]:
    """What a function makes of every item, as cluster tasks, in the order in which they end.

    No more are in flight than keep the cluster busy, so memory does not grow with the items.

    Args:
        function: is called in another process.
        items: one a task.
        num_cpus: CPUs that a task reserves.
        memory: bytes that a task reserves.

    Raises:
        RaybratsError: the first that the function raises.

    Example:
        >>> sorted(each(abs, [-2, 1], num_cpus=1, memory=2**20))  # doctest: +SKIP
        [1, 2]
    """
    import ray.exceptions

    task = ray.remote(num_cpus=num_cpus, memory=memory, max_retries=2)(function)
    in_flight = max(2, int(2 * resources()["CPU"] / num_cpus))
    waiting, running = list(reversed(items)), []
    while waiting or running:
        while waiting and len(running) < in_flight:
            running.append(task.remote(waiting.pop()))
        done, running = ray.wait(running, num_returns=1)
        try:
            yield from ray.get(done)
        except ray.exceptions.RayTaskError as error:
            if (cause := cause_of(error)) is not None:
                raise cause from error  # its own words, not the traceback around them
            raise


def _protect_token() -> None:
    """Ray writes its token readable for all; whoever has it runs code as this user."""
    token = Path.home() / ".ray" / "auth_token"
    if token.is_file() and token.stat().st_uid == os.getuid():
        token.chmod(stat.S_IRUSR | stat.S_IWUSR)
