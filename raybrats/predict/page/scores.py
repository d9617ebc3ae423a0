"""Scores of one model, or of two -> the tables and charts of the page's part on scores."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from raybrats.model.metrics import HD95_ONE_EMPTY_MM
from raybrats.predict.agreement import risk_coverage, volume_agreement
from raybrats.predict.evaluate import Evaluation
from raybrats.predict.page import charts
from raybrats.predict.ranking import paired
from raybrats.predict.summary import OVERALL, Row, means, regions

Rows = Sequence[Row]
Cases = dict[str, dict[str, dict[str, Any]]]
"""Case id -> region -> score -> value; None where it is undefined."""
TITLES = {
    "dice": "Dice",
    "iou": "IoU",
    "hd95_mm": "HD95 (mm)",
    "nsd": "NSD",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "lesion_dice": "Lesion Dice",
    "lesion_hd95_mm": "Lesion HD95 (mm)",
    "lesion_nsd": "Lesion NSD",
    "lesion_f1": "Lesion F1",
}
"""Score -> its title, in the order in which they are shown."""


def score_parts(evaluations: Mapping[str, Evaluation], quality: Rows) -> dict[str, Any]:
    """What the template of the scores asks for.

    Args:
        evaluations: scores by model; the first is the one that the page is about, a second is
            compared.
        quality: {case_id, region, expected_dice, look} of the same model.

    Example:
        >>> score_parts({}, [])["table"]
        {}
    """
    found = list(evaluations.values())
    rows = found[0].rows if found else ()
    other = found[1].rows if found[1:] else ()
    agreement = volume_agreement(rows).items()
    one_empty_mm = HD95_ONE_EMPTY_MM[found[0].rules] if found else 0.0
    return {
        "evaluation": found[0] if found else None,
        "regions": regions(rows),
        "titles": {s: t for s, t in TITLES.items() if not np.isnan(_array(rows, s)).all()},
        "table": _worst_first(_with_differences(_by_case(rows), _by_case(other))),
        "paired": paired(rows, other) if other else {},
        "one_empty": bool((_array(rows, "hd95_mm") == one_empty_mm).any()),
        "hd95_one_empty": one_empty_mm,
        "agreement": [(region, a, charts.agreement_chart(a)) for region, a in agreement],
        "trust": list(_trust(_by_case(rows), quality)),
        "looks": {str(row["case_id"]) for row in quality if row["look"]},
    }


def _array(rows: Rows, *names: str) -> np.ndarray:
    """The scores (row, name), NaN where there is none."""
    return np.array([[row.get(name) for name in names] for row in rows], float)


def _by_case(rows: Rows) -> Cases:
    """Rows as a table, with the `mean` of the regions that have a score."""
    cases: Cases = {}
    for row in rows:
        cases.setdefault(str(row["case_id"]), {})[str(row["region"])] = dict(row)
    for own in cases.values():
        own[OVERALL] = means([*own.values()])[OVERALL]
    return cases


def _worst_first(cases: Cases) -> Cases:
    """The table with the lowest mean Dice first; cases without one come last."""

    def order(case_id: str) -> tuple[float, str]:
        dice = cases[case_id][OVERALL]["dice"]
        return np.inf if dice is None else dice, case_id

    return {case_id: cases[case_id] for case_id in sorted(cases, key=order)}


def _with_differences(cases: Cases, other: Cases) -> Cases:
    """The table with a `score-difference` to another model beside each score, where it has it."""
    for case_id in cases if other else ():
        for region, row in cases[case_id].items():
            theirs = other.get(case_id, {}).get(region, {})
            values = _array([row, theirs], *TITLES)
            less = zip(TITLES, values[0] - values[1], strict=True)
            row |= {f"{s}-difference": None if np.isnan(d) else float(d) for s, d in less}
    return cases


def _trust(cases: Cases, quality: Rows) -> Iterator[tuple[str, Markup]]:
    """Title and chart of what the model's own expectations are worth."""
    pairs = {}
    for region in regions(quality):
        own = [row for row in quality if row["region"] == region]
        scored = [cases.get(row["case_id"], {}).get(region, {}) for row in own]
        both = np.concatenate([_array(own, "expected_dice"), _array(scored, "dice")], axis=1)
        both = both[~np.isnan(both).any(axis=1)]
        if len(both):
            pairs[region] = both
    if pairs:
        yield "Calibration: Dice and what was expected", charts.calibration_chart(pairs)
        lines = {region: risk_coverage(*both.T) for region, both in pairs.items()}
        yield "Risk and coverage, the surest cases first", charts.risk_chart(lines)
