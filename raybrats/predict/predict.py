"""A registered model over a cohort: label NIfTIs in each case's own grid, affine and labels."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray.data
from ray.data import ActorPoolStrategy

from raybrats import cluster, storage
from raybrats.data.cohort import index
from raybrats.data.cohort.case import BAD, INCOMPLETE, Case, open_case
from raybrats.data.cohort.usable import with_modalities
from raybrats.data.nifti.volume import encode_labels
from raybrats.errors import DataError, MissingObjectError, RaybratsError, UsageError
from raybrats.progress import Display
from raybrats.registry import load, tracking

RECORD = "predictions.json"
"""Beside the predictions: the model that made them."""


@dataclass(frozen=True)
class Outcome:
    """What became of the cases."""

    model: str
    cases: int
    written: int
    skipped: int
    """Already there, from the same model."""
    failed: tuple[Mapping[str, str], ...]
    """{case_id, reason}."""


@dataclass(frozen=True)
class Task:
    """What every predicting worker is told."""

    model: str
    tracking_uri: str
    out_uri: str
    threads: int


def predict(
    model_uri: str,
    cohort_uri: str,
    out_uri: str,
    *,
    fold: int | None = None,
    tracking_uri: str | None = None,
) -> Outcome:
    """Segments every case of a cohort file or tree; run again, it goes on where it stopped.

    Args:
        model_uri: `models:/name@alias` or `models:/name/version`.
        cohort_uri: cases; only those of `fold` where one is given.
        out_uri: folder for `<case_id>.nii.gz`.
        fold: cross-validation fold.
        tracking_uri: MLflow server; `tracking.default_uri()` where not given.

    Raises:
        TrackingError: there is no such model.
        UsageError: the folder holds predictions of another model.
        DataError: there is no case.
    """
    cluster.connect()
    tracking_uri = tracking_uri or tracking.default_uri()
    model = load.resolve(model_uri, tracking_uri)
    cases = [c for c in index.load(cohort_uri, verify=False) if fold in (None, c.fold)]
    if not cases:
        raise DataError(f"{cohort_uri}: no case in fold {fold}")
    out_uri = storage.absolute(out_uri)
    _claim(out_uri, model)
    there = {storage.name(uri) for uri in storage.list_objects(out_uri)}
    bad = [{"case_id": c.case_id, "reason": c.reason} for c in cases if c.status == BAD]
    good = [c for c in cases if c.status != BAD]
    todo = [c for c in good if file_name(c) not in there]
    failed = bad + (_run(todo, model, tracking_uri, out_uri) if todo else [])
    written = len(todo) - (len(failed) - len(bad))
    return Outcome(model, len(cases), written, len(good) - len(todo), tuple(failed))


def file_name(case: Case) -> str:
    """Name of a case's prediction."""
    return f"{case.case_id}.nii.gz"


def _claim(out_uri: str, model: str) -> None:
    """Records the model beside its predictions, so that two models never mix in one folder."""
    record = storage.join(out_uri, RECORD)
    try:
        before = json.loads(storage.read_bytes(record))["model"]
    except MissingObjectError:
        storage.write_bytes(record, json.dumps({"model": model}).encode())
        return
    if before != model:
        raise UsageError(f"{out_uri} holds predictions of {before}; choose another --out")


def _run(
    cases: Sequence[Case], model: str, tracking_uri: str, out_uri: str
) -> list[dict[str, str]]:
    """The cases through a pool of workers that keep the model; those that failed."""
    have = cluster.resources()
    gpu = have["GPU"] > 0
    size = min(len(cases), max(1, int(have["GPU"] if gpu else have["CPU"] // 2)))
    task = Task(model, tracking_uri, out_uri, threads=math.ceil(have["CPU"] / size / 2))
    rows = [{"place": place} for place in range(len(cases))]
    results = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        _Worker,
        fn_constructor_args=(task, tuple(cases)),
        compute=ActorPoolStrategy(size=size),
        num_cpus=1,
        num_gpus=1 if gpu else 0,
    )
    failed = []
    with Display("predicting", len(cases)) as display:
        for done, row in enumerate(results.iter_rows(), start=1):
            display.show(done, row["case_id"])
            if row["reason"]:
                failed.append({"case_id": row["case_id"], "reason": row["reason"]})
    return failed


def segment(case: Case, model: load.Model, out_uri: str) -> None:
    """Writes the prediction of one case, in its own grid and label values.

    Raises:
        DataError: the case is damaged, or lacks modalities and the model was trained with all.
        StorageError: out of reach.
    """
    status = with_modalities([case], model.modalities)[0].status
    if status == BAD or (status == INCOMPLETE and not model.takes_incomplete):
        raise DataError(
            f"{case.case_id}: {case.reason}; complete it, or use a model that was trained with "
            "augment.drop_modality"
        )
    opened = open_case(case, model.modalities, labels=False)
    labels = model.predict(np.stack(opened.volumes).astype(np.float32))
    values = np.array([0, *case.label_values], np.uint8)
    uri = storage.join(out_uri, file_name(case))
    storage.write_bytes(uri, encode_labels(values[labels], opened.grid))


class _Worker:
    """Keeps the model and segments one case after the other."""

    def __init__(self, task: Task, cases: tuple[Case, ...]) -> None:
        import torch  # not for the driver

        torch.set_num_threads(task.threads)
        self._task, self._cases = task, cases
        self._model = load.load(task.model, task.tracking_uri)

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        case = self._cases[int(row["place"])]
        try:
            segment(case, self._model, self._task.out_uri)
        except RaybratsError as error:
            return {"case_id": case.case_id, "reason": str(error)}
        except Exception as error:  # such as a GPU out of memory: the other cases go on
            words = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            return {"case_id": case.case_id, "reason": words}
        return {"case_id": case.case_id, "reason": ""}
