"""Bytes at a URI: local paths and s3://, with a deadline, bounded retries and plain errors.

s3:// follows the standard AWS_* variables and AWS_ENDPOINT_URL, so no secret passes through here.
"""

import asyncio
import errno
import os
import random
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from blake3 import blake3

from raybrats.errors import ChangedObjectError, MissingObjectError, StorageError

T = TypeVar("T")

DEADLINE_S = 120.0
"""Until an operation gives up, retries included; longer by what its bytes take on a slow line."""
_SLOW_LINE = 250e3
"""Bytes a second."""
WRITE_RACE_S = 1.0
"""Seconds after which two who wrote one object at once both read the last write; a write is faster."""
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)
"""What file systems without hard links answer: exFAT, and many that a program serves (FUSE)."""
_PART = 50 * 2**20
"""Bytes that s3fs reads in one request; larger objects in several at once."""

_S3_OPTIONS = {
    # Retries live here, in one place: with the defaults a dead server costs 25 requests and 50 s.
    "config_kwargs": {
        "connect_timeout": 5,
        "read_timeout": 15,
        "retries": {"mode": "standard", "total_max_attempts": 1},
    },
    "use_listings_cache": False,
}


def is_remote(uri: str) -> bool:
    """Whether the URI names an object store rather than a local path."""
    return "://" in uri and not uri.startswith("file://")


def absolute(uri: str) -> str:
    """The URI with local paths made absolute, so that it means the same in every process."""
    return uri.rstrip("/") if is_remote(uri) else str(Path(uri.removeprefix("file://")).resolve())


