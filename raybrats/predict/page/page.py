"""Facts, curves, scores and cases -> one HTML page that needs nothing but a browser."""

import base64
import gzip
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

import jinja2
import numpy as np
from markupsafe import Markup

from raybrats.predict import page
from raybrats.predict.evaluate import Evaluation
from raybrats.predict.label_score import confusion_of
from raybrats.predict.page import charts
from raybrats.predict.page.scores import Rows, score_parts
from raybrats.predict.page.slices import Shown, colours_of, embedded, region_volumes

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
    viewer = files(page).joinpath(NIIVUE).read_bytes() if report.viewer else b""
    return (
        pages.get_template("page.html.jinja")
        .render(
            report=report,
            style=Markup(_text("page.css")),
            script=Markup(script),
            script_hashes=[
                _hash(script.encode()),
                *([_hash(gzip.decompress(viewer))] * bool(viewer)),
            ],
            licence=_text("niivue.LICENSE") if report.viewer else "",
            viewer=base64.b64encode(viewer).decode(),
            charts=list(charts.training_charts(report.curves)),
            shown=[(case, embedded(case), region_volumes(case)) for case in report.cases],
            colours={n: c for case in report.cases for n, c in colours_of(case.label_set).items()},
            confused=_confused(report.cases),
            **score_parts(report.evaluations, report.quality),
        )
        .lstrip()
    )


def _text(name: str) -> str:
    return files(page).joinpath(name).read_text("utf-8")


def _hash(script: bytes) -> str:
    """Source of a script in a Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script).digest()).decode()}'"


def _confused(cases: Sequence[Shown]) -> list[tuple[tuple[str, ...], int, np.ndarray]]:
    """Names of the labels, number of cases, and voxels (reference, prediction) of those shown."""
    found: dict[tuple[str, ...], list[np.ndarray]] = {}
    for case in cases:
        if case.reference is not None:
            ours, names = next(iter(case.predictions.values())), case.label_set.names
            confusion = confusion_of(case.case_id, ours, case.reference, names)
            found.setdefault(confusion.names, []).append(confusion.voxels)
    return [(names, len(voxels), np.sum(voxels, axis=0)) for names, voxels in found.items()]
