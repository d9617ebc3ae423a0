"""Ranks, significance, tiers and paired differences of models on the same cases."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raybrats.errors import DataError, UsageError
from raybrats.predict import ranking
from raybrats.predict.compare import compare, compared
from raybrats.predict.ranking import LOWER_IS_BETTER, RANKED_BY, p_values, paired, ranks, standings
from raybrats.predict.summary import SCORES, summaries

REGIONS = ("WT", "TC", "ET")


def rows(values):
    """Rows of an array (case, region, score)."""
    return [
        {"case_id": f"case{c}", "region": REGIONS[r]}
        | {
            s: None if np.isnan(v) else v
            for s, v in zip(SCORES, values[c, r].tolist(), strict=True)
        }
        for c, r in product(*map(range, values.shape[:2]))
    ]


def model(seed, num_cases=30, better=0.0):
    """Scores of a model; `better` is added to what should be high, and taken from distances."""
    values = np.random.default_rng(seed).random((num_cases, len(REGIONS), len(SCORES)))
    signs = np.array([-1.0 if score in LOWER_IS_BETTER else 1.0 for score in SCORES])
    return rows(values + better * signs)


def equal(found, other):
    """Whether two summaries are those of opposite differences, to rounding."""
    ends = (found.mean, found.low, found.high), (-other.mean, -other.high, -other.low)
    return found.cases == other.cases and np.allclose(*ends, rtol=0, atol=1e-12)


@given(st.integers(0, 2**32), st.integers(1, 12))
def test_paired_differences_are_antisymmetric(seed, num_cases):
    a, b = model(seed, num_cases), model(seed + 1, num_cases)
    forth, back = paired(a, b), paired(b, a)
    assert all(equal(forth[r][s], back[r][s]) for r in (*REGIONS, "mean") for s in SCORES)
    assert all(found.mean == found.low == found.high == 0 for found in paired(a, a)["WT"].values())


def test_a_planted_difference_is_within_its_interval():
    a = model(0, 50)
    noise = np.random.default_rng(1).normal(0.05, 0.02, 50)
    b = [{**row, "dice": row["dice"] - noise[int(row["case_id"][4:])]} for row in a]
    found = paired(a, b)
    for region in (*REGIONS, "mean"):
        assert found[region]["dice"].low < 0.05 < found[region]["dice"].high
        assert found[region]["dice"].low > 0.03
        assert found[region]["iou"].mean == 0
    unpaired = summaries(a)["WT"]["dice"]
    assert unpaired.high - unpaired.low > 5 * (found["WT"]["dice"].high - found["WT"]["dice"].low)


def test_a_difference_takes_the_cases_that_both_have_scored():
    a, b = model(0, 5), model(1, 5)
    a[0]["dice"] = b[3]["dice"] = None  # case0 and case1 in WT
    found = paired(a, b[:-3])  # case4
    assert (found["WT"]["dice"].cases, found["WT"]["iou"].cases) == (2, 4)
    assert paired([], [])["mean"]["dice"] is None


@pytest.mark.parametrize("rules", RANKED_BY)
def test_the_better_model_wins_by_the_rules_of_every_year(rules):
    found = compared({"worse": model(0), "better": model(1, better=0.5)}, rules)
    first, second = found.standings
    assert (first.model, first.place, first.tier) == ("better", 1, 1)
    assert (second.model, second.place, second.tier) == ("worse", 2, 2)
    assert first.mean_rank < 1.5 < second.mean_rank
    assert found.p_values["better", "worse"] < 0.001
    count = 30 * len(REGIONS) * len(RANKED_BY[rules])
    assert first.rank_sum + second.rank_sum == pytest.approx(3 * count)
    assert {row[3] for row in found.difference_rows()} == {*RANKED_BY[rules]}


def test_scores_that_do_not_rank_change_nothing():
    a, b = model(0), model(1, better=0.5)
    spoilt = [{**row, "iou": 0.0, "lesion_dice": 0.0, "nsd": 0.0} for row in b]
    first, second = (compared({"a": a, "b": other}, "brats2020") for other in (b, spoilt))
    assert first.standings == second.standings


def test_models_that_are_alike_share_everything():
    found = compared({name: model(0) for name in "abc"}, "brats2020")
    assert {(s.place, s.mean_rank, s.tier) for s in found.standings} == {(2.0, 2.0, 1)}
    assert {*found.p_values.values()} == {1.0}


def test_an_undefined_score_cannot_be_beaten():
    """Nothing to find: one model finds nothing, the other something."""
    a, b = model(0, 1), model(0, 1)
    a[0] |= {"dice": None, "hd95_mm": None}
    b[0] |= {"dice": 0.0, "hd95_mm": 373.0}
    assert ranks({"a": a, "b": b}, "brats2020")[:, 0, :2].tolist() == [[1, 1], [2, 2]]
    b[0] |= {"dice": None, "hd95_mm": None}
    assert ranks({"a": a, "b": b}, "brats2020")[:, 0, :2].tolist() == [[1.5, 1.5], [1.5, 1.5]]


def test_p_values_are_those_of_all_exchanges():
    """With few cases every exchange can be counted."""
    found = np.random.default_rng(5).random((3, 8))
    p = p_values(found, permutations=200_000)
    assert (p == p.T).all()
    signs = np.array([*product((-1, 1), repeat=8)])
    for a, b in ((0, 1), (0, 2), (1, 2)):
        apart = found[a] - found[b]
        exact = (np.abs(signs @ apart) >= abs(apart.sum()) - 1e-9).mean()
        assert p[a, b] == pytest.approx(exact, abs=0.005)


def test_p_values_are_as_rare_as_they_say_where_models_are_alike():
    generator = np.random.default_rng(6)
    small = sum(p_values(generator.random((2, 40)), 999)[0, 1] < 0.05 for _ in range(200))
    assert 2 <= small <= 22  # ten of 200 are expected


def test_p_values_do_not_depend_on_how_many_are_drawn_at_once(monkeypatch):
    found = np.random.default_rng(7).random((2, 6))
    whole = p_values(found, 5000)
    monkeypatch.setattr(ranking, "_AT_ONCE", 6 * 1000)
    assert (p_values(found, 5000) == whole).all()


def test_a_tier_ends_where_a_model_is_worse_than_its_best():
    """Each is near its neighbour, the ends are apart."""
    p = np.array(
        [[1, 0.4, 0.01, 0.01], [0.4, 1, 0.3, 0.01], [0.01, 0.3, 1, 0.2], [0.01, 0.01, 0.2, 1]]
    )
    found = np.arange(4.0)[:, None, None]
    assert [s.tier for s in standings("abcd", found, p)] == [1, 1, 2, 2]
    order = [2, 0, 3, 1]
    moved = standings("abcd", found[order], p[np.ix_(order, order)])
    assert [(s.model, s.tier) for s in moved] == [("b", 1), ("d", 1), ("a", 2), ("c", 2)]


@pytest.mark.parametrize(
    ("folders", "said"),
    [(["a"], "two folders"), ([], "two folders"), (["a", "b", "a"], "a is given twice")],
)
def test_what_cannot_be_compared_is_refused(folders, said):
    with pytest.raises(UsageError, match=said):
        compare(folders, "cohort.parquet")
    with pytest.raises(UsageError, match="--permutations 0"):
        compare(["a", "b"], "cohort.parquet", permutations=0)


def test_folders_without_a_case_in_common_are_refused(tmp_path):
    for folder, number in (("a", 1), ("b", 2), ("references", 1), ("references", 2)):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"BraTS2021_0000{number}.nii.gz").touch()
    with pytest.raises(DataError, match="no case has a prediction in each"):
        compare([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "references"))
