"""A cohort as a Parquet file: one row a case."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING

from raybrats import storage
from raybrats.data.cohort.case import Case, from_row
from raybrats.errors import DataError, UsageError
from raybrats.filesystem import is_remote, problem_of

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
"""What no path of a row has: control characters, and bytes that are no UTF-8."""
MAX_ROWS, MAX_VALUES = 1_000_000, 16
"""Cases that a cohort has at most, and values of one of their lists in the mean (a box has six)."""
MAX_ID_BYTES = 200
"""A file name has 255 at most, of which its ending and a write's own take some."""
_NOT_A_NAME = re.compile(rf"[/\\]|{CONTROL.pattern}|^\.|^$")


def is_name(case_id: str) -> bool:
    """Whether the id is a file name, for the files of its predictions are named by it.

    Example:
        >>> [is_name(text) for text in ("BraTS2021_00000", "../etc", "")]
        [True, False, False]
    """
    return not _NOT_A_NAME.search(case_id) and len(case_id.encode()) <= MAX_ID_BYTES


def write_cohort(cases: Iterable[Case], uri: str) -> None:
    """Writes the cases as the rows of a Parquet file.

    Raises:
        StorageError: it cannot be written.

    Example:
        >>> case = Case("a", "a", "2020", "brats", ("/a.nii",), "/seg.nii", (1, 2, 4), fold=0)
        >>> write_cohort([case], "cohort.parquet")
        >>> read_cohort("cohort.parquet") == [case]
        True
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([asdict(c) for c in cases], schema=_schema()), buffer)
    storage.write_bytes(uri, buffer.getvalue().to_pybytes())


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
        # Bytes of its own and no threads: one of Arrow's that lets go of a Python object while the
        # interpreter ends would abort the process (1 of 85 times).
        file = pq.ParquetFile(pa.BufferReader(data))
        _check_size(file.metadata, uri)
        found = file.read(use_threads=False)
        if "label_set" not in found.schema.names:  # written when there was one only
            found = found.append_column(
                "label_set", pa.nulls(len(found), pa.string()).fill_null("")
            )
        found = found.select(_schema().names).cast(_schema())
        cases = [from_row(row) for row in found.to_pylist()]
    except (pa.ArrowException, KeyError, OSError, ValueError, TypeError) as error:
        # not in its own words, which hold what the file holds
        why = "it lacks a column" if isinstance(error, KeyError) else "no Parquet, or other types"
        raise DataError(f"{uri}: not a cohort file ({why}); make one by `raybrats index`") from None
    _check_rows(cases, uri)
    return cases


def _check_size(facts: "pq.FileMetaData", uri: str) -> None:
    """Refuses what a few bytes may claim to hold, before there is memory for it."""
    groups = [facts.row_group(number) for number in range(facts.num_row_groups)]
    counts = [g.column(n).num_values for g in groups for n in range(facts.num_columns)]
    if facts.num_rows > MAX_ROWS or max(counts, default=0) > MAX_ROWS * MAX_VALUES:
        raise DataError(f"{uri}: not a cohort file (more than {MAX_ROWS} cases); split it")


def _check_rows(cases: Sequence[Case], uri: str) -> None:
    """Refuses what indexing never writes and training or predicting would not notice."""
    ids: set[str] = set()
    folds: dict[str, int] = {}
    for case in cases:
        if _lacks_values(case):
            problem = f"the row of case {case.case_id!r} lacks a value"
        elif not is_name(case.case_id):
            problem = f"case id {case.case_id[:MAX_ID_BYTES]!r} is no file name"
        elif case.case_id in ids:
            problem = f"case {case.case_id} has two rows"
        elif folds.setdefault(case.subject, case.fold) != case.fold:
            both = f"{folds[case.subject]} and {case.fold}"
            problem = f"subject {case.subject} is in folds {both}, so one side would know the other"
        else:
            problem = _problem_of_files(case)
        if problem:
            raise DataError(
                f"{uri}: {problem}; repair the rows, or make it anew by `raybrats index`"
            )
        ids.add(case.case_id)


def _lacks_values(case: Case) -> bool:
    values = [value for name, value in vars(case).items() if name != "label_uri"]
    inner = [each for value in values if isinstance(value, tuple) for each in value]
    return any(each is None for each in values + inner)


def _problem_of_files(case: Case) -> str:
    """What is wrong with where a case's files lie and what is recorded of them; empty if nothing.

    A cohort may come from anywhere, so it names files by absolute path or s3://, as indexing does,
    and nothing else that could be opened.
    """
    labels = () if case.label_uri is None else (case.label_uri,)
    num_files = len(case.image_uris) + len(labels)
    for uri in (*filter(None, case.image_uris), *labels):
        place = uri.startswith("/") or is_remote(uri)
        if not place or problem_of(uri) or CONTROL.search(uri):
            return f"case {case.case_id} names {uri[:100]!r}, no absolute path or s3:// URI"
    if problem := _problem_of_labels(case):
        return f"case {case.case_id} has {problem}"
    if not _within(case.box, case.shape):
        return f"case {case.case_id} has box {case.box} in a shape of {case.shape}"
    if any(0 < len(facts) < num_files for facts in (case.sizes, case.digests)):
        return f"case {case.case_id} has fewer sizes or digests than files"
    return ""


def _problem_of_labels(case: Case) -> str:
    """What is wrong with the labels that a case is said to have; empty if nothing."""
    values, counts = case.label_values, case.label_counts
    try:
        num_labels = len(case.labels.names)
    except UsageError as error:
        return str(error)
    if len(values) not in (0, num_labels) or not all(0 < value < 256 for value in values):
        return f"label values {values}"
    return f"label counts {counts}" if len(counts) not in (0, num_labels) else ""


def _within(box: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether a box, if there is one, lies within the volume."""
    if not box:
        return True
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
