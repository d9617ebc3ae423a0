"""A cohort: every case of a tree, opened and verified once, one row a case in a Parquet file."""

import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from raybrats.brats import MODALITIES
from raybrats.config import NUM_FOLDS
from raybrats.data import layout, storage
from raybrats.data.prepare import Normalisation, Prepared, labels_from, prepare
from raybrats.data.volume import (
    Grid,
    Volume,
    canonical_spacing,
    decode,
    on_one_grid,
)
from raybrats.errors import ChangedObjectError, DataError, MissingObjectError

if TYPE_CHECKING:
    import pyarrow as pa

_HANDED_OUT = re.compile(r"imagests/|validation", re.IGNORECASE)
OK, UNLABELLED, BAD = "ok", "unlabelled", "bad"


@dataclass(frozen=True)
class Case:
    """One row of a cohort file."""

    case_id: str
    subject: str
    edition: str
    layout: str
    image_uris: tuple[str, ...]
    """One a modality in the order of `brats.MODALITIES`, or a single 4-D file."""
    label_uri: str | None
    label_values: tuple[int, ...]
    """Values of NCR, ED and ET in the label file."""
    sizes: tuple[int, ...] = ()
    """Bytes of the image files, then of the label file."""
    digests: tuple[str, ...] = ()
    """Sha256 of the same."""
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


@dataclass(frozen=True)
class Opened:
    """A case in memory."""

    volumes: tuple[np.ndarray, ...]
    """Canonical voxels (i, j, k) of each modality."""
    labels: np.ndarray | None
    grid: Grid
    """Of the first image file."""
    sizes: tuple[int, ...]
    digests: tuple[str, ...]


def find_cases(uri: str) -> list[Case]:
    """The cases below a URI by their names, not opened yet, with their folds."""
    cases = [_named(files) for files in layout.find_files(uri)]
    return with_folds(cases)


def with_folds(cases: Sequence[Case]) -> list[Case]:
    """The cases with folds of equal size, all scans of a subject in one fold.

    Subjects are ordered by the sha256 of their name, so the folds do not depend on the order of
    the files.
    """
    subjects = sorted({c.subject for c in cases}, key=lambda s: hashlib.sha256(s.encode()).digest())
    fold = {subject: n % NUM_FOLDS for n, subject in enumerate(subjects)}
    return [replace(case, fold=fold[case.subject]) for case in cases]


def open_case(case: Case, *, need_labels: bool = False) -> Opened:
    """Reads and decodes all files of a case, and checks that they belong together.

    Raises:
        DataError: a file is damaged, or files of the case differ in grid.
        StorageError: a file is out of reach, or not the bytes that were indexed.
    """
    if need_labels and case.label_uri is None:
        raise DataError(f"{case.case_id}: no label file")
    uris = (*case.image_uris, *([case.label_uri] if case.label_uri else []))
    expected = case.sizes or (None,) * len(uris), case.digests or (None,) * len(uris)
    files = [
        storage.read_bytes(uri, size=size, digest=digest)
        for uri, size, digest in zip(uris, *expected, strict=True)
    ]
    volumes = [decode(data, storage.name(uri)) for data, uri in zip(files, uris, strict=True)]
    volumes = on_one_grid(case.case_id, [storage.name(uri) for uri in uris], volumes)
    images = volumes[: len(case.image_uris)]
    labels = None
    if case.label_uri is not None:
        values = case.label_values
        labels = labels_from(volumes[-1], (values[0], values[1], values[2]), case.case_id)
    return Opened(
        volumes=_modalities(case, images),
        labels=labels,
        grid=images[0].grid,
        sizes=tuple(map(len, files)),
        digests=tuple(map(storage.sha256, files)),
    )


def prepare_case(case: Case, modalities: Sequence[str], normalisation: Normalisation) -> Prepared:
    """A case read, decoded, cropped and quantised, with the modalities in the order asked for."""
    opened = open_case(case)
    chosen = [opened.volumes[MODALITIES.index(m)] for m in modalities]
    return prepare(chosen, opened.labels, normalisation)


