"""Bytes at a URI: local paths and s3://, with a deadline, bounded retries and plain errors.

s3:// follows the standard AWS_* variables and AWS_ENDPOINT_URL, so no secret passes through here.
"""

import errno
import os
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
from blake3 import blake3

from raybrats.errors import ChangedObjectError, MissingObjectError, StorageError, UsageError
from raybrats.filesystem import absolute, check_file, files_below, is_remote, open_at, with_retries

WRITE_RACE_S = 1.0
"""Seconds until two who wrote one object at once both read the last write; a write takes less."""
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)
"""Errors of file systems without hard links: exFAT, and many that a program serves (FUSE)."""
_Put = Callable[[Path, Path], Any]
_PART = 50 * 2**20
"""Bytes that s3fs reads in one request; larger objects are read in several at once."""


def join(uri: str, *parts: str) -> str:
    """A URI below a URI.

    Raises:
        UsageError: the first one is empty, so that the rest would lie below the root.

    Example:
        >>> join("s3://bucket/runs/", "fold0", "config.json")
        's3://bucket/runs/fold0/config.json'
    """
    if not uri.strip():
        raise UsageError("an empty path or URI; give the path of a folder")
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def name(uri: str) -> str:
    """The last part of a URI.

    Example:
        >>> name("s3://bucket/runs/fold0/")
        'fold0'
    """
    return uri.rstrip("/").rpartition("/")[2]


def digest_of(data: bytes) -> str:
    """BLAKE3 of bytes, as hex: as hard to forge as sha256, at a quarter of its cost.

    Example:
        >>> digest_of(b"")[:16], len(digest_of(b""))
        ('af1349b9f5f9a1a6', 64)
    """
    return blake3(data).hexdigest()


def read_bytes(uri: str, *, size: int | None = None, digest: str | None = None) -> bytes:
    """The whole object, checked against the size and digest that it should have.

    Raises:
        StorageError: the object is missing, refused, out of reach, or not the bytes recorded.

    Example:
        >>> write_bytes("case/t1.nii", b"voxels")
        >>> read_bytes("case/t1.nii", size=6)
        b'voxels'
    """
    check_file(uri)
    # s3fs asks for the size before it reads, to see whether one request will do
    once = {"max_concurrency": 1} if size and size <= _PART and uri.startswith("s3://") else {}
    data = with_retries(
        uri, lambda fs, path, **limit: fs.cat_file(path, **once, **limit), size or 0
    )
    if size is not None and len(data) != size:
        raise ChangedObjectError(f"{uri}: {len(data)} bytes where {size} were recorded")
    if digest is not None and digest_of(data) != digest:
        raise ChangedObjectError(f"{uri}: other bytes than were recorded; index anew?")
    return data


def verify(uri: str, *, size: int, digest: str) -> None:
    """Checks an object's size and digest; a file on disk is mapped, not copied.

    Raises:
        StorageError: the object is missing, refused, out of reach, or not the bytes recorded.

    Example:
        >>> write_bytes("weights", b"1234")
        >>> verify("weights", size=4, digest=digest_of(b"1234"))
    """
    path = Path(absolute(uri))
    if is_remote(uri) or not path.is_file():
        read_bytes(uri, size=size, digest=digest)
        return
    found = blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()
    if (path.stat().st_size, found) != (size, digest):
        raise ChangedObjectError(f"{uri}: other bytes than were recorded")


def write_bytes(uri: str, data: bytes, mode: int = 0o666) -> None:
    """Puts an object whole: readers see the old one or the new one, never a part.

    A local link stays, and the file that it names is replaced; a device or a folder is refused.
    A local file has the mode that is given, less what the umask takes.

    Raises:
        StorageError: it cannot be written, or is out of reach.
        UsageError: the URI is empty, or neither a local path nor s3://.

    Example:
        >>> write_bytes("runs/fold0/config.json", b"{}")
    """
    if is_remote(uri):
        with_retries(uri, lambda fs, path, **limit: fs.pipe_file(path, data, **limit), len(data))
    else:
        _put_file(uri, data, os.replace, "written", mode)


def create(uri: str, data: bytes) -> bool:
    """Puts an object whole where there is none; False: there is one already, and it stays.

    Of many who create at once, one does. The data must be this writer's alone (a random token
    will do), for that is how a create whose answer was lost knows its own object.

    Raises:
        StorageError: it cannot be written, or is out of reach.

    Example:
        >>> create("runs/lease", b"first"), create("runs/lease", b"second")
        (True, False)
    """
    if not is_remote(uri):
        return _put_file(uri, data, _link, "created") or _holds(uri, data)
    if exists(uri):
        return False
    put = partial(_put_new, data=data)
    if with_retries(uri, put, len(data)) and with_retries(uri, put, len(data)):
        time.sleep(WRITE_RACE_S)  # put twice: this server ignores the condition, the last stays
    return _holds(uri, data)


