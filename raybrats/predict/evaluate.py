"""Predictions x references -> one row a case and region."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from raybrats import cluster, storage
from raybrats.brats import EDITIONS
from raybrats.data.cohort import index, layout, rows
from raybrats.data.nifti.labels import labels_from
from raybrats.data.nifti.volume import Volume, canonical_spacing, decode, on_one_grid
from raybrats.errors import DataError, UsageError
from raybrats.progress import Display

SCORES = ("dice", "iou", "f1", "hd95_mm", "sensitivity", "specificity")


@dataclass(frozen=True)
class LabelFile:
    """One label file, and its values of NCR, ED and ET where they are known."""

    case_id: str
    uri: str
    values: tuple[int, int, int] | None


@dataclass(frozen=True)
class Evaluation:
    """Scores of every case."""

    rows: tuple[Mapping[str, Any], ...]
    """{case_id, region, dice, iou, f1, hd95_mm, sensitivity, specificity}."""
    mean: Mapping[str, Mapping[str, float]]
    """Region -> score -> mean over cases; `mean` is the unweighted mean of the regions."""
    missing: tuple[str, ...]
    """References without a prediction."""


def evaluate(
    predictions: str,
    references: str,
    edition: str | None = None,
    *,
    skip_unlabelled: bool = False,
) -> Evaluation:
    """Scores every prediction against the reference of the same case id.

    Args:
        predictions: folder or URI of label files named by case id, or a cohort.
        references: the same.
        edition: label convention of the files; told from the data where not given (a cohort
            knows its own).
        skip_unlabelled: leave out predictions of cases that the references know without labels.

    Raises:
        DataError: no prediction has a reference, or a prediction has none.
        UsageError: there is no such edition.
    """
    if edition is not None and edition not in EDITIONS:
        raise UsageError(f"--edition {edition!r}: there are {', '.join(EDITIONS)}")
    cluster.connect()
    values = EDITIONS[edition].label_values if edition else None
    ours = _label_files(predictions, values, wanted="predictions")
    theirs = _label_files(references, values, wanted="references")
    strangers = sorted(i for i in ours if not (theirs.get(i) or (skip_unlabelled and i in theirs)))
    if strangers:
        raise DataError(f"no reference for {', '.join(strangers[:5])} in {references}")
    found = [(ours[case_id], theirs[case_id]) for case_id in sorted(ours)]
    pairs = [(mine, reference) for mine, reference in found if mine and reference]
    if not pairs:
        raise DataError(f"{references}: no labels for the cases of {predictions}")
    scored: dict[str, list[dict[str, Any]]] = {}
    with Display("evaluating", len(pairs)) as display:
        tasks = cluster.each(score_pair, pairs, num_cpus=0.5, memory=index.TASK_MEMORY)
        for rows in tasks:
            scored[rows[0]["case_id"]] = rows
            display.show(len(scored), rows[0]["case_id"])
    rows = tuple(row for case_id in sorted(scored) for row in scored[case_id])
    missing = sorted(case_id for case_id, file in theirs.items() if file and not ours.get(case_id))
    return Evaluation(rows, means(rows), tuple(missing))


def score_pair(pair: tuple[LabelFile, LabelFile]) -> list[dict[str, Any]]:
    """The rows of one case.

    Raises:
        DataError: a file is damaged, or the two differ in grid.
    """
    from raybrats.model.metrics import score_case  # MONAI: not for the driver

    names = [storage.name(file.uri) for file in pair]
    stored = [decode(storage.read_bytes(f.uri), n) for f, n in zip(pair, names, strict=True)]
    volumes = on_one_grid(pair[0].case_id, names, stored)
    prediction, reference = (
        labels_from(volume, file.values or _told_from(volume, other.values, name), name)
        for volume, file, other, name in zip(volumes, pair, reversed(pair), names, strict=True)
    )
    scores = score_case(prediction, reference, canonical_spacing(volumes[0].grid))
    return [{"case_id": pair[0].case_id, **asdict(score)} for score in scores]


def means(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean over cases of each score of each region, and over the regions."""
    regions = list(dict.fromkeys(row["region"] for row in rows))
    table = {
        region: {s: float(np.mean([r[s] for r in rows if r["region"] == region])) for s in SCORES}
        for region in regions
    }
    return {**table, "mean": {s: float(np.mean([table[r][s] for r in regions])) for s in SCORES}}


def _label_files(
    uri: str, values: tuple[int, int, int] | None, wanted: str
) -> Mapping[str, LabelFile | None]:
    """Label files by case id, from a cohort file, a tree of cases, or a folder of label files.

    A case that a cohort knows, but has no labels for, stands there with None.
    """
    uri = storage.absolute(uri)
    if uri.endswith(".parquet"):
        cases = rows.read_cohort(uri)
    else:
        plain = _plain_files(uri, values, wanted)
        if plain:
            return plain
        cases = index.find_cases(uri)
    found = {
        c.case_id: c.label_uri and LabelFile(c.case_id, c.label_uri, values or c.label_values)
        for c in cases
    }
    if not any(found.values()):
        raise DataError(f"{uri}: no label file")
    return found


def _plain_files(
    uri: str, values: tuple[int, int, int] | None, wanted: str
) -> dict[str, LabelFile]:
    """The label files of a folder that holds nothing else; both kinds may lie side by side."""
    storage.require(uri)
    files = [u for u in storage.list_objects(uri) if layout.is_volume(u)]
    labels = [u for u in files if not layout.is_modality(u)]
    if len(labels) < len(files) or storage.exists(storage.join(uri, "dataset.json")):
        return {}
    marked = [u for u in labels if layout.is_reference(u)]
    if 0 < len(marked) < len(labels):
        labels = marked if wanted == "references" else [u for u in labels if u not in set(marked)]
    ids = [layout.case_id_of(u) for u in labels]
    return {i: LabelFile(i, u, values) for i, u in zip(ids, labels, strict=True)}


def _told_from(
    volume: Volume, partner: tuple[int, int, int] | None, name: str
) -> tuple[int, int, int]:
    """The values of the file's partner where they fit; else ET is 4 where a 4 occurs, else 3."""
    found = set(np.unique(np.rint(volume.values)).astype(int).tolist())
    if partner is not None and found <= {0, *partner}:
        return partner
    if {3, 4} <= found:
        raise DataError(f"{name}: labels 3 and 4 both occur; say which by --edition")
    return (1, 2, 4) if 4 in found else (1, 2, 3)
