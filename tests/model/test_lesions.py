"""Lesion-wise scores against the official scorers' figures, and against slow plain code."""

import json
from itertools import permutations

import nibabel as nib
import numpy as np
import pytest
from faulty import SOAK
from scipy.ndimage import binary_dilation, generate_binary_structure, label

from raybrats.label_set import GLIOMA
from raybrats.model.distances import corner_surfaces, pooled_hd95, voxel_surfaces, weighted_hd95
from raybrats.model.lesions import Merging, lesions_2023, lesions_2026
from raybrats.model.metrics import score_case

ONE_MM = (1.0, 1.0, 1.0)
FULL = np.ones((3, 3, 3))
OFFICIAL_2023 = {
    "dice": "Legacy_Dice",
    "hd95_mm": "Legacy_HD95",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "reference_volume_mm3": "GT_Complete_Volume",
    "lesion_dice": "LesionWise_Score_Dice",
    "lesion_hd95_mm": "LesionWise_Score_HD95",
    "tp": "Num_TP",
    "fp": "Num_FP",
    "fn": "Num_FN",
}
OFFICIAL_2026 = {
    "dice": "global_bin_dsc",
    "hd95_mm": "global_bin_hd95",
    "nsd": "global_bin_nsd",
    "volume_mm3": "global_bin_volume_pred",
    "lesion_dice": "sq_dsc",
    "lesion_hd95_mm": "sq_hd95",
    "lesion_nsd": "sq_nsd",
    "tp": "tp",
    "fp": "fp",
    "fn": "fn",
    "lesion_f1": "rq",
}
CASES = [f"BraTS20_Training_{number:03d}" for number in (range(1, 6) if SOAK else (1, 5))]


def pair_of(folder, case_id):
    """Labels of the prediction and the reference, with ET as 3."""
    paths = [folder / f"{case_id}_{kind}.nii.gz" for kind in ("prediction", "seg")]
    labels = [np.asarray(nib.load(path).dataobj).astype(np.uint8) for path in paths]
    return [np.where(each == 4, 3, each).astype(np.uint8) for each in labels]


@pytest.mark.real
@pytest.mark.parametrize("case_id", CASES)
def test_scores_are_those_of_the_official_scorers(real_cases, case_id):
    folder = real_cases / "segmentations"
    pair = pair_of(folder, case_id)
    due = json.loads((folder / "official_scores.json").read_text())[case_id]
    for score in score_case(*pair, ONE_MM, GLIOMA, "brats2023"):
        for ours, theirs in OFFICIAL_2023.items():
            assert getattr(score, ours) == pytest.approx(due[score.region][theirs], abs=1e-6)
    for score in score_case(*pair, ONE_MM, GLIOMA, "brats2020"):
        for ours, theirs in [*OFFICIAL_2023.items()][:5]:
            assert getattr(score, ours) == pytest.approx(due[score.region][theirs], abs=1e-6)
        assert score.lesion_dice is None
    due = json.loads((folder / "official_scores_2026.json").read_text())[case_id]
    scores = score_case(*pair, ONE_MM, GLIOMA, "brats2026")
    assert {score.region.lower() for score in scores} == due.keys() - {"rc"}
    for score in scores:
        for ours, theirs in OFFICIAL_2026.items():
            expected = due[score.region.lower()][theirs]
            assert getattr(score, ours) == pytest.approx(expected, abs=1e-6)


def random_masks(seed):
    """Two masks of some boxes each, which may touch, be missing, or be the same; and a spacing."""
    random = np.random.default_rng(seed)
    masks = []
    for _ in range(2):
        mask = np.zeros((18, 16, 14), bool)
        for _ in range(random.integers(0, 5)):
            corner = random.integers(0, [15, 13, 11])
            size = random.integers(1, 5, 3)
            mask[tuple(slice(c, c + s) for c, s in zip(corner, size, strict=True))] = True
        masks.append(mask)
    if random.random() < 0.3:
        masks[0] = np.roll(masks[1], random.integers(0, 2), axis=random.integers(0, 3))
    spacing = tuple(float(mm) for mm in random.choice([0.5, 1.0, 2.5], 3))
    return *masks, spacing


def dice_of(one, other):
    return 2 * (one & other).sum() / (one.sum() + other.sum())


