"""Predictions of several models and their references -> who is better, and how surely."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from raybrats import storage
from raybrats.brats import Rules
from raybrats.data.cohort import index
from raybrats.errors import DataError, UsageError
from raybrats.predict.evaluate import score_pairs
from raybrats.predict.label_file import label_files
from raybrats.predict.pairs import Pair, check_rules, match, read_references, rules_for
from raybrats.predict.ranking import (
    PERMUTATIONS,
    RANKED_BY,
    Standing,
    p_values,
    paired,
    ranks,
    standings,
)
from raybrats.predict.summary import Row, Summaries, case_ids, means
from raybrats.table import table


@dataclass(frozen=True)
class Comparison:
    """Several models on the cases that all of them have predicted."""

    rules: Rules
    rows: Mapping[str, Sequence[Row]]
    """Folder of predictions -> rows of its scores, as in `Evaluation`."""
    cases: tuple[str, ...]
    left_out: Mapping[str, tuple[str, ...]]
    """Case id -> folders without a prediction of it, where another one has it."""
    standings: tuple[Standing, ...]
    """From the best to the worst."""
    p_values: Mapping[tuple[str, str], float]
    """Two folders, the better one first -> p-value of their difference in rank."""
    differences: Mapping[tuple[str, str], Summaries]
    """The same two -> scores of the first less those of the second, over cases."""

    @property
    def title(self) -> str:
        """By what is ranked, over how many cases, and what is left out."""
        text = f"{len(self.cases)} cases by {self.rules}, ranked by {', '.join(self.ranked_by)}"
        return text + (f"; {len(self.left_out)} left out" if self.left_out else "")

    @property
    def ranked_by(self) -> tuple[str, ...]:
        """Names of the scores that are ranked."""
        return RANKED_BY[self.rules]

    def difference_rows(self) -> list[tuple[str, str, str, str, float, float, float]]:
        """(better, other, region, score, difference, low, high) of the scores that are ranked.

        Example:
            >>> compare(["a", "b"], "cohort.parquet").difference_rows()  # doctest: +SKIP
        """
        return [
            (better, other, region, score, found.mean, found.low, found.high)
            for (better, other), regions in self.differences.items()
            for region, row in regions.items()
            for score in self.ranked_by
            if (found := row[score]) is not None
        ]

    def document(self) -> dict[str, Any]:
        """All but the rows as plain values, for JSON.

        Example:
            >>> compare(["a", "b"], "cohort.parquet").document()["rules"]  # doctest: +SKIP
            'brats2023'
        """
        return {
            "rules": self.rules,
            "cases": self.cases,
            "left_out": self.left_out,
            "ranked_by": self.ranked_by,
            "ranking": [asdict(standing) for standing in self.standings],
            "p_values": [{"a": a, "b": b, "p": p} for (a, b), p in self.p_values.items()],
            "differences": [
                {"a": a, "b": b, "region": region, "score": score, **asdict(found)}
                for (a, b), regions in self.differences.items()
                for region, row in regions.items()
                for score, found in row.items()
                if found is not None
            ],
            "mean": {model: means(rows) for model, rows in self.rows.items()},
        }

    def __str__(self) -> str:
        ranking = [(f"{s.place:g}", s.tier, s.model, s.mean_rank) for s in self.standings]
        columns = ("better", "other", "region", "score", "difference", "low", "high")
        return "\n".join(
            (
                self.title,
                table(("place", "tier", "model", "mean rank"), ranking),
                "",
                table(columns, self.difference_rows()),
            )
        )


def compare(
    predictions: Sequence[str],
    references: str,
    edition: str | None = None,
    *,
    rules: str | None = None,
    fold: int | None = None,
    permutations: int = PERMUTATIONS,
) -> Comparison:
    """Scores several folders of predictions on the cases that all have, and ranks them.

    Args:
        predictions: at least two folders or URIs, as for `evaluate`.
        references: as for `evaluate`, as are the next three.
        edition: label convention of the files.
        rules: by which the cases are scored and the models ranked.
        fold: the only cross-validation fold of which cases are scored.
        permutations: number of exchanges behind each p-value.

    Raises:
        DataError: no case has been predicted by all, or what `evaluate` refuses.
        UsageError: there are less than two folders, one is given twice, or as for `evaluate`.

    Example:
        >>> print(compare(["ours", "theirs"], "cohort.parquet"))  # doctest: +SKIP
    """
    _check(predictions, permutations)
    index.check_edition(edition)
    if rules is not None:
        check_rules(rules)
    known = read_references(storage.absolute(references), edition, fold=fold)
    pairs: dict[str, dict[str, Pair]] = {}
    for folder in predictions:
        place = storage.absolute(folder)
        matched = match(place, label_files(place, edition, kind="predictions"), known)
        pairs[folder] = {ours.case_id: (ours, theirs) for ours, theirs in matched.pairs}
    every = sorted({case_id for own in pairs.values() for case_id in own})
    lacking = {i: tuple(folder for folder, own in pairs.items() if i not in own) for i in every}
    common = [case_id for case_id, folders in lacking.items() if not folders]
    if not common:
        raise DataError(f"no case has a prediction in each of {', '.join(predictions)}")
    by = rules_for([pairs[predictions[0]][case_id] for case_id in common], rules)
    rows = {}
    for folder, own in pairs.items():
        scored = score_pairs([own[case_id] for case_id in common], by)
        rows[folder] = [row for case in scored for row in case.rows]
    left_out = {case_id: folders for case_id, folders in lacking.items() if folders}
    return compared(rows, by, left_out=left_out, permutations=permutations)


def compared(
    rows: Mapping[str, Sequence[Row]],
    rules: Rules,
    *,
    left_out: Mapping[str, tuple[str, ...]] | None = None,
    permutations: int = PERMUTATIONS,
) -> Comparison:
    """What rows of scores of several models, on the same cases, say of them.

    Example:
        >>> def rows(dice):
        ...     row = {"region": "WT", "dice": dice, "hd95_mm": 1.0}
        ...     return [{**row, "case_id": str(n)} for n in range(9)]
        >>> print(compared({"old": rows(0.75), "new": rows(0.875)}, "brats2020"))
        9 cases by brats2020, ranked by dice, hd95_mm
        place  tier  model  mean rank
        1         1  new        1.250
        2         2  old        1.750
        <BLANKLINE>
        better  other  region  score    difference    low   high
        new     old    WT      dice          0.125  0.125  0.125
        new     old    WT      hd95_mm       0.000  0.000  0.000
        new     old    mean    dice          0.125  0.125  0.125
        new     old    mean    hd95_mm       0.000  0.000  0.000
    """
    models, found = [*rows], ranks(rows, rules)
    p = p_values(found.mean(axis=2), permutations)
    order = standings(models, found, p)
    pairs = [*combinations([standing.model for standing in order], 2)]
    return Comparison(
        rules=rules,
        rows=rows,
        cases=case_ids(rows[models[0]]),
        left_out=left_out or {},
        standings=tuple(order),
        p_values={(a, b): float(p[models.index(a), models.index(b)]) for a, b in pairs},
        differences={(a, b): paired(rows[a], rows[b]) for a, b in pairs},
    )


def _check(predictions: Sequence[str], permutations: int) -> None:
    """Refuses what cannot be compared.

    Raises:
        UsageError: there are less than two folders, one is given twice, or no permutations.
    """
    if len(predictions) < 2:
        raise UsageError("compare: give two folders of predictions or more, then the references")
    if twice := {folder for folder in predictions if [*predictions].count(folder) > 1}:
        raise UsageError(f"compare: {min(twice)} is given twice")
    if permutations < 1:
        raise UsageError(f"--permutations {permutations}: expected 1 or more")
