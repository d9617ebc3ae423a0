"""Trees as nobody should have them: labels of other editions, names and files of every kind."""

import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from niftis import nifti, zipped

from raybrats.brats import EDITIONS, edition_of
from raybrats.data.cohort.case import Case, open_case
from raybrats.data.cohort.cohort import index
from raybrats.data.cohort.index import find_cases, mark_unproven, verify_case
from raybrats.data.cohort.rows import MAX_ID_BYTES, is_name, read_cohort, write_cohort
from raybrats.data.nifti.volume import Volume, decode, on_one_grid
from raybrats.errors import DataError, GridError, StorageError, UsageError
from raybrats.label_set import GLIOMA, PAEDIATRIC, label_set_of
from raybrats.phantom.phantom import write_phantoms

SHAPE = (24, 24, 20)
GLI = "BraTS-GLI-00000-000"
FOREIGN = {
    "BraTS-PED-00001-000": "PED",
    "BraTS-MET-00001-000": "MET",
    "BraTS-MEN-00004-000": "MEN",
    "BraTS-MEN-RT-0001-1": "MEN-RT",
    "BraTS-GLI-02062-100": "post-op",
    "brats-ped-00001-000": "PED",
}
"""Ids of the editions whose labels may be others than those of glioma before surgery."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one labelled case of 2023, whose values are 1, 2 and 3."""
    tree = tmp_path_factory.mktemp("source")
    write_phantoms(str(tree), num_cases=1, shape=SHAPE, edition="2023")
    return tree / GLI


@pytest.fixture
def put(source: Path, tmp_path: Path) -> Callable[..., Path]:
    """Puts the case below the tree under another id; its mask may lack, or be changed."""

    def copy(case_id: str, folder: str = "", *, labelled: bool = True, value: int = 0) -> Path:
        target = tmp_path / "tree" / (folder or case_id)
        target.mkdir(parents=True, exist_ok=True)
        for file in source.iterdir():
            if labelled or "seg" not in file.name:
                shutil.copy(file, target / file.name.replace(GLI, case_id))
        if value:
            mask = target / f"{case_id}-seg.nii.gz"
            voxels = np.asarray(nib.load(mask).dataobj).copy()
            voxels[voxels == 3] = value
            mask.write_bytes(zipped(nifti(voxels, nib.load(mask).affine)))
        return target

    return copy


def verified(tree: Path, edition: str | None = None) -> dict[str, Case]:
    return {case.case_id: verify_case(case) for case in find_cases(str(tree), edition)}


def only(tree: Path, edition: str | None = None) -> Case:
    (case,) = verified(tree, edition).values()
    return case


@pytest.mark.parametrize(("case_id", "edition"), FOREIGN.items())
def test_each_edition_has_its_own_labels_and_regions(tmp_path, case_id, edition):
    known = label_set_of(EDITIONS[edition].label_set)
    (drawn,) = write_phantoms(str(tmp_path), num_cases=1, shape=SHAPE, edition=edition)
    assert edition_of(drawn) == edition_of(case_id) == edition
    case = only(tmp_path)
    lacking = () if edition != "MEN-RT" else ("flair", "t1", "t2")
    assert (case.status, case.missing) == ("incomplete" if lacking else "ok", lacking)
    assert (case.labels, case.label_values) == (known, EDITIONS[edition].label_values)
    (mask,) = [*tmp_path.rglob("*seg.nii.gz"), *tmp_path.rglob("*gtv.nii.gz")]
    stored = np.asarray(nib.load(mask).dataobj)
    counts = [np.count_nonzero(stored == value) for value in case.label_values]
    assert case.label_counts == tuple(counts)
    assert min(counts) > 0


def test_labels_under_an_id_of_two_releases_are_bad_until_a_mask_shows_which(put, tmp_path):
    put("BraTS-PED-00001-000")  # 1, 2 and 3, which 2023 has and so may the later one
    tree = tmp_path / "tree"
    cases = mark_unproven([*verified(tree).values()])
    assert [case.status for case in cases] == ["bad"]
    for words in ("BraTS-PED ids are those of two releases", "--edition 2023 for 1 NCR", "PED for"):
        assert words in cases[0].reason
    assert only(tree, "2023").labels == GLIOMA
    assert only(tree, "PED").labels == PAEDIATRIC
    put("BraTS-PED-00002-000", value=4)  # oedema of the later one
    cases = mark_unproven([*verified(tree).values()])
    assert [(case.status, case.labels) for case in cases] == [("ok", PAEDIATRIC)] * 2


