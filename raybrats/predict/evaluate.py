"""Predictions and references -> scores, one row a case and region, by the rules of a year."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from raybrats import cluster, storage
from raybrats.brats import Rules
from raybrats.data.cohort import index
from raybrats.data.nifti.labels import labels_from
from raybrats.data.nifti.volume import canonical_spacing, decode, on_one_grid
from raybrats.label_set import label_set_of
from raybrats.predict.label_file import case_edition, label_files
from raybrats.predict.label_score import Confusion, confusion_of, label_scores
from raybrats.predict.pairs import (
    Pair,
    check_rules,
    match,
    read_references,
    rules_for,
    with_values,
)
from raybrats.predict.summary import (
    OVERALL,
    SCORES,
    Row,
    Summaries,
    Summary,
    case_ids,
    means,
    regions,
    summaries,
)
from raybrats.progress import Display
from raybrats.table import table

CHARGED = {
    **dict.fromkeys(("dice", "nsd", "lesion_dice", "lesion_nsd", "lesion_f1"), 0.0),
    **dict.fromkeys(("hd95_mm", "lesion_hd95_mm"), 373.0),
}
"""Scores of a reference without a prediction under `brats2026` (BraTS-evaluation 0.0.10)."""
_VOLUMES = ("volume_mm3", "reference_volume_mm3")


@dataclass(frozen=True)
class CaseScores:
    """What one prediction is worth."""

    rows: tuple[Row, ...]
    """One a region."""
    confusion: Confusion


@dataclass(frozen=True)
class Evaluation:
    """Scores of every case, and what they are over cases.

    Example:
        >>> rows = [{"case_id": "a", "region": "WT", "dice": 0.5, "hd95_mm": 3.0}]
        >>> print(evaluation_of("brats2020", rows, [], missing=["b"]))
        1 case by brats2020, 1 reference without a prediction
        score       WT   mean
        dice     0.500  0.500
        hd95_mm  3.000  3.000
    """

    rules: Rules
    rows: tuple[Row, ...]
    """{case_id, region, and each of `SCORES`} of each case and region; None: not defined."""
    mean: dict[str, dict[str, float | None]]
    """Region -> score -> mean over cases; `mean` is the unweighted mean of the regions."""
    missing: tuple[str, ...]
    """Case ids of references without a prediction; they do not count in the means."""
    unlabelled: tuple[str, ...]
    """Case ids of predictions that are left out, for the references know the case without labels.
    """
    summary: Summaries
    """Region -> score -> median, spread and interval of the mean over cases."""
    labels: dict[str, Any]
    """Accuracy, mean IoU and the scores of each label, as in `label_score.label_scores`."""
    charged: dict[str, dict[str, float | None]] | None = None
    """The means with each missing case as `CHARGED` has it, which is what the official scorer sums
    up; None but by `brats2026` with missing cases."""

    @property
    def title(self) -> str:
        """How many cases by which rules, and what is left out or charged."""
        text = f"{_counted(len(case_ids(self.rows)), 'case')} by {self.rules}"
        if self.missing:
            text += f", {_counted(len(self.missing), 'reference')} without a prediction"
        if self.charged:
            text += f" (charged Dice 0 for each, the mean is {self.charged[OVERALL]['dice']:.3f})"
        if self.unlabelled:
            text += f", {_counted(len(self.unlabelled), 'prediction')} left out without labels"
        if self.labels.get("accuracy") is not None:
            text += "; of labels: accuracy {accuracy:.4f}, mean IoU {mean_iou:.3f}".format_map(
                self.labels
            )
        return text

    @property
    def shown(self) -> dict[str, dict[str, Summary | None]]:
        """Score -> region -> summary of what a table shows: no volumes, nothing undefined."""
        return {
            score: {region: row[score] for region, row in self.summary.items()}
            for score in SCORES
            if score not in _VOLUMES and self.summary[OVERALL][score] is not None
        }

    def document(self) -> dict[str, Any]:
        """All of it as plain values, for JSON.

        Example:
            >>> rows = [{"case_id": "a", "region": "WT", "dice": 0.5}]
            >>> evaluation_of("brats2020", rows, []).document()["rules"]
            'brats2020'
        """
        kept = {"cases" if name == "rows" else name: value for name, value in vars(self).items()}
        summary = {
            region: {score: found and asdict(found) for score, found in row.items()}
            for region, row in self.summary.items()
        }
        return {**kept, "summary": summary}

    def __str__(self) -> str:
        rows = [
            (score, *("" if found is None else found.mean for found in row.values()))
            for score, row in self.shown.items()
        ]
        return f"{self.title}\n{table(('score', *self.summary), rows)}"


def evaluate(
    predictions: str,
    references: str,
    edition: str | None = None,
    *,
    rules: str | None = None,
    fold: int | None = None,
    skip_unknown: bool = False,
) -> Evaluation:
    """Scores every prediction against the reference of the same case id.

    Predictions of cases that the references know without labels are left out and told as that.

    Args:
        predictions: folder or URI of label files named by case id, or a cohort.
        references: the same.
        edition: label convention of the files; where not given that of the cohort or tree on
            either side, else the one that their ids begin with.
        rules: brats2020, brats2023 or brats2026; those of the references' years where not given.
        fold: the only cross-validation fold of which cases are scored, where one is given.
        skip_unknown: leave out cases with labels of an edition that is not supported, too.

    Raises:
        DataError: no prediction has a reference, a prediction has none, or nothing tells the label
            values of a file.
        UsageError: there is no such edition, there are no such rules or no such fold, the
            references are of years with several rules, or a URI is none.

    Example:
        >>> found = evaluate("predictions", "cohort.parquet", edition="2021")  # doctest: +SKIP
        >>> found.mean["WT"]["dice"]  # doctest: +SKIP
        0.8912
    """
    index.check_edition(edition)
    if rules is not None:
        check_rules(rules)
    predictions, uri = storage.absolute(predictions), storage.absolute(references)
    predicted = label_files(predictions, edition, kind="predictions")
    known = read_references(uri, edition, fold=fold, skip_unknown=skip_unknown)
    matched = match(predictions, predicted, known)
    found = rules_for(matched.pairs, rules)
    scored = score_pairs(matched.pairs, found)
    return evaluation_of(
        found,
        [row for case in scored for row in case.rows],
        [case.confusion for case in scored],
        missing=matched.missing,
        unlabelled=matched.unlabelled,
    )


def evaluation_of(
    rules: Rules,
    rows: Sequence[Row],
    confusions: Sequence[Confusion],
    *,
    missing: Sequence[str] = (),
    unlabelled: Sequence[str] = (),
) -> Evaluation:
    """What rows of scores and the confusions of their cases come to.

    Example:
        >>> rows = [{"case_id": "a", "region": "WT", "dice": 0.5}]
        >>> found = evaluation_of("brats2026", rows, [], missing=["b"])
        >>> found.mean["WT"]["dice"], found.charged["WT"]["dice"]
        (0.5, 0.25)
    """
    charges = [
        {"case_id": case_id, "region": name, **CHARGED}
        for case_id in (missing if rules == "brats2026" else ())
        for name in regions(rows)
    ]
    return Evaluation(
        rules=rules,
        rows=tuple(rows),
        mean=means(rows),
        missing=tuple(missing),
        unlabelled=tuple(unlabelled),
        summary=summaries(rows),
        labels=label_scores(confusions),
        charged=means([*rows, *charges]) if charges else None,
    )


def score_pairs(pairs: Sequence[Pair], rules: Rules) -> list[CaseScores]:
    """Scores of all pairs, on the cluster, in the order of their case ids.

    Raises:
        DataError: a file is damaged, or two that belong together differ in grid.

    Example:
        >>> score_pairs([], "brats2020")  # doctest: +SKIP
        []
    """
    scored: dict[str, CaseScores] = {}
    items = [(pair, rules) for pair in pairs]
    with Display("evaluating", len(pairs)) as display:
        tasks = cluster.each(_score_item, items, num_cpus=0.5, memory=index.TASK_MEMORY)
        for found in tasks:
            scored[found.confusion.case_id] = found
            display.show(len(scored), found.confusion.case_id)
    return [scored[case_id] for case_id in sorted(scored)]


def _score_item(item: tuple[Pair, Rules]) -> CaseScores:
    return score_pair(*item)


def score_pair(pair: Pair, rules: Rules) -> CaseScores:
    """Scores of one case, from its prediction and its reference.

    Raises:
        DataError: a file is damaged, the two differ in grid, or nothing tells their label values.

    Example:
        >>> from raybrats.phantom.phantom import write_phantoms
        >>> ids = write_phantoms("tree", num_cases=1, shape=(24, 24, 20), edition="2021")
        >>> (file,) = label_files("tree", None, kind="references").values()
        >>> [(row["region"], row["dice"]) for row in score_pair((file, file), "brats2020").rows]
        [('WT', 1.0), ('TC', 1.0), ('ET', 1.0)]
    """
    from raybrats.model.metrics import score_case  # not for the driver

    pair = with_values(pair)
    case_id, known = pair[0].case_id, label_set_of(pair[1].label_set)
    names = [storage.name(file.uri) for file in pair]
    decoded = [decode(storage.read_bytes(f.uri), n) for f, n in zip(pair, names, strict=True)]
    volumes = on_one_grid(case_id, names, decoded)
    prediction, reference = (
        labels_from(volume, file.values, name)
        for volume, file, name in zip(volumes, pair, names, strict=True)
    )
    spacing_mm = canonical_spacing(volumes[0].grid)
    edition = case_edition(pair[1])
    scores = score_case(prediction, reference, spacing_mm, known, rules, edition)
    rows = tuple({"case_id": case_id, **asdict(score)} for score in scores)
    return CaseScores(rows, confusion_of(case_id, prediction, reference, known.names))


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)
