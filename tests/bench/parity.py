"""One step from equal weights and an equal batch: the loss and every gradient beside nnU-Net's.

nnU-Net's trainer builds its own network and its own loss (`DC_and_BCE_loss` over regions,
`DC_and_CE_loss` over labels, both with `MemoryEfficientSoftDiceLoss` in a
`DeepSupervisionWrapper`), samples the targets of the coarser heads by its own transforms and takes
its own `train_step`; its first weights are copied into ours, which takes `train_step` of
`raybrats.train.step` on the same patches, normalised and not augmented. Both clip the gradient and
move the weights, which are compared too. Its Dice is a negative number, ours is that plus 1; its
weights of the heads sum to 1, so the losses differ by 1 exactly. Its coarsest head has weight 0 and
gets no gradient; ours has none.

A gradient is compared with the largest of its tensor. A bias before a norm has none but for
rounding, so it is compared with the largest of the network.
"""

import itertools
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import measure
import nnunet
import nnunet_train
import numpy as np
import torch
from step import STILL
from torch import Tensor, nn

from raybrats.config import TrainConfig, override_all
from raybrats.data.batch import Batch, collate
from raybrats.data.cohort.case import Case, prepare_case
from raybrats.data.cohort.index import find_cases, verify_case
from raybrats.data.patch import PatchRule, draw_patch, to_row
from raybrats.model.network import load_weights, weights_of
from raybrats.phantom.phantom import write_phantoms
from raybrats.recipes import recipe
from raybrats.train.learner import new_learner
from raybrats.train.step import augmented, train_step

CPU = torch.device("cpu")
EDGE, WIDTHS = 32, (8, 16, 32, 64)
MOST = 1e-5
"""Largest difference of the losses, of a gradient relative to the largest, and of a weight."""
OUR_LABELS = {"labels": {"background": 0, "NCR": 1, "ED": 2, "ET": 3}, "regions_class_order": None}
KINDS = ("absolute", "relative", "weight")
"""Worst differences of a tensor: of its gradient, and of itself after the step."""


@dataclass(frozen=True)
class Step:
    """What a step on either side gave."""

    loss: float
    gradients: Mapping[str, Tensor | None]
    weights: Mapping[str, Tensor]


def compare(made: nnunet.Dataset, cases: list[Case], config: TrainConfig) -> tuple[Step, Step]:
    """Our step and nnU-Net's, from its first weights."""
    labels_of = OUR_LABELS if config.loss.target == "labels" else {}
    trainer = nnunet_train.new_trainer(
        made, config, CPU, batch_dice=config.loss.batch_dice, changes=labels_of
    )
    learner, theirs = new_learner(config, CPU), trainer.network.state_dict()
    load_weights(learner.bare, {name: theirs[name] for name in weights_of(learner.bare)})
    batch = tumour_patches(cases, config)
    image, labels = augmented(learner, batch)
    targets = sampled(trainer, labels)
    other = float(trainer.train_step({"data": image.clone(), "target": targets})["loss"]) + 1
    own = train_step(learner, batch).item()
    return _step(own, learner.bare), _step(other, trainer.network)


def tumour_patches(cases: list[Case], config: TrainConfig) -> Batch:
    """A patch about a tumour voxel of each of as many cases as a step has patches."""
    data = replace(config.data, foreground_share=1.0)
    rule, rows = PatchRule(data, data.patch_size, config.run.seed), []
    for draw, case in enumerate(cases[: config.optim.global_batch]):
        prepared = prepare_case(case, data)
        patch = draw_patch(prepared, rule, draw=draw, case=draw, ordinal=0)
        rows.append(to_row(prepared, patch, draw))
    return collate(rows)


def sampled(trainer: nnunet_train.Trainer, labels: Tensor) -> list[Tensor]:
    """The targets of every head, finest first, as nnU-Net's transforms make them of our labels."""
    regions = (
        trainer.label_manager.foreground_regions if trainer.label_manager.has_regions else None
    )
    scales = trainer._get_deep_supervision_scales()
    chain = trainer.get_validation_transforms(scales, regions=regions)
    values = nnunet_train.VALUES if regions else np.arange(4)
    labels = torch.from_numpy(values.astype(np.int16))[labels.long()]
    heads = [chain(segmentation=patch[None])["segmentation"] for patch in labels]
    return [torch.stack(patches) for patches in zip(*heads, strict=True)]


def _step(loss: float, network: nn.Module) -> Step:
    named = dict(network.named_parameters())
    return Step(loss, {name: p.grad for name, p in named.items()}, named)


def rows_of(ours: Step, theirs: Step) -> dict[str, dict[str, float]]:
    """The worst differences of each tensor, of `KINDS`."""
    largest = max(float(g.abs().max()) for g in theirs.gradients.values() if g is not None)
    rows = {}
    for name, gradient in ours.gradients.items():
        other = theirs.gradients[name]
        worst = float((gradient - other).abs().max())
        scale = largest if name.endswith(".conv.bias") else float(other.abs().max())
        moved = float((ours.weights[name] - theirs.weights[name]).detach().abs().max())
        rows[name] = {"absolute": worst, "relative": worst / scale, "weight": moved}
    return rows


def settings() -> TrainConfig:
    """The recipe on small patches, without augmentation, in full precision."""
    changes = {
        "data.patch_size": (EDGE,) * 3,
        "network.widths": WIDTHS,
        "network.deep_supervision": nnunet.supervised(WIDTHS),
        "optim.precision": "fp32",
    }
    return replace(override_all(recipe("nnunet"), changes), augment=STILL)


def compared(folder: Path) -> Iterator[tuple[str, Step, Step]]:
    """Every variant of the loss by name, our step and nnU-Net's."""
    write_phantoms(f"{folder}/tree", num_cases=2, shape=(80, 80, 64))
    cases = [verify_case(case) for case in find_cases(f"{folder}/tree")]
    made, config = nnunet.make(cases, folder / "nnunet", preprocess=True), settings()
    for target, batch_dice in itertools.product(("regions", "labels"), (False, True)):
        loss = replace(config.loss, target=target, batch_dice=batch_dice)
        name = f"{target}, {'batch' if batch_dice else 'patch'}"
        yield name, *compare(made, cases, replace(config, loss=loss))


def check(*, as_json: bool) -> int:
    """Prints the differences tensor by tensor; 1 if one of them is too large."""
    torch.set_num_threads(1)
    tensors, whole = {}, {}
    with tempfile.TemporaryDirectory() as folder, measure.quiet():
        for name, ours, theirs in compared(Path(folder)):
            rows = rows_of(ours, theirs)
            alone = theirs.gradients.keys() - rows.keys()
            assert all(theirs.gradients[tensor] is None for tensor in alone), alone
            for tensor, row in rows.items():
                shape = "x".join(map(str, ours.weights[tensor].shape))
                tensors.setdefault(tensor, {"shape": shape})[name] = row["relative"]
            ends = {kind: max(row[kind] for row in rows.values()) for kind in KINDS}
            apart = abs(ours.loss - theirs.loss)
            whole[name] = {"loss": ours.loss, "nnU-Net + 1": theirs.loss, "apart": apart} | ends
    worst = max(row[kind] for row in whole.values() for kind in ("apart", "relative", "weight"))
    text = [
        measure.table("worst difference of a gradient, relative", tensors),
        measure.table("target, one Dice a", whole),
        f"worst of all {worst:.1e}, at most {MOST:.0e}: {'kept' if worst <= MOST else 'MISSED'}",
    ]
    measure.report({"tensors": tensors, "all": whole}, "\n\n".join(text), as_json=as_json)
    return int(worst > MOST)
