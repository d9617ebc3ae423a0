"""The trees that BraTS comes in: names alone tell the cases, and what is wrong with them."""

import json
from pathlib import Path

import numpy as np
import pytest
from niftis import nifti, zipped

from raybrats.brats import EDITIONS, MODALITIES
from raybrats.data.cohort.layout import (
    Files,
    case_id_of,
    find_files,
    is_modality,
    is_reference,
    stem,
)
from raybrats.errors import DataError, MissingObjectError
from raybrats.label_set import GLIOMA, label_set_of
from raybrats.phantom.phantom import make_phantom, write_phantoms

SHAPE = (24, 24, 20)


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder an edition, three cases in each."""
    root = tmp_path_factory.mktemp("trees")
    for edition in EDITIONS:
        write_phantoms(str(root / edition), num_cases=3, shape=SHAPE, edition=edition)
    return root


def touch(root: Path, *names: str) -> None:
    """Empty files: a layout is told without opening them."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def case_files(folder: str, case_id: str, ends: str = "flair t1 t1ce t2 seg") -> list[str]:
    return [f"{folder}{case_id}/{case_id}_{end}.nii.gz" for end in ends.split()]


def names(files: Files) -> list[str]:
    return [uri.rpartition("/")[2] for uri in files.image_uris]


@pytest.mark.parametrize("edition", EDITIONS)
def test_the_cases_of_an_edition_are_found(trees: Path, edition: str):
    found = find_files(str(trees / edition))
    first = 1 if edition in ("2020", "msd") else 0
    ids = [EDITIONS[edition].case_id.format(n) for n in range(first, first + 3)]
    assert [f.case_id for f in found] == ids
    for files in found:
        assert files.edition == edition
        assert files.layout == ("msd" if edition == "msd" else "brats")
        assert files.label_values == EDITIONS[edition].label_values
        assert files.label_set == EDITIONS[edition].label_set
        assert files.problem == ""
        assert Path(files.label_uri).is_file()
        assert all(Path(uri).is_file() for uri in filter(None, files.image_uris))
        if edition != "msd":
            ends = [stem(uri)[len(files.case_id) + 1 :] if uri else "" for uri in files.image_uris]
            assert tuple(ends) == EDITIONS[edition].suffixes


def test_a_tree_may_hold_several_editions(trees: Path):
    found = find_files(str(trees))
    assert len(found) == 3 * len(EDITIONS)
    assert {f.edition for f in found} == set(EDITIONS)
    assert [f.case_id for f in found] == sorted(f.case_id for f in found)
    assert not any(f.problem for f in found)


