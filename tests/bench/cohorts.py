"""A large cohort out of few cases, and what the processes below this one cost."""

import itertools
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from raybrats import storage
from raybrats.data.cohort.case import Case

_TICKS = os.sysconf("SC_CLK_TCK")


def repeated(cases: Sequence[Case], count: int, folder: Path) -> list[Case]:
    """`count` cases with files and digests of their own, so that each has its own cache entry.

    The files are copies that differ in the time field of the gzip header alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sources = [[Path(uri).read_bytes() for uri in (*c.image_uris, c.label_uri)] for c in cases]
    made = []
    for number in range(count):
        case, files = cases[number % len(cases)], sources[number % len(cases)]
        uris, digests = [], []
        for place, data in enumerate(files):
            copy = data[:4] + number.to_bytes(4, "little") + data[8:]
            uris.append(str(folder / f"{number:05d}_{place}.nii.gz"))
            Path(uris[-1]).write_bytes(copy)
            digests.append(storage.digest_of(copy))
        made.append(
            replace(
                case,
                case_id=f"case-{number:05d}",
                subject=f"case-{number:05d}",
                image_uris=tuple(uris[:-1]),
                label_uri=uris[-1],
                digests=tuple(digests),
            )
        )
    return made


class Meter:
    """CPU-seconds of this process and all below it, those that end meanwhile included.

    Processes are looked at four times a second, so one that ends takes a quarter of a second with
    it at most; waiting for children alone would miss those that Ray's daemon starts and ends.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[int, str], float] = {}
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Meter":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def seconds(self) -> float:
        """User and system time so far."""
        with self._lock:
            for pid in descendants():
                fields = _fields(Path(f"/proc/{pid}/stat"))
                if fields:
                    self._seen[pid, fields[19]] = sum(map(int, fields[11:13])) / _TICKS
            return sum(self._seen.values())

    def _watch(self) -> None:
        while not self._stop.wait(0.25):
            self.seconds()


def descendants() -> list[int]:
    """This process and all below it."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        fields = _fields(stat)
        if fields:
            children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = [os.getpid()]
    for pid in found:  # grows while it is walked
        found.extend(children.get(pid, []))
    return found


def memory_mb() -> dict[str, float]:
    """Proportional share of memory of the same processes, in 10^6 bytes, by kind."""
    sums = dict.fromkeys(("Pss_Anon", "Pss_Shmem", "Pss_File"), 0)
    for pid in descendants():
        for kind, kilobytes in _smaps(pid):
            if kind in sums:
                sums[kind] += kilobytes
    anonymous, shared, files = (1024 * kilobytes / 1e6 for kilobytes in sums.values())
    return {"private": anonymous, "store": shared, "mapped": files}


def _smaps(pid: int) -> Iterator[tuple[str, int]]:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return
    for line in itertools.islice(lines, 1, None):
        kind, kilobytes = line.split()[:2]
        yield kind.rstrip(":"), int(kilobytes)


def _fields(stat: Path) -> list[str]:
    """State, parent, ... of a process: what follows its name; empty when it has ended."""
    try:
        return stat.read_text().rpartition(")")[2].split()
    except OSError:
        return []
