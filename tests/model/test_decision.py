"""From probabilities to labels by the run's rules, which are fitted on folds they do not score."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from torch.testing import assert_close

from raybrats.config import LossConfig, TrainConfig, override_all
from raybrats.errors import UsageError
from raybrats.label_set import GLIOMA, LABEL_SETS
from raybrats.model.decision import (
    cleaned,
    decided,
    decided_together,
    labels_of,
    outer,
    probabilities,
)
from raybrats.model.fit import OutOfFold, fit_decision
from raybrats.model.regions import region_dice, region_sizes
from raybrats.model.windows import Blend

RUN = TrainConfig()


def ruled(**rules):
    return override_all(RUN, {f"prediction.{name}": value for name, value in rules.items()})


def logits(seed=0, outputs=3, shape=(6, 7, 5)):
    return torch.randn(1, outputs, *shape, generator=torch.Generator().manual_seed(seed))


def test_without_rules_the_sign_decides_whatever_the_weights():
    said, weight = logits(), torch.rand(6, 7, 5) + 0.1
    assert torch.equal(decided(RUN, Blend(said * weight, weight)), labels_of(said > 0))


@given(st.tuples(*[st.floats(0.02, 0.98)] * 3), st.integers(0, 9))
def test_thresholds_are_those_of_the_probabilities(cuts, seed):
    config, weight = ruled(threshold=cuts), torch.rand(6, 7, 5) + 0.1
    said = Blend(logits(seed) * weight, weight)
    found = decided(config, said)
    p = probabilities(config, Blend(said.total.clone(), weight))
    above = p > torch.tensor(cuts).view(1, 3, 1, 1, 1)
    near = ((p - torch.tensor(cuts).view(1, 3, 1, 1, 1)).abs() < 1e-5).any(dim=1)
    assert torch.equal(found[~near], labels_of(above)[~near])
    assert torch.equal(decided_together(config, p)[~near], found[~near])


def test_probabilities_of_a_softmax_are_a_softmax():
    config = replace(RUN, loss=LossConfig(target="labels"))
    said, weight = logits(outputs=4), torch.rand(6, 7, 5) + 0.1
    expected = said.softmax(dim=1)
    assert_close(probabilities(config, Blend(said * weight, weight)), expected)
    assert torch.equal(decided_together(config, expected), decided(config, Blend(said, weight)))


@pytest.mark.parametrize("least", [(0, 0, 0), (40, 0, 0), (0, 9, 4), (30, 15, 8)])
def test_components_that_are_too_small_become_what_lies_around(least):
    values = np.random.default_rng(0).choice(4, (14, 13, 12), p=(0.8, 0.05, 0.05, 0.1))
    labels = values.astype(np.uint8)
    expected = labels.copy()
    paint = {0: 0, 1: 2, 2: 1}  # WT -> background, TC -> ED, ET -> NCR
    for number, region in enumerate(GLIOMA.regions):
        parts, count = ndimage.label(np.isin(expected, region.labels), np.ones((3, 3, 3)))
        for part in range(1, count + 1):
            if (parts == part).sum() < least[number]:
                expected[parts == part] = paint[number]
    found = cleaned(ruled(smallest_voxels=least), torch.from_numpy(labels)[None])
    np.testing.assert_array_equal(found[0].numpy(), expected)
    assert any(least) == bool((expected != labels).any())


@pytest.mark.parametrize(("least", "et"), [(6, 3), (7, 1)])
def test_a_region_with_too_few_voxels_in_the_whole_case_is_the_next_outer_one(least, et):
    labels = torch.zeros(1, 9, 9, 9, dtype=torch.uint8)
    labels[0, 1:6] = 2
    labels[0, 2:4, 2:4, 2:4] = 1
    labels[0, 2:4, 2:4, 2] = labels[0, 5, 5, 5:7] = 3  # six voxels, in two places
    found = cleaned(ruled(replace_below_voxels=(0, 0, least)), labels)
    assert torch.equal(found, torch.where(labels == 3, et, labels))


def test_the_next_outer_region_of_every_label_set():
    found = {name: [outer(r, known) for r in known.regions] for name, known in LABEL_SETS.items()}
    assert found == {
        "glioma": [0, 2, 1],
        "treated": [0, 2, 1, 0],
        "paediatric": [0, 4, 2, 2],
        "gtv": [0],
    }


def ball(radius):
    at = np.indices((16, 16, 16)) - 8
    return (at**2).sum(axis=0) <= radius**2


def held_out(number, said, reference, **changes):
    """A case of one of two folds, whose three regions are alike."""
    fold = number % 2
    probabilities = np.repeat(said[None].astype(np.float32), 3, axis=0)
    labels = (3 * reference).astype(np.uint8)
    case = OutOfFold(f"case{number}", f"subject{number}", fold, fold, probabilities, labels)
    return replace(case, **changes)


def dice(config, cases):
    """Mean Dice of the three regions of some cases."""
    found = [
        region_dice(
            region_sizes(
                decided_together(config, torch.from_numpy(case.probabilities)[None])[0],
                torch.from_numpy(case.reference),
            )
        )
        for case in cases
    ]
    return float(np.mean(found))


def test_a_threshold_that_helps_every_fold_is_kept_with_what_it_gained():
    said = 0.95 * ball(3) + 0.4 * (ball(5) & ~ball(3)) + 0.1 * ~ball(5)  # its rim is too unsure
    cases = [held_out(n, said, ball(5)) for n in range(6)]
    found = fit_decision(RUN, lambda: cases)
    assert all(0.1 <= cut < 0.4 for cut in found.prediction.threshold)
    assert (found.prediction.smallest_voxels, found.prediction.replace_below_voxels) == ((), ())
    fitted = replace(RUN, prediction=found.prediction)
    assert found.gain["mean"] == pytest.approx(dice(fitted, cases) - dice(RUN, cases))
    assert found.gain.keys() == {"WT", "TC", "ET", "mean"}


def test_specks_are_dropped_where_that_helps_every_fold():
    said = ball(5) * 0.9
    said[0, :, 0] = 0.9  # 16 voxels
    cases = [held_out(n, said, ball(5)) for n in range(4)]
    found = fit_decision(RUN, lambda: cases)
    assert found.prediction.smallest_voxels == (50, 50, 50)
    assert found.gain["mean"] > 0
    alone = [held_out(n, np.where(ball(5), 0, said), ball(0) & False) for n in range(4)]
    found = fit_decision(RUN, lambda: alone)
    assert found.gain["mean"] == pytest.approx(1)  # an empty region that is found empty


def test_what_helps_only_the_cases_that_it_was_fitted_on_stays_off():
    """One fold wants its rim, the other does not; so the rim's threshold fits one and hurts one.

    Fitted on all, it looks better on all; fitted on either fold, it is wrong for the other.
    """
    core, rim = ball(4), ball(6) & ~ball(4)
    cases = [
        held_out(0, 0.9 * core + 0.7 * rim, core),  # better at 0.7
        held_out(1, 0.9 * core + 0.35 * rim, ball(6)),  # better below 0.35
    ]
    in_sample = max(dice(ruled(threshold=(cut,) * 3), cases) for cut in np.linspace(0.05, 0.95, 19))
    assert in_sample > dice(RUN, cases) + 0.05, "fitting on the scored cases looks better"
    found = fit_decision(RUN, lambda: cases)
    assert found.prediction == RUN.prediction
    assert found.gain == {"WT": 0, "TC": 0, "ET": 0, "mean": 0}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([{}], "cases of 1 fold"),
        ([{}, {"fold": 0, "held_out": 0}], "cases of 1 fold"),
        ([{}, {"case_id": "case0"}], "case0 is there twice"),
        ([{}, {"held_out": 0}], "case1 is of fold 1, on which its model was trained"),
        ([{}, {"subject": "subject0"}], "subject subject0 is in folds 0 and 1"),
    ],
)
def test_what_is_not_held_out_is_refused(changes, said):
    cases = [held_out(n, 0.9 * ball(3), ball(3), **each) for n, each in enumerate(changes)]
    with pytest.raises(UsageError, match=said) as refusal:
        fit_decision(RUN, lambda: cases)
    assert "\n" not in str(refusal.value)


def test_a_softmax_has_no_rules_to_fit():
    with pytest.raises(UsageError, match="a softmax has no thresholds"):
        fit_decision(replace(RUN, loss=LossConfig(target="labels")), list)
