"""A registered model over a cohort -> label NIfTIs in each case's own grid and label values."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray.data
from ray.data import ActorPoolStrategy

from raybrats import cluster, errors, storage
from raybrats.data.cohort import index
from raybrats.data.cohort.case import BAD, Case
from raybrats.data.nifti.volume import encode_labels
from raybrats.errors import DataError, RaybratsError
from raybrats.label_set import as_text
from raybrats.predict import origin
from raybrats.predict.patient import open_case_for
from raybrats.progress import Display
from raybrats.registry import load, tracking
from raybrats.registry.tracking import Run
from raybrats.table import table


@dataclass(frozen=True)
class Predicted:
    """Counts of the cases that a model has segmented, and those that it could not.

    Example:
        >>> print(Predicted("models:/raybrats/3", 12, 9, 2, ({"case_id": "a", "reason": "torn"},)))
        model               cases  written  skipped  failed
        models:/raybrats/3     12        9        2       1
        <BLANKLINE>
        case_id  reason
        a        torn
    """

    model: str
    """`models:/name/version`."""
    cases: int
    written: int
    skipped: int
    """Number of predictions that were already there, from the same model."""
    failed: tuple[Mapping[str, str], ...]
    """{case_id, reason} of each case without a prediction."""

    def __str__(self) -> str:
        counts = (self.model, self.cases, self.written, self.skipped, len(self.failed))
        text = table(("model", "cases", "written", "skipped", "failed"), [counts])
        if not self.failed:
            return text
        rows = [(failure["case_id"], failure["reason"]) for failure in self.failed]
        return f"{text}\n\n{table(('case_id', 'reason'), rows)}"


@dataclass(frozen=True)
class Settings:
    """Settings that all predicting workers share."""

    model: str
    server: Run
    out_uri: str
    threads: int
    """Threads that torch may use in each worker."""


def predict(
    model_uri: str,
    cohort_uri: str,
    out_uri: str,
    *,
    fold: int | None = None,
    tracking_uri: str | None = None,
) -> Predicted:
    """Segments every case of a cohort file or tree; run again, it goes on where it stopped.

    Args:
        model_uri: `models:/name@alias` or `models:/name/version`.
        cohort_uri: cohort file, or tree of cases.
        out_uri: folder for `<case_id>.nii.gz`.
        fold: cross-validation fold whose cases are segmented; all cases where not given.
        tracking_uri: MLflow server; `tracking.default_uri()` where not given.

    Raises:
        TrackingError: there is no such model.
        UsageError: the folder holds predictions of another model, or a URI is none.
        DataError: there is no case.

    Example:
        >>> print(predict("models:/raybrats@champion", "cohort.parquet", "out"))  # doctest: +SKIP
        model               cases  written  skipped  failed
        models:/raybrats/3     12       12        0       0
    """
    cohort_uri, out_uri = storage.absolute(cohort_uri), storage.absolute(out_uri)
    tracking_uri = tracking_uri or tracking.default_uri()
    model = load.resolve(model_uri, tracking_uri)
    cases = [c for c in index.load(cohort_uri, verify=False) if fold in (None, c.fold)]
    if not cases:
        raise DataError(f"{cohort_uri}: no case in fold {fold}")
    there = {storage.name(uri) for uri in storage.list_objects(out_uri)}
    known = origin.Origin(model, as_text(load.label_set(model, tracking_uri)))
    origin.record(out_uri, known, sorted(there & {file_name(c) for c in cases}))
    bad = [{"case_id": c.case_id, "reason": c.reason} for c in cases if c.status == BAD]
    good = [c for c in cases if c.status != BAD]
    todo = [c for c in good if file_name(c) not in there]
    failed = _segment_all(todo, model, tracking_uri, out_uri) if todo else []
    skipped, written = len(good) - len(todo), len(todo) - len(failed)
    return Predicted(model, len(cases), written, skipped, (*bad, *failed))


def file_name(case: Case) -> str:
    """File name of a case's prediction.

    Example:
        >>> from raybrats.phantom.phantom import write_phantoms
        >>> ids = write_phantoms("tree", num_cases=1, shape=(24, 24, 20), edition="2021")
        >>> file_name(index.find_cases("tree")[0])
        'BraTS2021_00000.nii.gz'
    """
    return f"{case.case_id}.nii.gz"


def _segment_all(
    cases: Sequence[Case], model: str, tracking_uri: str, out_uri: str
) -> list[dict[str, str]]:
    """Segments the cases in a pool of workers that keep the model; returns those that failed."""
    cluster.connect()
    total = cluster.resources()
    gpu = total["GPU"] > 0
    size = min(len(cases), max(1, int(total["GPU"] if gpu else total["CPU"] // 2)))
    server = Run(tracking_uri, run_id="")  # with what the environment says of us
    settings = Settings(model, server, out_uri, threads=math.ceil(total["CPU"] / size / 2))
    rows = [{"number": number} for number in range(len(cases))]
    results = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        # Ray documents that this may be a class; its annotation knows functions only.
        _Worker,  # ty: ignore[invalid-argument-type]
        fn_constructor_args=(settings, tuple(cases)),
        compute=ActorPoolStrategy(size=size),
        num_cpus=1,
        num_gpus=1 if gpu else 0,
    )
    failed = []
    with Display("predicting", len(cases)) as display:
        for done, row in enumerate(results.iter_rows(), start=1):
            if row["fatal"]:
                raise _error(row["fatal"], row["reason"])
            display.show(done, row["case_id"])
            if row["reason"]:
                failed.append({"case_id": row["case_id"], "reason": row["reason"]})
    return failed


def _error(kind: str, words: str) -> RaybratsError:
    """An error of the kind that has this name, as rows of Ray Data hold text only."""
    found = getattr(errors, kind)(words)
    return found if isinstance(found, RaybratsError) else RaybratsError(words)


def segment_case(case: Case, model: load.Model, out_uri: str) -> None:
    """Writes the prediction of one case of a cohort, in its own grid and label values.

    Where its masks tell other things apart than the model, values are the model's: 1, 2, ...

    Raises:
        DataError: the case is damaged, or lacks modalities and the model was trained with all.
        StorageError: one of its files, or the folder, is out of reach.

    Example:
        >>> model = load.load("models:/raybrats/3", "http://mlflow:5000")  # doctest: +SKIP
        >>> segment_case(index.find_cases("BraTS2021")[0], model, "out")  # doctest: +SKIP
    """
    raw = open_case_for(model, case)
    ours = range(1, len(model.label_set.names) + 1)
    values = case.written_values if case.labels == model.label_set else ours
    written = np.array([0, *values], np.uint8)
    uri = storage.join(out_uri, file_name(case))
    storage.write_bytes(uri, encode_labels(written[model.segment(raw.image).labels], raw.grid))


class _Worker:
    """One process of the pool: keeps the model and segments one case after the other."""

    def __init__(self, settings: Settings, cases: tuple[Case, ...]) -> None:
        import torch  # not for the driver

        torch.set_num_threads(settings.threads)
        self._out_uri, self._cases = settings.out_uri, cases
        self._model: load.Model | RaybratsError
        settings.server.enter()
        try:
            self._model = load.load(settings.model, settings.server.uri)
        except RaybratsError as error:  # what is raised here Ray tells in hundreds of lines
            self._model = error
        except Exception as error:  # such as a GPU that is full
            self._model = RaybratsError(f"{settings.model} cannot be loaded: {_line(error)}")

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        case, reason = self._cases[int(row["number"])], ""
        if isinstance(self._model, RaybratsError):
            kind = type(self._model).__name__
            return {"case_id": case.case_id, "reason": str(self._model), "fatal": kind}
        try:
            segment_case(case, self._model, self._out_uri)
        except RaybratsError as error:
            reason = str(error)
        except Exception as error:  # such as a GPU out of memory: the other cases go on
            reason = _line(error)
        return {"case_id": case.case_id, "reason": reason, "fatal": ""}


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
