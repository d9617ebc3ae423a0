"""Rows of scores -> means, spreads and bootstrap intervals over cases, a region and score each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SCORES = (
    *("dice", "iou", "hd95_mm", "nsd", "sensitivity", "specificity"),
    *("volume_mm3", "reference_volume_mm3", "lesion_dice", "lesion_hd95_mm", "lesion_nsd"),
    *("tp", "fp", "fn", "lesion_f1"),
)
"""Names of the scores, in the order of `raybrats.model.metrics.Score`."""
OVERALL = "mean"
"""What stands in the place of a region for the unweighted mean of all of them."""
LEVEL = 0.95
"""Part of the bootstrap means that lies within an interval."""
_RESAMPLES = 2000
"""Bootstrap samples; the ends of an interval then move by about 2 % of its width with the seed."""

Row = Mapping[str, Any]
"""{case_id, region, and each of `SCORES`, None where the rules leave it undefined}."""


@dataclass(frozen=True)
class Summary:
    """One score of one region over cases; those for which it is undefined are left out."""

    cases: int
    """Number of cases for which it is defined."""
    mean: float
    median: float | None
    """None for the mean of the regions, as the next."""
    std: float | None
    """Standard deviation over cases (n - 1 below the line); None of one case."""
    low: float
    """Lower end of the bootstrap interval of the mean."""
    high: float


Summaries = dict[str, dict[str, Summary | None]]
"""Region -> score -> summary, None where no case has the score."""


def case_ids(rows: Sequence[Row]) -> tuple[str, ...]:
    """Ids of the cases of some rows, each once, in their order.

    Example:
        >>> case_ids([{"case_id": "b"}, {"case_id": "a"}, {"case_id": "b"}])
        ('b', 'a')
    """
    return tuple(dict.fromkeys(str(row["case_id"]) for row in rows))


def regions(rows: Sequence[Row]) -> tuple[str, ...]:
    """Names of the regions of some rows, each once, in their order.

    Example:
        >>> regions([{"region": "WT"}, {"region": "TC"}, {"region": "WT"}])
        ('WT', 'TC')
    """
    return tuple(dict.fromkeys(str(row["region"]) for row in rows))


def as_array(rows: Sequence[Row], cases: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """The scores (case, region, score) of some rows, NaN where undefined or absent.

    Args:
        rows: of any order.
        cases: ids of the cases that are wanted.
        names: regions that are wanted.

    Example:
        >>> as_array([{"case_id": "a", "region": "WT", "dice": 0.5}], ["a"], ["WT"])[0, 0, :2]
        array([0.5, nan])
    """
    place_of_case = {case: n for n, case in enumerate(cases)}
    place_of_region = {name: n for n, name in enumerate(names)}
    found = np.full((len(cases), len(names), len(SCORES)), np.nan)
    for row in rows:
        if row["case_id"] in place_of_case and row["region"] in place_of_region:
            place = place_of_case[row["case_id"]], place_of_region[row["region"]]
            found[place] = [row.get(score) for score in SCORES]  # None becomes NaN
    return found


def means(rows: Sequence[Row]) -> dict[str, dict[str, float | None]]:
    """Mean over cases of each score of each region, and under `mean` over the regions too.

    A case for which a score is undefined is left out of its mean; None: it is for every case.

    Example:
        >>> row = {"case_id": "a", **dict.fromkeys(SCORES, 0.5), "nsd": None}
        >>> found = means([{**row, "region": "WT", "dice": 0.8}, {**row, "region": "TC"}])
        >>> found["WT"]["dice"], found["mean"]["dice"], found["mean"]["nsd"]
        (0.8, 0.65, None)
    """
    names = regions(rows)
    found = _mean(as_array(rows, case_ids(rows), names), axis=0)
    found = np.concatenate([found, _mean(found, axis=0)[None]])
    return {
        name: {s: None if np.isnan(v) else float(v) for s, v in zip(SCORES, values, strict=True)}
        for name, values in zip((*names, OVERALL), found, strict=True)
    }


def summaries(rows: Sequence[Row], seed: int = 0) -> Summaries:
    """Mean, median, spread and interval over cases of each score of each region, and of `mean`.

    Example:
        >>> rows = [{"case_id": str(n), "region": "WT", "dice": n / 10} for n in range(11)]
        >>> found = summaries(rows)["WT"]["dice"]
        >>> found.mean, found.median, 0.3 < found.low < 0.4, 0.6 < found.high < 0.7
        (0.5, 0.5, True, True)
    """
    names = regions(rows)
    return summaries_of(as_array(rows, case_ids(rows), names), names, seed)


def summaries_of(values: np.ndarray, names: Sequence[str], seed: int = 0) -> Summaries:
    """The same of an array (case, region, score), NaN where undefined.

    The interval holds the middle 95 % of the means of resampled cases (percentile bootstrap, Efron
    1979). All regions and scores share the samples, which the seed and the number of cases decide.

    Example:
        >>> found = summaries_of(np.full((3, 1, len(SCORES)), 0.5), ["WT"])["WT"]["dice"]
        >>> (found.mean, found.low, found.high)
        (0.5, 0.5, 0.5)
    """
    mean, resampled = _mean(values, axis=0), _resampled_means(values, seed)
    mean = np.concatenate([mean, _mean(mean, axis=0)[None]])
    resampled = np.concatenate([resampled, _mean(resampled, axis=1)[:, None]], axis=1)
    overall = _mean(values, axis=1)[:, None]  # only to count the cases that have any region
    values = np.concatenate([values, overall], axis=1)
    return {
        name: {
            score: _summary(values[:, r, s], mean[r, s], resampled[:, r, s], name)
            for s, score in enumerate(SCORES)
        }
        for r, name in enumerate((*names, OVERALL))
    }


def _summary(values: np.ndarray, mean: float, resampled: np.ndarray, name: str) -> Summary | None:
    """Of one region and score: `values` (case,), `resampled` means (resample,)."""
    defined = values[~np.isnan(values)]
    if not len(defined):
        return None
    ends = np.quantile(resampled[~np.isnan(resampled)], ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    spread = name != OVERALL
    return Summary(
        cases=len(defined),
        mean=float(mean),
        median=float(np.median(defined)) if spread else None,
        std=float(defined.std(ddof=1)) if spread and len(defined) > 1 else None,
        low=float(ends[0]),
        high=float(ends[1]),
    )


def _resampled_means(values: np.ndarray, seed: int) -> np.ndarray:
    """Means (resample, region, score) over cases that are drawn with replacement."""
    num_cases = len(values)
    if not num_cases:
        return np.full((_RESAMPLES, *values.shape[1:]), np.nan)
    share = np.full(num_cases, 1 / num_cases)
    drawn = np.random.default_rng(seed).multinomial(num_cases, share, size=_RESAMPLES)
    columns = values.reshape(num_cases, -1)
    defined = ~np.isnan(columns)
    total = drawn @ np.where(defined, columns, 0.0)
    count = drawn @ defined.astype(float)
    found = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    return found.reshape(_RESAMPLES, *values.shape[1:])


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean along an axis of what is not NaN; NaN where nothing is."""
    count = (~np.isnan(values)).sum(axis=axis)
    total = np.nansum(values, axis=axis)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
