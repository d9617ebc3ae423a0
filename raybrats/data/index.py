"""Verifying a tree on the cluster: every case read and opened once, as Ray tasks."""

from collections.abc import Iterator, Sequence

import ray

from raybrats.data import cohort, storage
from raybrats.data.cohort import Case
from raybrats.errors import DataError
from raybrats.progress import Display

_TASK_MEMORY = 600 * 2**20
"""Bytes that opening one case may take: 4 modalities of 240x240x155 inflated, and copies."""


def index(uri: str, out_uri: str | None = None) -> list[Case]:
    """The verified cases of a tree, also written as a cohort file where one is asked for.

    Raises:
        DataError: there is no case.
        StorageError: the tree is out of reach.
    """
    found = cohort.find_cases(uri)
    with Display("indexing", len(found)) as display:
        cases = []
        for case in _verified(found):
            cases.append(case)
            display.show(len(cases), case.case_id)
    cases.sort(key=lambda case: case.case_id)
    if out_uri is not None:
        cohort.write_cohort(cases, out_uri)
    return cases


def load(uri: str) -> list[Case]:
    """The cases of a cohort file, or of a tree, which is then indexed.

    Raises:
        DataError: no URI, or no case there.
    """
    if not uri:
        raise DataError("data.cohort is empty; give a cohort file or a tree of cases")
    if not uri.endswith(".parquet"):
        return index(uri)
    return cohort.read_cohort(storage.absolute(uri))


def _verified(cases: Sequence[Case]) -> Iterator[Case]:
    """Each case as its task ends; no more tasks in flight than keep the cluster busy."""
    verify = ray.remote(num_cpus=0.5, memory=_TASK_MEMORY, max_retries=2)(cohort.verify_case)
    in_flight = max(2, int(4 * ray.cluster_resources().get("CPU", 1)))
    waiting = list(reversed(cases))
    running: list[ray.ObjectRef] = []
    while waiting or running:
        while waiting and len(running) < in_flight:
            running.append(verify.remote(waiting.pop()))
        done, running = ray.wait(running, num_returns=1)
        yield from ray.get(done)
