"""Labels against labels: confusion of a case -> accuracy, mean IoU and scores of each label.

These are the figures that keras' metrics give: each label by itself, and the background among them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

BACKGROUND = "background"


@dataclass(frozen=True)
class Confusion:
    """How many voxels of each reference label have been given each label."""

    case_id: str
    names: tuple[str, ...]
    """Names of the labels: background, then 1, 2, ..."""
    voxels: np.ndarray
    """int64 (reference label, predicted label)."""


def confusion_of(
    case_id: str, prediction: np.ndarray, reference: np.ndarray, names: Sequence[str]
) -> Confusion:
    """The confusion of labels (i, j, k) against reference labels of the same shape.

    Args:
        case_id: its id.
        prediction: labels 0, 1, 2, ..., uint8.
        reference: the same.
        names: those of the labels 1, 2, ...

    Example:
        >>> labels = np.array([0, 0, 1, 2], np.uint8)
        >>> confusion_of("a", labels, np.array([0, 1, 1, 2], np.uint8), ("NCR", "ED")).voxels
        array([[1, 0, 0],
               [1, 1, 0],
               [0, 0, 1]])
    """
    num = 1 + len(names)
    pairs = reference.astype(np.uint16) * num + prediction  # at most 65 x 65 of them
    voxels = np.bincount(pairs.ravel(order="K"), minlength=num * num).reshape(num, num)
    return Confusion(case_id, (BACKGROUND, *names), voxels)


def label_scores(confusions: Sequence[Confusion]) -> dict[str, Any]:
    """Means over cases: `accuracy` over voxels, `mean_iou`, and the scores of each label.

    `mean_iou` is the mean of the background and of the labels that either side of a case has. A
    label that neither side has is left out of its own means for that case.

    Example:
        >>> labels, others = np.array([0, 0, 1, 1], np.uint8), np.array([0, 0, 0, 1], np.uint8)
        >>> found = label_scores([confusion_of("a", labels, others, ("NCR", "ED"))])
        >>> found["accuracy"], round(found["mean_iou"], 3), found["labels"]["ED"]["dice"]
        (0.75, 0.583, None)
        >>> found["labels"]["NCR"]["sensitivity"]
        1.0
    """
    tables = [_ratios(confusion.voxels) for confusion in confusions]
    names = dict.fromkeys(name for confusion in confusions for name in confusion.names)
    labels = {}
    for name in names:
        at = [
            (c.names.index(name), t)
            for c, t in zip(confusions, tables, strict=True)
            if name in c.names
        ]
        labels[name] = {kind: _mean([t[kind][n] for n, t in at]) for kind in _KINDS}
    return {
        "accuracy": _mean([c.voxels.trace() / c.voxels.sum() for c in confusions]),
        "mean_iou": _mean([float(np.nanmean(table["iou"])) for table in tables]),
        "labels": labels,
    }


_KINDS = ("dice", "iou", "sensitivity", "specificity")


def _ratios(voxels: np.ndarray) -> dict[str, np.ndarray]:
    """Scores (label,) of a confusion; NaN for labels that neither side has."""
    both, found, due = voxels.diagonal(), voxels.sum(axis=0), voxels.sum(axis=1)
    others = voxels.sum() - due
    shares = {
        "dice": (2 * both, found + due),
        "iou": (both, found + due - both),
        "sensitivity": (both, due),
        "specificity": (others - found + both, others),
    }
    absent = found + due == 0
    return {
        kind: np.where(absent | (whole == 0), np.nan, part / np.maximum(whole, 1))
        for kind, (part, whole) in shares.items()
    }


def _mean(values: Sequence[float]) -> float | None:
    defined = [float(value) for value in values if not np.isnan(value)]
    return float(np.mean(defined)) if defined else None