def verify_case(case: Case) -> Case:
    """The case with everything that opening it shows; its status and reason if it is bad.

    Raises:
        StorageError: the store is out of reach, which says nothing about the case.
    """
    if case.status == BAD:
        return case
    try:
        opened = open_case(case)
        prepared = prepare(opened.volumes, opened.labels)
    except (DataError, MissingObjectError, ChangedObjectError) as error:
        return replace(case, status=BAD, reason=str(error))
    counts: tuple[int, ...] = ()
    if opened.labels is not None:
        counts = tuple(np.bincount(opened.labels.ravel(order="K"), minlength=4)[1:].tolist())
    inside = (prepared.image != prepared.background[:, None, None, None]).any(axis=0)
    brains = [volume[prepared.box][inside] for volume in opened.volumes]
    return replace(
        case,
        sizes=opened.sizes,
        digests=opened.digests,
        shape=prepared.shape,
        spacing_mm=canonical_spacing(opened.grid),
        label_counts=counts,
        box=tuple(edge for span in prepared.box for edge in (span.start, span.stop)),
        mean=tuple(float(brain.mean(dtype=np.float64)) for brain in brains),
        deviation=tuple(float(brain.std(dtype=np.float64)) for brain in brains),
        status=UNLABELLED if opened.labels is None else OK,
    )


def write_cohort(cases: Iterable[Case], uri: str) -> None:
    """Writes the rows as a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([asdict(c) for c in cases], schema=_schema()), buffer)
    storage.write_bytes(uri, buffer.getvalue())


def read_cohort(uri: str) -> list[Case]:
    """The rows of a Parquet file.

    Raises:
        DataError: not a cohort file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = storage.read_bytes(uri)
    try:
        rows = pq.read_table(io.BytesIO(data)).select(_schema().names).cast(_schema()).to_pylist()
    except (pa.ArrowException, KeyError) as error:
        raise DataError(
            f"{uri}: not a cohort file ({error}); make one by `raybrats index`"
        ) from None
    return [Case(**{k: tuple(v) if isinstance(v, list) else v for k, v in r.items()}) for r in rows]


def summary(cases: Sequence[Case]) -> dict[str, Any]:
    """The counts that `raybrats index --json` prints."""
    editions: dict[str, int] = {}
    for case in cases:
        editions[case.edition] = editions.get(case.edition, 0) + 1
    bad = quarantined(cases)
    return {
        "layouts": sorted({case.layout for case in cases}),
        "editions": editions,
        "cases": len(cases),
        "ok": len(cases) - len(bad),
        "quarantined": [{"case_id": c.case_id, "reason": c.reason} for c in bad],
    }


def quarantined(cases: Sequence[Case]) -> list[Case]:
    """Cases that training cannot use; unlabelled ones only where labels are to be expected.

    That is beside labelled ones, but not in the folders in which the editions hand out their
    validation and test cases (imagesTs, ...ValidationData).
    """
    labelled = any(case.status == OK for case in cases)
    missing = [
        replace(c, reason="no label file")
        for c in cases
        if c.status == UNLABELLED and labelled and not any(map(_HANDED_OUT.search, c.image_uris))
    ]
    return [c for c in cases if c.status == BAD] + missing


def _named(files: layout.Files) -> Case:
    parts = files.case_id.split("-")
    repeated = len(parts) == 4 and parts[0].lower() == "brats" and parts[-1].isdigit()
    return Case(
        case_id=files.case_id,
        subject="-".join(parts[:-1]) if repeated else files.case_id,
        edition=files.edition,
        layout=files.layout,
        image_uris=files.image_uris,
        label_uri=files.label_uri,
        label_values=files.label_values,
        status=BAD if files.problem else OK,
        reason=files.problem,
    )


def _modalities(case: Case, images: Sequence[Volume]) -> tuple[np.ndarray, ...]:
    """One canonical array a modality, scaled where the file says so."""
    plain = [v.voxels if (v.slope, v.intercept) == (1.0, 0.0) else v.values for v in images]
    if len(plain) == 1 and plain[0].ndim == 4:
        plain = [plain[0][..., m] for m in range(plain[0].shape[3])]
    if len(plain) != len(MODALITIES) or any(v.ndim != 3 for v in plain):
        shapes = [v.voxels.shape for v in images]
        raise DataError(f"{case.case_id}: {shapes} is not four modalities of 3-D volumes")
    return tuple(plain)


def _schema() -> "pa.Schema":
    """Column types of the cohort file, read off the fields of `Case`."""
    import pyarrow as pa

    plain = {str: pa.string(), str | None: pa.string(), int: pa.int64(), float: pa.float64()}
    lists = {tuple[kind, ...]: pa.list_(plain[kind]) for kind in (str, int, float)}
    return pa.schema([(f.name, (plain | lists)[f.type]) for f in fields(Case)])
