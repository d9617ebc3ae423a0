"""What the loop costs beside the network: our training step against a bare one, round by round.

    python tests/bench/step.py [--recipe nnunet] [--edges 64 96] [--rounds 8] [--json]
    python tests/bench/step.py --device cuda --rounds 10 --steps 10

Ours is `loop.run` over int16 patches that lie ready in memory: copy to the device, normalisation,
augmentation, forward and backward, clipping, the guard against gradients that are not finite, the
schedule, the optimiser, and the figures of every tenth step. Bare is the least that can train the
same network: forward, the same loss, backward and the optimiser, in the same precision, on input
that is float32, normalised and on the device for good; nothing is clipped or guarded. A round is
--steps of ours, then as many bare ones. On a CPU the clock is the CPU time of the process, with
one thread; on a GPU it is the wall, and the device is waited for only at the ends of a round.

With augmentation off the ratio is what the loop costs; with `AugmentConfig()` also what that costs
on this device. Needs torch and numpy, neither MONAI, Ray, MLflow, pydantic nor tyro.
"""

import argparse
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import measure
import torch

from raybrats.config import AugmentConfig, ClusterConfig, TrainConfig
from raybrats.data.batch import Batch
from raybrats.data.prepare import Scaling
from raybrats.model.network import heads
from raybrats.recipes import RECIPES, recipe
from raybrats.train import loop
from raybrats.train.learner import Learner, new_learner
from raybrats.train.step import augmented

GOALS = {"cpu": 1.05, "cuda": 1.03}
"""Most that a step of ours may cost beside a bare one, augmentation off."""
NEVER = 10**6
"""Steps until what no benchmark wants to meet."""
STILL = AugmentConfig(**dict.fromkeys(AugmentConfig.CHANGES, 0.0))


@dataclass(frozen=True)
class Timing:
    """How often is timed."""

    rounds: int
    steps: int = 1
    """In a round."""
    warm: int = 1
    """Before the first round, of ours and of the peer."""


class _EnoughError(Exception):
    """Ends the loop."""


def settings(
    name: str, edge: int, size: int, precision: str = "bf16", *, augmented: bool = False
) -> TrainConfig:
    """A recipe on patches of another edge; one below 64 drops stages that would have one voxel."""
    config = recipe(name)
    stages = sum(edge % 2**n == 0 and edge >> n > 1 for n in range(len(config.network.widths)))
    supervised = min(config.network.deep_supervision, stages - 2)
    widths = config.network.widths[:stages]
    return replace(
        config,
        data=replace(config.data, patch_size=(edge,) * 3),
        augment=AugmentConfig() if augmented else STILL,
        network=replace(config.network, widths=widths, deep_supervision=supervised),
        optim=replace(config.optim, global_batch=size, precision=precision, steps=NEVER),
        validation=replace(config.validation, every_steps=NEVER),
        cluster=ClusterConfig(),
        run=replace(config.run, save_every_steps=NEVER),
    )


@functools.cache
def random_batch(size: int, edge: int, modalities: int = 4) -> Batch:
    """Noise in a ball with a tumour of three shells, as patches travel; page-locked for a GPU."""
    source, pinned = torch.Generator().manual_seed(0), torch.cuda.is_available()
    steps = torch.linspace(-1, 1, edge)
    radius = sum(axis**2 for axis in torch.meshgrid(steps, steps, steps, indexing="ij")).sqrt()
    noise = torch.randint(200, 1800, (size, modalities, *radius.shape), generator=source)
    image = (noise * (radius < 0.9)).to(torch.int16)
    labels = sum((radius < reach).to(torch.uint8) for reach in (0.2, 0.3, 0.4))
    scaling = Scaling(
        gain=torch.full((size, modalities), 1 / 462),
        bias=torch.full((size, modalities), -1000 / 462),
        low=torch.full((size, modalities), 0, dtype=torch.int16),
        high=torch.full((size, modalities), 2000, dtype=torch.int16),
        background=torch.zeros((size, modalities), dtype=torch.int16),
    )
    labels, draw = labels.expand(size, *radius.shape).contiguous(), torch.arange(size)
    if pinned:
        image, labels, draw = (part.pin_memory() for part in (image, labels, draw))
        scaling = scaling.map(torch.Tensor.pin_memory)
    # permuted so that i lies closest
    return Batch(image.permute(0, 1, 4, 3, 2), labels.permute(0, 3, 2, 1), scaling, draw)


