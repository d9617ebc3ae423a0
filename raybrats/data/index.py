"""Verifying a tree on the cluster: every case read and opened once, as Ray tasks."""

from raybrats import cluster
from raybrats.data import cohort, storage
from raybrats.data.cohort import Case
from raybrats.errors import DataError
from raybrats.progress import Display

TASK_MEMORY = 600 * 2**20
"""Bytes that opening one case may take: 4 modalities of 240x240x155 inflated, and copies."""


def index(uri: str, out_uri: str | None = None) -> list[Case]:
    """The verified cases of a tree, also written as a cohort file where one is asked for.

    Raises:
        DataError: there is no case.
        StorageError: the tree is out of reach.
    """
    found = cohort.find_cases(uri)
    verified = cluster.each(cohort.verify_case, found, num_cpus=0.5, memory=TASK_MEMORY)
    cases: list[Case] = []
    with Display("indexing", len(found)) as display:
        for case in verified:
            cases.append(case)
            display.show(len(cases), case.case_id)
    cases.sort(key=lambda case: case.case_id)
    if out_uri is not None:
        cohort.write_cohort(cases, out_uri)
    return cases


def load(uri: str, *, verify: bool = True) -> list[Case]:
    """The cases of a cohort file, or of a tree, which is indexed first where asked for.

    Raises:
        DataError: no URI, or no case there.
    """
    if not uri:
        raise DataError("data.cohort is empty; give a cohort file or a tree of cases")
    if uri.endswith(".parquet"):
        return cohort.read_cohort(storage.absolute(uri))
    return index(uri) if verify else cohort.find_cases(uri)
