"""Prepared cases on the node's own disk, shared by all workers, trials and jobs of the node.

An entry is one file, written aside and renamed, and read as a memory map, so a patch costs a copy
of its own bytes. Whatever fails here costs speed, never a run.
"""

import fcntl
import hashlib
import json
import logging
import mmap
import os
import re
import shutil
import stat
import tempfile
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path

from raybrats.config import DataConfig
from raybrats.data.cohort.case import Case, prepare_case
from raybrats.data.entry import decode, encode
from raybrats.data.nifti.memory import keep_freed
from raybrats.data.prepare import Prepared

VERSION = 2
"""Version of what `prepare` makes and how it is kept; entries of another one are not found."""
_REST_S = 60.0
"""Seconds until a process tries again to write after the disk was full."""
_STALE_S = 3600.0
"""Seconds after which the writer of a file written aside is taken for dead."""
_LOCKS = 256
"""Most cases that are prepared at once on a node; two of one lock wait for each other."""
_ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors")
"""Names of entries; whatever else lies in the folder is not ours to remove."""
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_FREE_FRACTION = 0.06
"""Fraction of the disk that is left free; Ray itself stops spilling when 5 % are."""
_OPEN = 16
"""Cases that a process keeps mapped, for opening one costs more than a small patch. The number
bounds the disk space of entries that were removed meanwhile, and the page tables: 60 KB a case."""


@dataclass(frozen=True)
class Tally:
    """Counts of what became of some look-ups; tallies add up.

    Example:
        >>> Tally(hits=3) + Tally(hits=1, misses=2)
        Tally(hits=4, misses=2, evicted=0, damaged=0, failed=0)
    """

    hits: int = 0
    """Cases that the cache had."""
    misses: int = 0
    """Cases that were read from their source and prepared."""
    evicted: int = 0
    """Entries removed to make room."""
    damaged: int = 0
    """Entries whose bytes were not those that were written; they are made anew."""
    failed: int = 0
    """Cases that could not be kept: the disk is full, or the folder not ours to write."""

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Tally)))


@dataclass
class _Process:
    """What this process remembers."""

    verified: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    """Inode, time and size of the entries whose digest it has compared, by name."""
    resting_until: float = 0.0
    """Time of the monotonic clock before which it does not try to write."""
    warned: bool = False


_process = _Process()


def prepared(case: Case, data: DataConfig) -> tuple[Prepared, Tally]:
    """The prepared case, from the cache where it is there, else made and kept.

    Processes that want the same case at once wait for the first to make it, so its source is read
    once a node.

    Raises:
        DataError: the case is damaged.
        StorageError: its source is out of reach or has changed.

    Example:
        >>> from raybrats.data.cohort.index import find_cases, verify_case
        >>> from raybrats.phantom.phantom import write_phantoms
        >>> _ = write_phantoms("heads", num_cases=1, shape=(24, 24, 20))
        >>> case = verify_case(find_cases("heads")[0])
        >>> data = DataConfig(cache_dir=os.path.abspath("cache"))
        >>> [prepared(case, data)[1].hits for _ in range(2)]
        [0, 1]
    """
    keep_freed()  # for the patches, too
    if not data.cache_gb or not case.digests:
        return prepare_case(case, data), Tally(misses=1)
    try:
        folder = _folder(data.cache_dir)
        entry = folder / f"{_key(case, data)}.safetensors"
        found, damaged = _read(entry)
        if found is not None:
            return found, Tally(hits=1)
        with (folder / f"lock-{int(entry.name[:8], 16) % _LOCKS}").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # which the system lets go when the process dies
            return _make(case, data, entry, Tally(damaged=damaged))
    except OSError as error:
        _warn_once(error)
        return prepare_case(case, data), Tally(misses=1, failed=1)


def _make(case: Case, data: DataConfig, entry: Path, tally: Tally) -> tuple[Prepared, Tally]:
    """The case, made by the holder of its lock, unless another process has made it meanwhile."""
    found, damaged = _read(entry)
    if found is not None:
        return found, tally + Tally(hits=1, damaged=damaged)
    made = prepare_case(case, data)
    tally += Tally(misses=1)
    if time.monotonic() < _process.resting_until:
        return made, tally + Tally(failed=1)
    try:
        return made, tally + Tally(evicted=_write(entry, made, int(data.cache_gb * 1e9)))
    except OSError as error:
        _process.resting_until = time.monotonic() + _REST_S
        _warn_once(error)
        return made, tally + Tally(failed=1)