def test_paths_may_be_relative_or_file_uris(trees: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(trees)
    assert find_files("2021") == find_files(f"file://{trees}/2021/") == find_files(f"{trees}/2021")


def test_kaggles_2020_with_case_355_and_a_validation_folder(tmp_path: Path):
    train = "BraTS2020_TrainingData/MICCAI_BraTS2020_TrainingData/"
    valid = "BraTS2020_ValidationData/MICCAI_BraTS2020_ValidationData/"
    for folder, case_id, ends in [
        (train, "BraTS20_Training_001", "flair t1 t1ce t2 seg"),
        (train, "BraTS20_Training_355", "flair t1 t1ce t2"),
        (valid, "BraTS20_Validation_001", "flair t1 t1ce t2"),
    ]:
        touch(tmp_path, *(n.removesuffix(".gz") for n in case_files(folder, case_id, ends)))
    touch(tmp_path, f"{train}BraTS20_Training_355/W39_1998.09.19_Segm.nii")
    touch(tmp_path, f"{train}name_mapping.csv", f"{train}survival_info.csv")
    first, renamed, unseen = find_files(str(tmp_path))
    assert first.label_uri.endswith("/BraTS20_Training_001_seg.nii")
    assert renamed.case_id == "BraTS20_Training_355"
    assert renamed.label_uri.endswith("/W39_1998.09.19_Segm.nii")
    assert (unseen.case_id, unseen.label_uri) == ("BraTS20_Validation_001", None)
    assert {f.edition for f in (first, renamed, unseen)} == {"2020"}
    assert not any(f.problem for f in (first, renamed, unseen))


def test_a_stray_mask_is_not_guessed_among_several_cases(tmp_path: Path):
    for case_id in ("a_1", "a_2"):
        touch(tmp_path, *(f"{case_id}_{end}.nii" for end in ("flair", "t1", "t1ce", "t2")))
    touch(tmp_path, "W39_Segm.nii")
    assert [f.label_uri for f in find_files(str(tmp_path))] == [None, None]


def test_capitals_in_names_do_not_matter(tmp_path: Path):
    case_id = "BraTS-GLI-00000-000"
    ends = ("t2f", "t1n", "t1c", "t2W", "SEG")
    touch(tmp_path, *(f"{case_id}/{case_id}-{end}.NII.GZ" for end in ends))
    (files,) = find_files(str(tmp_path))
    assert names(files) == [f"{case_id}-{end}.NII.GZ" for end in ends[:4]]
    assert files.label_uri.endswith("-SEG.NII.GZ")
    assert (files.case_id, files.edition) == (case_id, "2023")


def test_names_may_hold_spaces_and_letters_of_any_script(tmp_path: Path):
    touch(tmp_path, *case_files("Fälle 2021/", "BraTS2021_Müller 東"))
    (files,) = find_files(str(tmp_path))
    assert (files.case_id, files.edition) == ("BraTS2021_Müller 東", "2021")


def test_macs_shadows_and_hidden_folders_are_ignored(tmp_path: Path):
    touch(tmp_path, *case_files("", "BraTS2021_00000"), "BraTS2021_00000/.DS_Store")
    touch(tmp_path, *(n.replace("/", "/._") for n in case_files("", "BraTS2021_00000")))
    touch(tmp_path, *case_files(".Trash/", "BraTS2021_00001"), ".cache/dataset.json")
    touch(tmp_path, *case_files("__MACOSX/.x/", "BraTS2021_00002"))
    (files,) = find_files(str(tmp_path))
    assert (files.case_id, files.problem) == ("BraTS2021_00000", "")


def test_a_hidden_folder_above_the_tree_does_not_hide_it(tmp_path: Path):
    touch(tmp_path / ".data", *case_files("", "BraTS2021_00000"))
    assert len(find_files(str(tmp_path / ".data"))) == 1


def test_predictions_alone_are_no_case(tmp_path: Path):
    touch(tmp_path, *case_files("", "BraTS2021_00000"), "predictions/BraTS2021_00009_seg.nii.gz")
    assert [f.case_id for f in find_files(str(tmp_path))] == ["BraTS2021_00000"]


def test_what_is_wrong_with_the_names_becomes_a_problem(tmp_path: Path):
    touch(tmp_path, *case_files("one/", "BraTS2021_00000"), *case_files("two/", "BraTS2021_00000"))
    touch(tmp_path, *case_files("", "BraTS2021_00001"))
    touch(tmp_path, "BraTS2021_00001/BraTS2021_00001_t1.nii")
    touch(tmp_path, *case_files("", "BraTS2021_00002", "flair t1 seg"))
    touch(tmp_path, *case_files("", "BraTS2021_00003"))
    twins, double, partial, good = find_files(str(tmp_path))
    assert twins.problem == f"case id found twice: {tmp_path}/one/{twins.case_id} and " + (
        f"{tmp_path}/two/{twins.case_id}; rename or remove one"
    )
    assert double.problem == (
        "two files for t1: BraTS2021_00001_t1.nii, BraTS2021_00001_t1.nii.gz; remove one"
    )
    assert names(partial) == ["BraTS2021_00002_flair.nii.gz", "BraTS2021_00002_t1.nii.gz", "", ""]
    assert partial.problem == ""
    assert good.problem == ""


def write_nnunet(root: Path, channels: list[str], labels: dict, **more: object) -> np.ndarray:
    """Two cases of nnU-Net raw data whose channels go by these names; returns the first image."""
    order = [("flair", "t1", "t1ce", "t2").index(name.lower()) for name in channels]
    dataset = {"channel_names": dict(enumerate(channels)), "labels": labels, **more}
    (root / "imagesTr").mkdir(parents=True)
    (root / "labelsTr").mkdir()
    (root / "dataset.json").write_text(json.dumps(dataset))
    for n in (0, 1):
        image, mask = make_phantom(n, shape=SHAPE)
        for channel, modality in enumerate(order):
            file = root / "imagesTr" / f"BRATS_{n:03d}_{channel:04d}.nii.gz"
            file.write_bytes(zipped(nifti(image[modality])))
        (root / "labelsTr" / f"BRATS_{n:03d}.nii.gz").write_bytes(zipped(nifti(mask)))
    return make_phantom(0, shape=SHAPE)[0]


REGIONS = {
    "background": 0,
    "whole tumor": [1, 2, 3],
    "tumor core": [2, 3],
    "enhancing tumor": [3],
}
"""Of nnU-Net's own Dataset137_BraTS2021."""


@pytest.mark.parametrize(
    ("labels", "values"),
    [
        (REGIONS, (2, 1, 3)),
        ({**REGIONS, "enhancing tumor": 3}, (2, 1, 3)),
        ({"background": 0, "edema": 1, "non-enhancing tumor": 2, "enhancing tumour": 3}, (2, 1, 3)),
        ({"background": 0, "NCR": 1, "ED": 2, "ET": 4}, (1, 2, 4)),
        ({"0": "background", "1": "necrotic core", "2": "Oedema", "3": "enhancing"}, (1, 2, 3)),
    ],
)
def test_nnunets_channels_and_labels_go_by_name(tmp_path: Path, labels: dict, values: tuple):
    write_nnunet(tmp_path / "Dataset137", ["T1", "T1ce", "T2", "Flair"], labels)
    first, second = find_files(str(tmp_path))
    assert (first.case_id, second.case_id) == ("BRATS_000", "BRATS_001")
    assert names(first) == [f"BRATS_000_000{n}.nii.gz" for n in (3, 0, 1, 2)]
    assert first.label_uri.endswith("labelsTr/BRATS_000.nii.gz")
    assert (first.layout, first.label_values, first.problem) == ("nnunet", values, "")
    assert label_set_of(first.label_set) == GLIOMA


@pytest.mark.parametrize(
    ("labels", "order", "values", "names", "regions"),
    [
        (
            {"Background": 0, "NETC": 1, "peritumoral edema": 2, "ET": 3, "cavity": 4},
            None,
            (1, 2, 3, 4),
            ("NETC", "peritumoral edema", "ET", "cavity"),
            {"NETC": (1,), "peritumoral edema": (2,), "ET": (3,), "cavity": (4,)},
        ),
        (
            {"background": 0, "whole": [1, 2, 5], "core (all)": [1, 2], "ET": 5},
            [1, 2, 5],
            (1, 2, 5),
            ("label 1", "label 2", "ET"),
            {"whole": (1, 2, 3), "core _all_": (1, 2), "ET": (3,)},
        ),
        ({"background": 0, "tumour": 1}, None, (1,), ("tumour",), {"tumour": (1,)}),
    ],
)
def test_any_other_labels_of_nnunet_are_a_set_of_their_own(
    tmp_path, labels, order, values, names, regions
):
    more = {"regions_class_order": order} if order else {}
    write_nnunet(tmp_path, ["T1", "T1ce", "T2", "Flair"], labels, **more)
    first = find_files(str(tmp_path))[0]
    known = label_set_of(first.label_set)
    assert (first.label_values, known.names) == (values, names)
    assert {region.name: region.labels for region in known.regions} == regions
    painted = [values.index(value) + 1 for value in order or values]
    assert [region.painted for region in known.regions] == painted


def test_nnunets_volumes_come_in_the_order_of_the_modalities(tmp_path: Path):
    import nibabel as nib

    image = write_nnunet(tmp_path, ["T2", "Flair", "T1ce", "T1"], REGIONS)
    files = find_files(str(tmp_path))[0]
    for uri, modality in zip(files.image_uris, range(len(MODALITIES)), strict=True):
        assert np.array_equal(np.asarray(nib.load(uri).dataobj), image[modality])


def test_problems_of_nnunets_files_are_told(tmp_path: Path):
    write_nnunet(tmp_path, ["Flair", "T1", "T1ce", "T2"], REGIONS)
    (tmp_path / "imagesTr" / "BRATS_000_0002.nii.gz").unlink()
    touch(tmp_path, "imagesTr/BRATS_001_0001.nii", "imagesTr/notes.nii.gz")
    missing, twice = find_files(str(tmp_path))
    assert names(missing) == [f"BRATS_000_000{n}.nii.gz" if n != 2 else "" for n in range(4)]
    assert twice.problem.startswith("two files for t1: BRATS_001_0001.nii, BRATS_001_0001.nii.gz;")
    (tmp_path / "imagesTr" / "BRATS_001_0001.nii").unlink()
    touch(tmp_path, "labelsTr/BRATS_001.nii")
    assert find_files(str(tmp_path))[1].problem == (
        "two files for seg: BRATS_001.nii, BRATS_001.nii.gz; remove one"
    )


def test_test_images_of_a_dataset_have_no_labels(tmp_path: Path):
    write_phantoms(str(tmp_path), num_cases=1, shape=SHAPE, edition="msd")
    touch(tmp_path, "Task01_BrainTumour/imagesTs/BRATS_485.nii.gz")
    touch(tmp_path, "Task01_BrainTumour/imagesTs/._BRATS_485.nii.gz")
    seen, unseen = find_files(str(tmp_path))
    assert seen.label_uri.endswith("labelsTr/BRATS_001.nii.gz")
    assert (unseen.case_id, unseen.label_uri, unseen.problem) == ("BRATS_485", None, "")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("\x00\xff", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "neither a Decathlon nor an nnU-Net"),
        ('{"channel_names": {"0": "CT"}, "labels": {"liver": 1}}', "do not name flair"),
        ('{"channel_names": {"a": "t1", "b": "t2"}, "labels": {"edema": 1}}', "not numbered"),
    ],
)
def test_a_dataset_json_that_cannot_be_used_is_named(tmp_path: Path, text: str, said: str):
    (tmp_path / "dataset.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=rf"^{tmp_path}/dataset\.json: .*{said}"):
        find_files(str(tmp_path))


@pytest.mark.parametrize(
    "labels",
    [
        {"background": 0, "NCR": 1, "ED": 1, "ET": 3},
        {"background": 0, "whole": [1, 2, 3], "core": [4, 3], "ET": [5]},
        {"background": 0, "edema": "one", "necrosis": 2, "enhancing": 3},
        {"background": 0, "edema": None},
        {"background": 0, "whole": [[1]]},
        {"background": 0, "tumour": 1, "ignore": 2},
        {"background": 0, "mean": 1},
        {"background": 0},
        {"background": 0, "tumour": 256},
    ],
)
def test_labels_that_name_no_tumour_parts_are_refused(tmp_path: Path, labels: dict):
    write_nnunet(tmp_path, ["Flair", "T1", "T1ce", "T2"], labels)
    with pytest.raises(DataError, match=r"dataset\.json: .*labels"):
        find_files(str(tmp_path))


def test_a_decathlon_file_of_another_order_is_refused(tmp_path: Path):
    write_phantoms(str(tmp_path), num_cases=1, shape=SHAPE, edition="msd")
    file = tmp_path / "Task01_BrainTumour" / "dataset.json"
    dataset = json.loads(file.read_text())
    dataset["modality"] = {"0": "T1w", "1": "FLAIR", "2": "t1gd", "3": "T2w"}
    file.write_text(json.dumps(dataset))
    with pytest.raises(DataError, match="expected FLAIR, T1w, T1gd, T2w"):
        find_files(str(tmp_path))


def test_no_case_is_an_error_that_names_the_place(tmp_path: Path):
    touch(tmp_path, "notes.txt", "scan.nii.gz")
    with pytest.raises(DataError, match=f"^{tmp_path}: no BraTS case found in 2 files"):
        find_files(str(tmp_path))
    with pytest.raises(MissingObjectError, match="nowhere: does not exist"):
        find_files(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no BraTS case found in 0 files"):
        find_files(str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("name", "case_id", "modality", "reference"),
    [
        ("BraTS2021_00000_seg.nii.gz", "BraTS2021_00000", False, True),
        ("BraTS-GLI-00000-000-seg.nii.gz", "BraTS-GLI-00000-000", False, True),
        ("BraTS2021_00000_pred.nii", "BraTS2021_00000", False, False),
        ("BraTS2021_00000.nii.gz", "BraTS2021_00000", False, False),
        ("BraTS2021_00000_t1ce.nii.gz", "BraTS2021_00000_t1ce", True, False),
    ],
)
def test_the_case_id_of_a_label_file(name: str, case_id: str, modality: bool, reference: bool):
    uri = f"s3://bucket/run/{name}"
    assert case_id_of(uri) == case_id
    assert (is_modality(uri), is_reference(uri)) == (modality, reference)


@pytest.mark.real
def test_the_real_cases_are_found(real_cases: Path):
    found = [f for year in (2020, 2021, 2023) for f in find_files(str(real_cases / f"brats{year}"))]
    assert len(found) == 8
    assert not any(f.problem for f in found)
    assert all(f.label_uri for f in found)
    assert [f.edition for f in found] == ["2020", *["2021"] * 6, "2023"]
