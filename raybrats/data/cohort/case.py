"""A case: its row in a cohort, its files opened together, and prepared."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np

from raybrats import storage
from raybrats.brats import MODALITIES, why_no_labels
from raybrats.config import DataConfig
from raybrats.data.cohort import source
from raybrats.data.cohort.source import Source
from raybrats.data.nifti.header import Grid
from raybrats.data.nifti.labels import labels_from
from raybrats.data.nifti.volume import Volume, on_one_grid
from raybrats.data.prepare import Box, Prepared, prepare
from raybrats.errors import DataError
from raybrats.label_set import LabelSet, label_set_of

OK, UNLABELLED, INCOMPLETE, BAD = "ok", "unlabelled", "incomplete", "bad"
"""States of a case; incomplete: sound, with or without labels, but not with all modalities."""


@dataclass(frozen=True)
class Case:
    """One row of a cohort file."""

    case_id: str
    subject: str
    edition: str
    layout: str
    image_uris: tuple[str, ...]
    """One per modality in the order of `MODALITIES`, empty for a missing one; or one 4-D file."""
    label_uri: str | None
    label_values: tuple[int, ...]
    """Values of its labels in the label file, in their order; empty where they are not known."""
    sizes: tuple[int, ...] = ()
    """Bytes of the image files, 0 for a missing one, then of the label file."""
    digests: tuple[str, ...] = ()
    """BLAKE3 of the same files, empty for a missing one."""
    shape: tuple[int, ...] = ()
    """Voxels along the canonical axes (i, j, k)."""
    spacing_mm: tuple[float, ...] = ()
    label_counts: tuple[int, ...] = ()
    """Voxels of each label."""
    box: tuple[int, ...] = ()
    """Foreground box: first and one-past-last voxel of i, j and k."""
    mean: tuple[float, ...] = ()
    """Mean of each modality inside the brain, in the values of its file."""
    deviation: tuple[float, ...] = ()
    """Standard deviation of the same."""
    label_set: str = ""
    """What its masks tell apart, as `raybrats.label_set.label_set_of` reads it."""
    fold: int = -1
    status: str = OK
    reason: str = ""

    @property
    def missing(self) -> tuple[str, ...]:
        """Modalities without a file."""
        if len(self.image_uris) != len(MODALITIES):
            return ()
        return tuple(m for m, uri in zip(MODALITIES, self.image_uris, strict=True) if not uri)

    @property
    def written_values(self) -> tuple[int, ...]:
        """Values of the labels in its predictions: the label file's, else 1, 2, ..."""
        return self.label_values or tuple(range(1, len(self.labels.names) + 1))

    @property
    def labels(self) -> LabelSet:
        """What its masks tell apart: glioma where nothing else is known."""
        return label_set_of(self.label_set)

    @property
    def labelled_fraction(self) -> float:
        """Fraction of the voxels of the foreground box that has a label; 1 where none are known."""
        if self.foreground is None or not self.label_counts:
            return 1.0
        return sum(self.label_counts) / math.prod(s.stop - s.start for s in self.foreground)

    @property
    def foreground(self) -> Box | None:
        """The foreground box as slices; None where the case is not indexed."""
        if not self.box:
            return None
        i_first, i_end, j_first, j_end, k_first, k_end = self.box
        return slice(i_first, i_end), slice(j_first, j_end), slice(k_first, k_end)


def from_row(row: Mapping[str, Any]) -> Case:
    """The case of a row of plain values, lists where a case has tuples.

    Raises:
        TypeError: the row has other fields.

    Example:
        >>> row = {"case_id": "a", "subject": "a", "edition": "2020", "layout": "brats"}
        >>> files = {"image_uris": ["a.nii"], "label_uri": None, "label_values": [1, 2, 4]}
        >>> from_row(row | files).image_uris
        ('a.nii',)
    """
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
    return Case(**values)


