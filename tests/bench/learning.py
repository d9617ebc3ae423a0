"""Whether raybrats learns as nnU-Net 2.8 does: the same cases, network, patch, batch and steps.

    make .venv-bench/installed
    .venv-bench/bin/python tests/bench/learning.py [--cases TREE] [--seeds 3] [--out learning.jsonl]
    .venv-bench/bin/python tests/bench/learning.py --recipe full --device cuda --steps 1000
    .venv-bench/bin/python tests/bench/learning.py --parity

Each side is its own code. nnU-Net: its planner and preprocessing, `nnUNetTrainer` with its loaders,
augmentation, loss, optimiser and schedule, and `nnUNetPredictor`. raybrats: the recipe `nnunet`
through plan, patches, augmentation, `loop.run` and `predict_case`, without Ray. Both have a plain
U-Net of the same widths; nnU-Net gives the coarsest head the weight 0, so here
`network.deep_supervision` leaves it out. Whatever else its plan says is left to it, as whether the
Dice is one a patch or one a batch; both are printed. An epoch of nnU-Net is one step, so that its
learning rate falls with every step, and has no validation on patches. First weights, patches and
augmentation follow from the seed, but for nnU-Net on a GPU, whose batches come from processes that
it does not seed.

Training loss: what each side minimises on its own batches, the mean over its heads of Dice loss and
cross-entropy, as the mean of ten steps. nnU-Net's Dice loss is the negative Dice, ours 1 less the
Dice, and weights of heads sum to 1 on both sides, so 1 is added to nnU-Net's. Held-out Dice:
`region_dice` of the labels that each side's predictor makes of the whole case, windows overlapping
by a half, the mean over cases of WT, TC and ET; nnU-Net's in the frame of the file, ours in the box
of the brain, which makes no difference. On a GPU each trains in its own precision, nnU-Net in fp16
and ours in bf16; on a CPU both in fp32.

--recipe reduced: four stages of 8 to 64 channels, 64^3, 300 steps; full: the recipe's own six
stages, 128^3. --still is without augmentation and mirroring on both sides: differences that it
leaves are not those of augmentation. Every third case is held out, or those that --held-out names.
Finished runs are lines of --out, which are not run again with the same settings: one that was
interrupted goes on with the first run that is not there. Code is no part of the settings: a change
of it needs another file. Pictures and figures of real cases are not for the repository.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import curves
import measure
import nnunet
import torch
from curves import Curve
from learners import Task, ours, prepared_dataset, theirs
from step import NEVER, STILL

from raybrats.config import override_all
from raybrats.data.cohort.case import OK, Case
from raybrats.data.cohort.index import find_cases, verify_case
from raybrats.recipes import recipe

SIDES = ("raybrats", "nnunet")
SIZES: Mapping[str, Mapping[str, Any]] = {
    "reduced": {"edge": 64, "widths": [8, 16, 32, 64], "steps": 300},
    "full": {"edge": 128, "widths": list(recipe("nnunet").network.widths), "steps": 1000},
}
NUM_PHANTOMS = 9


def task_of(options: argparse.Namespace, cases: list[Case], folder: Path) -> Task:
    """The options' run with seed 0, and who is trained on and who is held out."""
    named = options.held_out or [case.case_id for case in cases[::3]]
    unknown = sorted({*named} - {case.case_id for case in cases})
    if unknown or len(named) == len(cases):
        raise SystemExit(f"--held-out: no case {', '.join(unknown) or 'is left to train on'}")
    changes = {
        "data.patch_size": [options.edge] * 3,
        "data.cache_dir": str(folder / "cache"),
        "network.widths": options.widths,
        "network.deep_supervision": nnunet.supervised(options.widths),
        "optim.steps": options.steps,
        "optim.global_batch": options.batch,
        "validation.every_steps": options.every,
        "prediction.mirror": [0, 1, 2] if options.mirror and not options.still else [],
        "run.save_every_steps": NEVER,
        "cluster.device": "cpu" if options.device == "cpu" else "gpu",
    }
    if options.device == "cpu":
        changes["optim.precision"] = "fp32"
    config = override_all(recipe("nnunet"), changes)
    return Task(
        config=replace(config, augment=STILL) if options.still else config,
        train=tuple(case for case in cases if case.case_id not in named),
        held_out=tuple(case for case in cases if case.case_id in named),
        device=torch.device(options.device),
        folder=folder,
    )