def join(uri: str, *parts: str) -> str:
    """A URI below a URI."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def name(uri: str) -> str:
    """Last part of a URI."""
    return uri.rstrip("/").rpartition("/")[2]


def digest_of(data: bytes) -> str:
    """BLAKE3 of bytes, as hex: as hard to forge as sha256, at a quarter of its cost."""
    return blake3(data).hexdigest()


def read_bytes(uri: str, *, size: int | None = None, digest: str | None = None) -> bytes:
    """The whole object, checked against the size and digest that it should have.

    Raises:
        StorageError: the object is missing, refused, out of reach, or not the bytes recorded.
    """
    # s3fs asks for the size before it reads, to see whether one request will do
    once = {"max_concurrency": 1} if size and size <= _PART and uri.startswith("s3://") else {}
    data = _attempt(uri, lambda fs, path, **limit: fs.cat_file(path, **once, **limit), size or 0)
    if size is not None and len(data) != size:
        raise ChangedObjectError(f"{uri}: {len(data)} bytes where {size} were recorded")
    if digest is not None and digest_of(data) != digest:
        raise ChangedObjectError(f"{uri}: other bytes than were recorded; index anew?")
    return data


def verify(uri: str, *, size: int, digest: str) -> None:
    """Does nothing if the object has this size and digest; on a disk nothing is copied for it.

    Raises:
        StorageError: as of `read_bytes`.
    """
    path = Path(absolute(uri))
    if is_remote(uri) or not path.is_file():
        read_bytes(uri, size=size, digest=digest)
        return
    found = blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()
    if (path.stat().st_size, found) != (size, digest):
        raise ChangedObjectError(f"{uri}: other bytes than were recorded")


def write_bytes(uri: str, data: bytes) -> None:
    """Puts an object whole: readers see the old one or the new one, never a part."""
    if is_remote(uri):
        _attempt(uri, lambda fs, path, **limit: fs.pipe_file(path, data, **limit), len(data))
        return
    path = Path(absolute(uri))
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(data)
        os.replace(aside, path)
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        raise StorageError(f"{uri}: cannot be written: {error.strerror or error}") from error


def create(uri: str, data: bytes) -> bool:
    """Puts an object whole where there is none; False: there is one already, and it stays.

    Of many who create at once, one does. The data must be of this writer alone (a random token
    will do), for that is how a create whose answer was lost knows its own object.

    Raises:
        StorageError: it cannot be written, or is out of reach.
    """
    if not is_remote(uri):
        return _create_on_disk(uri, data) or _holds(uri, data)
    if exists(uri):
        return False

    def put(fs: Any, path: str, **limit: float) -> bool:  # noqa: ANN401
        return _put_new(fs, path, data, **limit)

    if _attempt(uri, put, len(data)) and _attempt(uri, put, len(data)):
        time.sleep(WRITE_RACE_S)  # taken twice: this server ignores the condition, and the last has it
    return _holds(uri, data)


def list_objects(uri: str) -> dict[str, int]:
    """Size in bytes of every object below a URI, by its own URI, in sorted order."""
    found = _attempt(uri, lambda fs, path, **limit: fs.find(path, detail=True, **limit))
    for path, info in found.items():
        if info.get("islink") and os.path.isdir(path):
            raise StorageError(
                f"{path}: a link to a folder is not followed; name the folder itself"
            )
    prefix = f"{uri.partition('://')[0]}://" if is_remote(uri) else ""
    return {prefix + path: int(info["size"] or 0) for path, info in sorted(found.items())}


def exists(uri: str) -> bool:
    """Whether there is an object or a folder at the URI."""
    return bool(_attempt(uri, lambda fs, path, **limit: fs.exists(path, **limit)))


def require(uri: str) -> None:
    """Does nothing if there is an object or a folder at the URI.

    Raises:
        StorageError: there is none, or it is out of reach.
    """
    if not exists(uri):
        raise MissingObjectError(f"{uri}: does not exist")


def delete(uri: str) -> None:
    """Removes an object, or a folder with all that is below it."""
    _attempt(uri, lambda fs, path, **limit: fs.rm(path, recursive=True, **limit))


def rename(old_uri: str, new_uri: str) -> None:
    """Moves a folder; on object storage object by object, so not atomically."""
    if not is_remote(old_uri):
        _attempt(old_uri, lambda fs, path: fs.mv(path, absolute(new_uri)))
        return
    for uri, size in list_objects(old_uri).items():
        target = new_uri.rstrip("/") + uri[len(old_uri.rstrip("/")) :]
        _attempt(
            uri, lambda fs, path, to=target, **limit: fs.cp_file(path, to, **limit), num_bytes=size
        )
    delete(old_uri)


def for_ray(uri: str) -> dict[str, Any]:
    """`storage_path` and `storage_filesystem` of a Ray RunConfig for a URI.

    Ray would open s3:// by pyarrow's own client, whose uploads an older Ceph refuses (411).
    """
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    fs, path = fsspec.url_to_fs(absolute(uri), **_options(uri))
    return {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(fs))}


def _create_on_disk(uri: str, data: bytes) -> bool:
    path = Path(absolute(uri))
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(data)
        return _link(aside, path)
    except OSError as error:
        raise StorageError(f"{uri}: cannot be created: {error.strerror or error}") from error
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


def _put_new(fs: Any, path: str, data: bytes, **limit: float) -> bool:  # noqa: ANN401
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


def _options(uri: str) -> dict[str, Any]:
    return _S3_OPTIONS if uri.startswith("s3://") else {}


def _attempt(uri: str, action: Callable[..., T], num_bytes: int = 0) -> T:
    """Runs an action on the URI's file system; transient errors are retried with jitter.

    A read times out where nothing arrives for long, but not where a byte a second does; so a try
    also ends when half of the time left is over, and another one follows.
    """
    give_up = time.monotonic() + DEADLINE_S + num_bytes / _SLOW_LINE
    for turn in range(100):
        try:
            fs, path = fsspec.url_to_fs(absolute(uri), **_options(uri))
            fs.retries = 1  # of s3fs, which would try five times in every turn of ours
            limit = {"timeout": (give_up - time.monotonic()) / 2} if fs.async_impl else {}
            return action(fs, path, **limit)
        except Exception as error:
            refusal = _permanent(uri, error)
            if refusal is not None:
                raise refusal from error
            wait_s = min(8.0, 0.2 * 2**turn) * random.uniform(0.5, 1.5)
            if turn >= 5 or time.monotonic() + wait_s > give_up:
                said = str(error) or "too slow"
                words = f"{type(error).__name__}: {said}".splitlines()[0][:200]
                raise StorageError(
                    f"{uri}: out of reach after {turn + 1} tries ({words})"
                ) from error
            time.sleep(wait_s)
    raise AssertionError("the loop ends by returning or raising")


def _permanent(uri: str, error: Exception) -> StorageError | None:
    """The error in plain words where trying again cannot help, else None."""
    text = f"{type(error).__name__} {error} {error.__cause__}"
    if isinstance(error, FileNotFoundError | NotADirectoryError) or "NoSuchBucket" in text:
        return MissingObjectError(f"{uri}: does not exist")
    if isinstance(error, IsADirectoryError):
        return StorageError(f"{uri}: is a folder")
    if "ExpiredToken" in text:
        return StorageError(f"{uri}: the credentials have expired; renew them")
    if "RequestTimeTooSkewed" in text:
        return StorageError(f"{uri}: this machine's clock is wrong; set it")
    denied = ("AccessDenied", "Forbidden", "SignatureDoesNotMatch", "InvalidAccessKeyId", "(403)")
    if isinstance(error, PermissionError) or any(word in text for word in denied):
        return StorageError(f"{uri}: access refused; check AWS_ACCESS_KEY_ID and its permissions")
    if "NoCredentials" in text:
        return StorageError(
            f"{uri}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if isinstance(error, ImportError | ValueError):
        return StorageError(f"{uri}: not a path or URI that can be read ({error})")
    transient = (
        isinstance(error, OSError | asyncio.TimeoutError) or "botocore" in type(error).__module__
    )
    transient = transient or type(error).__module__.startswith(("aiohttp", "aiobotocore"))
    return None if transient else StorageError(f"{uri}: {type(error).__name__}: {error}")