def list_objects(uri: str) -> dict[str, int]:
    """Size in bytes of every object below a URI, by its own URI, in sorted order.

    Raises:
        StorageError: it is out of reach, a folder may not be read, or a link to one is below it.

    Example:
        >>> write_bytes("tree/case/t1.nii", b"voxels")
        >>> [(name(uri), size) for uri, size in list_objects("tree").items()]
        [('t1.nii', 6)]
    """
    if not is_remote(uri):
        return dict(sorted(files_below(absolute(uri))))
    found = with_retries(uri, lambda fs, path, **limit: fs.find(path, detail=True, **limit))
    return {f"s3://{path}": int(info["size"] or 0) for path, info in sorted(found.items())}


def exists(uri: str) -> bool:
    """Whether there is an object or a folder at the URI.

    Raises:
        StorageError: it is out of reach, or a folder above it may not be read.

    Example:
        >>> exists("nothing.parquet")
        False
    """

    def look(fs: fsspec.AbstractFileSystem, path: str, **limit: float) -> bool:
        # on disk, fsspec takes what it may not see for what is not there
        return bool(fs.exists(path, **limit) if is_remote(uri) else os.stat(path))

    with suppress(MissingObjectError):
        return with_retries(uri, look)
    return False


def require(uri: str) -> None:
    """Checks that there is an object or a folder at the URI.

    Raises:
        StorageError: there is none, or it is out of reach.

    Example:
        >>> require(".")
    """
    if not exists(uri):
        raise MissingObjectError(f"{uri}: does not exist")


def delete(uri: str) -> None:
    """Removes an object, or a folder with all that is below it.

    Raises:
        StorageError: there is none, or it is out of reach.

    Example:
        >>> write_bytes("old/config.json", b"{}")
        >>> delete("old")
    """
    with_retries(uri, lambda fs, path, **limit: fs.rm(path, recursive=True, **limit))


def rename(old_uri: str, new_uri: str) -> None:
    """Moves a folder; on object storage object by object, so not atomically.

    Raises:
        StorageError: there is none, or it is out of reach.

    Example:
        >>> write_bytes("step-1/MANIFEST.json", b"{}")
        >>> rename("step-1", "damaged-1")
    """
    if not is_remote(old_uri):
        with_retries(old_uri, lambda fs, path: fs.mv(path, absolute(new_uri)))
        return
    for uri, size in list_objects(old_uri).items():
        target = new_uri.rstrip("/") + uri[len(old_uri.rstrip("/")) :]
        with_retries(
            uri, lambda fs, path, to=target, **limit: fs.cp_file(path, to, **limit), num_bytes=size
        )
    delete(old_uri)


def for_ray(uri: str) -> dict[str, Any]:
    """`storage_path` and `storage_filesystem` of a Ray RunConfig for a URI.

    Ray would open s3:// by pyarrow's own client, whose uploads an older Ceph refuses (411).

    Example:
        >>> for_ray("runs/fold0")["storage_path"] == absolute("runs/fold0")
        True
    """
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    fs, path = open_at(uri)
    return {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(fs))}


def _put_file(uri: str, data: bytes, put: _Put, verb: str, mode: int = 0o666) -> bool:
    """Writes a file beside its place, then puts it there; False: `put` found the place taken."""
    check_file(uri)
    path = Path(absolute(uri))
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
        return put(aside, path) is not False
    except OSError as error:
        raise StorageError(f"{uri}: cannot be {verb}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            aside.unlink()


def _link(aside: Path, path: Path) -> bool:
    """Gives a file its second name, unless that is taken; a copy where there are no links."""
    try:
        os.link(aside, path)  # whole at once, and unlike a rename it never replaces
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with suppress(FileExistsError), path.open("xb") as file:  # a reader may see a part
            return file.write(aside.read_bytes()) >= 0
        return False
    return True


def _put_new(fs: fsspec.AbstractFileSystem, path: str, data: bytes, **limit: float) -> bool:
    """Puts an object under the condition that there is none; False: the server found one."""
    try:
        fs.pipe_file(path, data, mode="create", **limit)
    except OSError as error:
        # Ceph's refusal has no message, so s3fs does not know it for a FileExistsError
        if isinstance(error, FileExistsError) or "(PreconditionFailed)" in str(error.__cause__):
            return False
        if "(NotImplemented)" not in str(error.__cause__):
            raise
        fs.pipe_file(path, data, **limit)  # as OpenStack Swift, which knows no condition
    return True


def _holds(uri: str, data: bytes) -> bool:
    try:
        return read_bytes(uri) == data
    except MissingObjectError:
        return False
