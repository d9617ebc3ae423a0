"""One run of either side, raybrats' and nnU-Net's, each by its own code; see learning.py."""

import statistics
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import nnunet
import numpy as np
import torch
from curves import Curve

from raybrats.config import TrainConfig, digest
from raybrats.data.batch import Batch, collate
from raybrats.data.cache import prepared
from raybrats.data.cohort.case import Case
from raybrats.data.patch import PatchRule, draw_patch, to_row
from raybrats.data.plan import Plan
from raybrats.label_set import GLIOMA
from raybrats.model.inference import uploaded
from raybrats.model.regions import region_dice, region_sizes
from raybrats.train import loop
from raybrats.train.learner import new_learner

if TYPE_CHECKING:
    import nnunet_train


@dataclass(frozen=True)
class Task:
    """What both sides learn."""

    config: TrainConfig
    """Our run, of which nnU-Net takes patch, widths, batch, steps, validation and seed."""
    train: tuple[Case, ...]
    held_out: tuple[Case, ...]
    device: torch.device
    folder: Path

    def curve(self, side: str) -> Curve:
        """An empty one; its settings tell runs apart that cannot be compared."""
        settings = {
            "config": digest(replace(self.config, run=replace(self.config.run, seed=0))),
            "train": [case.case_id for case in self.train],
            "held_out": [case.case_id for case in self.held_out],
            "device": self.device.type,
        }
        return Curve(side, self.config.run.seed, settings)


def batches(config: TrainConfig, cases: tuple[Case, ...]) -> Iterator[Batch]:
    """The batches of a run as `data.stream` has them, made in this process."""
    plan = Plan(
        len(cases), config.optim.global_batch, config.run.seed, config.data.patches_per_case
    )
    rule = PatchRule(config.data, config.data.patch_size, config.run.seed, config.classes)
    pin = config.cluster.device == "gpu"
    for visits in plan.visits(rank=0, world=1, start=0, stop=config.optim.steps):
        for place in range(len(visits[0].draws)):
            rows = []
            for visit in visits:
                opened, _ = prepared(cases[visit.case], config.data)
                draw, ordinal = visit.draws[place], visit.ordinal + place
                patch = draw_patch(opened, rule, draw=draw, case=visit.case, ordinal=ordinal)
                rows.append(to_row(opened, patch, draw))
            yield collate(rows, pin=pin)


def ours(task: Task) -> Curve:
    """A run of the loop."""
    learner, curve = new_learner(task.config, task.device), task.curve("raybrats")
    whole = (prepared(case, task.config.data)[0] for case in task.held_out)
    held_out = [uploaded(case, task.device) for case in whole]
    seconds = []

    def log(figures: Mapping[str, float]) -> None:
        if "train/loss" in figures:
            curve.loss.append((learner.step, figures["train/loss"]))
            seconds.append(figures["step_s"])
        else:
            regions = [figures[f"val/dice_{region}"] for region in GLIOMA.region_names]
            curve.dice.append((learner.step, regions))
            tell(curve)

    hooks = loop.Hooks(lambda: loop.validate(learner, held_out), log, lambda *_: None, lambda: None)
    loop.run(learner, batches(task.config, task.train), hooks)
    curve.step_s = statistics.median(seconds)
    return curve


def theirs(task: Task, made: nnunet.Dataset) -> Curve:
    """A run of nnU-Net's trainer."""
    import nnunet_train  # not where nnU-Net is not installed, and ours alone runs

    config, curve = task.config, task.curve("nnunet")
    trainer = nnunet_train.new_trainer(made, config, task.device)
    steps, every = config.optim.steps, config.validation.every_steps
    losses, seconds = [], []

    def after_step(loss: float, took: float) -> None:
        step = trainer.current_epoch + 1
        losses.append(loss + 1)
        seconds.append(took)
        if step % loop.LOG_EVERY_STEPS == 0 or step == steps:
            curve.loss.append((step, statistics.fmean(losses)))
            losses.clear()
        if step % every == 0 or step == steps:
            curve.dice.append((step, validated(trainer, task, made)))
            tell(curve)

    trainer.after_step = after_step
    trainer.run_training()
    curve.step_s = statistics.median(seconds)
    return curve


def validated(trainer: "nnunet_train.Trainer", task: Task, made: nnunet.Dataset) -> list[float]:
    """Each region's mean Dice over the held-out cases, as nnU-Net's predictor segments them."""
    import nnunet_train

    scores = []
    for case in task.held_out:
        mirror = bool(task.config.prediction.mirror)
        labels = nnunet_train.segmented(trainer, case.case_id, mirror=mirror)
        pair = labels, nnunet_train.reference(made, case.case_id)
        sizes = region_sizes(*(torch.from_numpy(np.array(each)) for each in pair))
        scores.append(region_dice(sizes))
    return list(loop.mean_scores(scores, GLIOMA.region_names).values())[:-1]


def tell(curve: Curve) -> None:
    """A line of progress."""
    (step, regions), (_, loss) = curve.dice[-1], curve.loss[-1]
    dice = ", ".join(
        f"{name} {value:.3f}" for name, value in zip(GLIOMA.region_names, regions, strict=True)
    )
    print(f"{curve.side} seed {curve.seed}: step {step}, loss {loss:.3f}, {dice}", file=sys.stderr)


def prepared_dataset(task: Task) -> nnunet.Dataset:
    """The cases as nnU-Net has preprocessed them, split as ours are."""
    made = nnunet.make([*task.train, *task.held_out], task.folder / "nnunet", preprocess=True)
    nnunet.split(made, task.train, task.held_out)
    plan = made.read("nnUNetPlans.json")["configurations"]["3d_fullres"]
    of = {name: plan[name] for name in ("patch_size", "batch_dice", "use_mask_for_norm")}
    print(f"nnU-Net's own plan: {of}; ours: {task.config.loss}", file=sys.stderr)
    return made
