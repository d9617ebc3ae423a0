"""Scores over cases: means, intervals, labels, and the files that they are written to."""

import csv
import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raybrats import storage
from raybrats.errors import UsageError
from raybrats.predict import score_file
from raybrats.predict.evaluate import CHARGED, evaluation_of
from raybrats.predict.label_score import confusion_of, label_scores
from raybrats.predict.summary import SCORES, means, summaries


def rows(scores, region="WT", score="dice"):
    """A row a case; None: the case does not have the score."""
    empty = dict.fromkeys(SCORES)
    return [
        {"case_id": f"case{n}", "region": region, **empty, score: value}
        for n, value in enumerate(scores)
    ]


def test_means_go_over_cases_and_then_over_regions():
    figures = {"WT": (0.2, 0.4), "TC": (0.6, 0.8), "ET": (1.0, 1.0)}
    found = means(
        [
            {"case_id": str(n), "region": region, **dict.fromkeys(SCORES, value)}
            for region, values in figures.items()
            for n, value in enumerate(values)
        ]
    )
    assert list(found) == ["WT", "TC", "ET", "mean"]
    assert found["WT"]["dice"] == pytest.approx(0.3)
    assert found["mean"] == pytest.approx(dict.fromkeys(SCORES, 2 / 3))


def test_what_is_undefined_is_left_out():
    found = means([*rows([0.2, None, 0.4]), *rows([None] * 3, "TC")])
    assert found["WT"]["dice"] == found["mean"]["dice"] == pytest.approx(0.3)
    assert found["TC"]["dice"] is None
    summary = summaries(rows([0.2, None, 0.4]))["WT"]
    assert (summary["dice"].cases, summary["nsd"]) == (2, None)


def test_summaries_are_those_of_numpy():
    values = np.random.default_rng(0).random(31)
    found = summaries(rows(values.tolist()))["WT"]["dice"]
    assert found.mean == pytest.approx(values.mean())
    assert found.median == pytest.approx(np.median(values))
    assert found.std == pytest.approx(values.std(ddof=1))
    one = summaries(rows([0.25]))["WT"]["dice"]
    assert (one.mean, one.low, one.high, one.std) == (0.25, 0.25, 0.25, None)


def test_an_interval_holds_the_planted_mean_about_as_often_as_it_says():
    generator = np.random.default_rng(1)
    held = []
    for _ in range(40):
        found = summaries(rows((0.7 + 0.1 * generator.standard_normal(60)).tolist()))["WT"]["dice"]
        held.append(found.low <= 0.7 <= found.high)
    assert sum(held) >= 33  # of 40 at 95 %: less than 1 in 1,000 by chance


def test_an_interval_is_as_wide_as_theory_says():
    values = np.random.default_rng(2).standard_normal(400)
    found = summaries(rows(values.tolist()))["WT"]["dice"]
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.05)


def test_a_seed_decides_the_interval():
    scored = rows(np.random.default_rng(3).random(20).tolist())
    assert summaries(scored) == summaries(scored) == summaries(scored, seed=0)
    assert summaries(scored, seed=1) != summaries(scored)


def test_the_mean_of_regions_has_an_interval_of_its_own():
    """Regions of a case are drawn together: what cancels out between them is certain."""
    values = np.random.default_rng(4).random(25)
    scored = rows(values.tolist()) + rows((1 - values).tolist(), "TC")
    found = summaries(scored)["mean"]["dice"]
    assert found.cases == 25
    assert (found.low, found.high) == (pytest.approx(0.5), pytest.approx(0.5))


def test_references_without_a_prediction_are_charged_since_2026():
    scored = rows([0.8], score="dice") + rows([0.6], "TC")
    for rules in ("brats2020", "brats2023", "brats2026"):
        found = evaluation_of(rules, scored, [], missing=["a", "b", "c"])
        assert found.mean["WT"]["dice"] == pytest.approx(0.8)
        assert found.rows == tuple(scored)
        assert "1 case by" in found.title
        assert "3 references without a prediction" in found.title
        assert (found.charged is None) == (rules != "brats2026")
    assert found.charged["WT"]["dice"] == pytest.approx(0.2)
    assert found.charged["TC"]["hd95_mm"] == CHARGED["hd95_mm"] == 373
    assert found.charged["TC"]["specificity"] is None
    assert "charged Dice 0 for each, the mean is 0.175" in found.title
    assert evaluation_of("brats2026", scored, []).charged is None


