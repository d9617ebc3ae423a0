"""Predictions and references -> scores, one row a case and region."""

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
from raybrats.table import table

SCORES = ("dice", "iou", "f1", "hd95_mm", "sensitivity", "specificity")
"""Names of the scores, in the order in which they are shown."""

LabelValues = tuple[int, int, int]
"""Values of NCR, ED and ET in a label file."""


@dataclass(frozen=True)
class LabelFile:
    """One label file, and its label values where they are known."""

    case_id: str
    uri: str
    values: LabelValues | None


@dataclass(frozen=True)
class Evaluation:
    """Scores of every case, and their means.

    Example:
        >>> rows = [{"case_id": "a", "region": "WT", **dict.fromkeys(SCORES, 0.5)}]
        >>> print(Evaluation(tuple(rows), means(rows), missing=("b",)))
        cases scored: 1, references without a prediction: 1
        region   dice    iou     f1  hd95_mm  sensitivity  specificity
        WT      0.500  0.500  0.500    0.500        0.500        0.500
        mean    0.500  0.500  0.500    0.500        0.500        0.500
    """

    rows: tuple[Mapping[str, Any], ...]
    """{case_id, region, dice, iou, f1, hd95_mm, sensitivity, specificity} of each case and region.
    """
    mean: Mapping[str, Mapping[str, float]]
    """Region -> score -> mean over cases; `mean` is the unweighted mean of the regions."""
    missing: tuple[str, ...]
    """Case ids of references without a prediction."""

    def __str__(self) -> str:
        scored, missing = len({row["case_id"] for row in self.rows}), len(self.missing)
        rows = [(region, *(row[score] for score in SCORES)) for region, row in self.mean.items()]
        title = f"cases scored: {scored}, references without a prediction: {missing}"
        return f"{title}\n{table(('region', *SCORES), rows)}"


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
        edition: label convention of the files; inferred from their labels where not given (a
            cohort knows its own).
        skip_unlabelled: leave out predictions of cases that the references know without labels.

    Raises:
        DataError: no prediction has a reference, or a prediction has none.
        UsageError: there is no such edition.

    Example:
        >>> found = evaluate("predictions", "cohort.parquet", edition="2021")  # doctest: +SKIP
        >>> found.mean["WT"]["dice"]  # doctest: +SKIP
        0.8912
    """
    if edition is not None and edition not in EDITIONS:
        raise UsageError(f"--edition {edition!r}: there are {', '.join(EDITIONS)}")
    cluster.connect()
    values = EDITIONS[edition].label_values if edition else None
    predicted = _label_files(predictions, values, kind="predictions")
    labelled = _label_files(references, values, kind="references")
    alone = [
        case_id
        for case_id in sorted(predicted)
        if not (labelled.get(case_id) or (skip_unlabelled and case_id in labelled))
    ]
    if alone:
        raise DataError(f"no reference for {', '.join(alone[:5])} in {references}")
    both = [(predicted[case_id], labelled[case_id]) for case_id in sorted(predicted)]
    pairs = [(prediction, reference) for prediction, reference in both if prediction and reference]
    if not pairs:
        raise DataError(f"{references}: no labels for the cases of {predictions}")
    scored: dict[str, list[dict[str, Any]]] = {}
    with Display("evaluating", len(pairs)) as display:
        tasks = cluster.each(score_pair, pairs, num_cpus=0.5, memory=index.TASK_MEMORY)
        for case_rows in tasks:
            case_id = case_rows[0]["case_id"]
            scored[case_id] = case_rows
            display.show(len(scored), case_id)
    found = tuple(row for case_id in sorted(scored) for row in scored[case_id])
    missing = sorted(i for i, file in labelled.items() if file and not predicted.get(i))
    return Evaluation(found, means(found), tuple(missing))


def score_pair(pair: tuple[LabelFile, LabelFile]) -> list[dict[str, Any]]:
    """Rows of one case, a region each, from its prediction and its reference.

    Raises:
        DataError: a file is damaged, or the two differ in grid.

    Example:
        >>> from raybrats.phantom.phantom import write_phantoms
        >>> ids = write_phantoms("tree", num_cases=1, shape=(24, 24, 20), edition="2021")
        >>> case = index.find_cases("tree")[0]
        >>> file = LabelFile(case.case_id, case.label_uri, case.label_values)
        >>> [(row["region"], row["dice"]) for row in score_pair((file, file))]
        [('WT', 1.0), ('TC', 1.0), ('ET', 1.0)]
    """
    from raybrats.model.metrics import score_case  # MONAI: not for the driver

    names = [storage.name(file.uri) for file in pair]
    decoded = [decode(storage.read_bytes(f.uri), n) for f, n in zip(pair, names, strict=True)]
    volumes = on_one_grid(pair[0].case_id, names, decoded)
    prediction, reference = (
        labels_from(volume, file.values or _infer_values(volume, other.values, name), name)
        for volume, file, other, name in zip(volumes, pair, reversed(pair), names, strict=True)
    )
    scores = score_case(prediction, reference, canonical_spacing(volumes[0].grid))
    return [{"case_id": pair[0].case_id, **asdict(score)} for score in scores]


def means(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean over cases of each score of each region, and under `mean` over the regions too.

    Example:
        >>> row = dict.fromkeys(SCORES, 0.5)
        >>> found = means([{"region": "WT", **row, "dice": 0.8}, {"region": "TC", **row}])
        >>> found["WT"]["dice"], found["mean"]["dice"]
        (0.8, 0.65)
    """
    regions = list(dict.fromkeys(row["region"] for row in rows))
    found = {
        region: {s: float(np.mean([r[s] for r in rows if r["region"] == region])) for s in SCORES}
        for region in regions
    }
    return {**found, "mean": {s: float(np.mean([found[r][s] for r in regions])) for s in SCORES}}


