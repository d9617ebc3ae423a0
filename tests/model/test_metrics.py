"""Scores against plain set arithmetic and brute force, and the rules for empty regions."""

import nibabel as nib
import numpy as np
import pytest
import torch
from faulty import SOAK
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from raybrats.data.nifti.labels import labels_from
from raybrats.data.nifti.volume import decode
from raybrats.label_set import GLIOMA, LABEL_SETS
from raybrats.model.metrics import HD95_ONE_EMPTY_MM, score_case
from raybrats.model.regions import region_dice, region_mask, region_sizes

LABELS = hnp.arrays(np.uint8, (4, 3, 3), elements=st.integers(0, 3))
SETS = st.sampled_from([*LABEL_SETS.values()])
ONE_MM = (1.0, 1.0, 1.0)


def validated(prediction, reference, known=GLIOMA):
    """Dice as a validation finds it."""
    labels = (torch.from_numpy(np.array(each)) for each in (prediction, reference))
    return region_dice(region_sizes(*labels, known))


def voxels(labels, region):
    return {tuple(v) for v in np.argwhere(np.isin(labels, region.labels))}


@given(LABELS, LABELS, SETS)
def test_scores_are_set_arithmetic(prediction, reference, known):
    scores = score_case(prediction, reference, ONE_MM, known)
    for region, score in zip(known.regions, scores, strict=True):
        p, r = voxels(prediction, region), voxels(reference, region)
        assert score.region == region.name
        if p | r:
            assert score.dice == pytest.approx(2 * len(p & r) / (len(p) + len(r)))
            assert score.iou == pytest.approx(len(p & r) / len(p | r))
        if r:
            assert score.sensitivity == pytest.approx(len(p & r) / len(r))
        if len(r) < prediction.size:
            negatives = prediction.size - len(r)
            assert score.specificity == pytest.approx((negatives - len(p - r)) / negatives)
        assert all(0 <= v <= 1 for v in (score.dice, score.iou, score.specificity))


@given(LABELS, LABELS, SETS)
def test_validation_and_evaluation_agree_on_dice(prediction, reference, known):
    dice = [score.dice for score in score_case(prediction, reference, ONE_MM, known)]
    assert validated(prediction, reference, known) == pytest.approx(dice)


@given(LABELS)
def test_a_case_against_itself_is_perfect(labels):
    for score in score_case(labels, labels, (1.0, 2.0, 3.0)):
        figures = (score.dice, score.iou, score.sensitivity, score.specificity)
        assert figures == (1, 1, 1, 1)
        assert score.hd95_mm == 0


def test_both_empty():
    nothing = np.zeros((4, 4, 4), np.uint8)
    for score in score_case(nothing, nothing, ONE_MM):
        assert (score.dice, score.iou, score.sensitivity) == (1, 1, 1)
        assert (score.specificity, score.hd95_mm) == (1, 0)


def test_one_empty():
    nothing = np.zeros((4, 4, 4), np.uint8)
    tumour = nothing.copy()
    tumour[1, 2, 3] = 3
    for pair in ((nothing, tumour), (tumour, nothing)):
        for score in score_case(*pair, ONE_MM):
            assert (score.dice, score.iou) == (0, 0)
            assert score.hd95_mm == pytest.approx(373.12866)
    assert all(score.sensitivity == 0 for score in score_case(nothing, tumour, ONE_MM))
    assert (
        pytest.approx((240**2 + 240**2 + 155**2) ** 0.5, abs=1e-5) == HD95_ONE_EMPTY_MM["brats2020"]
    )


def test_what_2026_leaves_undefined_is_none():
    nothing = np.zeros((4, 4, 4), np.uint8)
    for score in score_case(nothing, nothing, ONE_MM, rules="brats2026"):
        assert (score.dice, score.iou, score.hd95_mm, score.nsd) == (None,) * 4
        assert (score.lesion_dice, score.lesion_f1, score.tp) == (None, None, 0)
    tumour = nothing.copy()
    tumour[1, 2, 3] = 3
    found = {s.region: s for s in score_case(nothing, tumour, ONE_MM, rules="brats2026")}
    assert (found["ET"].dice, found["ET"].nsd, found["ET"].hd95_mm) == (0, 0, 373)
    assert (found["ET"].lesion_dice, found["ET"].lesion_hd95_mm, found["ET"].fn) == (0, 373, 1)
    assert found["SNFH"].dice is None


@pytest.mark.parametrize("rules", ["brats2020", "brats2023"])
def test_a_rule_names_no_nsd_before_2026(rules):
    labels = np.zeros((6, 6, 6), np.uint8)
    labels[1:4, 1:4, 1:4] = 3
    for score in score_case(labels, labels, (1.0, 2.0, 3.0), rules=rules):
        assert score.nsd is None
        assert score.volume_mm3 == score.reference_volume_mm3 == 27 * 6
        assert (score.lesion_dice is None) == (rules == "brats2020")


def test_without_enhancing_tumour_only_that_region_is_empty():
    labels = np.zeros((4, 4, 4), np.uint8)
    labels[1:3, 1:3, 1:3] = 1
    assert validated(np.zeros_like(labels), labels) == [0, 0, 1]


@given(LABELS)
def test_a_region_is_the_voxels_of_its_labels(labels):
    whole, core, enhancing = (region_mask(labels, region) for region in GLIOMA.regions)
    np.testing.assert_array_equal(whole, labels > 0)
    np.testing.assert_array_equal(core, (labels == 1) | (labels == 3))
    np.testing.assert_array_equal(enhancing, labels == 3)


@pytest.mark.real
def test_dice_of_real_segmentations_is_that_of_their_files(real_cases):
    for number in range(1, 6 if SOAK else 2):
        stem = f"BraTS20_Training_{number:03d}"
        paths = [real_cases / "segmentations" / f"{stem}_{k}.nii.gz" for k in ("prediction", "seg")]
        volumes = [decode(path.read_bytes(), path.name) for path in paths]
        ours = validated(*(labels_from(v, (1, 2, 4), stem) for v in volumes))
        p, r = (np.asarray(nib.load(path).dataobj).astype(int) for path in paths)
        for region, dice in zip(((1, 2, 4), (1, 4), (4,)), ours, strict=True):
            inside = np.isin(p, region), np.isin(r, region)
            expected = 2 * (inside[0] & inside[1]).sum() / sum(mask.sum() for mask in inside)
            assert dice == pytest.approx(expected, rel=1e-12)
