"""What can go wrong for a user: one exception a cause, each with its exit code.

Every message says what happened, where, and what to do about it, in one line.
"""

from typing import ClassVar


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


class StorageError(RaybratsError):
    """Object storage that is out of reach, refuses us or lacks the object."""

    exit_code = 6


class MissingObjectError(StorageError):
    """There is nothing at the URI."""


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
