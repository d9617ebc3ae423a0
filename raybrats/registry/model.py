"""A model as callers see it: one network, or several that are averaged."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from raybrats.config import TrainConfig, override
from raybrats.data.prepare import Prepared
from raybrats.errors import UsageError
from raybrats.label_set import LabelSet

if TYPE_CHECKING:  # torch takes seconds, which those who only look up versions need not wait for
    from collections.abc import Mapping

    from torch import Tensor

    from raybrats.model.inference import Member, Segmented


@dataclass(frozen=True)
class Trained:
    """A network that was trained, as it is stored."""

    name: str
    """`models:/name/version`, or the URI of a checkpoint."""
    config: TrainConfig
    weights: "Mapping[str, Tensor]"


@dataclass(frozen=True)
class Model:
    """A model that segments cases."""

    name: str
    """`models:/name/version`, whichever way it was looked up, or the URI of a checkpoint; those of
    an ensemble's members, with commas between them."""
    modalities: tuple[str, ...]
    """Modalities that it takes, in the order of its input's first axis."""
    label_set: LabelSet
    """What it tells apart."""
    takes_incomplete: bool
    """Whether it was trained with modalities dropped, so that one may be missing."""
    members: "tuple[Member, ...]" = field(repr=False)
    """Its networks and their runs; thresholds and other rules are the first one's."""

    @property
    def config(self) -> TrainConfig:
        """The run whose preparation and rules count."""
        return self.members[0].config

    def segment(self, image: np.ndarray, *, probabilities: bool = False) -> "Segmented":
        """What it says of a raw case, float32 (modality, i, j, k), axes LPS.

        Raises:
            DataError: the image is all background.

        Example:
            >>> model.segment(image).labels.shape == image.shape[1:]  # doctest: +SKIP
            True
        """
        return self.segment_prepared(self.prepared(image), probabilities=probabilities)

    def prepared(self, image: np.ndarray) -> Prepared:
        """A raw case as its networks take it.

        Raises:
            DataError: the image is all background.

        Example:
            >>> model.segment_prepared(model.prepared(image))  # doctest: +SKIP
        """
        from raybrats.model.inference import prepared_for

        return prepared_for(self.config, image)

    def segment_prepared(self, prepared: Prepared, *, probabilities: bool = False) -> "Segmented":
        """What it says of a prepared case, in the volume that this was cropped from.

        Example:
            >>> model.segment_prepared(model.prepared(image)).agreement  # doctest: +SKIP
        """
        from raybrats.model.inference import segment_prepared

        return segment_prepared(self.members, prepared, probabilities=probabilities)


def model_of(
    trained: Sequence[Trained], network: str = "", mirror: tuple[int, ...] | None = None
) -> Model:
    """The model of one stored network, or of several together.

    Args:
        trained: the networks.
        network: `my.module:function`, if that is a network of the user's own.
        mirror: axes along which windows are mirrored; those of each one's run where not given.

    Raises:
        UsageError: a network is the user's own and not the one that was named, or the networks
            differ in modalities, preparation, labels or target.
        CheckpointError: weights are those of another network.

    Example:
        >>> model_of([read("models:/raybrats/3", uri)]).name  # doctest: +SKIP
        'models:/raybrats/3'
    """
    from raybrats.model.inference import members_of

    first = trained[0]
    for one in trained:
        _require_named(one, network)
        _require_alike(first, one)
    configs = [one.config for one in trained]
    if mirror is not None:
        configs = [override(config, "prediction.mirror", mirror) for config in configs]
    weights = [one.weights for one in trained]
    return Model(
        name=",".join(one.name for one in trained),
        modalities=first.config.data.modalities,
        label_set=first.config.labels,
        takes_incomplete=all(one.config.augment.drop_modality > 0 for one in trained),
        members=members_of(configs, weights),
    )


def _require_named(trained: Trained, network: str) -> None:
    name = trained.config.network.name
    if ":" in name and name != network:
        raise UsageError(
            f"{trained.name}: its network is {name}, which is imported only if you say so: "
            f"--network {name}, or network={name!r} in Python"
        )


def _require_alike(first: Trained, other: Trained) -> None:
    """Refuses what cannot be averaged with the first."""
    for what in ("modalities", "normalisation", "percentiles"):
        theirs, ours = (getattr(each.config.data, what) for each in (other, first))
        if theirs != ours:
            raise UsageError(f"{other.name} has data.{what} {theirs}, {first.name} {ours}")
    theirs, ours = (each.config.labels.names for each in (other, first))
    if other.config.labels != first.config.labels:
        raise UsageError(f"{other.name} tells apart {theirs}, {first.name} {ours}")
    theirs, ours = (each.config.loss.target for each in (other, first))
    if theirs != ours:
        raise UsageError(f"{other.name} has loss.target {theirs}, {first.name} {ours}")
