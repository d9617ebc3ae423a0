"""Predictions and references -> scores, one row a case and region."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from raybrats import cluster, storage
from raybrats.brats import EDITIONS, edition_of, label_set_name, label_values, why_no_labels
from raybrats.data.cohort import index, layout, rows
from raybrats.data.nifti.labels import labels_from
from raybrats.data.nifti.volume import canonical_spacing, decode, on_one_grid
from raybrats.errors import DataError, MissingObjectError
from raybrats.label_set import label_set_of
from raybrats.predict import origin
from raybrats.progress import Display
from raybrats.table import table

SCORES = ("dice", "iou", "hd95_mm", "sensitivity", "specificity")
"""Names of the scores, in the order in which they are shown."""

LabelValues = tuple[int, ...]
"""Values of the labels in a label file; empty where they are not known."""


@dataclass(frozen=True)
class LabelFile:
    """One label file, and its label values where a cohort or the caller knows them."""

    case_id: str
    uri: str
    values: LabelValues = ()
    label_set: str = ""
    """What they are, as in a cohort."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of every case, and their means.

    Example:
        >>> rows = [{"case_id": "a", "region": "WT", **dict.fromkeys(SCORES, 0.5)}]
        >>> print(Evaluation(tuple(rows), means(rows), missing=("b",)))
        cases scored: 1, references without a prediction: 1
        region   dice    iou  hd95_mm  sensitivity  specificity
        WT      0.500  0.500    0.500        0.500        0.500
        mean    0.500  0.500    0.500        0.500        0.500
    """

    rows: tuple[Mapping[str, Any], ...]
    """{case_id, region, dice, iou, hd95_mm, sensitivity, specificity} of each case and region."""
    mean: Mapping[str, Mapping[str, float]]
    """Region -> score -> mean over cases; `mean` is the unweighted mean of the regions."""
    missing: tuple[str, ...]
    """Case ids of references without a prediction."""
    unlabelled: tuple[str, ...] = ()
    """Case ids of predictions that are left out, for the references know the case without labels.
    """

    def __str__(self) -> str:
        scored, missing = len({row["case_id"] for row in self.rows}), len(self.missing)
        rows = [(region, *(row[score] for score in SCORES)) for region, row in self.mean.items()]
        title = f"cases scored: {scored}, references without a prediction: {missing}"
        title += f", left out without labels: {len(self.unlabelled)}" if self.unlabelled else ""
        return f"{title}\n{table(('region', *SCORES), rows)}"


def evaluate(
    predictions: str,
    references: str,
    edition: str | None = None,
    *,
    skip_unknown: bool = False,
) -> Evaluation:
    """Scores every prediction against the reference of the same case id.

    Predictions of cases that the references know without labels are left out and told as that.

    Args:
        predictions: folder or URI of label files named by case id, or a cohort.
        references: the same.
        edition: label convention of the files; where not given that of the cohort or tree on
            either side, else the one that their ids begin with.
        skip_unknown: leave out cases with labels of an edition that is not supported, too.

    Raises:
        DataError: no prediction has a reference, a prediction has none, or nothing tells the label
            values of a file.
        UsageError: there is no such edition, or a URI is none.

    Example:
        >>> found = evaluate("predictions", "cohort.parquet", edition="2021")  # doctest: +SKIP
        >>> found.mean["WT"]["dice"]  # doctest: +SKIP
        0.8912
    """
    index.check_edition(edition)
    predictions, references = storage.absolute(predictions), storage.absolute(references)
    predicted = _label_files(predictions, edition, kind="predictions")
    labelled = _label_files(references, edition, kind="references")
    if skip_unknown:
        labelled = {i: f if f and _with_own(f).values else None for i, f in labelled.items()}
    if alone := sorted(predicted.keys() - labelled.keys()):
        raise DataError(f"no reference for {', '.join(alone[:5])} in {references}")
    both = [(predicted[case_id], labelled[case_id]) for case_id in sorted(predicted)]
    pairs = [with_values((ours, theirs)) for ours, theirs in both if ours and theirs]
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
    unlabelled = tuple(i for i in sorted(predicted) if predicted[i] and not labelled[i])
    return Evaluation(found, means(found), tuple(missing), unlabelled)


def score_pair(pair: tuple[LabelFile, LabelFile]) -> list[dict[str, Any]]:
    """Rows of one case, a region each, from its prediction and its reference.

    Raises:
        DataError: a file is damaged, the two differ in grid, or nothing tells their label values.

    Example:
        >>> from raybrats.phantom.phantom import write_phantoms
        >>> ids = write_phantoms("tree", num_cases=1, shape=(24, 24, 20), edition="2021")
        >>> case = index.find_cases("tree")[0]
        >>> file = LabelFile(case.case_id, case.label_uri, case.label_values, case.label_set)
        >>> [(row["region"], row["dice"]) for row in score_pair((file, file))]
        [('WT', 1.0), ('TC', 1.0), ('ET', 1.0)]
    """
    from raybrats.model.metrics import score_case  # MONAI: not for the driver

    pair = with_values(pair)
    names = [storage.name(file.uri) for file in pair]
    decoded = [decode(storage.read_bytes(f.uri), n) for f, n in zip(pair, names, strict=True)]
    volumes = on_one_grid(pair[0].case_id, names, decoded)
    prediction, reference = (
        labels_from(volume, file.values, name)
        for volume, file, name in zip(volumes, pair, names, strict=True)
    )
    spacing_mm, known = canonical_spacing(volumes[0].grid), label_set_of(pair[1].label_set)
    scores = score_case(prediction, reference, spacing_mm, known)
    return [{"case_id": pair[0].case_id, **asdict(score)} for score in scores]


def with_values(pair: tuple[LabelFile, LabelFile]) -> tuple[LabelFile, LabelFile]:
    """The pair with the label values of both: its own, its partner's, or those of its id's edition.

    Raises:
        DataError: nothing tells them, or the labels of one are not those of the other.

    Example:
        >>> ours, theirs = LabelFile("a", "out/a.nii"), LabelFile("a", "/ref/a.nii", (1, 2, 4))
        >>> [file.values for file in with_values((ours, theirs))]
        [(1, 2, 4), (1, 2, 4)]
    """
    ours, theirs = (_like(a, b) for a, b in (pair, pair[::-1]))
    for file in (ours, theirs):
        if not file.values:
            raise DataError(f"{file.uri}: {why_no_labels(edition_of(file.case_id))}")
    told = [label_set_of(file.label_set) for file in (ours, theirs)]
    if told[0] != told[1]:
        words = " against ".join(", ".join(labels.names) for labels in told)
        raise DataError(f"{ours.uri} and {theirs.uri}: labels {words}; say whose by --edition")
    return ours, theirs


def _like(file: LabelFile, partner: LabelFile) -> LabelFile:
    """The file with its own labels, else its partner's, else those of its id's edition."""
    if file.values or not partner.values:
        return _with_own(file)
    known = label_set_of(file.label_set or partner.label_set)
    if known != label_set_of(partner.label_set):  # as `predict` has written them then
        return replace(file, values=tuple(range(1, len(known.names) + 1)))
    return replace(file, values=partner.values, label_set=partner.label_set)


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


def _label_files(uri: str, edition: str | None, kind: str) -> Mapping[str, LabelFile | None]:
    """Label files by case id, from a cohort file, a tree of cases, or a folder of label files.

    A case that a cohort knows, but has no labels for, stands there with None.

    Raises:
        DataError: there is no label file.
    """
    if uri.endswith(".parquet"):
        cases = rows.read_cohort(uri)
    else:
        plain = _plain_files(uri, edition, kind)
        if plain:
            return plain
        cases = index.find_cases(uri)
    told = _told_by(edition)
    found: dict[str, LabelFile | None] = {}
    for case in cases:
        labels = told or (case.label_values, case.label_set)
        own = LabelFile(case.case_id, case.label_uri, *labels) if case.label_uri else None
        found[case.case_id] = own
    if not any(found.values()):
        raise DataError(f"{uri}: no label file")
    return found


def _plain_files(uri: str, edition: str | None, kind: str) -> dict[str, LabelFile]:
    """Label files of a folder that holds nothing else; both kinds may lie side by side."""
    storage.require(uri)
    objects = storage.list_objects(uri)
    files = [u for u in objects if layout.is_volume(u)]
    labels = [u for u in files if not layout.is_modality(u)]
    if len(labels) < len(files) or any(storage.name(u) == "dataset.json" for u in objects):
        return {}
    marked = [u for u in labels if layout.is_reference(u)]
    if 0 < len(marked) < len(labels):
        labels = marked if kind == "references" else [u for u in labels if u not in set(marked)]
    found: dict[str, LabelFile] = {}
    told = _told_by(edition) or ((), _recorded(uri) if kind == "predictions" else "")
    for file in (LabelFile(layout.case_id_of(u), u, *told) for u in labels):
        if file.case_id in found:
            two = f"{found[file.case_id].uri} and {file.uri}"
            raise DataError(f"{two} are both of case {file.case_id}; leave one")
        found[file.case_id] = file
    return found


def _recorded(uri: str) -> str:
    """The label set of the model whose predictions lie there; empty where nothing says it."""
    try:
        return origin.read(uri).labels
    except MissingObjectError:
        return ""


def _told_by(edition: str | None) -> tuple[LabelValues, str] | None:
    """Values and name of the labels of an edition; None if none is named."""
    return (label_values(edition), label_set_name(edition)) if edition else None


def _with_own(file: LabelFile) -> LabelFile:
    """The file with the labels of its id's edition, unless it has some or its id tells none."""
    edition = edition_of(file.case_id)
    if file.values or edition not in EDITIONS or EDITIONS[edition].proof:
        return file
    return replace(file, values=label_values(edition), label_set=label_set_name(edition))
