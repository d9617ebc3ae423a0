"""A picture of every change alone, of the default mix and of domain-shift's, to look at.

    python tests/bench/montage.py --out montage.png [--cases TREE] [--patch 96]

A row a change, a column a modality, and labels over the first modality. Without --cases, phantoms.
Pictures of real cases are not for the repository.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure

from raybrats.brats import MODALITIES
from raybrats.config import AugmentConfig, DataConfig
from raybrats.data.augment.augment import augment
from raybrats.data.augment.change import Change, draw_change
from raybrats.data.batch import Batch, collate, normalise
from raybrats.data.patch import PatchRule, draw_patch, to_row
from raybrats.data.prepare import Prepared, prepare
from raybrats.phantom.phantom import make_phantom
from raybrats.recipes import domain_shift

NEVER = AugmentConfig(local_per_modality=1.0, **dict.fromkeys(AugmentConfig.CHANGES, 0.0))
NUM_MIXES = 6
NUMBERS = (
    *("median", "brightness", "brightness_added", "contrast", "low_resolution", "inverted_gamma"),
    *("gamma", "brightness_gradient", "local_gamma", "sharpening"),
)
"""Changes that are described by a number for each modality."""
COLOURS = mpl.colors.ListedColormap([(0, 0, 0, 0), "red", "lime", "gold"])


def cases_of(tree: str | None) -> list[Prepared]:
    """Two cases of a tree, one twice where there is only one, or two phantoms."""
    if tree:
        from raybrats.data.cohort.case import prepare_case
        from raybrats.data.cohort.index import find_cases

        return [prepare_case(case, DataConfig()) for case in (find_cases(tree) * 2)[:2]]
    phantoms = (make_phantom(index, shape=(160, 160, 120)) for index in range(2))
    return [prepare(list(image), labels) for image, labels in phantoms]


def batch_of(cases: list[Prepared], edge: int, seed: int) -> Batch:
    """A patch of each, about a voxel of its tumour."""
    rule = PatchRule(DataConfig(foreground_share=1.0), (edge,) * 3, seed)
    rows = []
    for number, case in enumerate(cases):
        patch = draw_patch(case, rule, draw=number, case=number, ordinal=0)
        rows.append(to_row(case, patch, number))
    return collate(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", help="a tree of cases in any BraTS layout")
    parser.add_argument("--out", type=Path, default=Path("montage.png"))
    parser.add_argument("--patch", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    batch = batch_of(cases_of(options.cases), options.patch, options.seed)
    image, brain = normalise(batch.image, batch.scaling)
    rows = [("as it is", image[0], batch.labels[0]), ("as it is", image[1], batch.labels[1])]
    jobs = [(name, replace(NEVER, **{name: 1.0}), 0) for name in AugmentConfig.CHANGES]
    jobs += [("default mix", AugmentConfig(), number % 2) for number in range(NUM_MIXES)]
    jobs += [("domain-shift", domain_shift().augment, number % 2) for number in range(NUM_MIXES)]
    for draw, (name, config, place) in enumerate(jobs):
        sample = tuple(part[place : place + 1] for part in (image, batch.labels, brain))
        changed, labels = augment(config, options.seed, torch.tensor([draw]), sample)
        words = described(draw_change(config, options.seed, draw, image.shape[1]))
        rows.append((f"{name}\n{words}", changed[0], labels[0]))
    show(rows).savefig(options.out, dpi=70)


def show(rows: list[tuple[str, torch.Tensor, torch.Tensor]]) -> Figure:
    """The middle slices, i to the right and j up, all on the scale of the first row."""
    columns = [*MODALITIES, "labels"]
    figure = Figure(figsize=(2.2 * len(columns) + 2.4, 2.25 * len(rows)))
    axes = figure.subplots(len(rows), len(columns))
    low, high = np.percentile(rows[0][1].numpy(), [0.5, 99.5], axis=(1, 2, 3))
    for line, (title, image, labels) in zip(axes, rows, strict=True):
        middle = image.shape[-1] // 2
        for column, axis in enumerate(line):
            modality = 0 if column == len(MODALITIES) else column
            axis.imshow(
                image[modality, :, :, middle].T,
                cmap="gray",
                origin="lower",
                vmin=low[modality],
                vmax=high[modality],
            )
            axis.set_xticks([])
            axis.set_yticks([])
        line[-1].imshow(
            labels[:, :, middle].T, cmap=COLOURS, origin="lower", vmin=0, vmax=3, alpha=0.5
        )
        line[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=8)
    for axis, column in zip(axes[0], columns, strict=True):
        axis.set_title(column)
    figure.subplots_adjust(left=0.2, right=0.99, top=0.98, bottom=0.01, wspace=0.03, hspace=0.03)
    return figure


def described(change: Change) -> str:
    """The parameters of a change, a line each, to compare with the picture."""
    lines = described_axes(change)
    for name in NUMBERS:
        values = [v[0] if isinstance(v, tuple) else v for v in getattr(change, name)]
        if values:
            words = " ".join("-" if v is None else f"{v:.2g}" for v in values)
            lines.append(f"{name} {words}")
    if change.blank_rectangles:
        words = " ".join(str(len(boxes or ())) for boxes in change.blank_rectangles)
        lines.append(f"rectangles {words}")
    if change.noise:
        lines.append(f"noise {change.noise[0][0]:.2f}")
    for number, sigmas in enumerate(change.blur):
        if sigmas is not None:
            lines.append(f"blur {MODALITIES[number]} " + " ".join(f"{s:.2f}" for s in sigmas))
    if change.dropped is not None:
        lines.append(f"dropped {MODALITIES[change.dropped]}")
    return "\n".join(lines)


def described_axes(change: Change) -> list[str]:
    """The same of what moves voxels."""
    lines = [f"mirror {''.join(a for a, m in zip('ijk', change.mirrored, strict=True) if m)}"]
    lines = lines if any(change.mirrored) else []
    if change.warp is not None:
        angles = " ".join(f"{angle:.0f}" for angle in change.warp.angles_degrees)
        scales = " ".join(f"{scale:.2f}" for scale in np.atleast_1d(change.warp.scale))
        lines += [f"turned {angles} deg, scale {scales}"]
        lines += [f"elastic {change.warp.elastic_voxels:.1f}"] * (change.warp.elastic_voxels > 0)
    if change.rotate90 is not None:
        lines.append(f"{change.rotate90[0]} quarters, axes {change.rotate90[1]}")
    if change.transpose is not None:
        lines.append(f"order of axes {change.transpose}")
    return lines


if __name__ == "__main__":
    main()