def run(options: argparse.Namespace, task: Task) -> dict[str, list[Curve]]:
    """The runs of every side and seed that are not in the file yet, one after another; all."""
    made, settings = None, task.curve("").settings
    asked = [(side, seed) for seed in range(options.seeds) for side in options.only or SIDES]
    for side, seed in asked:
        if any((c.side, c.seed) == (side, seed) for c in curves.kept(options.out, settings)):
            print(f"{side} seed {seed} is there", file=sys.stderr)
            continue
        config = task.config
        seeded = replace(task, config=replace(config, run=replace(config.run, seed=seed)))
        if side == "nnunet":
            made = made or prepared_dataset(task)
            curves.keep(options.out, theirs(seeded, made))
        else:
            curves.keep(options.out, ours(seeded))
    found = curves.kept(options.out, settings)
    by_side = {side: [c for c in found if c.side == side] for side in SIDES}
    return {side: runs for side, runs in by_side.items() if runs}


def parsed() -> argparse.Namespace:
    parser = measure.parser(__doc__, cases=True)
    parser.set_defaults(cases=os.environ.get("RAYBRATS_REAL_CASES"))
    parser.add_argument("--recipe", choices=tuple(SIZES), default="reduced")
    parser.add_argument("--edge", type=int, help="of the patch, in voxels")
    parser.add_argument("--widths", type=int, nargs="+")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--every", type=int, default=100, help="steps between validations")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3, help="0, 1, ...")
    parser.add_argument("--only", choices=SIDES, nargs=1)
    parser.add_argument("--still", action="store_true", help="without augmentation")
    parser.add_argument("--mirror", action="store_true", help="predict all mirror images")
    parser.add_argument("--held-out", nargs="+", help="case ids")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=Path("learning.jsonl"))
    parser.add_argument("--picture", type=Path, help="by default beside --out")
    parser.add_argument("--parity", action="store_true", help="one step from equal weights")
    options = parser.parse_args()
    for name, value in SIZES[options.recipe].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main() -> int:
    options = parsed()
    if options.parity:
        import parity

        return parity.check(as_json=options.json)
    shape = tuple(round(edge * min(1, options.edge / 64)) for edge in measure.PHANTOM_SHAPE)
    with (
        measure.tree_of(options.cases, num_cases=NUM_PHANTOMS, shape=shape) as tree,
        tempfile.TemporaryDirectory(prefix="raybrats-learning-") as folder,
        measure.quiet(),
    ):
        found = sorted(map(verify_case, find_cases(tree)), key=lambda case: case.case_id)
        cases = [case for case in found if case.status == OK]
        task = task_of(options, cases, Path(folder))
        sides = run(options, task)
    title = (
        f"{options.edge}^3, widths {' '.join(map(str, options.widths))}, batch {options.batch}, "
        f"{len(task.train)} {'cases' if options.cases else 'phantoms'}, {len(task.held_out)} held "
        f"out, {'no augmentation' if options.still else 'augmented'}, {options.device}"
    )
    picture = options.picture or options.out.with_suffix(".png")
    curves.draw(sides, title).savefig(picture, dpi=110)
    text = [title, curves.table(sides), curves.at_the_end(sides)]
    if len(sides) == 2:
        text.append(curves.verdict(*sides.values()))
    result = {"of": title, "runs": {side: list(map(vars, runs)) for side, runs in sides.items()}}
    measure.report(result, "\n\n".join([*text, f"drawn in {picture}"]), as_json=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
