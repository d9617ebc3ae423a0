"""The Ray cluster of this process: joining it, and whether a request fits it."""

import logging
import os
import re
import secrets
import socket
import stat
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TypeVar

from raybrats.errors import ResourcesError, cause_of
from raybrats.signals import handlers_kept, sigterm_spares_children

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
    # Ray's native code reports on stderr what is no error of the user's, as that an actor may not
    # be able to restart; what is one comes as an exception.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    # Where several tasks fail the first is told; Ray tells the others by a traceback each.
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
}

_CONNECT_S, _ANSWER_S = 5.0, 10.0
"""Seconds that the cluster has to accept a connection, and to answer the first words on it."""
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""How every gRPC connection begins (RFC 9113, 3.4), settings that say nothing included."""
_SETTINGS = 4
"""Kind of the frame with which every server of gRPC answers."""

_OTHER_TOKEN = "its token is another; set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH as its nodes do"
DATA_CPUS = 1.0
"""CPUs that a run leaves to Ray Data at least; without any, Ray waits in silence."""


def connect(*, dashboard: bool = False, verbose: bool = False) -> None:
    """Joins the cluster of RAY_ADDRESS or of this job, else starts one on this machine.

    Args:
        dashboard: start it with a local cluster; Ray Tune asks it for the state of ended trials.
        verbose: pass the workers' own output on to this process.

    Raises:
        ResourcesError: the cluster of RAY_ADDRESS does not answer, which is known within 30 s.

    Example:
        >>> connect()  # doctest: +SKIP
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    import ray.data
    from ray._private import worker

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False  # progress.py shows it
    if ray.is_initialized():
        return
    address = checked_address()
    if address is None:
        _make_token()
    # What nodes say of themselves goes there too, coloured: that many processes have started.
    setattr(worker, "_worker_logs_enabled", verbose)  # noqa: B010 - typed as a constant
    told: list[bytes] = []
    try:
        spared = nullcontext() if address else sigterm_spares_children()
        with handlers_kept(), _held_back(told), spared:
            ray.init(
                address=address or "local",
                logging_level=logging.ERROR,
                log_to_driver=verbose,
                # may only be given for a cluster that is started here
                include_dashboard=None if address else dashboard,
            )
    except Exception as error:  # Ray raises this very kind where a node does not come up in time
        stranger = any(b"InvalidAuthToken" in line for line in told)
        reason = _OTHER_TOKEN if stranger else str(error)
        raise _no_cluster(address or "on this machine", reason) from error
    _protect_token()


def checked_address() -> str | None:
    """Where the cluster is that this process joins, and answers; None: none, one is started here.

    Ray itself waits for minutes for one that does not answer, in native code that heeds no signal.

    Raises:
        ResourcesError: it does not answer, or RAY_ADDRESS is no address.

    Example:
        >>> checked_address()  # doctest: +SKIP
        '127.0.0.1:6379'
    """
    from ray._private import services

    wanted = os.environ.get("RAY_ADDRESS", "").strip()
    if wanted == "local":
        return None
    try:  # as Ray looks for one; its files may name one that is gone
        # Ray annotates a str, and says itself what None means.
        found = services.get_ray_address_from_environment(wanted or None, None)  # ty: ignore[invalid-argument-type]
    except ConnectionError as error:
        raise _no_cluster(wanted, str(error)) from None
    if found is None:
        return None
    match = re.fullmatch(r"(?:ray://)?(\[[\da-fA-F:.]+\]|[^\s:/@]+):(\d{1,5})/?", found)
    if not match or not 0 < int(match[2]) < 2**16:
        raise _no_cluster(found, "no address such as 10.0.0.1:6379; correct RAY_ADDRESS")
    if reason := _silence(match[1].strip("[]"), int(match[2])):
        raise _no_cluster(found, f"{reason}; start it, or correct or unset RAY_ADDRESS")
    return found


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


def this_node() -> dict[str, float]:
    """CPUs, GPUs and bytes of the object store of the node on which this process runs.

    Example:
        >>> this_node()  # doctest: +SKIP
        {'CPU': 16.0, 'GPU': 1.0, 'object_store_memory': 38000000000.0}
    """
    import ray

    here = ray.get_runtime_context().get_node_id()
    (found,) = [node["Resources"] for node in ray.nodes() if node["NodeID"] == here]
    kinds = ("CPU", "GPU", "object_store_memory")
    return {kind: float(found.get(kind, 0.0)) for kind in kinds}


def each(
    function: Callable[[T], R], items: Sequence[T], *, num_cpus: float, memory: int
) -> Iterator[R]:
    """What a function makes of every item, as cluster tasks, in the order in which they end.

    No more are in flight than keep the cluster busy, so memory does not grow with the items. The
    cluster is joined with the first of them, so that whatever is wrong before costs no Ray.

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

    connect()
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


@contextmanager
def _held_back(told: list[bytes]) -> Generator[None]:
    """Within it stderr is held back; what Ray says of its log level and its tries is left out.

    It is native code that says so, to the descriptor; `told` gets it line by line.
    """
    with tempfile.TemporaryFile() as held:
        own = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(own, 2)
            os.close(own)
            held.seek(0)
            told += held
            noise = (b"RAY_BACKEND_LOG_LEVEL", b"gcs_client.cc")
            with suppress(OSError):
                os.write(2, b"".join(n for n in told if not any(word in n for word in noise)))


def _silence(host: str, port: int) -> str:
    """Why nobody there speaks gRPC, as Ray does; empty if somebody does."""
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_S) as link:
            if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
                return ""  # it would not understand, and answers Ray
            link.settimeout(_ANSWER_S)
            link.sendall(_GREETING)
            frame = link.recv(9)
    except TimeoutError:
        return "no answer"
    except (OSError, UnicodeError) as error:
        return getattr(error, "strerror", None) or str(error)
    return "" if frame[3:4] == bytes((_SETTINGS,)) else "what answers there is not Ray"


def _no_cluster(where: str, reason: str) -> ResourcesError:
    first, *_ = reason.splitlines() or ["no words"]
    return ResourcesError(f"Ray cluster {where}: {first}")


def _make_token() -> None:
    """Makes Ray's token where Ray would, but readable for its owner alone from the first moment."""
    named = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    place = Path.home() / ".ray" / "auth_token"
    if named or os.environ.get("RAY_AUTH_MODE", "token").lower() != "token" or place.exists():
        return
    with suppress(OSError):  # Ray meets the same, and says so
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=place.parent) as aside:  # its mode is 0600
            aside.write(secrets.token_hex(32))
            aside.flush()
            os.link(aside.name, place)  # whole at once; one that somebody has made meanwhile stays


def _protect_token() -> None:
    """Ray has written tokens readable for all; whoever has it runs code as this user."""
    token = Path.home() / ".ray" / "auth_token"
    if token.is_file() and token.stat().st_uid == os.getuid():
        token.chmod(stat.S_IRUSR | stat.S_IWUSR)