def _label_files(uri: str, values: LabelValues | None, kind: str) -> Mapping[str, LabelFile | None]:
    """Label files by case id, from a cohort file, a tree of cases, or a folder of label files.

    A case that a cohort knows, but has no labels for, stands there with None.

    Raises:
        DataError: there is no label file.
    """
    uri = storage.absolute(uri)
    if uri.endswith(".parquet"):
        cases = rows.read_cohort(uri)
    else:
        plain = _plain_files(uri, values, kind)
        if plain:
            return plain
        cases = index.find_cases(uri)
    found: dict[str, LabelFile | None] = {}
    for case in cases:
        found[case.case_id] = None
        if case.label_uri:
            ncr, ed, et = values or case.label_values
            found[case.case_id] = LabelFile(case.case_id, case.label_uri, (ncr, ed, et))
    if not any(found.values()):
        raise DataError(f"{uri}: no label file")
    return found


def _plain_files(uri: str, values: LabelValues | None, kind: str) -> dict[str, LabelFile]:
    """Label files of a folder that holds nothing else; both kinds may lie side by side."""
    storage.require(uri)
    files = [u for u in storage.list_objects(uri) if layout.is_volume(u)]
    labels = [u for u in files if not layout.is_modality(u)]
    if len(labels) < len(files) or storage.exists(storage.join(uri, "dataset.json")):
        return {}
    marked = [u for u in labels if layout.is_reference(u)]
    if 0 < len(marked) < len(labels):
        labels = marked if kind == "references" else [u for u in labels if u not in set(marked)]
    ids = [layout.case_id_of(u) for u in labels]
    return {i: LabelFile(i, u, values) for i, u in zip(ids, labels, strict=True)}


def _infer_values(volume: Volume, partner: LabelValues | None, name: str) -> LabelValues:
    """Label values of a file's partner where they fit; else ET is 4 where a 4 occurs, else 3.

    Raises:
        DataError: both a 3 and a 4 occur.
    """
    found = set(np.unique(np.rint(volume.values)).astype(int).tolist())
    if partner is not None and found <= {0, *partner}:
        return partner
    if {3, 4} <= found:
        raise DataError(f"{name}: labels 3 and 4 both occur; say which by --edition")
    return (1, 2, 4) if 4 in found else (1, 2, 3)
