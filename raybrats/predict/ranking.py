"""Scores of several models on the same cases -> ranks, significance, tiers, paired differences.

BraTS ranks case by case and tells two models apart by permutation (Bakas et al. 2018, section 4).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.stats import rankdata

from raybrats.brats import Rules
from raybrats.predict.summary import (
    SCORES,
    Row,
    Summaries,
    as_array,
    case_ids,
    regions,
    summaries_of,
)

RANKED_BY: Mapping[Rules, tuple[str, ...]] = {
    "brats2020": ("dice", "hd95_mm"),
    "brats2023": ("lesion_dice", "lesion_hd95_mm"),
    "brats2026": ("dice", "nsd", "hd95_mm"),
}
"""Scores that are ranked: of the whole region until 2022, of its lesions from 2023 on, and since
2026 the three that a case without a prediction is charged in."""
LOWER_IS_BETTER = ("hd95_mm", "lesion_hd95_mm")
PERMUTATIONS = 10_000
"""The challenge takes 500,000."""
SIGNIFICANT = 0.05
"""Two models whose p-value is below are told apart."""
_TOLERANCE = 1e-9
"""Sums of the same ranks in another order are equal."""
_AT_ONCE = 2**22
"""Signs that are drawn at once: 32 MiB of them as float64."""


@dataclass(frozen=True)
class Standing:
    """Where a model ends up."""

    model: str
    place: float
    """1 for the best; models of one mean rank share the mean of their places."""
    mean_rank: float
    """Mean over cases, regions and ranked scores."""
    rank_sum: float
    """The same as a sum."""
    tier: int
    """1 for the best and all that are not significantly worse than it, and so on."""


def ranks(rows: Mapping[str, Sequence[Row]], rules: Rules) -> np.ndarray:
    """Ranks (model, case, region and ranked score) among the models; equals share their mean rank.

    Where the rules leave a score undefined there was nothing to find and nothing was found, which
    no other model can beat: it ranks first.

    Args:
        rows: those of each model, of the same cases.
        rules: which scores are ranked.

    Example:
        >>> def row(dice, hd95_mm):
        ...     return {"case_id": "a", "region": "WT", "dice": dice, "hd95_mm": hd95_mm}
        >>> ranks({"one": [row(0.9, 3.0)], "two": [row(0.8, 3.0)]}, "brats2020").tolist()
        [[[1.0, 1.5]], [[2.0, 1.5]]]
    """
    first = next(iter(rows.values()))
    values = np.stack([as_array(own, case_ids(first), regions(first)) for own in rows.values()])
    columns = []
    for score in RANKED_BY[rules]:
        column = values[..., SCORES.index(score)]
        cost = column if score in LOWER_IS_BETTER else -column
        columns.append(rankdata(np.where(np.isnan(cost), -np.inf, cost), axis=0))
    return np.stack(columns, axis=-1).reshape(*values.shape[:2], -1)


def p_values(case_ranks: np.ndarray, permutations: int = PERMUTATIONS, seed: int = 0) -> np.ndarray:
    """Two-sided p-values (model, model) of the difference in rank by random exchanges of cases.

    Were two models alike, then in each case either could have had the other's rank. Counted are
    the exchanges after which they lie as far apart as they do, and the one that changes nothing.

    Args:
        case_ranks: mean rank (model, case).
        permutations: number of random exchanges.
        seed: of the exchanges, which are the same for all pairs.

    Example:
        >>> p_values(np.array([[1.0] * 9, [2.0] * 9, [1.0] * 9]))[0].round(2).tolist()
        [1.0, 0.0, 1.0]
    """
    num_models, num_cases = case_ranks.shape
    pairs = np.array([*combinations(range(num_models), 2)]).reshape(-1, 2).T
    apart = (case_ranks[pairs[0]] - case_ranks[pairs[1]]).T  # (case, pair)
    least = np.abs(apart.sum(axis=0)) - _TOLERANCE
    generator, hits = np.random.default_rng(seed), np.ones(len(least))
    for first in range(0, permutations, step := max(1, _AT_ONCE // num_cases)):
        shape = min(step, permutations - first), num_cases
        signs = generator.integers(0, 2, shape) * 2.0 - 1.0
        hits += (np.abs(signs @ apart) >= least).sum(axis=0)
    found = np.ones((num_models, num_models))
    found[*pairs] = found[*pairs[::-1]] = hits / (1 + permutations)
    return found


def standings(models: Sequence[str], found: np.ndarray, p: np.ndarray) -> list[Standing]:
    """The models from the best to the worst, with their tiers.

    A tier holds its best model and the following ones until one is significantly worse than that
    best one, which begins the next.

    Args:
        models: their names.
        found: as `ranks` gives them.
        p: as `p_values` gives them.

    Example:
        >>> [s.tier for s in standings(["a", "b"], np.array([[[2.0]], [[1.0]]]), np.ones((2, 2)))]
        [1, 1]
    """
    mean_ranks, sums = found.mean(axis=(1, 2)), found.sum(axis=(1, 2))
    places = rankdata(mean_ranks.round(9))
    order = np.argsort(places, kind="stable")
    tier, leader, ordered = 1, order[0], []
    for n in order:
        if p[leader, n] < SIGNIFICANT:
            tier, leader = tier + 1, n
        figures = float(places[n]), float(mean_ranks[n]), float(sums[n])
        ordered.append(Standing(models[n], *figures, tier=tier))
    return ordered


def paired(rows_a: Sequence[Row], rows_b: Sequence[Row], seed: int = 0) -> Summaries:
    """Scores of a less those of b on the cases that both have, and bootstrap intervals.

    A case counts where both have the score. The regions are those that both have; `mean` is the
    unweighted mean of their differences.

    Example:
        >>> a = [{"case_id": c, "region": "WT", "dice": n / 4} for n, c in enumerate("abcd")]
        >>> b = [{**row, "dice": row["dice"] - 0.25} for row in a]
        >>> found = paired(a, b)["mean"]["dice"]
        >>> found.cases, found.mean, found.low
        (4, 0.25, 0.25)
    """
    others = case_ids(rows_b)
    cases = [case_id for case_id in case_ids(rows_a) if case_id in others]
    names = [name for name in regions(rows_a) if name in regions(rows_b)]
    apart = as_array(rows_a, cases, names) - as_array(rows_b, cases, names)
    return summaries_of(apart, names, seed)
