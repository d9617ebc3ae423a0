"""Verifying a tree on the cluster: every case read and opened once, as Ray tasks."""

from collections.abc import Sequence
from dataclasses import replace

from raybrats import cluster
from raybrats.data import cohort, storage
from raybrats.data.case import BAD, Case
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
    verified = cluster.each(cohort.verify_case, found, num_cpus=1, memory=TASK_MEMORY)
    cases: list[Case] = []
    with Display("indexing", len(found)) as display:
        for case in verified:
            cases.append(case)
            display.show(len(cases), case.case_id)
    cases = mark_copies(sorted(cases, key=lambda case: case.case_id))
    if out_uri is not None:
        cohort.write_cohort(cases, out_uri)
    return cases


def mark_copies(cases: Sequence[Case]) -> list[Case]:
    """The cases, with those bad that have the very image files of an earlier one, in any order.

    Under two ids they could come to lie on both sides of a split.
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
