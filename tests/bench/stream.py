"""Patches a second through Ray Data into one process, beside a torch DataLoader.

    .venv-bench/bin/python tests/bench/stream.py [--cases TREE] [--edges 128 96 64] [--rounds 3]

Both run the same function (`PatchTask`: open the case from the node cache, or decode and keep it,
then cut) over the same visits, in order, two patches of int16 a batch: raybrats as Ray tasks
through `Stream`, the other as a map-style Dataset with --workers worker processes. In each round
both go, one after the other. A stream begins with an empty cache; the first --lead batches, while
processes start, are not timed; the rest of the first epoch is "cold", --epochs more are "warm".
Printed are medians over the rounds. CPU is that of all processes, Ray's own included; own CPU is
that of the process that takes the batches, and longest the longest wait for one. The goal is about
warm patches a second, raybrats over DataLoader.

Without --cases, phantoms. A cohort of --num-cases is made of copies that differ in their digests.
"""

import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import measure
import ray
from cohorts import Meter, repeated
from torch.utils.data import DataLoader, Dataset

from raybrats import cluster
from raybrats.config import DataConfig, OptimConfig, TrainConfig
from raybrats.data.cohort.case import Case
from raybrats.data.cohort.index import find_cases, verify_case
from raybrats.data.plan import Plan
from raybrats.data.stream import Assignment, PatchTask, Stream

BATCH = 2
OWN, PEER = "raybrats Stream (Ray Data)", "torch DataLoader"


@dataclass(frozen=True)
class Pass:
    """One reading of some steps."""

    patches: int
    wall_s: float
    cpu_s: float
    own_s: float
    """CPU-seconds of the process that takes the batches, a worker's beside its step."""
    longest_s: float
    """Longest wait for a batch."""


class Patches(Dataset):
    """The patch of a visit, by the task that Ray runs."""

    def __init__(self, task: PatchTask, visits: list[dict]) -> None:
        self._task, self._visits = task, visits

    def __len__(self) -> int:
        return len(self._visits)

    def __getitem__(self, number: int) -> dict:
        warnings.filterwarnings("ignore")  # arrays of the memory map cannot be written
        return next(iter(self._task(self._visits[number])))


def ray_data(config: TrainConfig, cases: Sequence[Case], steps: int, _: int) -> Iterator[object]:
    cpus = cluster.resources()["CPU"]
    start_workers(int(cpus / config.data.cpus_per_task), config.data.cpus_per_task)
    whole = Assignment(rank=0, world=1, start=0, stop=steps, cpus=cpus)
    return (batch.image for batch in Stream(config, cases, whole))


def dataloader(
    config: TrainConfig, cases: Sequence[Case], steps: int, num_workers: int
) -> Iterator[object]:
    windows = Plan(len(cases), BATCH, config.run.seed).visits(rank=0, world=1, start=0, stop=steps)
    stream = Stream(config, cases, Assignment(rank=0, world=1, start=0, stop=steps, cpus=1))
    visits = [stream.visit_row(visit) for window in windows for visit in window]
    dataset = Patches(PatchTask(config, cases), visits)
    options = {"num_workers": num_workers, "multiprocessing_context": "spawn"}
    return (batch["image"] for batch in DataLoader(dataset, BATCH, **options))


def start_workers(count: int, num_cpus: float) -> None:
    """Has Ray start the processes that the stream's tasks will find, with their imports done."""

    @ray.remote(num_cpus=num_cpus)
    def import_all() -> None:
        import raybrats.data.stream  # noqa: F401

        time.sleep(1)  # so that each task has a process of its own

    ray.get([import_all.remote() for _ in range(count)])


def read(images: Iterator[object], ends: Sequence[int], meter: Meter) -> list[Pass]:
    """What the steps between one end and the next cost."""
    passes, patches, marks, longest, last = [], 0, (0.0, 0.0, 0.0), 0.0, 0.0
    for step, image in enumerate(images, start=1):
        patches += len(image)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
        if step in ends:
            marks, before = (now, meter.seconds(), time.process_time()), marks
            spent = (after - earlier for after, earlier in zip(marks, before, strict=True))
            passes.append(Pass(patches, *spent, longest))
            patches, longest = 0, 0.0
    return passes[1:]


def compare(cases: Sequence[Case], edge: int, folder: Path, options: object) -> dict[str, dict]:
    """Medians over the rounds, by peer."""
    steps = len(cases) // BATCH
    ends = (options.lead, steps, steps * (1 + options.epochs))
    passes: dict[str, list[list[Pass]]] = {OWN: [], PEER: []}
    with Meter() as meter:
        for turn in range(options.rounds):
            for name, open_ in ((OWN, ray_data), (PEER, dataloader)):
                cache = folder / f"cache-{edge}-{turn}-{len(name)}"
                data = DataConfig(patch_size=(edge,) * 3, cache_dir=str(cache))
                config = TrainConfig(data=data, optim=OptimConfig(global_batch=BATCH))
                images = open_(config, cases, ends[-1], options.workers)
                passes[name].append(read(images, ends, meter))
                shutil.rmtree(cache)
    return {name: _summary(done, edge) for name, done in passes.items()}


def _summary(rounds: list[list[Pass]], edge: int) -> dict[str, float]:
    row = {}
    for name, done in zip(("cold", "warm"), zip(*rounds, strict=True), strict=True):
        speed = statistics.median(p.patches / p.wall_s for p in done)
        row[f"{name} patch/s"] = speed
        row[f"{name} MB/s"] = speed * 4 * 2 * edge**3 / 1e6
        row[f"{name} CPU-ms"] = 1e3 * statistics.median(p.cpu_s / p.patches for p in done)
        row[f"{name} own CPU-ms"] = 1e3 * statistics.median(p.own_s / p.patches for p in done)
        row[f"{name} longest ms"] = 1e3 * statistics.median(p.longest_s for p in done)
    return row


def main() -> None:
    parser = measure.parser(__doc__, rounds=3, cases=True)
    parser.add_argument("--edges", type=int, nargs="+", default=[128, 96, 64])
    parser.add_argument("--num-cases", type=int, default=48, help="of the cohort that is read")
    parser.add_argument("--epochs", type=int, default=4, help="warm ones")
    parser.add_argument("--lead", type=int, default=8, help="batches before the clock runs")
    parser.add_argument("--workers", type=int, default=2, help="of the DataLoader")
    options = parser.parse_args()
    result, text = {}, []
    with measure.tree_of(options.cases) as tree, tempfile.TemporaryDirectory() as folder:
        verified = [verify_case(case) for case in find_cases(tree)]
        cases = repeated(verified, options.num_cases, Path(folder) / "cases")
        cluster.connect()
        for edge in options.edges:
            rows = compare(cases, edge, Path(folder), options)
            ratio = {name: rows[OWN][name] / rows[PEER][name] for name in rows[OWN]}
            result[str(edge)] = rows = {**rows, "raybrats / DataLoader": ratio}
            text.append(measure.table(f"{edge}^3, {len(cases)} cases", rows))
    measure.report({"edges": result}, "\n\n".join(text), as_json=options.json)


if __name__ == "__main__":
    main()
