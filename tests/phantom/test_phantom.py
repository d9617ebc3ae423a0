"""Phantoms: what every case promises, and the tree that each edition's archive unpacks to."""

import gzip
import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from raybrats.brats import EDITIONS, MODALITIES
from raybrats.errors import UsageError
from raybrats.label_set import ED, ET, NCR, label_set_of
from raybrats.phantom.phantom import make_phantom, write_phantoms

SMALL = (48, 48, 36)
TINY = (20, 24, 16)
FLAIR, T1, T1CE, T2 = range(4)


@pytest.fixture(scope="module")
def cases():
    return [make_phantom(index, shape=SMALL) for index in range(10)]


def files(root):
    return sorted(str(path.relative_to(root)) for path in Path(root).rglob("*") if path.is_file())


def mean(image, modality, where):
    return image[modality][where].mean()


def test_a_case_is_drawn_by_seed_and_index_alone(cases):
    image, labels = make_phantom(2, shape=SMALL)
    np.testing.assert_array_equal(image, cases[2][0])
    np.testing.assert_array_equal(labels, cases[2][1])
    assert not np.array_equal(image, cases[1][0])
    assert not np.array_equal(image, make_phantom(2, shape=SMALL, seed=1)[0])


def test_types_and_shapes(cases):
    for image, labels in cases:
        assert image.shape == (len(MODALITIES), *SMALL)
        assert image.dtype == np.int16
        assert labels.shape == SMALL
        assert labels.dtype == np.uint8
        assert image.min() == 0


def test_the_background_is_zero_in_all_modalities_at_once(cases):
    for image, _ in cases:
        brain = image > 0
        assert (brain == brain[0]).all()
        assert 0.16 < brain[0].mean() < 0.22
        for axis in range(3):
            assert not brain[0].take([0, -1], axis=axis).any()


def test_labels_lie_inside_the_brain(cases):
    for image, labels in cases:
        assert (image[:, labels > 0] > 0).all()


def test_volumes_are_those_of_gliomas(cases):
    cm3 = 240 * 240 * 155 / np.prod(SMALL) / 1000
    for index, (_, labels) in enumerate(cases):
        necrotic, oedema, enhancing = (cm3 * (labels == value).sum() for value in (NCR, ED, ET))
        assert 1.5 < necrotic < 45
        assert 20 < oedema < 100
        assert enhancing == 0 if index % 5 == 3 else 5 < enhancing < 40


def test_both_hemispheres_get_tumours(cases):
    left = [np.argwhere(labels)[:, 0].mean() > SMALL[0] / 2 for _, labels in cases]
    assert 0 < sum(left) < len(cases)


def test_one_geometry_on_every_lattice():
    (_, coarse), (_, fine) = (make_phantom(0, shape=(n, n, n)) for n in (32, 64))
    whole = fine.reshape(32, 2, 32, 2, 32, 2).astype(bool).mean((1, 3, 5)) > 0.5
    dice = 2 * (whole & (coarse > 0)).sum() / (whole.sum() + (coarse > 0).sum())
    assert dice > 0.8


def healthy_and_white(image, labels):
    healthy = (image[0] > 0) & (labels == 0)
    return healthy, healthy & (image[T1] > np.percentile(image[T1][healthy], 60))


def test_tumour_contrasts(cases):
    for image, labels in cases:
        healthy, white = healthy_and_white(image, labels)
        necrotic, oedema = labels == NCR, labels == ED
        assert mean(image, FLAIR, oedema) > 1.25 * mean(image, FLAIR, healthy)
        assert mean(image, T2, oedema) > 1.2 * mean(image, T2, white)
        assert mean(image, T1, oedema) < 0.9 * mean(image, T1, white)
        assert mean(image, T1, necrotic) < 0.85 * mean(image, T1, oedema)
        assert mean(image, T2, necrotic) > 1.15 * mean(image, T2, oedema)


