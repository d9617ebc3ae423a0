"""A run and its predictions -> one HTML page of its curves, scores and cases."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raybrats import storage
from raybrats.brats import MODALITIES
from raybrats.data.cohort import index
from raybrats.data.cohort.case import BAD, Case, open_case
from raybrats.data.nifti.labels import labels_from
from raybrats.data.nifti.volume import canonical_spacing, decode
from raybrats.errors import DataError, MissingObjectError, UsageError
from raybrats.label_set import LabelSet, label_set_of
from raybrats.predict import origin
from raybrats.predict.evaluate import Evaluation, evaluate
from raybrats.predict.origin import Origin
from raybrats.predict.page.page import Report, render
from raybrats.predict.page.slices import Shown
from raybrats.predict.predict import file_name
from raybrats.registry import load, tracking
from raybrats.registry.tracking import Run

_ROLES = ("worst", "lower quartile", "median", "upper quartile", "best")
"""Cases that are shown, by their mean Dice among all that are scored."""
_QUALITY = "quality.csv"
"""What `predict` says beside its predictions of how good each of them is."""


@dataclass(frozen=True)
class Options:
    """What a page shows beside the scores and some cases."""

    run: str = ""
    """MLflow run whose curves are shown; that of the predictions' model where not given."""
    tracking_uri: str = ""
    """MLflow server; `tracking.default_uri()` where not given."""
    cases: Sequence[str] = ()
    """Ids of cases that are shown in any event."""
    against: str = ""
    """Folder or URI of another model's predictions, which are set beside these."""
    viewer: bool = False
    """Whether the page holds NiiVue."""
    rules: str | None = None
    """Rules of the scores, as `evaluate` takes them."""


@dataclass(frozen=True)
class Predictions:
    """A folder of predictions and whose they are."""

    uri: str
    model: str
    known: LabelSet


def write_report(
    predictions: str,
    cohort_uri: str,
    out_uri: str,
    options: Options = Options(),
    evaluation: Evaluation | None = None,
) -> str:
    """Writes the page, logs it to MLflow and returns where it lies.

    Args:
        predictions: folder or URI that `predict` wrote.
        cohort_uri: the cases that it read; their labels are the references, where they have any.
        out_uri: place of the page.
        options: what it shows.
        evaluation: scores of these predictions; measured here where not given.

    Raises:
        DataError: the folder holds no predictions of these cases.
        UsageError: a URI is none, or a case that is asked for is not among them.

    Example:
        >>> write_report("predictions", "cohort.parquet", "report.html")  # doctest: +SKIP
        '/home/me/report.html'
    """
    predictions, out_uri = storage.absolute(predictions), storage.absolute(out_uri)
    cohort_uri = storage.absolute(cohort_uri)
    storage.check_file(out_uri)
    tracking_uri = options.tracking_uri or tracking.default_uri()
    found = _origin(predictions)
    ours = Predictions(predictions, found.model, label_set_of(found.labels))
    run = Run(tracking_uri, options.run or load.run_id_of(ours.model, tracking_uri))
    cases = _predicted(index.load(cohort_uri, verify=False), ours)
    if not cases:
        raise DataError(f"{predictions}: no prediction of a case of {cohort_uri}")
    if unknown := sorted(set(options.cases) - {case.case_id for case in cases}):
        raise UsageError(f"--case {unknown[0]}: no case of that name has a prediction")
    both = [ours, *([_other(options.against, ours)] if options.against else [])]
    evaluations = {}
    if any(c.label_uri and c.label_values and c.labels == ours.known for c in cases):
        known = {ours.model: evaluation} if evaluation else {}
        evaluations = {
            p.model: known.get(p.model)
            or evaluate(p.uri, cohort_uri, rules=options.rules, skip_unknown=True)
            for p in both
        }
    scores = evaluations.get(ours.model)
    chosen = _chosen(cases, scores.rows if scores else (), options.cases)
    page = Report(
        title=f"raybrats: {ours.model}",
        facts=_facts(ours.model, run, _counted(cases, scores)),
        curves=tracking.curves(run),
        evaluations=evaluations,
        cases=[_shown(case, role, both) for case, role in chosen],
        quality=_quality(predictions),
        viewer=options.viewer,
    )
    html = render(page)
    storage.write_bytes(out_uri, html.encode())
    tracking.log_report(run, ours.model, storage.name(out_uri), html)
    return out_uri


def _predicted(cases: Sequence[Case], predictions: Predictions) -> list[Case]:
    """The cases that have a prediction."""
    there = {storage.name(uri) for uri in storage.list_objects(predictions.uri)}
    return [c for c in cases if c.status != BAD and file_name(c) in there]