@dataclass(frozen=True)
class Opened:
    """A case in memory."""

    volumes: tuple[np.ndarray, ...]
    """Canonical voxels (i, j, k) of each modality that was asked for, in that order."""
    labels: np.ndarray | None
    """Canonical labels (i, j, k), uint8; None where there are none, or none are wanted."""
    grid: Grid
    """Grid of the first file opened; if that states no orientation, of the first that does."""
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

    Example:
        >>> from raybrats.data.cohort.index import find_cases
        >>> from raybrats.phantom.phantom import write_phantoms
        >>> case_ids = write_phantoms("phantoms", num_cases=1, shape=(24, 24, 20))
        >>> opened = open_case(find_cases("phantoms")[0], ("flair", "t1ce"))
        >>> [volume.shape for volume in opened.volumes]
        [(24, 24, 20), (24, 24, 20)]
    """
    opened = _open_files(case, modalities, labels=labels)
    if opened.grid.oriented or (labels and set(modalities) >= set(MODALITIES)):
        return opened
    # The label file may be the only one that states an orientation, whatever its values mean.
    every = _open_files(case, (*modalities, *MODALITIES), labels=labels or bool(case.label_values))
    volumes = every.volumes[: len(modalities)]
    return replace(every, volumes=volumes, labels=every.labels if labels else None)


def prepare_case(case: Case, data: DataConfig) -> Prepared:
    """A case read, decoded, cropped and quantised, with the modalities that are asked for.

    An indexed case is cropped to the box in its row, which is that of all its modalities. Indexing
    has checked that its files belong together, so they are opened one after the other.

    Raises:
        DataError: the case is damaged, or not as its row says.
        StorageError: a file is out of reach, or not the bytes that were indexed.

    Example:
        >>> from raybrats.data.cohort.index import find_cases
        >>> from raybrats.phantom.phantom import write_phantoms
        >>> case_ids = write_phantoms("phantoms", num_cases=1, shape=(24, 24, 20))
        >>> prepare_case(find_cases("phantoms")[0], DataConfig()).image.shape
        (4, 14, 18, 17)
    """
    how, num_labels = (data.normalisation, data.percentiles), len(case.labels.names)
    if case.box and len(case.image_uris) > 1:  # a 4-D file is not opened in parts
        with suppress(_NoOrientation):
            labels = _open_one(case, None).labels if case.label_uri else None
            volumes = _DeferredVolumes(case, data.modalities)
            return prepare(volumes, labels, *how, box=case.foreground, num_labels=num_labels)
    opened = open_case(case, data.modalities)
    return prepare(opened.volumes, opened.labels, *how, box=case.foreground, num_labels=num_labels)


def _open_files(case: Case, modalities: Sequence[str], *, labels: bool = True) -> Opened:
    """The files that are wanted and no others, on the grid of those that state an orientation."""
    if labels and case.label_uri is not None and not case.label_values:
        raise DataError(f"{case.case_id}: {why_no_labels(case.edition)}")
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
        encoded = labels_from(mask, case.label_values, case.case_id)
    return Opened(
        volumes=_volumes(case, modalities, images),
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
    # a row also records the label file, which may not be wanted
    expected = case.sizes or (None,) * len(uris), case.digests or (None,) * len(uris)
    return [
        source.read(uri, size=size, digest=digest) if uri else None
        for uri, size, digest in zip(uris, *expected, strict=False)
    ]


def _volumes(
    case: Case, modalities: Sequence[str], images: Sequence[Volume]
) -> tuple[np.ndarray, ...]:
    """One canonical array per modality, scaled where the file says so; a missing one is zeros."""
    if not modalities:
        return ()
    plain = [v.voxels if (v.slope, v.intercept) == (1.0, 0.0) else v.values for v in images]
    single = len(case.image_uris) == 1
    if single and plain[0].ndim == 4:
        plain = [plain[0][..., m] for m in range(plain[0].shape[3])]
    there: list[str] = [
        m for m in MODALITIES if single or (m in modalities and m not in case.missing)
    ]
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


class _NoOrientation(Exception):  # noqa: N818 - never seen outside
    """A file states no orientation: it lies as the others do, so all are needed at once."""


class _DeferredVolumes(Sequence[np.ndarray]):
    """The volumes of an indexed case, each opened when it is asked for."""

    def __init__(self, case: Case, modalities: Sequence[str]) -> None:
        self._case, self._modalities = case, modalities

    def __len__(self) -> int:
        return len(self._modalities)

    @overload
    def __getitem__(self, place: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[np.ndarray]: ...

    def __getitem__(self, place: int | slice) -> np.ndarray | Sequence[np.ndarray]:
        if isinstance(place, slice):
            return _DeferredVolumes(self._case, self._modalities[place])
        case, modality = self._case, self._modalities[place]
        if modality in case.missing:
            return _empty(case.shape)
        volume = _open_one(case, modality).volumes[0]
        if volume.shape != case.shape:
            raise DataError(f"{case.case_id}: {volume.shape} voxels where its row has {case.shape}")
        return volume


def _open_one(case: Case, modality: str | None) -> Opened:
    """The file of a modality, or of the labels where none is named.

    Raises:
        _NoOrientation: the file states none.
    """
    opened = _open_files(case, (modality,) if modality else (), labels=not modality)
    if not opened.grid.oriented:
        raise _NoOrientation
    return opened
