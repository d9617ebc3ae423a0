"""The file system behind a URI: opened, and tried until a deadline; its errors in plain words."""

import asyncio
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from raybrats.errors import MissingObjectError, StorageError

T = TypeVar("T")

DEADLINE_S = 120.0
"""Seconds until an action gives up, retries included; more where many bytes take a slow line."""
SLOW_LINE = 250e3
"""Bytes per second of a slow line."""
_MAX_TRIES = 6
_DENIED = ("AccessDenied", "Forbidden", "SignatureDoesNotMatch", "InvalidAccessKeyId", "(403)")
"""Words in the answers of S3 servers that refuse access."""

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
    return "://" in uri and not uri.startswith("file://")


def absolute(uri: str) -> str:
    """The URI with local paths made absolute, so that it means the same in every process.

    Example:
        >>> absolute("s3://bucket/cases/"), absolute("runs") == str(Path("runs").resolve())
        ('s3://bucket/cases', True)
    """
    return uri.rstrip("/") if is_remote(uri) else str(Path(uri.removeprefix("file://")).resolve())


def open_at(uri: str) -> tuple[Any, str]:
    """The file system of a URI, and the path that the URI has there.

    Example:
        >>> open_at("file:///cohorts/BraTS2020")[1]
        '/cohorts/BraTS2020'
    """
    options = S3_OPTIONS if uri.startswith("s3://") else {}
    return fsspec.url_to_fs(absolute(uri), **options)


def with_retries(uri: str, action: Callable[..., T], num_bytes: int = 0) -> T:
    """The result of an action on a URI's file system; transient errors are retried with jitter.

    The action gets the file system, the path there and, for s3://, the `timeout` of a try. A read
    times out where nothing arrives for long, but not where a byte a second does; so a try ends when
    half of the time left is over, and another one follows.

    Raises:
        StorageError: the object is missing, refused, or out of reach until the deadline.

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
    if "ExpiredToken" in text:
        return StorageError(f"{uri}: the credentials have expired; renew them")
    if "RequestTimeTooSkewed" in text:
        return StorageError(f"{uri}: this machine's clock is wrong; set it")
    if isinstance(error, PermissionError) or any(word in text for word in _DENIED):
        return StorageError(f"{uri}: access refused; check AWS_ACCESS_KEY_ID and its permissions")
    if "NoCredentials" in text:
        rule = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        return StorageError(f"{uri}: no credentials; {rule}")
    if isinstance(error, ImportError | ValueError):
        return StorageError(f"{uri}: not a path or URI that can be read ({error})")
    module = type(error).__module__
    transient = isinstance(error, OSError | asyncio.TimeoutError) or "botocore" in module
    transient = transient or module.startswith("aiohttp")
    return None if transient else StorageError(f"{uri}: {type(error).__name__}: {error}")
