"""A cohort: every case of a tree, opened and verified once, one row a case in a Parquet file."""

import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from raybrats.brats import MODALITIES
from raybrats.config import NUM_FOLDS, DataConfig
from raybrats.data import layout, storage
from raybrats.data.case import (
    BAD,
    INCOMPLETE,
    OK,
    UNLABELLED,
    Case,
    Opened,
    from_row,
    open_case,
    open_files,
)
from raybrats.data.prepare import Prepared, prepare
from raybrats.data.volume import canonical_spacing
from raybrats.errors import ChangedObjectError, DataError, MissingObjectError

if TYPE_CHECKING:
    import pyarrow as pa

_NO_NAME = re.compile(r"[/\\\x00-\x1f]|^\.")
"""In a case id, which names the files of its predictions."""
_HANDED_OUT = re.compile(r"imagests/|validation", re.IGNORECASE)


def find_cases(uri: str) -> list[Case]:
    """The cases below a URI by their names, not opened yet, with their folds."""
    cases = [named(files) for files in layout.find_files(uri)]
    return with_folds(cases)


def with_folds(cases: Sequence[Case]) -> list[Case]:
    """The cases with folds of equal size, all scans of a subject in one fold.

    Subjects are ordered by the sha256 of their name, so the folds do not depend on the order of
    the files.
    """
    subjects = sorted({c.subject for c in cases}, key=lambda s: hashlib.sha256(s.encode()).digest())
    fold = {subject: n % NUM_FOLDS for n, subject in enumerate(subjects)}
    return [replace(case, fold=fold[case.subject]) for case in cases]


def prepare_case(case: Case, data: DataConfig) -> Prepared:
    """A case read, decoded, cropped and quantised, with the modalities that are asked for.

    An indexed case is cropped to the box in its row, which is that of all its modalities. That its
    files belong together was seen when it was indexed, so they are opened one after the other.

    Raises:
        DataError: the case is damaged, or not as its row says.
        StorageError: a file is out of reach, or not the bytes that were indexed.
    """
    how = data.normalisation, data.percentiles
    box = tuple(slice(*case.box[first : first + 2]) for first in (0, 2, 4)) if case.box else None
    if box and len(case.image_uris) > 1:  # a 4-D file is not opened in parts
        with suppress(_Unoriented):
            labels = _alone(case, None).labels if case.label_uri else None
            return prepare(_Modalities(case, data.modalities), labels, *how, box=box)
    opened = open_case(case, data.modalities)
    return prepare(opened.volumes, opened.labels, *how, box=box)


class _Unoriented(Exception):  # noqa: N818 - never seen outside
    """A file lies as the others do, so all are needed at once."""


class _Modalities(Sequence[np.ndarray]):
    """The volumes of an indexed case, each opened when it is asked for."""

    def __init__(self, case: Case, names: Sequence[str]) -> None:
        self._case, self._names = case, names

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, place: int) -> np.ndarray:
        case, name = self._case, self._names[place]
        if name in case.missing:
            return np.zeros(case.shape, np.int16, order="F")
        volume = _alone(case, name).volumes[0]
        if volume.shape != case.shape:
            raise DataError(f"{case.case_id}: {volume.shape} voxels where its row has {case.shape}")
        return volume


def _alone(case: Case, modality: str | None) -> Opened:
    """The file of a modality, or of the labels where none is named."""
    opened = open_files(case, (modality,) if modality else (), labels=not modality)
    if not opened.grid.known:
        raise _Unoriented
    return opened


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
        inside = (prepared.image != prepared.background[:, None, None, None]).any(axis=0)
        if not inside.any():
            raise DataError(f"{case.case_id}: every voxel is background; is the volume empty?")
    except (DataError, MissingObjectError, ChangedObjectError) as error:
        return replace(case, status=BAD, reason=str(error))
    counts: tuple[int, ...] = ()
    if opened.labels is not None:
        counts = tuple(np.bincount(opened.labels.ravel(order="K"), minlength=4)[1:].tolist())
    brains = [volume[prepared.box][inside] for volume in opened.volumes]
    reason = _lacks(case, brains)
    sound = UNLABELLED if case.label_uri is None else OK
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
        status=INCOMPLETE if reason else sound,
        reason=reason,
    )


def _lacks(case: Case, brains: Sequence[np.ndarray]) -> str:
    """Which modalities of a sound case carry nothing: without a file, or one value everywhere."""
    flat = [m for m, brain in zip(MODALITIES, brains, strict=False) if brain.min() == brain.max()]
    constant = [modality for modality in flat if modality not in case.missing]
    found = [f"no {', '.join(case.missing)} file"] if case.missing else []
    found += [f"{', '.join(constant)} constant inside the brain"] if constant else []
    return "; ".join(found)


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
        DataError: not a cohort file, or rows that contradict each other (edited by hand, joined).
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
    cases = [from_row(row) for row in rows]
    _check_rows(cases, uri)
    return cases