@pytest.mark.parametrize("case_id", ["patient7", "BRATS_001", "BraTS-GLI-00001", "BraTS2021"])
def test_labels_under_an_id_that_says_nothing_are_bad_until_an_edition_is_stated(
    put, tmp_path, case_id
):
    put(case_id)
    case = only(tmp_path / "tree")
    assert (case.status, case.edition) == ("bad", "unknown")
    assert "--edition" in case.reason
    assert "2020, 2021, 2023, msd" in case.reason
    stated = only(tmp_path / "tree", "2023")
    assert (stated.status, stated.edition, stated.label_values) == ("ok", "2023", (1, 2, 3))
    assert only(tmp_path / "tree", "msd").label_counts == tuple(
        stated.label_counts[n] for n in (1, 0, 2)
    )


@pytest.mark.parametrize(
    ("case_id", "edition"),
    [
        ("Brats17_2013_10_1", "2020"),
        ("Brats18_CBICA_AAM_1", "2020"),
        ("BraTS19_TCIA10_408_1", "2020"),
        ("BraTS20_Training_001", "2020"),
        ("BraTS2021_00000", "2021"),
        (GLI, "2023"),
        ("BRATS-gli-00005-012", "2023"),
        ("BraTS-SSA-00002-000", "2023"),
        ("BraTS-GoAT-00000", "2023"),
        ("BraTS-GLI-00005-1000", "unknown"),
        ("xBraTS2021_00000", "unknown"),
        ("BraTS2022_00000", "unknown"),
        *FOREIGN.items(),
    ],
)
def test_the_beginning_of_an_id_names_the_edition(case_id, edition):
    assert edition_of(case_id) == edition


@pytest.mark.parametrize("case_id", ["BraTS-SSA-00002-000", "BraTS-GoAT-00000", GLI])
def test_editions_with_the_labels_of_2023_are_ok(put, tmp_path, case_id):
    put(case_id)
    case = only(tmp_path / "tree")
    assert (case.status, case.edition, case.label_values) == ("ok", "2023", (1, 2, 3))


@pytest.mark.parametrize(
    ("case_id", "value", "stated"),
    [
        (GLI, 4, None),  # GLI after surgery under an id from before
        ("BraTS2021_00000", 0, None),  # 3 where 2021 has 4
        ("BraTS-PED-00001-000", 4, "2023"),
        ("BraTS-MET-00001-000", 5, None),
        ("BraTS-MEN-RT-0001-1", 0, None),
        (GLI, 0, "2021"),
    ],
)
def test_a_value_that_the_edition_lacks_is_bad_whoever_named_it(
    put, tmp_path, case_id, value, stated
):
    put(case_id, value=value)
    case = only(tmp_path / "tree", stated)
    assert case.status == "bad"
    assert re.search(f"unknown label [{value or '23'}]; this edition has", case.reason)


def test_an_edition_that_is_stated_takes_mapped_labels(put, tmp_path):
    for case_id in FOREIGN:
        put(case_id, folder=f"{case_id}-folder")
    cases = verified(tmp_path / "tree", "2023").values()
    assert {(case.status, case.edition) for case in cases} == {("ok", "2023")}
    with pytest.raises(UsageError, match=r"--edition 'GLI': there are 2020, 2021, 2023, msd, MEN"):
        find_cases(str(tmp_path / "tree"), "GLI")


def test_a_dataset_json_keeps_its_own_labels(tmp_path):
    write_phantoms(str(tmp_path), num_cases=1, shape=SHAPE, edition="msd")
    assert only(tmp_path, "2020").label_values == (2, 1, 3)


@pytest.mark.parametrize("labelled", [True, False])
def test_whoever_needs_no_labels_opens_any_case(put, tmp_path, labelled):
    put("patient7", labelled=labelled)
    (case,) = find_cases(str(tmp_path / "tree"))
    assert case.status == "ok"
    assert case.written_values == (1, 2, 3)
    assert len(open_case(case, labels=False).volumes) == 4
    assert verify_case(case).status == ("bad" if labelled else "ok").replace("ok", "unlabelled")
    if labelled:
        with pytest.raises(DataError, match="--edition"):
            open_case(case, ("flair",))


