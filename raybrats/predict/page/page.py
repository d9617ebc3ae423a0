"""Facts, curves, scores and cases -> one HTML page that needs nothing but a browser."""

import base64
import gzip
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from raybrats.label_set import LabelSet
from raybrats.model.metrics import HD95_ONE_EMPTY_MM
from raybrats.predict.agreement import confusion, risk_coverage, volume_agreement
from raybrats.predict.evaluate import Evaluation
from raybrats.predict.page import charts
from raybrats.predict.page.slices import Shown, colours_of, embedded, region_volumes

Rows = Sequence[Mapping[str, Any]]
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
NIIVUE = "niivue-0.69.0.umd.js.gz"
"""`dist/niivue.umd.js` of npm's `@niivue/niivue` 0.69.0 (BSD-2-Clause), by `gzip -9n`."""


@dataclass(frozen=True)
class Report:
    """Everything that the page shows; empty parts are left out."""

    title: str
    facts: Mapping[str, str]
    """Name -> value of each line at the head of the page."""
    curves: Mapping[str, charts.Curve]
    """Metrics of the run, as `tracking.curves` gives them."""
    evaluations: Mapping[str, Evaluation]
    """Model -> its scores; the first is the one that the page is about, a second is compared."""
    cases: Sequence[Shown]
    """Cases whose slices are shown."""
    quality: Rows = ()
    """{case_id, region, expected_dice, agreement, look} of each case and region."""
    viewer: bool = False
    """Whether the page holds NiiVue, which shows a case in three dimensions."""

    @property
    def scored(self) -> Rows:
        """Rows of the model that the page is about."""
        return next(iter(self.evaluations.values())).rows if self.evaluations else ()


def render(report: Report) -> str:
    """Self-contained HTML of the page, the same text for the same report.

    Example:
        >>> html = render(Report("phantoms", {"cases": "3"}, curves={}, evaluations={}, cases=[]))
        >>> html.startswith("<!DOCTYPE html>"), "<h1>phantoms</h1>" in html
        (True, True)
    """
    loader = jinja2.PackageLoader("raybrats", "predict/page")
    pages = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    script = "".join(_text(name) for name in ("table.js", "slices.js", "viewer.js"))
    viewer = files(__package__).joinpath(NIIVUE).read_bytes() if report.viewer else b""
    return (
        pages.get_template("page.html.jinja")
        .render(
            report=report,
            style=Markup(_text("page.css")),
            script=Markup(script),
            script_hashes=[_hash(script.encode()), *([_hash(gzip.decompress(viewer))] * bool(viewer))],
            licence=_text("niivue.LICENSE") if report.viewer else "",
            viewer=base64.b64encode(viewer).decode(),
            charts=list(charts.training_charts(report.curves)),
            shown=[(case, embedded(case), region_volumes(case)) for case in report.cases],
            colours={n: c for case in report.cases for n, c in colours_of(case.label_set).items()},
            confused=_confused(report.cases),
            **_score_parts(report),
        )
        .lstrip()
    )


def _text(name: str) -> str:
    return files(__package__).joinpath(name).read_text("utf-8")


