"""The estimate of a step's memory beside what a step takes on a CPU, each in a process of its own.

    .venv/bin/python tests/bench/memory.py [--recipes nnunet residual] [--edges 64 96] [--batch 2]

Taken: the peak of the resident set less what it was when the learner had its weights, and those
weights. The estimate is what the forward pass keeps, so it is the least: the peak has the work
space of convolutions and the gradients of activations above it.
"""

import itertools
import resource
import subprocess
import sys
from typing import Any

import measure
import step
import torch

from raybrats.model.cost import memory
from raybrats.train.learner import new_learner
from raybrats.train.step import train_step

CPU = torch.device("cpu")


def taken(name: str, edge: int, batch: int) -> int:
    """Bytes of two steps at their peak, with the weights."""
    learner = new_learner(step.settings(name, edge, batch, "fp32"), CPU)
    patches = step.random_batch(batch, edge)
    before = resident()
    for _ in range(2):
        train_step(learner, patches)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak - before + sum(weight.nbytes for weight in learner.weights().values())


def resident() -> int:
    """Bytes that this process has in memory now."""
    with open("/proc/self/statm") as numbers:
        return int(numbers.read().split()[1]) * resource.getpagesize()


def beside(name: str, edge: int, batch: int) -> dict[str, Any]:
    """The estimate, what was taken, and their ratio."""
    command = [sys.executable, __file__, "--only", name, str(edge), str(batch)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    estimate = memory(step.settings(name, edge, batch, "fp32")).of(batch)
    return {"estimate_GB": estimate / 1e9, "taken_GB": int(done.stdout) / 1e9}


def main() -> int:
    parser = measure.parser(__doc__)
    parser.add_argument("--recipes", nargs="+", default=["nnunet", "nnunet-residual", "residual"])
    parser.add_argument("--edges", type=int, nargs="+", default=[64, 96])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--only", nargs=3, metavar=("RECIPE", "EDGE", "BATCH"))
    options = parser.parse_args()
    if options.only:
        name, edge, batch = options.only
        print(taken(name, int(edge), int(batch)))
        return 0
    rows = {
        f"{name} {edge}^3": beside(name, edge, options.batch)
        for name, edge in itertools.product(options.recipes, options.edges)
    }
    lines = [
        f"{name:<24} {row['estimate_GB']:>10.2f} {row['taken_GB']:>9.2f} "
        f"{row['taken_GB'] / row['estimate_GB']:>6.2f}"
        for name, row in rows.items()
    ]
    head = f"{'':<24} {'estimate GB':>10} {'taken GB':>9} {'ratio':>6}"
    measure.report(rows, "\n".join([head, *lines]), as_json=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