def _other(uri: str, ours: Predictions) -> Predictions:
    """Another model's predictions of the same labels; without a record, known by their folder.

    Raises:
        DataError: its labels are others.
    """
    uri = storage.absolute(uri)
    storage.require(uri)
    name = storage.name(uri.rstrip("/"))
    try:
        found = origin.read(uri)
    except MissingObjectError:
        return Predictions(uri, name, ours.known)
    if label_set_of(found.labels) != ours.known:
        raise DataError(f"{uri}: {found.model} tells other labels apart than {ours.model}")
    model = found.model if found.model != ours.model else f"{found.model} in {name}"
    return Predictions(uri, model, ours.known)


def _origin(predictions: str) -> Origin:
    """The model that wrote a folder of predictions, as `predict` records it.

    Raises:
        DataError: the folder has no such record.
    """
    try:
        return origin.read(predictions)
    except MissingObjectError:
        raise DataError(f"{predictions}: not a folder that `raybrats predict` wrote") from None


def _counted(cases: Sequence[Case], evaluation: Evaluation | None) -> str:
    """How many cases there are, and how many of them are not scored."""
    unscored = len(evaluation.unlabelled) if evaluation else 0
    return f"{len(cases)}, {unscored} without labels" if unscored else str(len(cases))


def _facts(model: str, run: Run, num_cases: str) -> dict[str, str]:
    """Name -> value of the lines at the head of the page."""
    parameters = tracking.logged_parameters(run)
    shown = {
        "recipe": "recipe",
        "network": "network.name",
        "widths": "network.widths",
        "patch": "data.patch_size",
        "normalisation": "data.normalisation",
        "steps": "optim.steps",
        "global batch": "optim.global_batch",
        "workers": "cluster.workers",
    }
    facts = {title: parameters[name] for title, name in shown.items() if name in parameters}
    return {"model": model, **facts, "cases": num_cases, "MLflow run": run.run_id}


def _chosen(
    cases: Sequence[Case], rows: Sequence[Mapping[str, object]], named: Sequence[str]
) -> list[tuple[Case, str]]:
    """The named cases, and from the worst mean Dice to the best those of `_ROLES`."""
    by_id = {case.case_id: case for case in cases}
    dice: dict[str, list[float]] = {}
    for row in rows:
        if row["dice"] is not None:
            dice.setdefault(str(row["case_id"]), []).append(float(str(row["dice"])))
    ranked = sorted(dice.keys() & by_id.keys(), key=lambda i: (np.mean(dice[i]), i))
    pool, roles = (ranked, _ROLES) if ranked else (sorted(by_id), ("",) * len(_ROLES))
    places = np.linspace(0, len(pool) - 1, len(roles)).round().astype(int)
    found: dict[str, str] = {}
    for place, role in zip(places, roles, strict=True):
        found.setdefault(pool[place], role)
    return [(by_id[i], found.get(i, "")) for i in dict.fromkeys((*named, *found))]


def _shown(case: Case, role: str, both: Sequence[Predictions]) -> Shown:
    """Images, predictions and, where there are such, reference labels of a case."""
    known = both[0].known
    alike = case.labels == known
    opened = open_case(case, labels=alike and bool(case.label_values))
    values = case.written_values if alike else tuple(range(1, len(known.names) + 1))
    name = file_name(case)
    labels = {}
    for predictions in both:
        place = storage.join(predictions.uri, name)
        if predictions is both[0] or storage.exists(place):
            volume = decode(storage.read_bytes(place), name)
            labels[predictions.model] = labels_from(volume, values, name)
    images = zip(MODALITIES, opened.volumes, strict=True)
    return Shown(
        case_id=case.case_id,
        images={modality: v for modality, v in images if modality not in case.missing},
        spacing_mm=canonical_spacing(opened.grid),
        reference=opened.labels,
        predictions=labels,
        label_set=known,
        role=role,
    )


def _quality(predictions: str) -> list[dict[str, Any]]:
    """Rows of quality.csv; none where there is no such file.

    Raises:
        DataError: it is not as `predict` writes it.
    """
    place = storage.join(predictions, _QUALITY)
    try:
        text = storage.read_bytes(place).decode(errors="replace")
    except MissingObjectError:
        return []
    try:
        return [
            {
                "case_id": row["case_id"],
                "region": row["region"],
                "expected_dice": float(row["expected_dice"] or "nan"),
                "agreement": float(row["agreement"] or "nan"),
                "look": row["look"].lower() in ("1", "true", "yes"),
            }
            for row in csv.DictReader(io.StringIO(text))
        ]
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{place}: not as `raybrats predict` writes it ({error!r})") from None
