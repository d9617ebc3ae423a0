"""Cost and memory of streaming, by the number of cases, of workers and by patch size.

    .venv-bench/bin/python tests/bench/scaling.py [--cases TREE] [--patches 600] [--json]

Each row, in a Ray cluster of its own: as many workers (Ray tasks that each read their `Stream`)
take all visits of a cohort once with an empty node cache (cold), then --patches with the full one
(warm). CPU is that of all processes. Memory is the peak over both, sampled twice a second, of this
process and all of Ray's: private pages, pages of the object store that were touched, and, apart,
mapped files (libraries and cached cases, which the system can drop). The first row is Ray at rest.
What it shows: memory follows workers and patch size, not the number of cases.

Without --cases, phantoms of 96x96x64; cohorts are copies that differ in their digests.
"""

import argparse
import itertools
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import measure
import ray
from cohorts import Meter, memory_mb, repeated

from raybrats import cluster
from raybrats.config import DataConfig, OptimConfig, TrainConfig
from raybrats.data.cohort.case import Case
from raybrats.data.cohort.index import find_cases, verify_case
from raybrats.data.stream import Assignment, Stream

SHAPE = (96, 96, 64)
EACH = 2
"""Patches a worker and step."""


@dataclass(frozen=True)
class Setting:
    """One row."""

    num_cases: int
    workers: int
    edge: int

    def __str__(self) -> str:
        return f"{self.num_cases} cases, {self.workers} workers, {self.edge}^3"


class Peak:
    """Highest memory while it is entered."""

    def __init__(self) -> None:
        self.mb = {"private": 0.0, "store": 0.0, "mapped": 0.0}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        more = True
        while more:  # once more after the end
            more = not self._stop.wait(0.5)
            now = memory_mb()
            if now["private"] + now["store"] > self.mb["private"] + self.mb["store"]:
                self.mb |= {kind: now[kind] for kind in ("private", "store")}
            self.mb["mapped"] = max(self.mb["mapped"], now["mapped"])


@ray.remote(num_cpus=0, max_retries=0)
def consume(config: TrainConfig, cases: Sequence[Case], assignment: Assignment) -> int:
    """Patches of a rank's assignment; what a training worker would take."""
    return sum(len(batch.image) for batch in Stream(config, cases, assignment))


def run(setting: Setting, cases: Sequence[Case], folder: Path, meter: Meter, patches: int) -> dict:
    batch = EACH * setting.workers
    data = DataConfig(patch_size=(setting.edge,) * 3, cache_dir=str(folder / "cache"))
    config = TrainConfig(data=data, optim=OptimConfig(global_batch=batch))
    steps = -(-setting.num_cases // batch)
    ends = 0, steps, steps + -(-patches // batch)
    cluster.connect()
    row, held = {}, ray.put(list(cases[: setting.num_cases]))

    def read(config: TrainConfig, start: int, stop: int) -> int:
        given = assignments(start, stop, batch)
        return sum(ray.get([consume.remote(config, held, each) for each in given]))

    lead = replace(config, data=replace(data, cache_gb=0.0))
    read(lead, 0, 10)  # while Ray's processes start
    with Peak() as peak:
        for name, (start, stop) in zip(("cold", "warm"), itertools.pairwise(ends), strict=True):
            began, spent = time.perf_counter(), meter.seconds()
            done = read(config, start, stop)
            wall, cpu = time.perf_counter() - began, meter.seconds() - spent
            row |= {f"{name} patch/s": done / wall, f"{name} CPU-ms": 1e3 * cpu / done}
    ray.shutdown()
    shutil.rmtree(folder / "cache")
    return row | memory_columns(peak)


def assignments(start: int, stop: int, batch: int) -> list[Assignment]:
    world = batch // EACH
    cpus = cluster.resources()["CPU"] / world
    return [
        Assignment(rank=rank, world=world, start=start, stop=stop, cpus=cpus)
        for rank in range(world)
    ]


def memory_columns(peak: Peak) -> dict[str, float]:
    mb = peak.mb
    return {
        "private MB": mb["private"],
        "store MB": mb["store"],
        "memory MB": mb["private"] + mb["store"],
        "mapped MB": mb["mapped"],
    }


def settings(options: argparse.Namespace) -> list[Setting]:
    """One thing at a time: first the cases, then the workers, then the patch."""
    few, edge = min(options.num_cases), options.edges[0]
    rows = [Setting(count, 1, edge) for count in options.num_cases]
    rows += [Setting(few, count, edge) for count in options.workers if count > 1]
    rows += [Setting(few, 1, other) for other in options.edges[1:]]
    return rows


def main() -> None:
    parser = measure.parser(__doc__, rounds=1, cases=True)
    parser.add_argument("--num-cases", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--edges", type=int, nargs="+", default=[64, 32, 96])
    parser.add_argument("--patches", type=int, default=600, help="of each row, with a full cache")
    options = parser.parse_args()
    tree_of = measure.tree_of(options.cases, num_cases=4, shape=SHAPE)
    with tree_of as tree, tempfile.TemporaryDirectory() as name, Meter() as meter:
        folder = Path(name)
        verified = [verify_case(case) for case in find_cases(tree)]
        cases = repeated(verified, max(options.num_cases), folder / "cases")
        cluster.connect()
        with Peak() as rest:
            time.sleep(3)
        ray.shutdown()
        empty = dict.fromkeys(("cold patch/s", "cold CPU-ms", "warm patch/s", "warm CPU-ms"), "")
        rows = {"Ray at rest": empty | memory_columns(rest)}
        for setting in settings(options):
            done = [
                run(setting, cases, folder, meter, options.patches) for _ in range(options.rounds)
            ]
            rows[str(setting)] = {
                column: sorted(row[column] for row in done)[len(done) // 2] for column in done[0]
            }
    measure.report(rows, measure.table("", rows), as_json=options.json)


if __name__ == "__main__":
    main()