def test_enhancing_tumour_is_the_brightest_in_t1ce_and_dark_in_t1(cases):
    for image, labels in cases:
        if (labels == ET).any():
            healthy, white = healthy_and_white(image, labels)
            others = (healthy, labels == NCR, labels == ED)
            enhancing = mean(image, T1CE, labels == ET)
            assert enhancing > 1.2 * max(mean(image, T1CE, other) for other in others)
            assert mean(image, T1, labels == ET) < 0.85 * mean(image, T1, white)


def test_fluid_and_white_matter_have_opposite_contrasts(cases):
    for image, labels in cases:
        healthy = (image[0] > 0) & (labels == 0)
        t2 = image[T2]
        fluid = healthy & (t2 > np.percentile(t2[healthy], 95))
        white = healthy & (t2 < np.percentile(t2[healthy], 30))
        for modality in (FLAIR, T1, T1CE):
            assert mean(image, modality, fluid) < 0.9 * mean(image, modality, white)


def test_no_single_threshold_finds_the_tumour(cases):
    image, labels = cases[0]
    brain = image[0] > 0
    oedema = np.percentile(image[FLAIR][labels == ED], 20)
    assert (image[FLAIR][brain & (labels == 0)] > oedema).any()


TREES = {
    "2020": [
        f"MICCAI_BraTS2020_TrainingData/BraTS20_Training_001/BraTS20_Training_001_{name}.nii.gz"
        for name in ("flair", "seg", "t1", "t1ce", "t2")
    ],
    "2021": [
        f"BraTS2021_00000/BraTS2021_00000_{name}.nii.gz"
        for name in ("flair", "seg", "t1", "t1ce", "t2")
    ],
    "2023": [
        f"BraTS-GLI-00000-000/BraTS-GLI-00000-000-{name}.nii.gz"
        for name in ("seg", "t1c", "t1n", "t2f", "t2w")
    ],
    "msd": [
        "Task01_BrainTumour/dataset.json",
        "Task01_BrainTumour/imagesTr/BRATS_001.nii.gz",
        "Task01_BrainTumour/labelsTr/BRATS_001.nii.gz",
    ],
    **{
        edition: [
            f"{case_id}/{case_id}-{name}.nii.gz" for name in ("seg", "t1c", "t1n", "t2f", "t2w")
        ]
        for edition, case_id in (
            ("MEN", "BraTS-MEN-00000-000"),
            ("MET", "BraTS-MET-00000-000"),
            ("PED", "BraTS-PED-00000-000"),
            ("post-op", "BraTS-GLI-00000-100"),
        )
    },
    "MEN-RT": [f"BraTS-MEN-RT-0000-1/BraTS-MEN-RT-0000-1_{name}.nii.gz" for name in ("gtv", "t1c")],
}


@pytest.mark.parametrize("edition", EDITIONS)
def test_each_edition_has_its_tree(tmp_path, edition):
    case_ids = write_phantoms(str(tmp_path), num_cases=1, shape=TINY, edition=edition)
    assert files(tmp_path) == TREES[edition]
    assert all(case_id in TREES[edition][-1] for case_id in case_ids)


