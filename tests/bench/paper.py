"""Training of the `nnunet` recipe on 8, 32 and 128 GPUs on paper: estimates, nothing ran on a GPU.

    .venv/bin/python tests/bench/paper.py [--patches-per-s 100 45] [--gbit 100 400] [--json]

A step of one GPU takes what is given: 100 patches a second are the goal for an H200, 45 what the
code came to when it was read on paper. A step of several takes more by

    exposed   the ring all-reduce of the gradients ("exchange"), over NVLink within a node, then
              over the node's one network card, that comes after the backward pass: DDP sends a
              bucket when its gradients are there and the one before has been sent
    slowest   all wait for the slowest: their times are normal, independent, of deviation --jitter

and takes no less than `network`, in which the card moves gradients and patches, or `feeding`, in
which the node's CPUs make the patches. Patches cross the network where tasks are spread over all
nodes; "near" is the efficiency where each runs on the node that wants its patch.

It is kind to the network: links are used fully and both ways at once (what NCCL and Ray reach of
that was not measured), and exchange and patches hinder each other in their sum only. It is unkind
to many nodes: a ring's latency grows with them, where NCCL may take trees. Validation is not in the
efficiency.

Counted are the bytes of a patch, and those of the gradients in the order in which a backward pass
without a device (meta tensors) brings them, each at its share of that pass's operations. Every
constant says where it is from, or that it is assumed. The examples, limiting cases, are tried
before the tables are made.
"""

import argparse
import doctest
import functools
import math
import timeit
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import measure
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from raybrats.config import TrainConfig
from raybrats.config.data import NUM_FOLDS
from raybrats.model.cost import cost
from raybrats.model.network import heads, network_of
from raybrats.recipes import nnunet

Table = dict[str, dict[str, float | str]]
Gradients = tuple[tuple[int, float], ...]
"""Bytes, and the share of the backward pass after which they are there; in that order."""
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20
"""Bytes at which DDP's first bucket is full, and the others (torch 2.13, by default)."""
BACKWARD = 2 / 3
"""Of a step: gradients of image and kernel each cost what the forward pass does."""
NVLINK_BYTES_S = 450e9
"""One way: half of the 900 GB/s of NVIDIA's data sheets for H100 and H200."""
HOPS_S = (3e-6, 10e-6)
"""Latency of a hop of a ring, within a node and between nodes. Assumed."""
PCIE_BYTES_S = 50e9
"""From a GPU to its host. Assumed, for PCIe 5."""
DECODE_S = 0.0465
"""CPU-seconds from a case's files to int16. Measured on real cases, one thread."""
CUT_S = 0.003
"""CPU-seconds to cut a 128^3 patch of a kept case into a kept buffer. Measured on phantoms."""
STREAM_S = 2 / 58
"""CPU-seconds of such a patch from Ray Data's task to the batch, at most. Measured: 58 a second
on two cores."""
CASE_BYTES = 8.6e6
"""Of a case's five .nii.gz. Measured: the mean of eight real cases, which have 7.4 to 10.0 MB."""
KEPT_BYTES = 43.3e9 / 1251
"""Of a prepared case. Extrapolated from phantoms: 38.5 GB of int16 and 4.8 of labels for 1251."""
WINDOWS = 8
"""Of a case at 128^3, cropped to the brain (142 x 179 x 145), overlap 0.25 or 0.5. Counted."""
CASE_S = 0.1
"""Seconds of a validated case beside its windows. An estimate on paper: 40 s of one GPU for 250
cases at 45 patches/s, less the windows."""


@dataclass(frozen=True)
class Work:
    """What one GPU does in a step."""

    step_s: float
    patches: int
    patch_bytes: int
    gradients: Gradients
    sent: float = 1.0
    """Bytes that are exchanged for each of a gradient."""

    @property
    def gradient_bytes(self) -> int:
        return sum(size for size, _ in self.gradients)