def test_scans_of_one_subject_are_in_one_fold_also_with_a_longer_prefix(put, tmp_path):
    for visit in (1, 2):
        put(f"BraTS-MEN-RT-0001-{visit}")
    assert {c.subject for c in find_cases(str(tmp_path / "tree"), "2023")} == {"BraTS-MEN-RT-0001"}


@pytest.mark.ray
def test_a_tree_of_which_nothing_can_be_used_gives_no_cohort(put, tmp_path, ray_cluster):
    assert ray_cluster.address
    put("BraTS-PED-00001-000")
    put("patient7")
    out = tmp_path / "cohort.parquet"
    with pytest.raises(DataError) as refusal:
        index(str(tmp_path / "tree"), str(out))
    assert refusal.value.exit_code == 5
    for words in ("1 of edition PED", "1 of edition unknown", "two releases", "--edition 2023"):
        assert words in str(refusal.value)
    assert not out.exists()
    put(GLI)
    assert index(str(tmp_path / "tree"), str(out)).summary["ok"] == 1
    assert read_cohort(str(out))[0].status == "ok"


# Names


NAMES = {
    "newline in the folder": ("two\nlines", GLI),
    "escape in the folder": ("\x1b[31mred", GLI),
    "control of 8 bits in the folder": ("\x9b31m", GLI),
    "bytes that are no UTF-8": (os.fsdecode(b"\xff\xfe"), GLI),
    "newline in the id": ("", "BraTS-GLI-00000-000\nx"),
    "backslash in the id": ("", "BraTS-GLI-00000\\000"),
    "escape in the id": ("", "BraTS-GLI-00000-000\x1b[2J"),
    "id that is no UTF-8": ("", os.fsdecode(b"BraTS-\xff")),
    "id of 230 bytes": ("", "BraTS-GLI-00000-000" + "x" * 211),
}


@pytest.mark.parametrize(("folder", "case_id"), NAMES.values(), ids=NAMES)
def test_a_name_that_could_confuse_is_reported_as_a_bad_case(put, tmp_path, folder, case_id):
    put(case_id, folder=folder or "folder")
    put("BraTS-GLI-00001-000")
    cases = list(verified(tmp_path / "tree").values())
    assert sorted(case.status for case in cases) == ["bad", "ok"]
    (bad,) = (case for case in cases if case.status == "bad")
    assert is_name(bad.case_id)
    assert bad.reason.isprintable()
    assert bad.reason.endswith("rename it")
    write_cohort(cases, str(tmp_path / "cohort.parquet"))
    assert read_cohort(str(tmp_path / "cohort.parquet")) == cases


def test_an_id_that_predict_refuses_is_refused_by_index(put, tmp_path):
    """What is written as a row is read again, whatever the tree's names are."""
    ids = ["a\\b", "\x7f", "x" * (MAX_ID_BYTES + 1), "x" * (MAX_ID_BYTES + 2), "..", "BraTS2021_1"]
    for number, case_id in enumerate(ids):
        put(case_id, folder=str(number))
    found = verified(tmp_path / "tree")
    shown = len(ids) - 1  # a name that begins with a dot is hidden
    assert len(found) == shown
    assert all(is_name(case_id) for case_id in found)
    write_cohort(found.values(), str(tmp_path / "cohort.parquet"))
    assert len(read_cohort(str(tmp_path / "cohort.parquet"))) == shown


def test_a_file_of_nnunet_without_an_id_is_reported(tmp_path):
    (tmp_path / "imagesTr").mkdir()
    channels = {str(n): name for n, name in enumerate(("flair", "t1", "t1ce", "t2"))}
    labels = {"background": 0, "NCR": 1, "ED": 2, "ET": 3}
    (tmp_path / "dataset.json").write_text(
        json.dumps({"channel_names": channels, "labels": labels})
    )
    for channel in range(4):
        (tmp_path / "imagesTr" / f"_{channel:04d}.nii.gz").touch()
    case = only(tmp_path)
    assert (case.case_id, case.status) == ("(empty)", "bad")


