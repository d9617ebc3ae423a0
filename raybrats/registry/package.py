"""The package that the network of a registered model is of, where it is not raybrats' own.

What a registry names is never imported for that: the package is installed where the model is
loaded, in the version that it was registered with, and offers the network by its name.
"""

import importlib.metadata
from collections.abc import Mapping
from contextlib import suppress

from raybrats.config import NETWORKS, TrainConfig
from raybrats.errors import CheckpointError, UsageError

TAG = "network_package"
"""Tag of a version: the package and its version, as `mine==1.0`; our own networks need none."""


def require_installed(name: str, tags: Mapping[str, str]) -> None:
    """Refuses a version whose package is not installed here as it was when it was registered.

    Args:
        name: `models:/name/version`.
        tags: the version's.

    Raises:
        CheckpointError: with what is installed.

    Example:
        >>> require_installed("models:/brats/3", {TAG: "mine==1.0"})
        Traceback (most recent call last):
        raybrats.errors.CheckpointError: models:/brats/3: its network is of mine==1.0; it is not ...
    """
    package = tags.get(TAG, "")
    dist, _, version = package.partition("==")
    here = ""
    with suppress(importlib.metadata.PackageNotFoundError, ValueError):
        here = importlib.metadata.version(dist) if dist else ""
    if here != version:
        words = f"{here} is" if here else "it is not"
        raise CheckpointError(f"{name}: its network is of {package}; {words} installed here")


def require_offered(name: str, tags: Mapping[str, str], config: TrainConfig) -> None:
    """Refuses a version whose network is not what its package offers by that name.

    Raises:
        CheckpointError: it is a module's, or another package's.

    Example:
        >>> require_offered("models:/brats/3", {}, TrainConfig())
    """
    try:
        offered = NETWORKS.package(config.network.name)
    except UsageError as error:
        raise CheckpointError(f"{name}: {error}") from error
    if offered != tags.get(TAG, ""):
        said, found = tags.get(TAG) or "none", offered or "none"
        raise CheckpointError(f"{name}: its network is of package {found}; its version says {said}")
