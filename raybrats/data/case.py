"""A case: its row in a cohort, and its files opened together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from raybrats.brats import MODALITIES
from raybrats.data import source, storage
from raybrats.data.prepare import labels_from
from raybrats.data.source import Source
from raybrats.data.volume import Grid, Volume, on_one_grid
from raybrats.errors import DataError

OK, UNLABELLED, INCOMPLETE, BAD = "ok", "unlabelled", "incomplete", "bad"
"""Incomplete: sound, but without all modalities; with or without labels."""


@dataclass(frozen=True)
class Case:
    """One row of a cohort file."""

    case_id: str
    subject: str
    edition: str
    layout: str
    image_uris: tuple[str, ...]
    """One a modality in the order of `MODALITIES`, empty for a missing one; or one 4-D file."""
    label_uri: str | None
    label_values: tuple[int, ...]
    """Values of NCR, ED and ET in the label file."""
    sizes: tuple[int, ...] = ()
    """Bytes of the image files, 0 for a missing one, then of the label file."""
    digests: tuple[str, ...] = ()
    """BLAKE3 of the same, empty for a missing one."""
    shape: tuple[int, ...] = ()
    """Canonical (i, j, k)."""
    spacing_mm: tuple[float, ...] = ()
    label_counts: tuple[int, ...] = ()
    """Voxels of NCR, ED and ET."""
    box: tuple[int, ...] = ()
    """Foreground box: first and one-past-last voxel of i, j and k."""
    mean: tuple[float, ...] = ()
    """Of each modality inside the brain, as stored on disk."""
    deviation: tuple[float, ...] = ()
    fold: int = -1
    status: str = OK
    reason: str = ""

    @property
    def missing(self) -> tuple[str, ...]:
        """Modalities without a file."""
        if len(self.image_uris) != len(MODALITIES):
            return ()
        return tuple(m for m, uri in zip(MODALITIES, self.image_uris, strict=True) if not uri)


def from_row(row: Mapping[str, Any]) -> Case:
    """The case of a row of plain values, lists where a case has tuples.

    Raises:
        TypeError: the row has other fields.
    """
    return Case(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()})


@dataclass(frozen=True)
class Opened:
    """A case in memory."""

    volumes: tuple[np.ndarray, ...]
    """Canonical voxels (i, j, k) of each modality that was asked for, in that order."""
    labels: np.ndarray | None
    grid: Grid
    """Of the first file opened; where it does not know how it lies, of the first that does."""
    sources: tuple[Source | None, ...]
    """The image files, None for a missing or unwanted one, then the label file."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each source."""
        return tuple(found.size if found else 0 for found in self.sources)

    @property
    def digests(self) -> tuple[str, ...]:
        """BLAKE3 of each source."""
        return tuple(found.digest if found else "" for found in self.sources)


def open_case(case: Case, modalities: Sequence[str] = MODALITIES, *, labels: bool = True) -> Opened:
    """Reads and decodes the files of a case that are wanted, and checks that they belong together.

    A file without an orientation lies as the others do, so where none of those wanted has one, all
    are opened.

    Raises:
        DataError: a file is damaged, or files of the case differ in grid.
        StorageError: a file is out of reach, or not the bytes that were indexed.
    """
    opened = open_files(case, modalities, labels=labels)
    if opened.grid.known or (labels and set(modalities) >= set(MODALITIES)):
        return opened
    every = open_files(case, (*modalities, *MODALITIES))
    volumes = every.volumes[: len(modalities)]
    return replace(every, volumes=volumes, labels=every.labels if labels else None)


def open_files(case: Case, modalities: Sequence[str], *, labels: bool = True) -> Opened:
    """The files that are wanted and no others, laid as those among them that know how they lie.

    Raises:
        DataError: a file is damaged, or files of the case differ in grid.
        StorageError: a file is out of reach, or not the bytes that were indexed.
    """
    sources = _sources(case, modalities, labels=labels)
    read = [found for found in sources if found is not None]
    names = [storage.name(found.uri) for found in read]
    volumes = on_one_grid(case.case_id, names, [found.volume() for found in read])
    images, encoded = volumes, None
    if labels and case.label_uri is not None:
        *images, mask = volumes
        if mask.voxels.ndim != 3:
            shape = mask.voxels.shape
            raise DataError(f"{case.case_id}: its label file is {shape}; expected one 3-D volume")
        values = case.label_values
        encoded = labels_from(mask, (values[0], values[1], values[2]), case.case_id)
    return Opened(
        volumes=_modalities(case, modalities, images),
        labels=encoded,
        grid=volumes[0].grid,
        sources=tuple(sources),
    )


def _sources(case: Case, modalities: Sequence[str], *, labels: bool) -> list[Source | None]:
    """The image files, None for one that is missing or not wanted, then the label file.

    Raises:
        DataError: none of the modalities that are wanted has a file.
        StorageError: a file is out of reach, or not the bytes that were indexed.
    """
    uris = case.image_uris
    if len(uris) == len(MODALITIES):
        uris = tuple(u if m in modalities else "" for m, u in zip(MODALITIES, uris, strict=True))
    if modalities and not any(uris):
        raise DataError(f"{case.case_id}: no {', '.join(modalities)} file")
    uris += (case.label_uri,) if labels and case.label_uri else ()
    # a row tells of the labels too, where they are not wanted
    expected = case.sizes or (None,) * len(uris), case.digests or (None,) * len(uris)
    return [
        source.read(uri, size=size, digest=digest) if uri else None
        for uri, size, digest in zip(uris, *expected, strict=False)
    ]


def _modalities(
    case: Case, modalities: Sequence[str], images: Sequence[Volume]
) -> tuple[np.ndarray, ...]:
    """One canonical array a modality, scaled where the file says so; a missing one is zeros."""
    if not modalities:
        return ()
    plain = [v.voxels if (v.slope, v.intercept) == (1.0, 0.0) else v.values for v in images]
    single = len(case.image_uris) == 1
    if single and plain[0].ndim == 4:
        plain = [plain[0][..., m] for m in range(plain[0].shape[3])]
    there = [m for m in MODALITIES if single or (m in modalities and m not in case.missing)]
    if len(plain) != len(there) or any(v.ndim != 3 for v in plain):
        shapes = ", ".join(str(v.voxels.shape) for v in images)
        rule = "expected one 3-D file a modality, or one 4-D file of flair, t1, t1ce, t2"
        raise DataError(f"{case.case_id}: {shapes} is not four modalities of 3-D volumes; {rule}")
    found = dict(zip(there, plain, strict=True))
    return tuple(_empty(plain[0].shape) if m in case.missing else found[m] for m in modalities)


def _empty(shape: tuple[int, ...]) -> np.ndarray:
    voxels = np.zeros(shape, np.int16, order="F")
    voxels.flags.writeable = False  # as decoded ones are
    return voxels