def _check_rows(cases: Sequence[Case], uri: str) -> None:
    """Refuses what indexing never writes and training or predicting would not notice."""
    ids: set[str] = set()
    folds: dict[str, int] = {}
    for case in cases:
        if not case.case_id or _NO_NAME.search(case.case_id):
            problem = f"case id {case.case_id!r} is no file name"
        elif case.case_id in ids:
            problem = f"case {case.case_id} has two rows"
        elif folds.setdefault(case.subject, case.fold) != case.fold:
            both = f"{folds[case.subject]} and {case.fold}"
            problem = f"subject {case.subject} is in folds {both}, so one side would know the other"
        elif not _holds(case.shape, case.box):
            problem = f"case {case.case_id} has box {case.box} in a shape of {case.shape}"
        elif any(0 < len(told) < _num_files(case) for told in (case.sizes, case.digests)):
            problem = f"case {case.case_id} has fewer sizes or digests than files"
        else:
            ids.add(case.case_id)
            continue
        raise DataError(f"{uri}: {problem}; repair the rows, or make it anew by `raybrats index`")


def _holds(shape: Sequence[int] | None, box: Sequence[int] | None) -> bool:
    """Whether a box, if there is one, lies within the volume."""
    if not box:
        return box is not None
    if not shape or (len(shape), len(box)) != (3, 6):
        return False
    return all(0 <= a < b <= n for a, b, n in zip(box[::2], box[1::2], shape, strict=True))


def _num_files(case: Case) -> int:
    return len(case.image_uris) + (case.label_uri is not None)


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


def judged(cases: Sequence[Case], modalities: Sequence[str]) -> list[Case]:
    """The cases as a run sees them that takes only some modalities.

    An incomplete case is whole if it lacks none of these, and bad if it lacks all of them.
    """
    return [_judged(case, set(modalities)) if case.status == INCOMPLETE else case for case in cases]


def _judged(case: Case, chosen: set[str]) -> Case:
    lacking = {m for m, spread in zip(MODALITIES, case.deviation, strict=False) if spread == 0}
    lacking |= set(case.missing)
    if chosen <= lacking:
        return replace(case, status=BAD)
    whole = OK if case.label_uri else UNLABELLED
    return case if chosen & lacking else replace(case, status=whole, reason="")


def quarantined(cases: Sequence[Case], *, allow_incomplete: bool = False) -> list[Case]:
    """Cases that training cannot use; unlabelled ones only where labels are to be expected.

    That is beside labelled ones, but not in the folders in which the editions hand out their
    validation and test cases (imagesTs, ...ValidationData).
    """
    labelled = bool(trainable(cases, allow_incomplete=True))
    bad = [c for c in cases if c.status == BAD]
    if not allow_incomplete:
        hint = "; augment.drop_modality takes such cases"
        bad += [replace(c, reason=c.reason + hint) for c in cases if c.status == INCOMPLETE]
    told = {case.case_id for case in bad}
    unlabelled = [
        replace(case, reason="no label file")
        for case in cases
        if case.status in (UNLABELLED, INCOMPLETE)
        and case.label_uri is None
        and case.case_id not in told
        and not any(map(_HANDED_OUT.search, case.image_uris))
    ]
    return bad + (unlabelled if labelled else [])


def trainable(cases: Sequence[Case], *, allow_incomplete: bool = False) -> list[Case]:
    """Cases with labels in which nothing is wrong."""

    def fits(case: Case) -> bool:
        return case.status == OK or (
            allow_incomplete and case.status == INCOMPLETE and case.label_uri is not None
        )

    return [case for case in cases if fits(case)]


def named(files: layout.Files) -> Case:
    """A case by its names: not opened, without a fold."""
    parts = files.case_id.split("-")
    repeated = len(parts) == 4 and parts[0].lower() == "brats" and parts[-1].isdigit()
    case = Case(
        case_id=files.case_id,
        subject="-".join(parts[:-1]) if repeated else files.case_id,
        edition=files.edition,
        layout=files.layout,
        image_uris=files.image_uris,
        label_uri=files.label_uri,
        label_values=files.label_values,
    )
    if files.problem:
        return replace(case, status=BAD, reason=files.problem)
    return replace(case, status=INCOMPLETE, reason=_lacks(case, ())) if case.missing else case


def _schema() -> "pa.Schema":
    """Column types of the cohort file, read off the fields of `Case`."""
    import pyarrow as pa

    plain = {str: pa.string(), str | None: pa.string(), int: pa.int64(), float: pa.float64()}
    lists = {tuple[kind, ...]: pa.list_(plain[kind]) for kind in (str, int, float)}
    return pa.schema([(f.name, (plain | lists)[f.type]) for f in fields(Case)])
