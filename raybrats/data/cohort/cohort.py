"""The verified cases of a tree, as the Python API hands them on."""

from dataclasses import dataclass, field
from typing import Any

from raybrats import storage
from raybrats.data.cohort import index as indexing
from raybrats.data.cohort.case import Case
from raybrats.table import table


@dataclass(frozen=True)
class Cohort:
    """Verified cases, and where their rows were written.

    Example:
        >>> print(Cohort((), "cohort.parquet"))
        cases  ok  quarantined  cohort
            0   0            0  cohort.parquet
    """

    cases: tuple[Case, ...] = field(repr=False)
    uri: str = ""
    """Cohort file; empty if none was written."""

    @property
    def summary(self) -> dict[str, Any]:
        """The counts that `raybrats index --json` prints, and why cases are quarantined."""
        return indexing.summary(self.cases) | {"cohort_uri": self.uri}

    def __str__(self) -> str:
        found = self.summary
        bad = [(row["case_id"], row["reason"]) for row in found["quarantined"]]
        columns = ("cases", "ok", "quarantined", "cohort")
        counts = table(columns, [(found["cases"], found["ok"], len(bad), self.uri)])
        return f"{counts}\n\n{table(('quarantined', 'reason'), bad)}" if bad else counts


def index(tree: str, out_uri: str | None = None, edition: str | None = None) -> Cohort:
    """The verified cases of a tree, also written as a cohort file where one is asked for.

    Args:
        tree: local path or URI below which cases lie.
        out_uri: cohort file that is written.
        edition: whose labels the cases have; told by the beginning of each id where not given.

    Raises:
        DataError: there is no case, or none that is not bad.
        StorageError: the tree is out of reach.
        UsageError: there is no such edition, or a URI is none.

    Example:
        >>> index("s3://bucket/BraTS2021", "s3://bucket/cohort.parquet")  # doctest: +SKIP
        Cohort(uri='s3://bucket/cohort.parquet')
    """
    tree, out = storage.absolute(tree), None if out_uri is None else storage.absolute(out_uri)
    indexing.check_edition(edition)
    if out is not None:
        storage.check_file(out)
    return Cohort(tuple(indexing.index(tree, out, edition)), out or "")
