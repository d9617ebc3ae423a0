"""The file system behind a URI: opened, and tried until a deadline; its errors in plain words.

There are two, local paths and s3://. fsspec knows many more, chained ones among them, that fetch
from elsewhere or read what a file names; here is the one place where a URI becomes a file system.
"""

import asyncio
import os
import random
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from raybrats.errors import (
    MissingObjectError,
    RaybratsError,
    StorageError,
    UnreadableError,
    UsageError,
    redacted,
)

T = TypeVar("T")

DEADLINE_S = 120.0
"""Seconds until an action gives up, retries included; more where many bytes take a slow line."""
SLOW_LINE = 250e3
"""Bytes per second of a slow line."""
_MAX_TRIES = 6
_DENIED = "access refused; check AWS_ACCESS_KEY_ID and its permissions"
_REFUSALS = (
    ("ExpiredToken", "the credentials have expired; renew them"),
    ("RequestTimeTooSkewed", "this machine's clock is wrong; set it"),
    ("PermissionError", _DENIED),
    ("AccessDenied", _DENIED),
    ("Forbidden", _DENIED),
    ("SignatureDoesNotMatch", _DENIED),
    ("InvalidAccessKeyId", _DENIED),
    ("(403)", _DENIED),
    ("NoCredentials", "no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
)
"""Words in the errors of S3 where it refuses access, and what they mean."""

_BUCKET = re.compile(r"s3://[^/]+(/|$)")
_FOREIGN = re.compile(r"[a-z][a-z0-9+.-]*:[:/]|.*://", re.IGNORECASE | re.DOTALL)
"""What begins as a URI does, or holds another one; a path may hold a colon elsewhere."""
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)

S3_OPTIONS = {
    # Retries live below, in one place: with the defaults a dead server costs 25 requests and 50 s.
    "config_kwargs": {
        "connect_timeout": 5,
        "read_timeout": 15,
        "retries": {"mode": "standard", "total_max_attempts": 1},
    },
    "use_listings_cache": False,
}


def is_remote(uri: str) -> bool:
    """Whether the URI names an object store rather than a local path.

    Example:
        >>> is_remote("s3://bucket/cases"), is_remote("file:///cases"), is_remote("cases")
        (True, False, False)
    """
    return uri.startswith("s3://")


def problem_of(uri: str) -> str:
    """Why the text is neither a local path nor an s3:// URI; empty if it is one.

    Example:
        >>> problem_of("s3://bucket/cases"), problem_of("simplecache::s3://bucket/cases")
        ('', 'expected a local path or s3://BUCKET/...')
    """
    if not uri.strip():
        return "an empty path or URI; name a file or folder"
    if "\0" in uri:
        return "a path cannot hold NUL"
    plain = uri.removeprefix("s3://" if is_remote(uri) else "file://")
    if _FOREIGN.match(plain) or (is_remote(uri) and not _BUCKET.match(uri)):
        return "expected a local path or s3://BUCKET/..."
    if uri.startswith("file://") and not plain.startswith("/"):
        return "expected file:///PATH, on this machine"
    return ""


def absolute(uri: str) -> str:
    """The URI with local paths made absolute, so that it means the same in every process.

    Raises:
        UsageError: it is empty, or neither a local path nor an s3:// URI.

    Example:
        >>> absolute("s3://bucket/cases/"), absolute("runs") == str(Path("runs").resolve())
        ('s3://bucket/cases', True)
    """
    problem = problem_of(uri)
    if problem:
        raise UsageError(f"{redacted(uri)!r}: {problem}")
    if is_remote(uri):
        return uri.rstrip("/")
    try:
        return str(Path(uri.removeprefix("file://")).resolve())
    except (OSError, RuntimeError):  # until Python 3.13 the latter
        raise UsageError(f"{uri}: links that lead in a circle") from None


def open_at(uri: str) -> tuple[Any, str]:
    """The file system of a URI, and the path that the URI has there.

    Raises:
        UsageError: it is empty, or neither a local path nor an s3:// URI.

    Example:
        >>> open_at("file:///cohorts/BraTS2020")[1]
        '/cohorts/BraTS2020'
    """
    place = absolute(uri)
    if is_remote(place):
        return fsspec.filesystem("s3", **S3_OPTIONS), place.removeprefix("s3://")
    return fsspec.filesystem("file"), place


