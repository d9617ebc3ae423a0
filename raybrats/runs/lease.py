"""The name of a run belongs to one driver at a time: lease.json, beside the checkpoints.

A holder renews its lease by counting up. Clocks of two machines are never compared: a lease is dead
when its process is, where that can be seen, or when it was watched for long and did not change.
"""

import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from threading import Event, Thread

from pydantic import TypeAdapter

from raybrats import storage
from raybrats.errors import MissingObjectError, StorageError, UsageError

_LOG = logging.getLogger(__name__)
NAME = "lease.json"
RENEW_S = 5.0
"""Seconds between renewals: two requests each, so a run of a day costs some 35,000 cheap ones."""
EXPIRY_S = 20.0
"""Seconds until a lease that does not change is dead: three renewals may fail in a row."""
_LAST_RENEWAL_S = 5.0
"""Seconds to wait at the end for a renewal under way; then the lease is left to expire."""
_LOOKS = 20
"""Looks at a lease that is watched; counted, so that an outage of the store is no sign of death."""

_OURS: set[str] = set()
"""Tokens of this process; another one with its pid is what an earlier run could not remove."""
_TURNS = 10
"""Tries, for the holder may have ended or two taken over at once; each is rare."""


@dataclass(frozen=True)
class Lease:
    """Who holds a run."""

    token: str
    """Random; no two holders have the same."""
    host: str
    boot: str | None
    """Kernel's id of this boot, for a host's name is neither unique nor tells a restart."""
    pid_namespace: str | None
    """Kernel's id of the pids' namespace: in another container the same pid is another process."""
    pid: int
    started: int | None
    """Start of the process in clock ticks after boot, for pids are used again."""
    since: str
    """When, by the holder's clock: to be read by people only."""
    renewals: int

    def __post_init__(self) -> None:
        words = self.host + self.since
        if not 0 < self.pid < 2**31 or len(words) > 500 or not words.isprintable():
            raise ValueError("not a lease")

    @property
    def data(self) -> bytes:
        """What is stored."""
        return json.dumps(asdict(self), indent=1).encode()

    @property
    def place(self) -> tuple[str | None, ...]:
        """Where its pid means something."""
        return self.host, self.boot, self.pid_namespace


@contextmanager
def held(run_uri: str, on_lost: Callable[[str], None]) -> Generator[None]:
    """Holds the run for this process, renewing the lease from a thread.

    If another driver has taken it over nevertheless, say because this process was stopped for
    long, `on_lost` is called once, from that thread, with a line of words.

    Raises:
        UsageError: another driver holds it and is alive.
        StorageError: the lease is out of reach.

    Example:
        >>> with held("runs/one", print):
        ...     storage.exists("runs/one/lease.json")
        True
    """
    uri = storage.join(run_uri, NAME)
    mine = _own()
    ended = Event()
    thread = Thread(target=_keep, args=(uri, mine, on_lost, ended), name="lease", daemon=True)
    _OURS.add(mine.token)
    try:
        _take(uri, mine)
        thread.start()
        yield
    finally:
        ended.set()
        if thread.ident is not None:
            thread.join(_LAST_RENEWAL_S)
            if not thread.is_alive():  # a renewal that hangs would undo the removal
                _release(uri, mine)
        _OURS.discard(mine.token)


def _take(uri: str, mine: Lease) -> None:
    """Returns once the lease is ours; refuses if it is of one who lives."""
    for _ in range(_TURNS):
        if storage.create(uri, mine.data):
            return
        seen = _read(uri)
        if seen is None:  # its holder has ended just now
            continue
        if _dead(uri, seen, mine):
            if _take_over(uri, seen, mine):
                return
        elif (now := _read(uri)) is not None:
            name = storage.name(_run(uri))
            raise UsageError(
                f"run {name} is held by {_words(_parse(now))}; choose another run.name, or wait "
                f"for its end ({uri})"
            )
    raise StorageError(f"{uri}: can be neither created nor read; is there a folder or a link?")


