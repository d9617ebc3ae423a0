"""A tree verified on the cluster: every case read and opened once, as Ray tasks."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from raybrats import cluster, storage
from raybrats.brats import EDITIONS, MODALITIES, why_no_labels
from raybrats.config import NUM_FOLDS
from raybrats.data.cohort import layout, rows
from raybrats.data.cohort.case import BAD, INCOMPLETE, OK, UNLABELLED, Case, open_case
from raybrats.data.cohort.usable import quarantined
from raybrats.data.nifti.volume import canonical_spacing
from raybrats.data.prepare import prepare
from raybrats.errors import (
    ChangedObjectError,
    DataError,
    MissingObjectError,
    UnreadableError,
    UsageError,
)
from raybrats.progress import Display

TASK_MEMORY = 600 * 2**20
"""Bytes that opening one case may take: 4 modalities of 240x240x155 inflated, and copies."""


def index(uri: str, out_uri: str | None = None, edition: str | None = None) -> list[Case]:
    """The verified cases of a tree, also written as a cohort file where one is asked for.

    Args:
        uri: local path or URI of the tree.
        out_uri: cohort file that is written.
        edition: whose labels the cases have; told by the beginning of each id where not given.

    Raises:
        DataError: there is no case, or none that is not bad.
        StorageError: the tree is out of reach.

    Example:
        >>> cases = index("s3://bucket/BraTS2020", "s3://bucket/cohort.parquet")  # doctest: +SKIP
    """
    found = find_cases(uri, edition)
    verified = cluster.each(verify_case, found, num_cpus=1, memory=TASK_MEMORY)
    cases: list[Case] = []
    with Display("indexing", len(found)) as display:
        for case in verified:
            cases.append(case)
            display.show(len(cases), case.case_id)
    cases = mark_copies(sorted(cases, key=lambda case: case.case_id))
    cases = cases if edition else mark_unproven(cases)
    if all(case.status == BAD for case in cases):
        raise DataError(f"{uri}: no case can be used ({_editions(cases)}): {_first_bad(cases)}")
    if out_uri is not None:
        rows.write_cohort(cases, out_uri)
    return cases


def mark_copies(cases: Sequence[Case]) -> list[Case]:
    """The cases; those that have the very image files of an earlier one, in any order, are bad.

    Under two ids the same images could lie on both sides of a split.

    Example:
        >>> one = Case("a", "a", "2020", "brats", ("a.nii",), None, (), digests=("ff",))
        >>> other = replace(one, case_id="b", image_uris=("b.nii",))
        >>> [case.status for case in mark_copies([one, other])]
        ['ok', 'bad']
    """
    first: dict[tuple[str, ...], str] = {}
    marked = []
    for case in cases:
        content = tuple(sorted(case.digests[: len(case.image_uris)]))
        original = first.setdefault(content, case.case_id) if content else case.case_id
        if original != case.case_id and case.status != BAD:
            reason = f"same image files as {original}; remove one of the two"
            case = replace(case, status=BAD, reason=reason)
        marked.append(case)
    return marked


def mark_unproven(cases: Sequence[Case]) -> list[Case]:
    """The cases; those are bad whose labels are of one of two releases, and nothing shows which.

    A tree is of one release: a value in one of its masks that the other does not have is proof.

    Example:
        >>> case = Case("a", "a", "PED", "brats", ("a.nii",), "seg.nii", (1, 2, 3, 4))
        >>> [mark_unproven([replace(case, label_counts=(9, 0, 0, n))])[0].status for n in (0, 7)]
        ['bad', 'ok']
    """
    shown = {case.edition for case in cases if _has_proof(case)}
    return [
        replace(case, status=BAD, reason=f"{case.case_id}: {why_no_labels(case.edition)}")
        if case.label_counts and _needs_proof(case.edition) and case.edition not in shown
        else case
        for case in cases
    ]


def _needs_proof(edition: str) -> bool:
    return edition in EDITIONS and EDITIONS[edition].proof > 0


def _has_proof(case: Case) -> bool:
    if not _needs_proof(case.edition) or not case.label_counts:
        return False
    return case.label_counts[case.label_values.index(EDITIONS[case.edition].proof)] > 0


def _editions(cases: Sequence[Case]) -> str:
    counts = Counter(case.edition for case in cases)
    return ", ".join(f"{count} of edition {name}" for name, count in sorted(counts.items()))


def _first_bad(cases: Sequence[Case]) -> str:
    """The reason of the first case, and of the first of each other edition."""
    first = {case.edition: case for case in reversed(cases)}
    return "; ".join(f"{c.case_id} ({c.reason})" for c in cases if c is first[c.edition])


def load(uri: str, *, verify: bool = True) -> list[Case]:
    """The cases of a cohort file, or of a tree, which is indexed first unless `verify` is off.

    Raises:
        DataError: there is no case.
        StorageError: it is missing or out of reach.
        UsageError: the URI is empty, or none.

    Example:
        >>> rows.write_cohort([], "cohort.parquet")
        >>> load("cohort.parquet")
        []
    """
    if not uri:
        raise UsageError("data.cohort is empty; give a cohort file or a tree of cases")
    if uri.endswith(".parquet"):
        return rows.read_cohort(storage.absolute(uri))
    return index(uri) if verify else find_cases(uri)


def find_cases(uri: str, edition: str | None = None) -> list[Case]:
    """The cases below a URI as their names say, with their folds; not opened yet.

    Where an edition is given, its label values are those of all cases but a dataset.json's.

    Raises:
        DataError: there is no case.
        StorageError: the tree is out of reach.
        UsageError: there is no such edition, or the URI is none.

    Example:
        >>> for end in ("flair", "t1", "t1ce", "t2", "seg"):
        ...     storage.write_bytes(f"tree/BraTS2021_00000/BraTS2021_00000_{end}.nii.gz", b"")
        >>> [(case.case_id, case.fold, case.status) for case in find_cases("tree")]
        [('BraTS2021_00000', 0, 'ok')]
    """
    check_edition(edition)
    return with_folds([case_of(files) for files in layout.find_files(uri, edition)])


def check_edition(edition: str | None) -> None:
    """Refuses an edition whose labels are not known.

    Raises:
        UsageError: there is no such edition.

    Example:
        >>> check_edition("2023")
    """
    if edition is not None and edition not in EDITIONS:
        raise UsageError(f"--edition {edition!r}: there are {', '.join(EDITIONS)}")


def case_of(files: layout.Files) -> Case:
    """The case of some files: not opened, without a fold.

    Example:
        >>> uris = ("flair.nii", "t1.nii", "", "t2.nii")
        >>> files = layout.Files("BraTS-GLI-00005-101", "2023", "brats", uris, None, (1, 2, 3))
        >>> case = case_of(files)
        >>> case.subject, case.status, case.reason
        ('BraTS-GLI-00005', 'incomplete', 'no t1ce file')
    """
    parts = files.case_id.split("-")
    repeated = len(parts) >= 4 and parts[0].lower() == "brats" and parts[-1].isdigit()
    case = Case(
        case_id=files.case_id,
        subject="-".join(parts[:-1]) if repeated else files.case_id,
        edition=files.edition,
        layout=files.layout,
        image_uris=files.image_uris,
        label_uri=files.label_uri,
        label_values=files.label_values,
        label_set=files.label_set,
    )
    if files.problem:
        return replace(case, status=BAD, reason=files.problem)
    return (
        replace(case, status=INCOMPLETE, reason=_why_incomplete(case, ())) if case.missing else case
    )


def with_folds(cases: Sequence[Case]) -> list[Case]:
    """The cases with folds of equal size, all scans of a subject in one fold.

    Subjects are ordered by the sha256 of their name, so the folds do not depend on the order of
    the files.

    Example:
        >>> case = Case("a", "a", "2020", "brats", ("a.nii",), None, ())
        >>> [c.fold for c in with_folds([replace(case, subject=name) for name in "aabc"])]
        [2, 2, 1, 0]
    """
    subjects = sorted({c.subject for c in cases}, key=lambda s: hashlib.sha256(s.encode()).digest())
    fold = {subject: n % NUM_FOLDS for n, subject in enumerate(subjects)}
    return [replace(case, fold=fold[case.subject]) for case in cases]


def verify_case(case: Case) -> Case:
    """The case with everything that opening it shows, or with status and reason if it is bad.

    Raises:
        StorageError: the store is out of reach, which says nothing about the case.

    Example:
        >>> from raybrats.phantom.phantom import write_phantoms
        >>> case_ids = write_phantoms("phantoms", num_cases=1, shape=(24, 24, 20))
        >>> case = verify_case(find_cases("phantoms")[0])
        >>> case.status, case.shape, case.spacing_mm
        ('ok', (24, 24, 20), (10.0, 10.0, 7.75))
    """
    if case.status == BAD:
        return case
    try:
        opened = open_case(case)
        num_labels = len(case.labels.names)
        prepared = prepare(opened.volumes, opened.labels, num_labels=num_labels)
        inside = (prepared.image != prepared.scaling.background[:, None, None, None]).any(axis=0)
        if not inside.any():
            raise DataError(f"{case.case_id}: every voxel is background; is the volume empty?")
    except (DataError, MissingObjectError, ChangedObjectError, UnreadableError) as error:
        return replace(case, status=BAD, reason=str(error))
    counts: tuple[int, ...] = ()
    if opened.labels is not None:
        found = np.bincount(opened.labels.ravel(order="K"), minlength=1 + num_labels)
        counts = tuple(found[1:].tolist())
    brains = [volume[prepared.box][inside] for volume in opened.volumes]
    reason = _why_incomplete(case, brains)
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


def _why_incomplete(case: Case, brains: Sequence[np.ndarray]) -> str:
    """Names the modalities of a sound case that carry nothing: no file, or one value everywhere."""
    flat = [m for m, brain in zip(MODALITIES, brains, strict=False) if brain.min() == brain.max()]
    constant = [modality for modality in flat if modality not in case.missing]
    found = [f"no {', '.join(case.missing)} file"] if case.missing else []
    found += [f"{', '.join(constant)} constant inside the brain"] if constant else []
    return "; ".join(found)


def summary(cases: Sequence[Case]) -> dict[str, Any]:
    """The counts that `raybrats index --json` prints.

    Example:
        >>> case = Case("a", "a", "2020", "brats", ("a.nii",), "seg.nii", (1, 2, 4))
        >>> summary([case])["ok"]
        1
    """
    bad = quarantined(cases)
    return {
        "layouts": sorted({case.layout for case in cases}),
        "editions": dict(Counter(case.edition for case in cases)),
        "cases": len(cases),
        "ok": len(cases) - len(bad),
        "quarantined": [{"case_id": c.case_id, "reason": c.reason} for c in bad],
    }