def check_file(uri: str) -> None:
    """Refuses a local path at which there is something else than a file, without opening it.

    Opening a FIFO waits until somebody writes, and replacing a device removes it.

    Raises:
        UnreadableError: there is a folder, a FIFO, a socket or a device.

    Example:
        >>> check_file("/dev/null")
        Traceback (most recent call last):
        ...
        raybrats.errors.UnreadableError: /dev/null: is a device; expected a regular file
    """
    place = absolute(uri)
    if is_remote(place):
        return
    try:
        mode = os.stat(place).st_mode
    except OSError:  # nothing, or nothing to be seen, as whoever opens it will say
        return
    kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "")
    if kind:
        raise UnreadableError(f"{uri}: is {kind}; expected a regular file")


def files_below(root: str) -> Iterator[tuple[str, int]]:
    """Path and size of every file below a local folder; a broken link has 0 bytes.

    fsspec would leave out, without a word, what lies in a folder that may not be read.

    Raises:
        StorageError: a folder may not be read, or is a link; the root is a FIFO or a device.

    Example:
        >>> Path("tree").mkdir()
        >>> Path("tree/t1.nii").write_bytes(b"voxels")
        6
        >>> list(files_below("tree"))
        [('tree/t1.nii', 6)]
    """

    def refuse(error: OSError) -> None:
        ours = not isinstance(error, FileNotFoundError | NotADirectoryError)
        if ours and not _is_of_the_system(str(error.filename)):
            raise UnreadableError(f"{error.filename}: cannot be read: {error.strerror}") from error

    if os.path.exists(root) and not os.path.isdir(root):
        check_file(root)
        yield root, os.path.getsize(root)
    for folder, folders, files in os.walk(root, onerror=refuse):
        for path in (os.path.join(folder, each) for each in folders):
            if os.path.islink(path):
                raise StorageError(
                    f"{path}: a link to a folder is not followed; name the folder itself"
                )
        for path in (os.path.join(folder, each) for each in files):
            size = 0
            with suppress(OSError):
                size = os.stat(path).st_size
            yield path, size


def _is_of_the_system(folder: str) -> bool:
    """Whether a folder belongs to a disk or a desktop, and holds no file of ours."""
    name = os.path.basename(folder)
    return name.startswith(".") or name in ("lost+found", "System Volume Information")


def with_retries(uri: str, action: Callable[..., T], num_bytes: int = 0) -> T:
    """The result of an action on a URI's file system; transient errors are retried with jitter.

    The action gets the file system, the path there and, for s3://, the `timeout` of a try. A read
    times out where nothing arrives for long, but not where a byte a second does; so a try ends when
    half of the time left is over, and another one follows.

    Raises:
        StorageError: the object is missing, refused, or out of reach until the deadline.
        UsageError: the URI is empty, or neither a local path nor s3://.

    Example:
        >>> with_retries(".", lambda fs, path, **limit: fs.isdir(path))
        True
    """
    give_up = time.monotonic() + DEADLINE_S + num_bytes / SLOW_LINE
    tries = 0
    while True:
        try:
            fs, path = open_at(uri)
            fs.retries = 1  # of s3fs, which would try five times in every try of ours
            limit = {"timeout": (give_up - time.monotonic()) / 2} if fs.async_impl else {}
            return action(fs, path, **limit)
        except RaybratsError:
            raise
        except Exception as error:
            final = _final_error(uri, error)
            if final is not None:
                raise final from error
            wait_s = min(8.0, 0.2 * 2**tries) * random.uniform(0.5, 1.5)
            tries += 1
            if tries == _MAX_TRIES or time.monotonic() + wait_s > give_up:
                reason = str(error) or "too slow"
                words = f"{type(error).__name__}: {reason}".splitlines()[0][:200]
                raise StorageError(f"{uri}: out of reach after {tries} tries ({words})") from error
        time.sleep(wait_s)


def _final_error(uri: str, error: Exception) -> StorageError | None:
    """The error in plain words where trying again cannot help, else None."""
    text = f"{type(error).__name__} {error} {error.__cause__}"
    if isinstance(error, FileNotFoundError | NotADirectoryError) or "NoSuchBucket" in text:
        return MissingObjectError(f"{uri}: does not exist")
    if isinstance(error, IsADirectoryError):
        return StorageError(f"{uri}: is a folder")
    if isinstance(error, PermissionError) and not is_remote(uri):
        return UnreadableError(f"{uri}: cannot be read: {error.strerror or 'Permission denied'}")
    refusal = next((words for sign, words in _REFUSALS if sign in text), "")
    if refusal:
        return StorageError(f"{uri}: {refusal}")
    if isinstance(error, ImportError | ValueError):
        return StorageError(f"{uri}: not a path or URI that can be read ({error})")
    module = type(error).__module__
    transient = isinstance(error, OSError | asyncio.TimeoutError) or "botocore" in module
    transient = transient or module.startswith("aiohttp")
    return None if transient else StorageError(f"{uri}: {type(error).__name__}: {error}")
