"""Patches a second and memory of the `nnunet` step on this device, beside the device's own limits.

    python tests/bench/gpu_step.py [--edge 128] [--batches 2 4 8] [--only bf16] [--json]
    python tests/bench/gpu_step.py --device cpu --edge 32 --batches 1 2 --steps 2

Needs torch, numpy, MONAI and nibabel; neither Ray, MLflow, pydantic, tyro, pyarrow, fsspec nor
numba. Where MONAI and nibabel are wheels that were unpacked into a folder:

    pip download --no-deps --dest wheels monai nibabel       # where there is a network
    for wheel in wheels/*.whl; do python -m zipfile -e $wheel unpacked; done
    PYTHONPATH=.:unpacked python tests/bench/gpu_step.py --json > gpu_step.json

Every row is the loop of a real run (step.py) over int16 patches in page-locked memory: the side
stream, augmentation, backward, update. "tuned" is eager with cuDNN's own search for the fastest
convolution, "compiled" is `cluster.compile`. What the row's memory or compiler cannot do stands in
the row, in words. Rows come in the order of their weight; what --budget-s leaves no time for says
so. Peak memory is that of the allocator. On a CPU there is one thread, seconds are CPU time, and
the peak is the largest resident set of the process so far; a patch below 64 has fewer stages.

The floor of a row is what its device would need at its measured rates:

    flops  = of forward and backward of the network (torch.utils.flop_counter, meta device),
             over the rate of a matrix product in the row's precision (TF32 where fp32 on a GPU)
    bytes  = 4 P + 2 G + 2 S + 2 A, over the rate of a copy (bytes read and written)
             P parameters: read forward, backward and by the optimiser, which writes them;
             G gradients, S optimiser state, A saved activations: written and read once each

A is what autograd keeps of forward and loss, by `torch.autograd.graph.saved_tensors_hooks`: each
storage once, without the parameters, of one and of two patches, and a straight line for more.
"roofline" is the larger of the two times, "sum" both; x_roofline and x_sum are our multiples.
"""

import argparse
import functools
import gc
import itertools
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import measure
import step
import torch
from torch.utils.flop_counter import FlopCounterMode

from raybrats.config import TrainConfig
from raybrats.model.network import build, heads
from raybrats.train import loop
from raybrats.train.learner import new_learner

KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = ("contiguous", "channels_last_3d")
COLUMNS = ("patches/s", "ms", "peak_GB", "x_roofline", "x_sum", "words")
batch_of = functools.cache(step.random_batch)


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
            batch, timing = batch_of(row.batch, options.edge), step.Timing(1, options.steps, warm)
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


def best_rate(call: Callable[[], object], amount: float, device: torch.device) -> float:
    """Amount a second, of five calls, the best of five times."""
    now, spent = step.clock(device), []
    for _ in range(6):
        began = now()
        for _ in range(5):
            call()
        spent.append(now() - began)
    return 5 * amount / min(spent[1:])


def product_rates(precisions: Sequence[str], device: torch.device) -> dict[str, float]:
    """FLOP a second of a square matrix product; fp32 in TF32, as convolutions are on a GPU."""
    size, before = 8192 if device.type == "cuda" else 1024, torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else before)
    rates = {}
    for precision in precisions:
        one, other = torch.randn(2, size, size, device=device, dtype=KINDS[precision])
        result = torch.empty_like(one)
        multiply = functools.partial(torch.mm, one, other, out=result)
        rates[precision] = best_rate(multiply, 2 * size**3, device)
    torch.set_float32_matmul_precision(before)
    return rates


