"""What a run is held to before it begins, and what of another run it begins with."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from raybrats import storage
from raybrats.config import NETWORKS, TrainConfig
from raybrats.data.cohort.case import Case
from raybrats.errors import UsageError
from raybrats.registry import load, tracking
from raybrats.runs import record
from raybrats.runs.job import INITIAL
from raybrats.train import manifest

if TYPE_CHECKING:
    from raybrats.train.checkpoint import Checkpoint

_LOG = logging.getLogger(__name__)


def check_code(config: TrainConfig) -> None:
    """Refuses a network or a loss of others that will not do, before a run has begun.

    Raises:
        UsageError: it is not there, does not fit, or its model could not be registered.

    Example:
        >>> from raybrats.recipes import tiny
        >>> check_code(tiny())
    """
    if not config.of_others:
        return
    from raybrats.model.rehearsal import rehearse  # torch

    if config.tracking.model:
        try:
            NETWORKS.package(config.network.name)
        except UsageError as error:
            raise UsageError(f"{error}, or register nothing: --tracking.model ''") from error
    rehearse(config)


def source_of(config: TrainConfig, uri: str) -> "Checkpoint | None":
    """The checkpoint that a new run goes on from; None where it goes on from none.

    Raises:
        RaybratsError: there is none, or the run does not go on from it.

    Example:
        >>> from raybrats.recipes import tiny
        >>> print(source_of(tiny(), "runs/two"))
        None
    """
    if not config.run.continue_from:
        return None
    from raybrats.train import continued  # torch

    source = continued.last_of(storage.absolute(config.run.continue_from))
    continued.check(config, source, uri)
    return source


def beginning(
    config: TrainConfig, uri: str, cases: Sequence[Case], source: "Checkpoint | None"
) -> dict[str, str]:
    """Puts beside a new run what it begins with; returns tags that name it exactly.

    Args:
        config: the new run.
        uri: where it is.
        cases: its cases, which must be those of a run that it goes on from.
        source: what `source_of` gave.

    Raises:
        RaybratsError: there is no such run or model, or it does not fit.

    Example:
        >>> from raybrats.recipes import tiny
        >>> beginning(tiny(), "runs/two", [], None)
        {}
    """
    if source is None:
        begun = first_weights(config, uri)
        return {"raybrats.init_from": begun} if begun else {}
    from raybrats.train import continued  # torch

    known = record.read(manifest.run_of(source.uri))
    if known is None:
        _LOG.warning("%s has no record beside it: its cases may be others", source.uri)
    elif not record.same_cohort(known, cases):
        raise UsageError(f"run.continue_from: {source.uri} was trained on another cohort")
    continued.begin(config, source, uri)
    _LOG.info("goes on from %s", source.uri)
    return {"raybrats.continue_from": source.uri}


def first_weights(config: TrainConfig, uri: str) -> str:
    """Puts what `network.init_from` names beside the run, for its workers; returns its exact name.

    A new run begins with it, and so does every restart before its first checkpoint.

    Raises:
        RaybratsError: there is no such model, or it does not fit.

    Example:
        >>> first_weights(config, "runs/two")  # doctest: +SKIP
        'models:/raybrats/3'
    """
    wanted = config.network.init_from
    if not wanted:
        return ""
    from safetensors.torch import save  # torch

    from raybrats.model.network import fitting

    source = load.read(wanted, tracking.tracking_uri(config))
    kept, new = fitting(config, source.config, source.weights)
    storage.write_bytes(storage.join(uri, INITIAL), save(kept))
    _LOG.info("begins with %s%s", source.name, f"; new: {', '.join(new)}" if new else "")
    return source.name
