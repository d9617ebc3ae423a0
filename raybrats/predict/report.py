"""A run and its predictions -> one HTML page of its curves, scores and cases."""

from collections.abc import Mapping, Sequence

import numpy as np

from raybrats import storage
from raybrats.brats import MODALITIES
from raybrats.data.cohort import index
from raybrats.data.cohort.case import BAD, Case, open_case
from raybrats.data.nifti.labels import labels_from
from raybrats.data.nifti.volume import canonical_spacing, decode
from raybrats.errors import DataError, MissingObjectError
from raybrats.label_set import LabelSet, label_set_of
from raybrats.predict import origin
from raybrats.predict.evaluate import Evaluation, evaluate
from raybrats.predict.origin import Origin
from raybrats.predict.page import Overlay, Report, render
from raybrats.predict.predict import file_name
from raybrats.registry import load, tracking
from raybrats.registry.tracking import Run

MAX_OVERLAYS = 6
"""Cases that are shown as images, at most."""


def write_report(
    predictions: str,
    cohort_uri: str,
    out_uri: str,
    *,
    run: str = "",
    tracking_uri: str = "",
    evaluation: Evaluation | None = None,
) -> str:
    """Writes the page and returns where it lies.

    Args:
        predictions: folder or URI that `predict` wrote.
        cohort_uri: the cases that it read; their labels are the references, where they have any.
        out_uri: place of the page.
        run: MLflow run whose curves are shown; that of the predictions' model where not given.
        tracking_uri: MLflow server; `tracking.default_uri()` where not given.
        evaluation: scores of these predictions; measured here where not given.

    Raises:
        DataError: the folder holds no predictions of these cases.
        UsageError: a URI is none.

    Example:
        >>> write_report("predictions", "cohort.parquet", "report.html")  # doctest: +SKIP
        '/home/me/report.html'
    """
    predictions, out_uri = storage.absolute(predictions), storage.absolute(out_uri)
    cohort_uri = storage.absolute(cohort_uri)
    storage.check_file(out_uri)
    tracking_uri = tracking_uri or tracking.default_uri()
    found = _origin(predictions)
    model, known = found.model, label_set_of(found.labels)
    shown = Run(tracking_uri, run or load.run_id_of(model, tracking_uri))
    there = {storage.name(uri) for uri in storage.list_objects(predictions)}
    cases = index.load(cohort_uri, verify=False)
    cases = [c for c in cases if c.status != BAD and file_name(c) in there]
    if not cases:
        raise DataError(f"{predictions}: no prediction of a case of {cohort_uri}")
    comparable = [c for c in cases if c.label_uri and c.label_values and c.labels == known]
    if evaluation is None and comparable:
        evaluation = evaluate(predictions, cohort_uri, skip_unknown=True)
    rows = evaluation.rows if evaluation else ()
    page = Report(
        title=f"raybrats: {model}",
        facts=_facts(model, shown, _counted(cases, evaluation)),
        curves=tracking.curves(shown),
        scores=rows,
        overlays=[_overlay(case, predictions, known) for case in _spread(cases, rows)],
    )
    storage.write_bytes(out_uri, render(page).encode())
    return out_uri


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


def _spread(cases: Sequence[Case], rows: Sequence[Mapping[str, object]]) -> list[Case]:
    """At most `MAX_OVERLAYS` cases, spread evenly from the worst mean Dice to the best."""
    dice: dict[str, list[float]] = {}
    for row in rows:
        if row["dice"] is not None:
            dice.setdefault(str(row["case_id"]), []).append(float(str(row["dice"])))
    ranked = sorted(cases, key=lambda case: float(np.mean(dice.get(case.case_id, [0.0]))))
    count = min(MAX_OVERLAYS, len(ranked))
    return [ranked[n] for n in np.linspace(0, len(ranked) - 1, count).round().astype(int)]


def _overlay(case: Case, predictions: str, known: LabelSet) -> Overlay:
    """Images, prediction and, where there are such, reference labels of a case."""
    alike = case.labels == known
    opened = open_case(case, labels=alike and bool(case.label_values))
    values = case.written_values if alike else tuple(range(1, len(known.names) + 1))
    name = file_name(case)
    volume = decode(storage.read_bytes(storage.join(predictions, name)), name)
    return Overlay(
        case_id=case.case_id,
        flair=opened.volumes[MODALITIES.index("flair")],
        t1ce=opened.volumes[MODALITIES.index("t1ce")],
        spacing_mm=canonical_spacing(opened.grid),
        reference=opened.labels,
        prediction=labels_from(volume, values, name),
        label_set=known,
    )