def bare_step(config: TrainConfig, batch: Batch, device: torch.device) -> Callable[[], None]:
    """Forward, loss, backward and the optimiser, on input that is ready."""
    learner = new_learner(config, device)
    image, labels = augmented(learner, batch)
    learner.network.train()

    def step() -> None:
        learner.optimizer.zero_grad(set_to_none=True)
        with learner.autocast():
            loss = learner.loss(heads(learner.network(image)), labels)
        learner.scaler.scale(loss).backward()
        learner.scaler.step(learner.optimizer)
        if learner.scaler.is_enabled():
            learner.scaler.update()

    return step


def clock(device: torch.device) -> Callable[[], float]:
    """CPU-seconds of this process; of a GPU the wall, once it has done what it was given."""
    if device.type != "cuda":
        return time.process_time

    def now() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def timed(
    learner: Learner, batch: Batch, timing: Timing, peer: Callable[[], None] | None = None
) -> list[tuple[float, float]]:
    """Seconds a step of the loop and of the peer that runs after each round, one pair a round."""
    now, numbers, pairs = clock(learner.device), itertools.count(1), []
    began = 0.0

    def peers(count: int) -> float:
        start = now()
        for _ in range(count if peer else 0):
            peer()
        return now() - start

    def check_in() -> None:
        nonlocal began
        done = next(numbers) - timing.warm
        if done < 0 or done % timing.steps:
            return
        spent = now() - began
        beside = peers(timing.steps if done else timing.warm)
        if done:
            pairs.append((spent / timing.steps, beside / timing.steps))
        if len(pairs) == timing.rounds:
            raise _EnoughError
        began = now()

    hooks = loop.Hooks(lambda: [[0.0] * 3], lambda _: None, lambda *_: None, check_in)
    with suppress(_EnoughError):
        loop.run(learner, itertools.repeat(batch), hooks)
    return pairs


def compare(config: TrainConfig, timing: Timing, device: torch.device) -> dict[str, Any]:
    """Milliseconds a step of ours and bare, and their ratio over the rounds."""
    batch = random_batch(config.optim.global_batch, config.data.patch_size[0])
    peer = bare_step(config, batch, device)
    pairs = timed(new_learner(config, device), batch, timing, peer)
    ours, bare = zip(*pairs, strict=True)
    ratios = [own / other for own, other in pairs]
    return {
        "ours_ms": 1e3 * statistics.median(ours),
        "bare_ms": 1e3 * statistics.median(bare),
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "of_minima": min(ours) / min(bare),
        "ratios": ratios,
    }


def measured(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """One comparison for every edge, precision and augmentation off and on."""
    device, rows = torch.device(options.device), {}
    timing = Timing(options.rounds, options.steps, options.warm)
    for edge, precision, on in itertools.product(options.edges, options.precisions, (False, True)):
        name = f"{edge}^3 {precision}, augmentation {'on' if on else 'off'}"
        config = settings(options.recipe, edge, options.batch, precision, augmented=on)
        rows[name] = compare(config, timing, device)
        print(name, rows[name], file=sys.stderr, flush=True)
    return rows


def verdict(rows: dict[str, dict[str, Any]], goal: float) -> Sequence[str]:
    """Which rows without augmentation keep the goal."""
    return [
        f"{name}: {row['ratio']:.3f}, goal at most {goal}: {'kept' if kept else 'MISSED'}"
        for name, row in rows.items()
        if name.endswith("off")
        for kept in [row["ratio"] <= goal]
    ]


def parsed() -> argparse.Namespace:
    parser = measure.parser(__doc__, rounds=8)
    parser.add_argument("--device", choices=tuple(GOALS), default="cpu")
    parser.add_argument("--recipe", choices=tuple(RECIPES), default="nnunet")
    parser.add_argument("--edges", type=int, nargs="+", default=[64, 96])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1, help="steps a round")
    parser.add_argument("--warm", type=int, default=1, help="steps before the first round")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    if options.device == "cpu":
        torch.set_num_threads(1)
    with measure.quiet():
        rows = measured(options)
    goal, kind = GOALS[options.device], "CPU" if options.device == "cpu" else "wall"
    told = f"{options.recipe}, batch {options.batch}, {options.device}, torch {torch.__version__}"
    columns = [name for name in next(iter(rows.values())) if name != "ratios"]
    shown = {name: {c: row[c] for c in columns} for name, row in rows.items()}
    title = f"{kind} time a step, {options.rounds} rounds"
    text = "\n".join([told, measure.table(title, shown), *verdict(rows, goal)])
    measure.report({"of": told, "goal": goal, "rows": rows}, text, as_json=options.json)


if __name__ == "__main__":
    main()
