"""Patches a second and memory of the `nnunet` step on this device, beside the device's own limits.

    python tests/bench/gpu_step.py [--edge 128] [--batches 2 4 8] [--only bf16] [--json]
    python tests/bench/gpu_step.py --device cpu --edge 32 --batches 1 2 --steps 2

Needs torch, numpy and nibabel; neither MONAI, Ray, MLflow, pydantic, tyro, pyarrow, fsspec nor
numba. Where nibabel is a wheel that was unpacked into a folder:

    pip download --no-deps --dest wheels nibabel             # where there is a network
    for wheel in wheels/*.whl; do python -m zipfile -e $wheel unpacked; done
    PYTHONPATH=.:unpacked python tests/bench/gpu_step.py --json > gpu_step.json

Every row is the loop of a real run (step.py) over int16 patches in page-locked memory: the side
stream, augmentation, backward, update. "tuned" is eager with cuDNN's own search for the fastest
convolution, "compiled" is `cluster.compile`. What the row's memory or compiler cannot do stands in
the row, in words. Rows come in the order of their weight; what --budget-s leaves no time for says
so. Peak memory is that of the allocator. On a CPU there is one thread, seconds are CPU time, and
the peak is the largest resident set of the process so far; a patch below 64 has fewer stages.

The floor of a row is what this device would need at its measured rates (floor.py has the formula):
"roofline" is the larger of computing and moving bytes, "sum" both; x_roofline and x_sum are our
multiples. Where the host waits for the GPU within a step is told by torch itself.
"""

import argparse
import gc
import itertools
import resource
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import floor
import measure
import step
import torch

from raybrats.config import TrainConfig
from raybrats.train.learner import new_learner
from raybrats.train.ranks import make_ready
from raybrats.train.step import train_step

LAYOUTS = ("contiguous", "channels_last_3d")
COLUMNS = ("patches/s", "ms", "peak_GB", "x_roofline", "x_sum", "words")


@dataclass(frozen=True)
class Row:
    """One configuration."""

    batch: int
    precision: str
    layout: str
    engine: str
    augmented: bool

    @property
    def name(self) -> str:
        change = "augmented" if self.augmented else "plain"
        return f"{self.engine} {self.layout} {self.precision} batch {self.batch} {change}"

    def config(self, edge: int) -> TrainConfig:
        """The real recipe with it."""
        config = step.settings("nnunet", edge, self.batch, self.precision, augmented=self.augmented)
        last, compiled = self.layout == "channels_last_3d", self.engine == "compiled"
        return replace(
            config, cluster=replace(config.cluster, channels_last=last, compile=compiled)
        )


def rows_of(options: argparse.Namespace) -> list[Row]:
    """What decides most first: eager, then compiled from the smallest batch up."""
    tuned = () if options.device == "cpu" else ("tuned",)
    kinds = list(itertools.product(options.precisions, LAYOUTS, (True, False)))
    found = [
        Row(batch, precision, layout, engine, augmented)
        for engine in ("eager", *tuned)
        for precision, layout, augmented in kinds
        for batch in options.batches
        if engine == "eager" or not augmented
    ]
    found += [
        Row(batch, precision, layout, "compiled", augmented)
        for batch in options.batches
        for precision, layout, augmented in kinds
    ]
    return [row for row in found if options.only in row.name]


def measured(row: Row, options: argparse.Namespace) -> dict[str, Any]:
    """Pace and memory of a row, or the words of what it cannot do."""
    device, began = torch.device(options.device), time.perf_counter()
    cleared(row, device)
    warm = options.warmup * (2 if row.engine == "compiled" else 1)
    found: dict[str, Any] = {}
    try:
        with tuned(row.engine == "tuned"), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            learner = new_learner(row.config(options.edge), device)
            make_ready(learner)
            batch, timing = (
                step.random_batch(row.batch, options.edge),
                step.Timing(1, options.steps, warm),
            )
            ((seconds, _),) = step.timed(learner, batch, timing)
        found = {"patches/s": row.batch / seconds, "ms": 1e3 * seconds}
        found |= {"peak_GB": peak_bytes(device) / 1e9, "words": fallen_back(said)}
    except Exception as error:  # whatever it cannot do is its result
        found["words"] = f"{type(error).__name__}: {first_line(error)}"
    return found | {"took_s": time.perf_counter() - began}


def cleared(row: Row, device: torch.device) -> None:
    """Frees what the row before has left."""
    gc.collect()
    if row.engine == "compiled":
        torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


