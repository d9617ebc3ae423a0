"""The Ray cluster of this process: joining it, and whether a request fits it."""

import os
import stat
from pathlib import Path

from raybrats.errors import ResourcesError

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    # Keeps CUDA_VISIBLE_DEVICES of tasks that ask for no GPU.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # A worker group that cannot start is told so in a minute instead of being retried for ever.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    # Workers keep the driver's working directory, so relative paths mean the same there.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}

DATA_CPUS = 1.0
"""CPUs that a run leaves to Ray Data at least; without any, Ray waits in silence."""


def connect(*, dashboard: bool = False) -> None:
    """Joins the cluster of RAY_ADDRESS or of this job, else starts one on this machine.

    Args:
        dashboard: start it with a local cluster; Ray Tune asks it for the state of ended trials.

    Raises:
        ResourcesError: the cluster of RAY_ADDRESS does not answer.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    try:
        ray.init(address=address, logging_level="WARNING", include_dashboard=_wanted(dashboard))
    except (ConnectionError, RuntimeError) as error:
        words = str(error).splitlines()[0]
        raise ResourcesError(f"Ray cluster {address or 'on this machine'}: {words}") from error
    _protect_token()


def check_fits(*, workers: int, cpus_per_worker: float, gpu: bool, streams: int = 1) -> None:
    """Refuses a request that the cluster can never grant.

    Args:
        workers: of one run.
        cpus_per_worker: that each reserves.
        gpu: whether each also takes one GPU.
        streams: runs at a time; each leaves `DATA_CPUS` to Ray Data.

    Raises:
        ResourcesError: with the figures and the field to change.
    """
    have = resources()
    gpus, cpus = workers * streams, streams * (workers * cpus_per_worker + DATA_CPUS)
    if gpu and gpus > have["GPU"]:
        raise ResourcesError(
            f"{gpus} workers with one GPU each, but the cluster has {have['GPU']:g} GPUs; "
            "lower cluster.workers or set cluster.device to cpu"
        )
    if cpus > have["CPU"]:
        raise ResourcesError(
            f"{workers} workers x {cpus_per_worker:g} CPUs + {DATA_CPUS:g} for decoding"
            f"{f', {streams} runs at a time,' if streams > 1 else ''} make {cpus:g}, "
            f"but the cluster has {have['CPU']:g} CPUs; "
            "lower cluster.workers or cluster.cpus_per_worker"
        )


def resources() -> dict[str, float]:
    """CPUs and GPUs of the whole cluster."""
    import ray

    total = ray.cluster_resources()
    return {kind: float(total.get(kind, 0.0)) for kind in ("CPU", "GPU")}


def _wanted(dashboard: bool) -> bool | None:
    """`include_dashboard` may only be given for a cluster that is started here."""
    return None if os.environ.get("RAY_ADDRESS") else dashboard


def _protect_token() -> None:
    """Ray writes its token readable for all; whoever has it runs code as this user."""
    token = Path.home() / ".ray" / "auth_token"
    if token.is_file() and token.stat().st_uid == os.getuid():
        token.chmod(stat.S_IRUSR | stat.S_IWUSR)