def _folder(chosen: str) -> Path:
    """The folder, which is this user's alone; made if need be.

    Raises:
        OSError: it cannot be made, or another user could put anything there.
    """
    folder = Path(chosen or Path(tempfile.gettempdir(), f"raybrats-cache-{os.getuid()}"))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    there = folder.stat()
    if there.st_uid != os.getuid() or (not chosen and folder.is_symlink()):
        raise PermissionError(f"{folder} belongs to another user; set data.cache_dir")
    # Where it is set, others may add files of theirs, which are not used, and replace none.
    if there.st_mode & _OTHERS_WRITE and not there.st_mode & stat.S_ISVTX:
        advice = f"chmod go-w {folder}, or set data.cache_dir"
        raise PermissionError(f"other users may write to {folder}; {advice}")
    return folder


def _key(case: Case, data: DataConfig) -> str:
    """Digest of everything that decides the prepared case."""
    percentiles = data.percentiles if data.normalisation == "percentile" else None
    there = [bool(uri) for uri in case.image_uris]
    made_of = [VERSION, case.digests, there, case.label_values, case.box]
    made_as = [data.modalities, data.normalisation, percentiles]
    return hashlib.sha256(json.dumps([made_of, made_as]).encode()).hexdigest()


def _read(entry: Path) -> tuple[Prepared | None, int]:
    """The case of an entry, or None; and the number, 0 or 1, of damaged ones that were removed."""
    try:
        there = entry.lstat()
        if not _is_ours(there):
            return None, 0
        case = _mapped(entry, (there.st_ino, there.st_mtime_ns, there.st_size))
    except FileNotFoundError:
        return None, 0
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        with suppress(FileNotFoundError):
            entry.unlink()
        return None, 1
    with suppress(OSError):  # it was removed meanwhile, or the disk is read-only
        os.utime(entry, ns=(time.time_ns(), there.st_mtime_ns))  # what eviction goes by
    return case, 0


def _is_ours(there: os.stat_result) -> bool:
    """Whether it is a file that this user alone could write."""
    own = stat.S_ISREG(there.st_mode) and there.st_uid == os.getuid()
    return own and not there.st_mode & _OTHERS_WRITE


@lru_cache(maxsize=_OPEN)
def _mapped(entry: Path, mark: tuple[int, int, int]) -> Prepared:
    """The case of the entry that has this inode, time and size; its digest is compared once.

    Raises:
        FileNotFoundError: there is another entry by now.
        ValueError, KeyError, TypeError, AttributeError: it is not what was written.
    """
    with entry.open("rb") as file:
        there = os.fstat(file.fileno())
        if mark != (there.st_ino, there.st_mtime_ns, there.st_size):
            raise FileNotFoundError(entry)
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    case = decode(mapped, verify=_process.verified.get(entry.name) != mark)
    _process.verified[entry.name] = mark
    return case


def _write(entry: Path, case: Prepared, limit: int) -> int:
    """Number of other entries that were removed to write this one.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    parts = encode(case)
    size = sum(part.nbytes for part in parts)
    if size > limit:
        return 0
    disk = shutil.disk_usage(entry.parent)
    if disk.free - size < _FREE_FRACTION * disk.total:
        raise OSError(f"{entry.parent}: {disk.free / 1e9:.1f} GB free, which is left to others")
    aside = entry.with_name(f"aside-{uuid.uuid4().hex}")
    try:
        with aside.open("xb") as file:
            os.fchmod(file.fileno(), 0o600)
            file.writelines(parts)
        os.replace(aside, entry)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    return _evict(entry.parent, limit)


def _evict(folder: Path, limit: int) -> int:
    """Removes the entries that were not used for longest, down to the limit, and dead writers'."""
    held: list[tuple[int, int, Path]] = []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            there = path.stat()
            if _ENTRY.fullmatch(path.name):
                held.append((there.st_atime_ns, there.st_size, path))
            elif path.name.startswith("aside-") and time.time() - there.st_mtime > _STALE_S:
                path.unlink()
    excess, removed = sum(size for _, size, _ in held) - limit, 0
    for _, size, path in sorted(held):
        if excess <= 0:
            break
        excess -= size
        with suppress(FileNotFoundError):  # another process removes them too
            path.unlink()
            removed += 1
    return removed


def _warn_once(error: Exception) -> None:
    if not _process.warned:
        _process.warned = True
        logging.getLogger(__name__).warning("cases are not cached on this node: %s", error)
