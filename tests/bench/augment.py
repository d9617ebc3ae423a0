"""Milliseconds a batch of normalisation and of each change, beside a copy and a training step.

    python tests/bench/augment.py [--device cuda] [--edge 128] [--rounds 20] [--no-step] [--json]
        [--mixes-only]

Each change is forced on for every patch (those of a fraction of the modalities for that); a mix is
the mean over the draws of a recipe, of which some cost much more than most, so it takes many rounds
(`--mixes-only`). Rounds are interleaved.
Needs torch and numpy; neither MONAI, Ray nor MLflow.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from raybrats.config import AugmentConfig, TrainConfig
from raybrats.data.augment.augment import augment
from raybrats.data.batch import Batch, collate, normalise
from raybrats.data.patch import to_row
from raybrats.data.prepare import prepare
from raybrats.phantom.phantom import make_phantom
from raybrats.recipes import domain_shift, nnunet

COPY, STEP = "copy of the float32 batch", "nnunet step"
MIXES = {f"{made.recipe}'s mix (mean)": made.augment for made in (nnunet(), domain_shift())}


def phantom_batch(size: int, edge: int) -> Batch:
    """Patches that are whole phantom heads, as they travel."""
    rows = []
    for index in range(size):
        image, labels = make_phantom(index, shape=(edge,) * 3)
        prepared = prepare(list(image), labels)
        rows.append(to_row(prepared, (image, labels), index))
    return collate(rows)


def peers(batch: Batch, *, with_step: bool, with_each: bool) -> dict[str, Callable[[int], object]]:
    """What is timed, each called with the number of the round."""
    image, brain = normalise(batch.image, batch.scaling)
    samples, size = (image, batch.labels, brain), len(image)

    def changes(config: AugmentConfig) -> Callable[[int], object]:
        return lambda turn: augment(config, 0, torch.arange(size) + turn * size, samples)

    never = AugmentConfig(**dict.fromkeys(AugmentConfig.CHANGES, 0.0))
    table: dict[str, Callable[[int], object]] = {
        COPY: lambda _: image.clone(),
        "normalise": lambda _: normalise(batch.image, batch.scaling),
        "nothing switched on": changes(never),
    }
    if with_each:
        table |= {name: changes(replace(never, **{name: 1.0})) for name in AugmentConfig.CHANGES}
    table |= {name: changes(config) for name, config in MIXES.items()}
    if with_step:
        table[STEP] = training_step(nnunet(), image, batch.labels)
    return table


def training_step(
    config: TrainConfig, image: torch.Tensor, labels: torch.Tensor
) -> Callable[[int], object]:
    """Forward, loss, backward and the optimiser, on patches that are ready."""
    from raybrats.model.network import heads
    from raybrats.train.learner import new_learner

    learner, kind = new_learner(config, image.device), image.device.type
    learner.network.train()

    def step(_: int) -> None:
        with torch.autocast(kind, torch.bfloat16, config.optim.precision == "bf16"):
            loss = learner.loss(heads(learner.network(image)), labels)
        learner.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        learner.optimizer.step()

    return step


def measure(
    table: dict[str, Callable[[int], object]], rounds: int, device: torch.device
) -> dict[str, float]:
    """Milliseconds of each: the median, but of a mix the mean, since draws differ."""
    spent: dict[str, list[float]] = {name: [] for name in table}
    for turn in range(-1, rounds):
        for name, call in table.items():
            wait(device)
            began = time.perf_counter()
            call(turn + 1)
            wait(device)
            if turn >= 0:
                spent[name].append(1e3 * (time.perf_counter() - began))
    return {
        name: (statistics.fmean if name in MIXES else statistics.median)(values)
        for name, values in spent.items()
    }


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--edge", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--no-step", action="store_true", help="leave the training step out")
    parser.add_argument("--mixes-only", action="store_true", help="no change alone")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    device = torch.device(options.device)
    batch = phantom_batch(options.batch, options.edge).to(device)
    table = peers(batch, with_step=not options.no_step, with_each=not options.mixes_only)
    times = measure(table, options.rounds, device)
    shape = f"{options.batch}x4x{options.edge}^3 on {options.device}, torch {torch.__version__}"
    if options.json:
        json.dump({"batch": shape, "rounds": options.rounds, "ms": times}, sys.stdout, indent=1)
        return
    print(f"{shape}, {options.rounds} rounds\n{'':28}  ms a batch    x copy  % of step")
    for name, ms in times.items():
        percent = f"{100 * ms / times[STEP]:9.1f}" if STEP in times else f"{'-':>9}"
        print(f"{name:28}{ms:12.2f}{ms / times[COPY]:10.1f}  {percent}")


if __name__ == "__main__":
    main()