def naive_2023(prediction, reference, spacing, dilations, least_mm3):
    """The rules lesion by lesion: each dilated alone, those whose dilations touch merged."""
    near = generate_binary_structure(3, 2)
    numbered, count = label(reference, FULL)
    zones, num_zones = label(binary_dilation(reference, near, iterations=dilations), FULL)
    components, num_found = label(prediction, FULL)
    lesions = [np.zeros_like(reference) for _ in range(num_zones)]
    for number in range(1, count + 1):
        lesions[zones[numbered == number][0] - 1] |= numbered == number
    dice, distances, hit, tp, fn = [], [], set(), 0, 0
    for lesion in lesions:
        around = binary_dilation(lesion, near, iterations=dilations)
        touching = set(np.unique(components[around])) - {0}
        hit |= touching
        if lesion.sum() * np.prod(spacing) <= least_mm3:
            continue
        tp, fn = tp + bool(touching), fn + (not touching)
        found = np.isin(components, [*touching])
        dice.append(dice_of(found, lesion) if touching else 0)
        surfaces = corner_surfaces(found, lesion, spacing) if touching else None
        distances.append(weighted_hd95(surfaces) if surfaces else 374)
    fp = num_found - len(hit)
    count = len(dice) + fp
    if not count:
        return 1, 0, 0, 0, 0
    return sum(dice) / count, (sum(distances) + 374 * fp) / count, tp, fp, fn


def naive_2026(prediction, reference, spacing):
    """The best of all one-to-one pairings, tried one by one."""
    found, num_found = label(prediction, FULL)
    due, num_due = label(reference, FULL)
    masks = [[m == n + 1 for n in range(k)] for m, k in ((found, num_found), (due, num_due))]
    fewer, more = sorted(masks, key=len)
    best, pairs = 0.0, []
    for chosen in permutations(range(len(more)), len(fewer)):
        tried = [(few, more[n]) for few, n in zip(fewer, chosen, strict=True)]
        tried = [pair for pair in tried if dice_of(*pair) >= 1e-6]
        if sum(dice_of(*pair) for pair in tried) > best:
            best, pairs = sum(dice_of(*pair) for pair in tried), tried
    hd95 = [pooled_hd95(voxel_surfaces(*pair, spacing)) for pair in pairs]
    return best, sorted(hd95), len(pairs), num_found, num_due


@pytest.mark.parametrize("first", range(0, 1000 if SOAK else 40, 40))
def test_random_pairs_are_scored_as_by_plain_code(first):
    for seed in range(first, first + 40):
        prediction, reference, spacing = random_masks(seed)
        merging = Merging(*[(3, 50.0), (1, 2.0), (1, 50.0)][seed % 3])
        # The rules are applied to whole volumes, whose ends the dilation must not feel.
        room = [np.pad(mask, 5) for mask in (prediction, reference)]
        ours = lesions_2023(*room, spacing, merging)
        dice, hd95, *counts = naive_2023(*room, spacing, merging.dilations, merging.least_mm3)
        assert ours.lesion_dice == pytest.approx(dice)
        assert ours.lesion_hd95_mm == pytest.approx(hd95)
        assert [ours.tp, ours.fp, ours.fn] == counts
        ours = lesions_2026(prediction, reference, spacing)
        best, hd95, tp, num_found, num_due = naive_2026(prediction, reference, spacing)
        assert (ours.tp, ours.fp, ours.fn) == (tp, num_found - tp, num_due - tp)
        if tp:
            assert ours.lesion_dice == pytest.approx(best / tp)
            assert ours.lesion_f1 == pytest.approx(2 * tp / (num_found + num_due))
        elif num_found or num_due:
            assert (ours.lesion_dice, ours.lesion_hd95_mm, ours.lesion_f1) == (0, 373, 0)
        else:
            assert (ours.lesion_dice, ours.lesion_f1) == (None, None)


def test_a_small_lesion_counts_neither_found_nor_missed():
    reference, nothing = np.zeros((30, 30, 30), bool), np.zeros((30, 30, 30), bool)
    reference[4:7, 4:7, 4:7] = True  # 27 mm3
    assert lesions_2023(nothing, reference, ONE_MM, Merging()).fn == 0
    assert lesions_2023(nothing, reference, ONE_MM, Merging(1, 2.0)).fn == 1
    assert lesions_2023(reference, reference, ONE_MM, Merging()).fp == 0