def _dead(uri: str, seen: bytes, mine: Lease) -> bool:
    lease = _parse(seen)
    if lease and lease.started is not None and None not in mine.place and lease.place == mine.place:
        own = (lease.pid, lease.started) == (mine.pid, mine.started)
        return lease.token not in _OURS if own else not _lives(lease.pid, lease.started)
    _LOG.warning(
        "waiting up to %g s for %s, who holds %s, to show life", EXPIRY_S, _words(lease), _run(uri)
    )
    for _ in range(_LOOKS):
        time.sleep(EXPIRY_S / _LOOKS)
        if _read(uri) != seen:
            return False
    return True


def _take_over(uri: str, seen: bytes, mine: Lease) -> bool:
    """Writes our lease over a dead one; whether ours is the one that stands.

    Whoever else saw the dead one has written by the time that we read, or has been too slow.
    """
    looked = time.monotonic()
    if _read(uri) != seen:
        return False
    storage.write_bytes(uri, mine.data)
    if time.monotonic() - looked < storage.WRITE_RACE_S:
        time.sleep(storage.WRITE_RACE_S)
        return _is(_read(uri), mine)
    # Too slow: this may have overwritten one who had read and begun. It puts its lease back when it
    # renews, and whoever does not within EXPIRY_S is dead.
    _release(uri, mine)
    _LOG.warning("waiting %g s, for %s was slow to write", EXPIRY_S, uri)
    time.sleep(EXPIRY_S)
    return False


def _keep(uri: str, mine: Lease, on_lost: Callable[[str], None], ended: Event) -> None:
    """Renews the lease until the end, or until it is another's."""
    while not ended.wait(RENEW_S):
        mine = replace(mine, renewals=mine.renewals + 1)
        taker = _renew(uri, mine)
        if taker is not None:
            on_lost(f"{_run(uri)} has been taken over by {_words(taker)}")
            return


def _renew(uri: str, mine: Lease) -> Lease | None:
    """Stores the lease, unless it is another's now, who is returned."""
    with suppress(StorageError):  # no loss: the next turn tries again
        looked = time.monotonic()
        data = _read(uri)
        lease = _parse(data or b"")
        if lease and lease.token != mine.token:
            return lease
        if time.monotonic() - looked > RENEW_S:  # what was read may be long past: look again first
            return None
        if data is None:  # removed by hand, or by one who was too slow to take it over
            storage.create(uri, mine.data)
        else:
            storage.write_bytes(uri, mine.data)
    return None


def _release(uri: str, mine: Lease) -> None:
    with suppress(StorageError):  # what is left is taken over, as of any process that has ended
        if _is(_read(uri), mine):
            storage.delete(uri)


def _read(uri: str) -> bytes | None:
    try:
        return storage.read_bytes(uri)
    except MissingObjectError:
        return None


def _parse(data: bytes) -> Lease | None:
    """The lease; None if it is damaged, which is nobody's that could be asked."""
    try:
        return TypeAdapter(Lease).validate_json(data, strict=True)
    except ValueError:
        return None


def _is(data: bytes | None, mine: Lease) -> bool:
    lease = _parse(data or b"")
    return lease is not None and lease.token == mine.token


def _words(lease: Lease | None) -> str:
    if lease is None:
        return "someone whose lease is damaged"
    return f"process {lease.pid} on {lease.host} since {lease.since}"


def _run(uri: str) -> str:
    return uri.removesuffix(f"/{NAME}")


def _own() -> Lease:
    boot = namespace = None
    with suppress(OSError):  # elsewhere than on Linux
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    stat = _stat(os.getpid())
    return Lease(
        token=uuid.uuid4().hex,
        host=socket.gethostname(),
        boot=boot,
        pid_namespace=namespace,
        pid=os.getpid(),
        started=stat[1] if stat else None,
        since=datetime.now().astimezone().isoformat(" ", "seconds"),
        renewals=0,
    )


def _lives(pid: int, started: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    stat = _stat(pid)
    if stat is None:  # hidden, as /proc can hide the processes of others
        return True
    return stat[0] not in "ZX" and stat[1] == started


def _stat(pid: int) -> tuple[str, int] | None:
    """State of a process (Z and X: it has ended) and its start in clock ticks after boot."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[19])
