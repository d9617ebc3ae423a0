"""A cohort as a Parquet file: one row a case."""

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING

from raybrats import storage
from raybrats.data.cohort.case import Case, from_row
from raybrats.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

_NOT_A_NAME = re.compile(r"[/\\\x00-\x1f]|^\.")
"""What no case id has, for the files of its predictions are named by it."""


def write_cohort(cases: Iterable[Case], uri: str) -> None:
    """Writes the cases as the rows of a Parquet file.

    Raises:
        StorageError: it cannot be written.

    Example:
        >>> case = Case("a", "a", "2020", "brats", ("a.nii",), "seg.nii", (1, 2, 4), fold=0)
        >>> write_cohort([case], "cohort.parquet")
        >>> read_cohort("cohort.parquet") == [case]
        True
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([asdict(c) for c in cases], schema=_schema()), buffer)
    storage.write_bytes(uri, buffer.getvalue())


def read_cohort(uri: str) -> list[Case]:
    """The cases in the rows of a Parquet file.

    Raises:
        DataError: not a cohort file, or rows that contradict each other (edited by hand, joined).
        StorageError: it is missing or out of reach.

    Example:
        >>> write_cohort([], "empty.parquet")
        >>> read_cohort("empty.parquet")
        []
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
        num_files = len(case.image_uris) + (case.label_uri is not None)
        if not case.case_id or _NOT_A_NAME.search(case.case_id):
            problem = f"case id {case.case_id!r} is no file name"
        elif case.case_id in ids:
            problem = f"case {case.case_id} has two rows"
        elif folds.setdefault(case.subject, case.fold) != case.fold:
            both = f"{folds[case.subject]} and {case.fold}"
            problem = f"subject {case.subject} is in folds {both}, so one side would know the other"
        elif not _within(case.box, case.shape):
            problem = f"case {case.case_id} has box {case.box} in a shape of {case.shape}"
        elif any(0 < len(facts) < num_files for facts in (case.sizes, case.digests)):
            problem = f"case {case.case_id} has fewer sizes or digests than files"
        else:
            ids.add(case.case_id)
            continue
        raise DataError(f"{uri}: {problem}; repair the rows, or make it anew by `raybrats index`")


def _within(box: Sequence[int] | None, shape: Sequence[int] | None) -> bool:
    """Whether a box, if there is one, lies within the volume."""
    if not box:
        return box is not None
    if not shape or (len(shape), len(box)) != (3, 6):
        return False
    return all(0 <= a < b <= n for a, b, n in zip(box[::2], box[1::2], shape, strict=True))


def _schema() -> "pa.Schema":
    """Column types of the cohort file, read off the fields of `Case`."""
    import pyarrow as pa

    plain = {str: pa.string(), str | None: pa.string(), int: pa.int64(), float: pa.float64()}
    lists = {tuple[kind, ...]: pa.list_(plain[kind]) for kind in (str, int, float)}
    columns: dict[object, pa.DataType] = {**plain, **lists}
    return pa.schema([(f.name, columns[f.type]) for f in fields(Case)])
