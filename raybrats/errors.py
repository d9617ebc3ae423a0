"""What can go wrong for a user: one exception a cause, each with its exit code.

Every message says what happened, where, and what to do about it, in one line.
"""

import re
from typing import ClassVar
from urllib.parse import parse_qsl, urlsplit

_SECRET_NAME = re.compile(r"pass|pwd|token|secret|key|credential|auth|sig", re.IGNORECASE)
"""What the names of parameters have within them whose values are nobody else's business."""
_SECRETS = (
    (
        re.compile(
            rf"([?&;#][^=&;#\s\"]{{0,64}}(?:{_SECRET_NAME.pattern})[^=&;#\s\"]{{0,64}}=)[^\s\"]+",
            re.I,
        ),
        r"\1***",
    ),
    # A password may hold anything, so it ends at the last @; a bucket or a path may hold one too,
    # but no colon before the first slash.
    (re.compile(r"(?<=://)(?:[^/\s\"@]*:[^\s\"]*|[^/\s\"]+)@"), "***@"),
    (
        re.compile(
            r"((?:https?|ftp|\w{1,16}sql)(?:\+\w{1,32})?://)[^/\s\"][^\s\"]*@", re.IGNORECASE
        ),
        r"\1***@",
    ),
)
"""Places of credentials in a word, and what is shown of each."""
_WORD = re.compile(r"\S+")
_LONGEST = 4096
"""Characters of a path at most; the patterns take time with the square of a word's."""


class RaybratsError(Exception):
    """An error that the user can act on; the command line prints it without a traceback."""

    exit_code: ClassVar[int] = 1


class UsageError(RaybratsError, ValueError):
    """A verb, recipe, field or value that does not exist or does not fit."""

    exit_code = 2


class CheckpointError(RaybratsError):
    """No checkpoint of the run can be trusted."""

    exit_code = 3


class RegistrationError(RaybratsError):
    """The network is trained and kept in storage, but the registry has not taken it."""

    exit_code = 4


class DataError(RaybratsError):
    """A case, a volume or a cohort that breaks a rule."""

    exit_code = 5


class GridError(DataError):
    """Volumes of one case that lie on different grids."""


class StorageError(RaybratsError):
    """Object storage that is out of reach, refuses us or lacks the object."""

    exit_code = 6


class MissingObjectError(StorageError):
    """There is nothing at the URI."""


class UnreadableError(StorageError):
    """A path at which there is no file that this user may read: a FIFO, or one of another user."""


class ChangedObjectError(StorageError):
    """Other bytes at the URI than were recorded."""


class TrackingError(RaybratsError):
    """An MLflow server that is out of reach, or a model that it does not know."""

    exit_code = 6


class ResourcesError(RaybratsError):
    """More workers, CPUs or GPUs than the cluster has."""

    exit_code = 7


class DivergedError(RaybratsError):
    """Training whose gradients are not finite any more."""

    exit_code = 8


def cause_of(error: BaseException | None) -> RaybratsError | None:
    """The error that a user can act on within what a library has wrapped around it; None without.

    Errors travel between processes as they are: their words are all that they hold, so pickling
    keeps them. Ray hands them on as `cause` of its own, Python as `__cause__`.

    Example:
        >>> wrapped = RuntimeError("a task failed")
        >>> wrapped.__cause__ = DataError("case 7: truncated")
        >>> cause_of(wrapped)
        DataError('case 7: truncated')
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        inner = getattr(error, "cause", None)
        # Ray makes errors that are of both kinds, whose words are a traceback: their cause is plain
        if isinstance(error, RaybratsError) and not isinstance(inner, RaybratsError):
            return error
        error = inner or error.__cause__
    return None


def first_line(error: BaseException) -> str:
    r"""The kind of an error of somebody else's code, and the first line of its words.

    Example:
        >>> first_line(ValueError("no GPU here\nand more"))
        'ValueError: no GPU here'
    """
    first, *_ = str(error).strip().splitlines() or ["no words"]
    return f"{type(error).__name__}: {first}"[:200]


def redacted(text: str) -> str:
    """The text without the credentials in its URIs, whichever characters they hold.

    Rather too much is hidden than too little: what a server's path holds before an @, for example.

    Example:
        >>> redacted("no answer from http://me:sec/ret@mlflow:5000/?token=abc")
        'no answer from http://***@mlflow:5000/?token=***'
    """
    return _WORD.sub(_redacted_word, text)


def _redacted_word(match: re.Match[str]) -> str:
    word = match[0]
    if "://" not in word and "=" not in word:
        return word
    if len(word) > _LONGEST:  # of a server that wants the search for credentials to take long
        return f"({len(word)} characters)"
    for pattern, shown in _SECRETS:
        word = pattern.sub(shown, word)
    return word


def holds_credentials(uri: str) -> bool:
    """Whether a URI has a user, a password or the like within it.

    Example:
        >>> holds_credentials("postgresql://db/mlflow?password=hush")
        True
        >>> holds_credentials("s3://bucket/runs@home")
        False
    """
    try:
        names = [name for name, _ in parse_qsl(urlsplit(uri).query, keep_blank_values=True)]
    except ValueError:
        names = []
    return redacted(uri) != uri or any(_SECRET_NAME.search(name) for name in names)
