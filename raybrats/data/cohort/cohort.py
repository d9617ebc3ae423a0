"""The verified cases of a tree, as the Python API hands them on."""

from dataclasses import dataclass, field
from typing import Any

from raybrats import cluster, storage
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


def index(tree: str, out_uri: str = "") -> Cohort:
    """The verified cases of a tree, also written as a cohort file where one is asked for.

    Raises:
        DataError: there is no case.
        StorageError: the tree is out of reach.

    Example:
        >>> index("s3://bucket/BraTS2021", "s3://bucket/cohort.parquet")  # doctest: +SKIP
        Cohort(uri='s3://bucket/cohort.parquet')
    """
    cluster.connect()
    out_uri = storage.absolute(out_uri) if out_uri else ""
    return Cohort(tuple(indexing.index(tree, out_uri or None)), out_uri)
