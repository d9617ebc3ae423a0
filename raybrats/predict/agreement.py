"""Predictions against references, as numbers: agreement of volumes, risk and coverage."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_NUM_DEVIATIONS = 1.96
"""Standard deviations about the mean that hold 95 % of normal differences (Bland & Altman 1986)."""
_MM3_OF_CM3 = 1000


@dataclass(frozen=True)
class Agreement:
    """Volumes of one region, in cm3, as Bland and Altman compare two methods."""

    mean: np.ndarray
    """(case): mean of the predicted and the reference volume."""
    difference: np.ndarray
    """(case): predicted less reference volume."""

    @property
    def bias(self) -> float:
        """Mean difference."""
        return float(self.difference.mean())

    @property
    def limits(self) -> tuple[float, float] | None:
        """Limits of agreement; None for a single case, which has no standard deviation."""
        if len(self.difference) < 2:
            return None
        reach = _NUM_DEVIATIONS * float(self.difference.std(ddof=1))
        return self.bias - reach, self.bias + reach


def volume_agreement(rows: Sequence[Mapping[str, Any]]) -> dict[str, Agreement]:
    """Region -> agreement of its volumes, from the rows of an `Evaluation` that tell both.

    Example:
        >>> rows = [
        ...     {"region": "WT", "volume_mm3": 5000, "reference_volume_mm3": 4000},
        ...     {"region": "WT", "volume_mm3": 9000, "reference_volume_mm3": 6000},
        ... ]
        >>> found = volume_agreement(rows)["WT"]
        >>> found.bias, [round(limit, 2) for limit in found.limits]
        (2.0, [-0.77, 4.77])
    """
    found = {}
    for region in dict.fromkeys(str(row["region"]) for row in rows):
        own = [row for row in rows if row["region"] == region]
        pairs = [(row.get("volume_mm3"), row.get("reference_volume_mm3")) for row in own]
        both = np.array(pairs, float) / _MM3_OF_CM3  # None becomes NaN
        predicted, reference = both[~np.isnan(both).any(axis=1)].T
        if len(predicted):
            found[region] = Agreement((predicted + reference) / 2, predicted - reference)
    return found


def risk_coverage(expected: np.ndarray, dice: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fraction of cases kept, the surest first, and their mean of 1 - Dice, (case) each.

    Example:
        >>> kept, risk = risk_coverage(np.array([0.5, 0.9]), np.array([0.6, 0.8]))
        >>> kept.tolist(), risk.round(2).tolist()
        ([0.5, 1.0], [0.2, 0.3])
    """
    surest_first = np.argsort(-expected, kind="stable")
    counts = np.arange(1, len(dice) + 1)
    return counts / len(dice), np.cumsum(1 - dice[surest_first]) / counts