@dataclass(frozen=True)
class Place:
    """Nodes, and what joins them."""

    network_bytes_s: float
    """Of a node's network card, one way."""
    cpus: float = 96.0
    """Of a node, of which each worker takes one. Assumed."""
    jitter: float = 0.03
    """Deviation of a GPU's step, as a fraction of it. Assumed."""
    near: bool = False
    """Whether patches are cut on the node that wants them."""
    node_gpus: int = 8
    nvlink_bytes_s: float = NVLINK_BYTES_S
    hops_s: tuple[float, float] = HOPS_S

    def split(self, gpus: int) -> tuple[int, int]:
        """GPUs of a node, and nodes."""
        return min(gpus, self.node_gpus), -(-gpus // self.node_gpus)


@dataclass(frozen=True)
class Step:
    """Seconds of a step of all GPUs."""

    alone: float
    exchange: float
    exposed: float
    slowest: float
    network: float
    feeding: float

    @property
    def total(self) -> float:
        return max(self.alone + self.exposed + self.slowest, self.network, self.feeding)

    @property
    def limit(self) -> str:
        """What makes it longer than that of one GPU, most of all."""
        floors = {self.feeding: "feeding", self.network: "network", self.alone: "nothing"}
        return floors.get(self.total, "exposed" if self.exposed > self.slowest else "slowest")


def gradients_of(config: TrainConfig) -> Gradients:
    """Those of a run's network, in fp32."""
    found = []
    with torch.device("meta"), FlopCounterMode(display=False) as done:
        network = network_of(config).train()
        image = torch.empty(1, len(config.data.modalities), *config.data.patch_size)
        loss = torch.stack([head.mean() for head in heads(network(image))]).sum()
        forward = done.get_total_flops()
        for weight in network.parameters():
            weight.register_post_accumulate_grad_hook(
                lambda weight: found.append((4 * weight.numel(), done.get_total_flops()))
            )
        loss.backward()
    whole = done.get_total_flops() - forward
    assert sum(size for size, _ in found) == 4 * cost(config).parameters
    return tuple((size, (flops - forward) / whole) for size, flops in found)


@functools.cache
def buckets(gradients: Gradients, full: int = BUCKET) -> Gradients:
    """DDP's buckets, each there when its last gradient is.

    >>> buckets(((2**20, 0.1), (6, 0.2), (5, 0.7), (3, 1.0)), full=10)
    ((1048576, 0.1), (11, 0.7), (3, 1.0))
    """
    made, size, limit = [], 0, FIRST_BUCKET
    for number, (more, there) in enumerate(gradients, 1):
        size += more
        if size >= limit or number == len(gradients):
            made.append((size, there))
            size, limit = 0, full
    return tuple(made)


def ring_s(size: float, members: int, bytes_s: float, hop_s: float) -> float:
    """Seconds of a ring all-reduce.

    >>> ring_s(1e8, members=1, bytes_s=1.0, hop_s=1.0)  # with nobody
    0.0
    >>> ring_s(1e8, members=2, bytes_s=1e8, hop_s=0.0)  # half of it there, half back
    1.0
    """
    return 2 * (members - 1) * (size / members / bytes_s + hop_s)


def largest_of(count: int) -> float:
    """Expected largest of some standard normal numbers, by Blom's approximation (1958).

    >>> [round(largest_of(count), 2) for count in (1, 8, 128)]  # exactly 0, 1.42, 2.59
    [0.0, 1.43, 2.58]
    """
    return NormalDist().inv_cdf((count - 0.375) / (count + 0.25))


def step_of(work: Work, gpus: int, place: Place) -> Step:
    """A step of so many GPUs.

    >>> work = Work(0.02, patches=2, patch_bytes=18_874_368, gradients=((124_792_112, 1.0),))
    >>> step_of(work, 1, Place(network_bytes_s=1.0)).total  # one has nobody to wait for
    0.02
    >>> free = Place(math.inf, cpus=math.inf, nvlink_bytes_s=math.inf, hops_s=(0.0, 0.0))
    >>> step_of(work, 128, replace(free, jitter=0.0)).total
    0.02
    >>> done = step_of(work, 128, free)  # only the slowest is left
    >>> done.total == done.alone + done.slowest, done.limit
    (True, 'slowest')
    >>> done = step_of(work, 16, Place(network_bytes_s=1e8, near=True))
    >>> done.exposed == done.exchange > done.network == 124_792_112 / 1e8  # all come at the end
    True
    """
    within, nodes = place.split(gpus)
    rates = place.nvlink_bytes_s, place.network_bytes_s
    links = list(zip((within, nodes), rates, place.hops_s, strict=True))
    backward, exchange, end = BACKWARD * work.step_s, 0.0, 0.0
    for size, there in buckets(work.gradients):
        spent = sum(ring_s(work.sent * size, *link) for link in links)
        exchange, end = exchange + spent, max(end, there * backward) + spent
    patch_bytes = 0 if place.near else within * work.patches * work.patch_bytes
    crossing = (nodes - 1) / nodes * (2 * work.sent * work.gradient_bytes + patch_bytes)
    return Step(
        alone=work.step_s,
        exchange=exchange,
        exposed=end - backward,
        slowest=place.jitter * work.step_s * largest_of(gpus),
        network=crossing / place.network_bytes_s,
        feeding=within * work.patches * STREAM_S / (place.cpus - within),
    )


def efficiency(work: Work, gpus: int, place: Place) -> float:
    """Patches a second of all, in percent of as many times those of one."""
    return 100 * step_of(work, 1, place).total / step_of(work, gpus, place).total


def first_below(percent: float, work: Work, place: Place, most: int = 2**14) -> str:
    """Fewest GPUs, in whole nodes where there are several, whose efficiency is less."""
    counts = [*range(1, place.node_gpus), *range(place.node_gpus, most + 1, place.node_gpus)]
    below = (str(gpus) for gpus in counts if efficiency(work, gpus, place) < percent)
    return next(below, f"> {most}")


def steps_table(work: Work, places: Sequence[Place], counts: Sequence[int]) -> Table:
    rows: Table = {}
    for gpus in counts:
        several = places[0].split(gpus)[1] > 1
        for place in places if several else places[:1]:
            done = step_of(work, gpus, place)
            parts = {f"{name} ms": 1e3 * value for name, value in vars(done).items()}
            del parts["alone ms"], parts["feeding ms"]
            rows[_gpus(gpus) + several * f", {_gbit(place)}"] = parts | {
                "step ms": 1e3 * done.total,
                "patches/s": gpus * work.patches / done.total,
                "efficiency %": efficiency(work, gpus, place),
                "near %": efficiency(work, gpus, replace(place, near=True)),
                "limit": done.limit,
            }
    return rows


def ends_table(work: Work, places: Sequence[Place]) -> Table:
    """From how many GPUs on the efficiency is less than 90 %, spread and if something changed."""
    double = replace(work, patches=2 * work.patches, step_s=2 * work.step_s)
    half = replace(work, sent=0.5)
    rows: Table = {}
    for place in places:
        near, even = replace(place, near=True), replace(place, jitter=0.0)
        changed = {"spread": (work, place), "near": (work, near), "no jitter": (work, even)}
        changed |= {"bf16 gradients": (half, place), "twice the batch": (double, place)}
        rows[_gbit(place)] = {name: first_below(90, *each) for name, each in changed.items()}
    return rows


def feeding_table(
    work: Work, place: Place, counts: Sequence[int], cases: int, storage_bytes_s: float
) -> Table:
    """What feeds a node at the rate of its GPUs; cold: every case from object storage.

    Held-out cases stay with their rank, the others come to all nodes, one at random each epoch.
    """
    rows: Table = {}
    for gpus in counts:
        within, nodes = place.split(gpus)
        rate = within * work.patches / work.step_s
        kept = cases - cases // NUM_FOLDS + cases // NUM_FOLDS / nodes
        epochs = math.log(0.01) / math.log(1 - 1 / nodes) if nodes > 1 else 1.0
        rows[_gpus(gpus)] = {
            "patch GB/s": rate * work.patch_bytes / 1e9,
            "CPUs to cut": rate * CUT_S,
            "CPUs, warm": rate * STREAM_S,
            "CPUs, cold": rate * (STREAM_S + DECODE_S),
            "read GB/s": rate * CASE_BYTES / 1e9,
            "cache GB": kept * KEPT_BYTES / 1e9,
            "99 % hits": f"epoch {math.ceil(epochs) + 1}",
            "decode all s": kept * DECODE_S / (place.cpus - within),
            "read all s": nodes * kept * CASE_BYTES / storage_bytes_s,
        }
    return rows


def run_table(
    work: Work, place: Place, counts: Sequence[int], cases: int, config: TrainConfig
) -> Table:
    """What the batch does to a run, and what a run does besides its steps."""
    rows: Table = {}
    held_out, steps = cases // NUM_FOLDS, config.optim.steps
    window_s = (1 - BACKWARD) * work.step_s / work.patches
    saved = 2 * work.gradient_bytes  # weights and momentum
    for gpus in counts:
        each = step_of(work, gpus, place).total
        validation = math.ceil(held_out / gpus) * (WINDOWS * window_s + CASE_S)
        training, between = config.validation.every_steps * each, config.run.save_every_steps * each
        rows[_gpus(gpus)] = {
            "batch": gpus * work.patches,
            "steps an epoch": (cases - held_out) / (gpus * work.patches),
            "hours of steps": steps * each / 3600,
            "epochs in all": steps * gpus * work.patches / (cases - held_out),
            "validation s": validation,
            "% of time": 100 * validation / (validation + training),
            "saving MB/s": saved / between / 1e6,
            "copied, %": 100 * saved / PCIE_BYTES_S / between,
        }
    return rows


def copy_ms(size: int) -> float:
    """A copy of so many bytes on this machine, the best of nine."""
    source = np.ones(size, np.uint8)
    target = np.empty_like(source)
    return 1e3 * min(timeit.repeat(lambda: np.copyto(target, source), number=1, repeat=9))


def _gpus(count: int) -> str:
    return f"{count} GPU{'' if count == 1 else 's'}"


def _gbit(place: Place) -> str:
    return f"{place.network_bytes_s * 8e-9:g} Gbit/s"


def _options() -> argparse.Namespace:
    parser = measure.parser(__doc__)
    parser.add_argument("--patches-per-s", type=float, nargs="+", default=[100.0, 45.0])
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--gbit", type=float, nargs="+", default=[100.0, 400.0], help="a node's")
    parser.add_argument("--storage-gbit", type=float, default=100.0, help="to all nodes together")
    parser.add_argument("--cases", type=int, default=1251, help="of the cohort (BraTS 2021: 1251)")
    parser.add_argument("--cpus-per-node", type=float, default=Place.cpus)
    parser.add_argument("--jitter", type=float, default=Place.jitter)
    return parser.parse_args()


def main() -> None:
    options, config = _options(), nnunet()
    doctest.testmod(raise_on_error=True)
    shared = {"jitter": options.jitter, "cpus": options.cpus_per_node}
    places = [Place(gbit / 8e-9, **shared) for gbit in options.gbit]
    patch_bytes = math.prod(config.data.patch_size) * (2 * len(config.data.modalities) + 1)
    gradients, patches = gradients_of(config), config.optim.global_batch
    counts, cases, storage = options.gpus, options.cases, options.storage_gbit / 8e-9
    result, text = {}, ["ESTIMATES: nothing ran on a GPU"]
    for speed in options.patches_per_s:
        work = Work(patches / speed, patches, patch_bytes, gradients)
        tables = {
            f"{speed:g} patches/s a GPU": steps_table(work, places, counts),
            "under 90 % from": ends_table(work, places),
            "a node is fed": feeding_table(work, places[0], counts, cases, storage),
            f"a run, {_gbit(places[-1])}": run_table(work, places[-1], counts, cases, config),
        }
        result[f"{speed:g} patches/s"] = tables
        text += [measure.table(title, rows) for title, rows in tables.items()]
    sent, copied = buckets(gradients), copy_ms(patch_bytes)
    result |= {"buckets": sent, "patch_bytes": patch_bytes, "copy_ms": copied}
    listed = ", ".join(f"{size / 1e6:.1f} at {100 * there:.0f} %" for size, there in sent)
    text += [
        f"MB of DDP's buckets, by the backward pass: {listed}",
        f"a patch: {patch_bytes / 1e6:.1f} MB, which this machine copies in {copied:.1f} ms",
    ]
    measure.report(result, "\n\n".join(text), as_json=options.json)


if __name__ == "__main__":
    main()