def copy_rate(device: torch.device) -> float:
    """Bytes read and written a second."""
    source = torch.zeros(2**28 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    return best_rate(lambda: target.copy_(source), 2 * source.nbytes, device)


def step_flops(config: TrainConfig) -> int:
    """Of forward and backward of one patch, two a multiplication and addition."""
    with torch.device("meta"):
        network = build(config.network, len(config.data.modalities))
        image = torch.zeros(1, len(config.data.modalities), *config.data.patch_size)
    with FlopCounterMode(display=False) as counter:
        torch.stack([head.mean() for head in heads(network(image))]).sum().backward()
    return counter.get_total_flops()


def saved_bytes(config: TrainConfig, device: torch.device) -> int:
    """What autograd keeps of forward and loss, each storage once, without the parameters."""
    learner, kept = new_learner(config, device), {}
    own = {weight.untyped_storage().data_ptr() for weight in learner.bare.parameters()}
    batch = batch_of(config.optim.global_batch, config.data.patch_size[0])
    image, labels = loop.augmented(learner, batch)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with learner.autocast():
            loss = learner.loss(heads(learner.network(image)), labels)
        assert loss.requires_grad, "its graph keeps the storages, so that no address comes twice"
    return sum(kept.values())


def floors(rows: Sequence[Row], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Milliseconds that the device needs for each precision and batch, by its measured rates."""
    device = torch.device(options.device)
    precisions = sorted({row.precision for row in rows})
    products, copied = product_rates(precisions, device), copy_rate(device)
    found = {}
    for precision in precisions:
        one, two = (step.settings("nnunet", options.edge, n, precision) for n in (1, 2))
        first, second = saved_bytes(one, device), saved_bytes(two, device)
        flops, weights = step_flops(one), parameter_bytes(one)
        for batch in sorted({row.batch for row in rows if row.precision == precision}):
            saved = first + (batch - 1) * (second - first)
            computed = batch * flops / products[precision]
            moved = (8 * weights + 2 * saved) / copied  # G and S are as large as P: 4 + 2 + 2
            found[f"{precision} batch {batch}"] = {
                "TFLOP": batch * flops / 1e12,
                "TFLOP/s": products[precision] / 1e12,
                "saved_GB": saved / 1e9,
                "copy_GB/s": copied / 1e9,
                "flops_ms": 1e3 * computed,
                "bytes_ms": 1e3 * moved,
                "roofline_ms": 1e3 * max(computed, moved),
                "sum_ms": 1e3 * (computed + moved),
            }
    return found


def parameter_bytes(config: TrainConfig) -> int:
    with torch.device("meta"):
        network = build(config.network, len(config.data.modalities))
    return sum(weight.nbytes for weight in network.parameters())


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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--edge", type=int, default=128)
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--precisions", nargs="+", choices=tuple(KINDS), default=["bf16", "fp32"])
    parser.add_argument("--steps", type=int, default=15, help="that are timed")
    parser.add_argument("--warmup", type=int, default=5, help="before; twice as many if compiled")
    parser.add_argument("--rounds", type=int, default=6, help="of the loop beside a bare step")
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    parser.add_argument("--budget-s", type=float, default=280.0, help="until rows are left out")
    parser.add_argument("--json", action="store_true", help="print one JSON document, no tables")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    if options.device == "cpu":
        torch.set_num_threads(1)
    rows = rows_of(options)
    with measure.quiet():
        limits = floors(rows, options)
        beside = overhead(options)
        found = all_rows(rows, options)
    found = {row.name: beside_floor(row, found[row.name], limits) for row in rows}
    shown = {n: {c: row.get(c, "-") for c in COLUMNS} for n, row in found.items()}
    ratios = {n: {k: v for k, v in row.items() if k != "ratios"} for n, row in beside.items()}
    result = {**described(options), "floor": limits, "overhead": beside, "rows": found}
    tables = (
        ", ".join(f"{name} {value}" for name, value in described(options).items()),
        measure.table("floor", limits),
        measure.table(f"loop, goal {step.GOALS[options.device]} off", ratios),
        measure.table("step", shown),
    )
    measure.report(result, "\n\n".join(tables), as_json=options.json)


if __name__ == "__main__":
    main()