def _hash(script: bytes) -> str:
    """Source of a script in a Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script).digest()).decode()}'"


def _score_parts(report: Report) -> dict[str, Any]:
    """What the part on scores is made of."""
    rows = report.scored
    regions = tuple(dict.fromkeys(str(row["region"]) for row in rows))
    evaluations = list(report.evaluations.values())
    agreement = volume_agreement(rows).items()
    return {
        "evaluation": evaluations[0] if evaluations else None,
        "regions": regions,
        "titles": {s: t for s, t in TITLES.items() if any(_number(r.get(s)) for r in rows)},
        "table": _by_case(rows, _by_case(evaluations[1].rows) if evaluations[1:] else None),
        "paired": list(_paired(evaluations, regions)),
        "hd95_one_empty": HD95_ONE_EMPTY_MM,
        "agreement": [(region, a, charts.agreement_chart(a)) for region, a in agreement],
        "trust": list(_trust(rows, report.quality)),
        "looks": [row for row in report.quality if row["look"]],
    }


def _number(value: object) -> bool:
    """Whether it is a number, neither None nor NaN."""
    return isinstance(value, int | float) and value == value


def _mean(values: Sequence[object]) -> float | None:
    """Mean of those that are numbers; None where none is."""
    numbers = [value for value in values if _number(value)]
    return float(np.mean(np.array(numbers, float))) if numbers else None


def _by_case(rows: Rows, other: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """Case id -> region, and `mean` of the regions -> score; the lowest mean Dice first.

    Where there is another table, each score also has a `score-difference` to it.
    """
    cases: dict[str, dict[str, Any]] = {}
    for row in rows:
        cases.setdefault(str(row["case_id"]), {})[str(row["region"])] = dict(row)
    for case_id, regions in cases.items():
        means = {s: _mean([row.get(s) for row in regions.values()]) for s in TITLES}
        regions["mean"] = means
        for region, row in regions.items() if other is not None else ():
            theirs = (other or {}).get(case_id, {}).get(region, {})
            row |= {f"{s}-difference": _less(row.get(s), theirs.get(s)) for s in TITLES}

    def worst_first(case: tuple[str, dict[str, Any]]) -> tuple[float, str]:
        dice = case[1]["mean"]["dice"]
        return (2.0 if dice is None else dice), case[0]

    return dict(sorted(cases.items(), key=worst_first))


def _less(value: Any, other: Any) -> float | None:  # noqa: ANN401 - whatever the rows hold
    return value - other if _number(value) and _number(other) else None


def _paired(evaluations: Sequence[Evaluation], regions: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Scores of two models over the cases that both have, by score and region."""
    if len(evaluations) < 2:
        return
    ours, theirs = (_by_case(evaluation.rows) for evaluation in evaluations[:2])
    for score, title in TITLES.items():
        for region in (*regions, "mean"):
            pairs = [
                (ours[i].get(region, {}).get(score), theirs[i].get(region, {}).get(score))
                for i in ours.keys() & theirs.keys()
            ]
            if found := [pair for pair in pairs if all(map(_number, pair))]:
                both = np.array(found, float)
                less = both[:, 0] - both[:, 1]
                yield {
                    "title": title,
                    "score": score,
                    "region": region,
                    "cases": len(less),
                    "means": [*both.mean(axis=0), less.mean()],
                    "counts": [int(n) for n in ((less > 0).sum(), (less == 0).sum(), (less < 0).sum())],
                }


def _trust(rows: Rows, quality: Rows) -> Iterator[tuple[str, Markup]]:
    """Title and chart of what the model's own expectations are worth."""
    dice = {(row["case_id"], row["region"]): row["dice"] for row in rows}
    pairs: dict[str, list[tuple[float, float]]] = {}
    for row in quality:
        pair = row["expected_dice"], dice.get((row["case_id"], row["region"]))
        if all(map(_number, pair)):
            pairs.setdefault(row["region"], []).append(pair)
    if pairs:
        yield "Calibration: Dice and what was expected", charts.calibration_chart(pairs)
        lines = {region: risk_coverage(*np.array(p, float).T) for region, p in pairs.items()}
        yield "Risk and coverage, the surest cases first", charts.risk_chart(lines)


def _confused(cases: Sequence[Shown]) -> list[tuple[LabelSet, int, np.ndarray]]:
    """Label set, number of cases, and voxels by reference and prediction, of the shown cases."""
    found: dict[LabelSet, list[np.ndarray]] = {}
    for case in cases:
        if case.reference is not None:
            ours, known = next(iter(case.predictions.values())), case.label_set
            counts = confusion(ours, case.reference, len(known.names))
            found.setdefault(known, []).append(counts)
    return [(known, len(counts), np.sum(counts, axis=0)) for known, counts in found.items()]