@given(st.integers(0, 2**32), st.integers(1, 6))
def test_label_scores_are_those_of_their_definitions(seed, num_labels):
    generator = np.random.default_rng(seed)
    names = tuple("abcdef"[:num_labels])
    p, r = generator.integers(0, 1 + num_labels, (2, 4, 3, 3)).astype(np.uint8)
    p[generator.random(p.shape) < 0.5] = 0
    found = label_scores([confusion_of("one", p, r, names)])
    assert found["accuracy"] == pytest.approx((p == r).mean())
    overlaps = []
    for n, name in enumerate(("background", *names)):
        ours, theirs = p == n, r == n
        either = (ours | theirs).sum()
        if not either:
            assert found["labels"][name] == dict.fromkeys(found["labels"][name])
            continue
        overlaps.append((ours & theirs).sum() / either)
        label = found["labels"][name]
        assert label["iou"] == pytest.approx(overlaps[-1])
        assert label["dice"] == pytest.approx(
            2 * (ours & theirs).sum() / (ours.sum() + theirs.sum())
        )
        if theirs.any():
            assert label["sensitivity"] == pytest.approx(ours[theirs].mean())
        if not theirs.all():
            assert label["specificity"] == pytest.approx((~ours[~theirs]).mean())
    assert found["mean_iou"] == pytest.approx(np.mean(overlaps))


def test_label_scores_are_means_over_cases_and_cases_may_differ_in_labels():
    ones, zeros = np.ones((2, 2, 2), np.uint8), np.zeros((2, 2, 2), np.uint8)
    found = label_scores(
        [
            confusion_of("a", ones, ones, ("NCR",)),
            confusion_of("b", zeros, ones, ("NCR", "ED")),
            confusion_of("c", zeros, zeros, ("GTV",)),
        ]
    )
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["labels"]["NCR"]["dice"] == pytest.approx(0.5)
    assert found["labels"]["GTV"]["dice"] is found["labels"]["ED"]["dice"] is None


@pytest.fixture
def evaluation():
    """Two cases and regions, some scores undefined, names that a table has to quote."""
    scored = rows([0.1, None]) + rows([1 / 3, 0.7], 'T"C,')
    for n, row in enumerate(scored):
        row |= {"tp": n, "hd95_mm": 373.12866}
    return evaluation_of("brats2023", scored, [], missing=["x"])


def test_json_holds_the_whole_document(evaluation, tmp_path):
    score_file.write(evaluation, str(tmp_path / "scores.json"))
    document = json.loads((tmp_path / "scores.json").read_text(), parse_constant=pytest.fail)
    assert document["cases"] == [*evaluation.rows]
    assert document["mean"] == evaluation.mean
    assert document["missing"] == ["x"]
    assert document["summary"]["WT"]["dice"]["cases"] == 1


def test_csv_leaves_undefined_scores_empty(evaluation, tmp_path):
    score_file.write(evaluation, str(tmp_path / "scores.csv"))
    lines = list(csv.DictReader(io.StringIO((tmp_path / "scores.csv").read_text())))
    for line, row in zip(lines, evaluation.rows, strict=True):
        texts = {name: "" if value is None else str(value) for name, value in row.items()}
        assert line == texts


def test_parquet_has_nulls_types_and_its_rules(evaluation, tmp_path):
    score_file.write(evaluation, str(tmp_path / "scores.parquet"))
    found = pq.read_table(tmp_path / "scores.parquet")
    assert found.to_pylist() == [*evaluation.rows]
    assert [str(found.schema.field(name).type) for name in ("tp", "dice", "nsd")] == [
        *("int64", "double", "double")
    ]
    assert found.schema.metadata[b"rules"] == b"brats2023"


@pytest.mark.parametrize("name", ["scores.xlsx", "scores", "json"])
def test_other_endings_are_refused(evaluation, tmp_path, name):
    with pytest.raises(UsageError, match=r"--out .*\.json, \.csv, \.parquet"):
        score_file.write(evaluation, str(tmp_path / name))
    assert not storage.exists(str(tmp_path / name))