@contextmanager
def tuned(on: bool) -> Iterator[None]:
    """Lets cuDNN try its convolutions and take the fastest."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def fallen_back(said: Sequence[warnings.WarningMessage]) -> str:
    """What a learner says that goes on without its compiler."""
    words = (str(one.message) for one in said)
    return next((word[:160] for word in words if "torch.compile failed" in word), "")


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:160]


def beside_floor(row: Row, found: dict[str, Any], limits: Mapping[str, Any]) -> dict[str, Any]:
    """The row with its multiples of the floor."""
    limit = limits[f"{row.precision} batch {row.batch}"]
    if "ms" not in found:
        return found
    multiples = {f"x_{kind}": found["ms"] / limit[f"{kind}_ms"] for kind in ("roofline", "sum")}
    return found | multiples


def all_rows(rows: Sequence[Row], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Every row, while there is time."""
    began, found = time.perf_counter(), {}
    for row in rows:
        if time.perf_counter() - began > options.budget_s:
            found[row.name] = {"words": "left out: no time (--budget-s)"}
            continue
        found[row.name] = measured(row, options)
        print(row.name, found[row.name], file=sys.stderr, flush=True)
    return found


def overhead(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The loop beside a bare step, as step.py has it."""
    timing, found = step.Timing(options.rounds, options.steps, options.warmup), {}
    for precision, on in itertools.product(options.precisions, (False, True)):
        config = step.settings("nnunet", options.edge, options.batches[0], precision, augmented=on)
        name = f"{precision} batch {options.batches[0]}, augmentation {'on' if on else 'off'}"
        found[name] = step.compare(config, timing, torch.device(options.device))
    return found


def host_waits(options: argparse.Namespace) -> dict[str, float]:
    """Where the host waits for the GPU in an augmented step, and how often a step; torch tells."""
    if options.device != "cuda":
        return {}
    size, steps = options.batches[0], 8
    learner = new_learner(
        step.settings("nnunet", options.edge, size, augmented=True), torch.device("cuda")
    )
    batch = step.random_batch(size, options.edge)
    train_step(learner, batch)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        for turn in range(1, steps + 1):
            train_step(learner, replace(batch, draw=batch.draw + turn * size))
        torch.cuda.set_sync_debug_mode("default")
    places = [f"{one.filename}:{one.lineno}" for one in said if "synchroniz" in str(one.message)]
    return {place: count / steps for place, count in Counter(places).most_common()}


def described(options: argparse.Namespace) -> dict[str, Any]:
    """The device, and what decides how fast it may be."""
    gpu = options.device == "cuda"
    network = step.settings("nnunet", options.edge, 2).network
    return {
        "device": torch.cuda.get_device_name() if gpu else "CPU, one thread",
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "tf32_in_convolutions": torch.backends.cudnn.allow_tf32 if gpu else False,
        "edge": options.edge,
        "widths": network.widths,
        "deep_supervision": network.deep_supervision,
    }


def parsed() -> argparse.Namespace:
    parser = measure.parser(__doc__, rounds=6)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--edge", type=int, default=128)
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument(
        "--precisions", nargs="+", choices=tuple(floor.KINDS), default=["bf16", "fp32"]
    )
    parser.add_argument("--steps", type=int, default=15, help="that are timed")
    parser.add_argument("--warmup", type=int, default=5, help="before; twice as many if compiled")
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    parser.add_argument("--budget-s", type=float, default=230.0, help="until rows are left out")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    if options.device == "cpu":
        torch.set_num_threads(1)
    rows = rows_of(options)
    with measure.quiet():
        pairs = sorted({(row.precision, row.batch) for row in rows})
        limits = floor.floors(pairs, options.edge, torch.device(options.device))
        beside, waits = overhead(options), host_waits(options)
        found = all_rows(rows, options)
    found = {row.name: beside_floor(row, found[row.name], limits) for row in rows}
    shown = {n: {c: row.get(c, "-") for c in COLUMNS} for n, row in found.items()}
    ratios = {n: {k: v for k, v in row.items() if k != "ratios"} for n, row in beside.items()}
    result = {**described(options), "floor": limits, "overhead": beside, "waits": waits}
    result["rows"] = found
    tables = (
        ", ".join(f"{name} {value}" for name, value in described(options).items()),
        measure.table("floor", limits),
        measure.table(f"loop, goal {step.GOALS[options.device]} off", ratios),
        measure.table("step", shown),
        *(f"the host waits at {place}, {count:g} times a step" for place, count in waits.items()),
    )
    measure.report(result, "\n\n".join(tables), as_json=options.json)


if __name__ == "__main__":
    main()