@pytest.mark.parametrize("edition", EDITIONS)
def test_each_edition_has_its_label_values(tmp_path, edition):
    write_phantoms(str(tmp_path), num_cases=1, shape=TINY, edition=edition)
    path = next(path for path in TREES[edition] if re.search("seg|labelsTr|gtv", path))
    stored = np.asarray(nib.load(tmp_path / path).dataobj)
    _, labels = make_phantom(0, shape=TINY)
    assert stored.dtype == np.uint8
    values = EDITIONS[edition].label_values
    written = dict(zip(label_set_of(EDITIONS[edition].label_set).names, values, strict=True))
    alike = {  # what each is in glioma; cysts and cavities are within the necrosis
        **{"NCR": (NCR,), "ED": (ED,), "ET": (ET,), "SNFH": (ED,), "GTV": (NCR, ET)},
        **dict.fromkeys(("NETC", "NET", "RC", "CC"), (NCR,)),
    }
    for name, value in written.items():
        inside = np.isin(labels, alike[name])
        np.testing.assert_array_equal(inside[stored == value], True)
        if name not in ("NETC", "NET", "RC", "CC"):
            np.testing.assert_array_equal(inside, stored == value)
    hollow = [written[name] for name in ("RC", "CC") if name in written]
    core = np.count_nonzero(labels == NCR)
    assert [np.count_nonzero(stored == value) for value in hollow] == [core // 2] * len(hollow)


@pytest.mark.parametrize("edition", ["2020", "2021", "2023"])
def test_files_hold_the_modality_that_they_name(tmp_path, edition):
    (case_id,) = write_phantoms(str(tmp_path), num_cases=1, shape=TINY, edition=edition)
    image, _ = make_phantom(0, shape=TINY)
    names = EDITIONS[edition]
    for suffix, volume in zip(names.suffixes, image, strict=True):
        (path,) = tmp_path.rglob(f"{case_id}{names.separator}{suffix}.nii.gz")
        stored = np.asarray(nib.load(path).dataobj)
        assert stored.dtype == np.int16
        np.testing.assert_array_equal(stored, volume)


def test_the_decathlon_stores_one_file_of_four_dimensions_and_an_index(tmp_path):
    case_ids = write_phantoms(str(tmp_path), num_cases=2, shape=TINY, edition="msd")
    root = tmp_path / "Task01_BrainTumour"
    index = json.loads((root / "dataset.json").read_text())
    assert index["modality"] == {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}
    assert index["labels"]["1"] == "edema"
    assert index["numTraining"] == 2
    for number, (case_id, row) in enumerate(zip(case_ids, index["training"], strict=True)):
        assert row["image"] == f"./imagesTr/{case_id}.nii.gz"
        assert (root / row["label"]).is_file()
        stored = nib.load(root / row["image"])
        image, _ = make_phantom(number, shape=TINY)
        assert stored.get_data_dtype() == np.int16
        np.testing.assert_array_equal(np.asarray(stored.dataobj), np.moveaxis(image, 0, -1))


def test_the_head_keeps_its_size_on_a_coarse_lattice(tmp_path):
    write_phantoms(str(tmp_path), num_cases=1, shape=(60, 48, 31), edition="2021")
    nifti = nib.load(tmp_path / TREES["2021"][0])
    assert nib.aff2axcodes(nifti.affine) == ("L", "P", "S")
    np.testing.assert_allclose(nifti.header.get_zooms(), (4, 5, 5))
    np.testing.assert_allclose(nifti.affine[:3, 3], (0, 47 * 5, 0))
    assert nifti.header.get_xyzt_units()[0] == "mm"
    assert nifti.header["descrip"] == b""


def test_files_repeat_byte_for_byte(tmp_path):
    for name in ("once", "again"):
        write_phantoms(str(tmp_path / name), num_cases=2, shape=TINY, edition="2023")
    assert files(tmp_path / "once") == files(tmp_path / "again")
    for path in files(tmp_path / "once"):
        data = (tmp_path / "once" / path).read_bytes()
        assert data == (tmp_path / "again" / path).read_bytes()
        assert gzip.decompress(data)


def test_what_cannot_be_drawn_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match=r"one of 2020, 2021, 2023, msd, MEN, .*, got '2019'"):
        write_phantoms(str(tmp_path), edition="2019")
    with pytest.raises(UsageError, match="num_cases must be at least 1, got 0"):
        write_phantoms(str(tmp_path), num_cases=0)
    with pytest.raises(UsageError, match=r"at least 16 voxels .* \(64, 15, 64\)"):
        make_phantom(0, shape=(64, 15, 64))
    assert files(tmp_path) == []