# Files that are none


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    where = os.getcwd()
    os.chdir(path.parent)  # a socket's path has 107 bytes at most
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(where)


def make_device(path: Path) -> None:
    try:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))  # as /dev/zero, which never ends
    except PermissionError:
        pytest.skip("only root makes devices")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("end", ["t1n", "seg"])
@pytest.mark.parametrize("make", [make_fifo, make_socket, make_device])
def test_what_is_no_file_is_quarantined_and_never_opened(put, tmp_path, make, end):
    file = put(GLI) / f"{GLI}-{end}.nii.gz"
    file.unlink()
    make(file)
    case = only(tmp_path / "tree")
    assert case.status == "bad"
    kind = make.__name__.removeprefix("make_").replace("fifo", "FIFO")
    assert case.reason == f"{file}: is a {kind}; expected a regular file"


@pytest.mark.timeout(60)
def test_a_dataset_json_that_is_a_fifo_is_refused(put, tmp_path):
    put(GLI)
    make_fifo(tmp_path / "tree" / "dataset.json")
    with pytest.raises(StorageError, match=r"dataset\.json: is a FIFO"):
        find_cases(str(tmp_path / "tree"))


@pytest.fixture
def nobody(put: Callable[..., Path]) -> Iterator[Path]:
    """A tree of one case in a place that all may enter, read by a user who is not root."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    shutil.copytree(put(GLI), folder / GLI)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield folder
    if root:
        os.seteuid(0)
    shutil.rmtree(folder)


def closed(path: Path) -> None:
    user = os.geteuid()
    os.seteuid(os.getuid())
    path.chmod(0)
    os.seteuid(user)


def test_a_local_file_that_may_not_be_read_says_so(nobody):
    file = nobody / GLI / f"{GLI}-t2w.nii.gz"
    closed(file)
    case = only(nobody)
    assert (case.status, case.reason) == ("bad", f"{file}: cannot be read: Permission denied")


@pytest.mark.parametrize("name", [".Trash-0", "lost+found"])
def test_a_folder_of_the_disk_that_may_not_be_read_is_no_matter(nobody, name):
    user = os.geteuid()
    os.seteuid(os.getuid())
    (nobody / name).mkdir(mode=0)
    os.seteuid(user)
    assert only(nobody).status == "ok"


def test_a_folder_that_may_not_be_read_is_not_passed_over(nobody):
    closed(nobody / GLI)
    with pytest.raises(StorageError, match=f"^{nobody / GLI}: cannot be read: Permission denied$"):
        find_cases(str(nobody))
    with pytest.raises(StorageError, match="cannot be read: Permission denied"):
        find_cases(str(nobody / GLI / "below"))


# The file that differs


def volume(shape: tuple[int, int, int] = (4, 5, 6), shift: float = 0.0) -> Volume:
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    affine[0, 3] = shift
    return decode(nifti(np.ones(shape, np.int16), affine), "x.nii")


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize(
    ("odd", "how"), [({"shape": (4, 5, 7)}, "differs in shape"), ({"shift": 3}, "lies elsewhere")]
)
def test_the_file_that_differs_from_the_other_three_is_the_one_named(place, odd, how):
    volumes = [volume(**(odd if n == place else {})) for n in range(4)]
    names = ["flair.nii", "t1.nii", "t1ce.nii", "t2.nii"]
    with pytest.raises(GridError, match=f"^case: {names[place]} {how}"):
        on_one_grid("case", names, volumes)


def test_grids_that_are_each_like_the_next_are_told_apart_all_the_same():
    """Rounding of another tool: the one in the middle is like both others."""
    with pytest.raises(GridError, match="lies elsewhere"):
        on_one_grid("case", ["a", "b", "c"], [volume(shift=n * 0.008) for n in range(3)])


@pytest.mark.parametrize("bare", [1, 3])
def test_the_odd_one_is_named_also_where_another_states_no_orientation(bare):
    volumes = [volume(shape=(4, 5, 7)), *(volume() for _ in range(3))]
    volumes[bare] = replace(volumes[bare], grid=replace(volumes[bare].grid, oriented=False))
    with pytest.raises(
        GridError, match=r"^case: flair differs in shape from the others: \(4, 5, 7"
    ):
        on_one_grid("case", ["flair", "t1", "t1ce", "t2"], volumes)
