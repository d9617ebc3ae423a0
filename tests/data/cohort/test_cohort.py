"""A cohort file says what opening every case showed, and quarantines in words."""

import random
import shutil
from dataclasses import fields, replace
from pathlib import Path

import deflate
import nibabel as nib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from blake3 import blake3
from niftis import canonical, nifti, with_fields, zipped

from raybrats.brats import EDITIONS, MODALITIES
from raybrats.config import NUM_FOLDS, DataConfig
from raybrats.data.cohort.case import Case, open_case, prepare_case
from raybrats.data.cohort.index import find_cases, summary, verify_case, with_folds
from raybrats.data.cohort.rows import read_cohort, write_cohort
from raybrats.data.cohort.usable import quarantined, usable
from raybrats.data.prepare import Prepared
from raybrats.errors import ChangedObjectError, DataError, MissingObjectError
from raybrats.phantom.phantom import make_phantom, write_phantoms
from raybrats.recipes import recipe

SHAPE = (24, 24, 20)


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trees")
    for edition in EDITIONS:
        write_phantoms(str(root / edition), num_cases=4, shape=SHAPE, edition=edition)
    return root


@pytest.fixture
def one(trees: Path, tmp_path: Path) -> Path:
    """The folder of one case of 2021, to be damaged."""
    return Path(shutil.copytree(trees / "2021" / "BraTS2021_00000", tmp_path / "BraTS2021_00000"))


def only(folder: Path) -> Case:
    (case,) = find_cases(str(folder))
    return case


def reread(file: Path) -> nib.Nifti1Image:
    return nib.Nifti1Image.from_bytes(deflate.gzip_decompress(file.read_bytes(), 2**20))


@pytest.mark.parametrize("edition", [name for name in EDITIONS if name != "MEN-RT"])
def test_verifying_fills_every_column_with_what_numpy_counts(trees: Path, edition: str):
    for index, case in enumerate(find_cases(str(trees / edition))):
        verified = verify_case(case)
        uris = [*case.image_uris, case.label_uri]
        files = [Path(uri).read_bytes() for uri in uris]
        assert verified.sizes == tuple(len(data) for data in files)
        assert verified.digests == tuple(blake3(data).hexdigest() for data in files)
        images = [canonical(nib.load(uri)) for uri in case.image_uris]
        image = np.moveaxis(images[0], -1, 0) if edition == "msd" else np.stack(images)
        mask = canonical(nib.load(case.label_uri))
        assert verified.shape == mask.shape == SHAPE
        assert verified.spacing_mm == pytest.approx((10, 10, 7.75))
        assert verified.label_counts == tuple(
            int((mask == value).sum()) for value in EDITIONS[edition].label_values
        )
        enhancing = verified.labels.names.index("ET")
        assert (verified.label_counts[enhancing] == 0) == (index == 3)
        brain = (image != 0).any(axis=0)
        spans = [np.flatnonzero(brain.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
        assert verified.box == tuple(int(e) for s in spans for e in (s[0], s[-1] + 1))
        assert verified.mean == pytest.approx(image[:, brain].mean(axis=1))
        assert verified.deviation == pytest.approx(image[:, brain].std(axis=1))
        assert (verified.status, verified.reason) == ("ok", "")
        assert verified.edition == edition
        assert verify_case(verified) == verified


def test_a_cohort_file_gives_back_every_row(trees: Path, tmp_path: Path):
    cases = [verify_case(case) for case in find_cases(str(trees / "2023"))]
    cases += [replace(cases[0], case_id="ü", status="bad", reason="a 'reason', \"quoted\"")]
    cases += [replace(cases[0], case_id="v", label_uri=None, label_counts=(), status="unlabelled")]
    cases += find_cases(str(trees / "msd"))
    uri = str(tmp_path / "deep" / "cohort.parquet")
    write_cohort(cases, uri)
    assert read_cohort(uri) == cases
    assert pq.read_schema(uri).names == [field.name for field in fields(Case)]
    write_cohort([], uri)
    assert read_cohort(uri) == []


def test_what_is_no_cohort_file_is_refused(tmp_path: Path):
    file = tmp_path / "cohort.parquet"
    file.write_bytes(b"PAR1 but not really PAR1")
    with pytest.raises(DataError, match="not a cohort file"):
        read_cohort(str(file))
    for table in (
        {"a": [1, 2]},
        {"case_id": ["x"], "subject": ["x"]},
        {field.name: [{"deep": 1}] for field in fields(Case)},
        {field.name: ["x"] for field in fields(Case)},
    ):
        pq.write_table(pa.table(table), file)
        with pytest.raises(DataError, match=r"not a cohort file \(.*raybrats index"):
            read_cohort(str(file))
    with pytest.raises(MissingObjectError, match="does not exist"):
        read_cohort(str(tmp_path / "nothing.parquet"))


def named(*case_ids: str) -> list[Case]:
    blank = Case("", "", "2023", "brats", (), None, (1, 2, 3))
    return [replace(blank, case_id=i, subject=i.rpartition("-")[0]) for i in case_ids]


def test_folds_are_balanced_and_keep_a_subject_together():
    ids = [f"BraTS-GLI-{n:05d}-{t:03d}" for n in range(101) for t in range(1 + n % 3)]
    cases = with_folds(named(*ids))
    folds = {case.subject: case.fold for case in cases}
    assert all(case.fold == folds[case.subject] for case in cases)
    sizes = [list(folds.values()).count(fold) for fold in range(NUM_FOLDS)]
    assert sum(sizes) == 101
    assert max(sizes) - min(sizes) <= 1


def test_folds_do_not_depend_on_the_order_of_the_files():
    cases = named(*(f"BraTS-GLI-{n:05d}-000" for n in range(40)))
    shuffled = random.Random(1).sample(cases, len(cases))
    by_id = {case.case_id: case.fold for case in with_folds(shuffled)}
    assert by_id == {case.case_id: case.fold for case in with_folds(cases)}
    assert len(set(by_id.values())) == NUM_FOLDS


@pytest.mark.parametrize("layout", ["folders", "nnunet"])
def test_timepoints_of_2023_are_one_subject(tmp_path: Path, layout: str):
    ids = [f"BraTS-GLI-{n:05d}-{t:03d}" for n in range(12) for t in range(2)]
    for case_id in ids:
        if layout == "folders":
            files = [f"{case_id}/{case_id}-{end}.nii.gz" for end in ("t2f", "t1n", "t1c", "t2w")]
        else:
            files = [f"imagesTr/{case_id}_{channel:04d}.nii.gz" for channel in range(4)]
        for file in files:
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).touch()
    if layout == "nnunet":
        (tmp_path / "dataset.json").write_text(
            '{"channel_names": {"0": "flair", "1": "t1", "2": "t1ce", "3": "t2"},'
            ' "labels": {"background": 0, "NCR": 1, "ED": 2, "ET": 3}}'
        )
    cases = find_cases(str(tmp_path))
    assert [case.case_id for case in cases] == ids
    assert len({case.subject for case in cases}) == 12
    for first, second in zip(cases[::2], cases[1::2], strict=True):
        assert (first.subject, first.fold) == (second.subject, second.fold)
        assert first.case_id.startswith(f"{first.subject}-")


def spoil(folder: Path, end: str, change) -> str:
    """Changes the image of one file in place; returns its name."""
    file = folder / f"{folder.name}_{end}.nii.gz"
    voxels = np.asarray(reread(file).dataobj)
    file.write_bytes(zipped(change(voxels, reread(file).affine)))
    return file.name


@pytest.mark.parametrize("end", [".hdr", ".hdr.gz"])
def test_a_case_of_headers_and_images_is_that_of_its_volumes(one: Path, end: str):
    whole = verify_case(only(one))
    for file in sorted(one.glob("*.nii.gz")):
        image = nib.load(file)
        pair = nib.Nifti1Pair(np.asarray(image.dataobj), image.affine)
        nib.save(pair, file.with_name(file.name.replace(".nii.gz", end)))
        file.unlink()
    case = verify_case(only(one))
    assert (case.status, case.reason) == ("ok", "")
    for column in ("shape", "label_counts", "box", "mean", "deviation"):
        assert getattr(case, column) == getattr(whole, column)
    assert verify_case(case) == case
    image = one / f"{one.name}_t1{end}".replace("hdr", "img")
    image.unlink()
    assert f"{image.name}: does not exist" in verify_case(only(one)).reason


def test_a_truncated_file_is_quarantined_by_name(one: Path):
    file = one / f"{one.name}_t1ce.nii.gz"
    file.write_bytes(file.read_bytes()[:-200])
    case = verify_case(only(one))
    assert case.status == "bad"
    assert file.name in case.reason
    assert "fetch it again" in case.reason


def test_a_file_of_another_shape_is_quarantined(one: Path):
    name = spoil(one, "t2", lambda voxels, affine: nifti(voxels[:, :, 1:], affine))
    case = verify_case(only(one))
    assert case.status == "bad"
    assert case.reason.startswith(f"{one.name}: {name} differs in shape")
    assert "(24, 24, 19) and (24, 24, 20)" in case.reason


def test_a_file_that_lies_elsewhere_is_quarantined(one: Path):
    def shifted(voxels: np.ndarray, affine: np.ndarray) -> bytes:
        affine[0, 3] += 2.5
        return nifti(voxels, affine)

    name = spoil(one, "flair", shifted)
    case = verify_case(only(one))
    assert case.status == "bad"
    assert "lies elsewhere" in case.reason
    assert case.reason.startswith(f"{one.name}: ")
    assert name == f"{one.name}_flair.nii.gz"


def test_a_mirrored_mask_is_not_taken_for_the_others_grid(one: Path):
    spoil(
        one,
        "seg",
        lambda voxels, affine: nifti(voxels[::-1].copy(), affine @ np.diag([-1, 1, 1, 1])),
    )
    assert "seg.nii.gz lies elsewhere" in verify_case(only(one)).reason


def test_an_unknown_label_is_quarantined(one: Path):
    def relabelled(voxels: np.ndarray, affine: np.ndarray) -> bytes:
        return nifti(np.where(voxels == 4, 3, voxels).astype(np.uint8), affine)

    spoil(one, "seg", relabelled)
    case = verify_case(only(one))
    assert case.status == "bad"
    assert case.reason.startswith(f"{one.name}: unknown label 3; this edition has 0, 1, 2, 4")


@pytest.mark.parametrize("lost", [("seg",), ("flair",), ("flair", "t1", "seg"), ("t2",)])
def test_a_file_without_an_orientation_lies_as_the_others(one: Path, lost: tuple[str, ...]):
    whole = open_case(only(one))
    for end in lost:
        spoil(one, end, lambda v, a: with_fields(nifti(v, a), sform_code=0, qform_code=0))
    opened = open_case(only(one))
    assert np.array_equal(opened.labels, whole.labels)
    for ours, theirs in zip(opened.volumes, whole.volumes, strict=True):
        assert np.array_equal(ours, theirs)
    assert np.allclose(opened.grid.affine, whole.grid.affine, atol=1e-4)


def test_a_case_wholly_without_orientation_keeps_its_files_together(one: Path):
    for end in ("flair", "t1", "t1ce", "t2", "seg"):
        spoil(one, end, lambda v, a: with_fields(nifti(v, a), sform_code=0, qform_code=0))
    case = verify_case(only(one))
    image, labels = make_phantom(0, shape=SHAPE)
    assert case.status == "ok"
    assert case.label_counts == tuple(int((labels == n).sum()) for n in (1, 2, 3))
    assert case.mean == pytest.approx(image[:, (image != 0).any(axis=0)].mean(axis=1))


def test_one_grid_in_other_units_of_rounding_is_one_grid(one: Path):
    spoil(one, "t1", lambda voxels, affine: nifti(voxels, affine + 1e-4))
    assert verify_case(only(one)).status == "ok"


def test_an_empty_mask_is_a_case_and_scaled_images_are_measured_as_stored(one: Path):
    spoil(one, "seg", lambda voxels, affine: nifti(np.zeros_like(voxels), affine))
    before = verify_case(only(one))
    assert (before.status, before.label_counts) == ("ok", (0, 0, 0))
    spoil(one, "t1", lambda v, a: with_fields(nifti(v, a), scl_slope=0.5, scl_inter=0))
    after = verify_case(only(one))
    assert after.mean == pytest.approx(tuple(np.multiply(before.mean, (1, 0.5, 1, 1))), rel=1e-5)


def test_a_head_without_brain_or_with_two_modalities_is_quarantined(one: Path):
    for end in ("flair", "t1", "t1ce", "t2"):
        spoil(one, end, lambda voxels, affine: nifti(np.zeros_like(voxels), affine))
    assert "every voxel is background" in verify_case(only(one)).reason
    write_phantoms(str(one / "msd"), num_cases=1, shape=SHAPE, edition="msd")
    (file,) = (one / "msd").rglob("imagesTr/*.nii.gz")
    three = np.asarray(reread(file).dataobj)[..., :3]
    file.write_bytes(zipped(nifti(three, reread(file).affine)))
    assert "is not four modalities" in verify_case(only(one / "msd")).reason


def test_a_missing_or_changed_file_is_told_from_a_damaged_one(one: Path):
    case = verify_case(only(one))
    file = Path(case.image_uris[1])
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ChangedObjectError, match=f"{file.name}: other bytes than were recorded"):
        open_case(case)
    file.write_bytes(data + b"\0")
    with pytest.raises(ChangedObjectError, match=f"{len(data) + 1} bytes where {len(data)}"):
        open_case(case)
    file.unlink()
    with pytest.raises(MissingObjectError, match=f"{file.name}: does not exist"):
        open_case(case)
    assert file.name in verify_case(case).reason


def test_a_problem_of_the_names_is_kept(one: Path):
    shutil.copy(one / f"{one.name}_t1.nii.gz", one / f"{one.name}_T1.nii.gz")
    case = verify_case(only(one))
    assert case.status == "bad"
    assert case.reason.startswith("two files for t1: ")


def test_unlabelled_cases_count_as_quarantined_only_beside_labelled_ones(trees: Path):
    found = find_cases(str(trees / "2020"))
    cases = [verify_case(case) for case in found]
    bare = [verify_case(replace(case, label_uri=None)) for case in found]
    assert [case.status for case in bare] == ["unlabelled"] * 4
    assert [case.label_counts for case in bare] == [()] * 4
    assert quarantined(bare) == []
    alone = summary(bare)
    assert (alone["cases"], alone["ok"], alone["quarantined"]) == (4, 4, [])
    mixed = summary([cases[0], *bare[1:], replace(cases[0], status="bad", reason="why")])
    assert (mixed["cases"], mixed["ok"], mixed["editions"]) == (5, 1, {"2020": 5})
    assert mixed["layouts"] == ["brats"]
    assert mixed["quarantined"] == [
        {"case_id": cases[0].case_id, "reason": "why"},
        *({"case_id": case.case_id, "reason": "no label file"} for case in bare[1:]),
    ]


def test_a_case_is_prepared_with_the_modalities_asked_for(trees: Path):
    case = find_cases(str(trees / "2021"))[0]
    image, labels = make_phantom(0, shape=SHAPE)
    prepared = prepare_case(case, DataConfig(modalities=("t1ce", "flair")))
    order = [MODALITIES.index("t1ce"), MODALITIES.index("flair")]
    assert np.array_equal(prepared.image, image[order][:, *prepared.box])
    assert np.array_equal(prepared.labels, labels[prepared.box])


@pytest.mark.parametrize("wanted", [("flair",), ("t1", "flair"), ("flair", "t1", "t1ce", "t2")])
def test_wanted_files_without_an_orientation_lie_as_the_others(one: Path, wanted: tuple[str, ...]):
    whole = open_case(only(one))
    for end in wanted:
        spoil(one, end, lambda v, a: with_fields(nifti(v, a), sform_code=0, qform_code=0))
    opened = open_case(only(one), wanted, labels=False)
    for modality, volume in zip(wanted, opened.volumes, strict=True):
        assert np.array_equal(volume, whole.volumes[MODALITIES.index(modality)]), modality
    assert opened.labels is None
    assert np.allclose(opened.grid.affine, whole.grid.affine, atol=1e-4)


def test_only_the_files_that_are_wanted_are_read(one: Path):
    case = verify_case(only(one))
    whole = prepare_case(case, DataConfig(modalities=("t1ce", "flair")))
    for lost in ("t1", "t2"):
        next(one.glob(f"*_{lost}.nii.gz")).unlink()
    prepared = prepare_case(case, DataConfig(modalities=("t1ce", "flair")))
    assert np.array_equal(prepared.image, whole.image)
    next(one.glob("*_seg.nii.gz")).unlink()
    opened = open_case(case, ("flair", "t1ce"), labels=False)
    flair, t1ce = opened.volumes
    assert np.array_equal(np.stack([t1ce, flair])[:, *whole.box], whole.image)
    assert opened.labels is None
    with pytest.raises(MissingObjectError, match=r"_t2\.nii\.gz: does not exist"):
        open_case(case, ("flair", "t2"), labels=False)
    with pytest.raises(MissingObjectError, match=r"_seg\.nii\.gz: does not exist"):
        open_case(case, ("flair",))


def test_a_case_without_any_wanted_file_is_refused(one: Path):
    case = replace(only(one), image_uris=("", *only(one).image_uris[1:]))
    with pytest.raises(DataError, match=f"{case.case_id}: no flair file"):
        open_case(case, ("flair",))


def assert_equal(one: Prepared, other: Prepared):
    for mine, others in ((one, other), (one.scaling, other.scaling)):
        for name, value in vars(mine).items():
            assert name == "scaling" or np.array_equal(getattr(others, name), value), name


@pytest.mark.parametrize("lost", [("seg",), ("flair", "t1"), ("flair", "t1", "t1ce", "t2"), "all"])
@pytest.mark.parametrize("absent", [None, "t1ce"])
def test_an_indexed_case_opened_file_by_file_is_the_case_opened_at_once(
    one: Path, lost: tuple[str, ...], absent: str | None
):
    for end in (*MODALITIES, "seg") if lost == "all" else lost:
        spoil(one, end, lambda v, a: with_fields(nifti(v, a), sform_code=0, qform_code=0))
    if absent:
        next(one.glob(f"*_{absent}.nii.gz")).unlink()
    found = only(one)
    indexed = verify_case(found)
    assert indexed.status == ("incomplete" if absent else "ok")
    at_once, by_file = (prepare_case(c, DataConfig()) for c in (found, indexed))
    assert_equal(by_file, at_once)


def test_an_indexed_4d_case_is_that_of_its_file(trees: Path):
    found = find_cases(str(trees / "msd"))[0]
    at_once, by_row = (
        prepare_case(c, DataConfig(modalities=("t2", "flair"))) for c in (found, verify_case(found))
    )
    assert_equal(by_row, at_once)


def test_a_row_whose_shape_is_not_that_of_the_files_is_refused(one: Path):
    case = replace(verify_case(only(one)), shape=(24, 24, 19))
    with pytest.raises(DataError, match=r"\(24, 24, 20\) voxels where its row has \(24, 24, 19\)"):
        prepare_case(case, DataConfig())


@pytest.mark.real
def test_a_real_case_of_each_edition_is_ok(real_cases: Path):
    for folder, has in [
        ("brats2020/BraTS20_Training_001", (True, True, True)),
        ("brats2021/BraTS2021_01484", (True, True, False)),
        ("brats2023/BraTS-GLI-00000-000", (True, True, True)),
    ]:
        case = verify_case(only(real_cases / folder))
        assert (case.status, case.reason) == ("ok", "")
        assert case.shape == (240, 240, 155)
        assert case.spacing_mm == pytest.approx((1, 1, 1))
        assert tuple(count > 0 for count in case.label_counts) == has


def test_cases_with_too_little_tumour_are_left_out_by_name(caplog: pytest.LogCaptureFixture):
    """What three-modality says it leaves out: those under a hundredth of the foreground box."""
    empty = Case("", "", "2021", "brats", ("/a.nii.gz",) * 4, "/seg.nii.gz", (1, 2, 4))
    cases = [
        replace(empty, case_id=f"c{n}", subject=f"c{n}", fold=n % 2, label_counts=counts, box=box)
        for n, (counts, box) in enumerate(
            [
                ((3, 4, 3), (0, 10, 0, 10, 0, 10)),  # just one in a hundred
                ((3, 4, 2), (0, 10, 0, 10, 0, 10)),
                ((0, 0, 9), (5, 10, 0, 10, 0, 10)),
                ((0, 0, 0), (0, 10, 0, 10, 0, 10)),
                ((500, 0, 0), (0, 10, 0, 10, 0, 10)),
                ((), ()),  # not known
            ]
        )
    ]
    with caplog.at_level("WARNING"):
        good = usable(recipe("three-modality", {"data.fold": 0}), cases)
    assert [case.case_id for case in good] == ["c0", "c2", "c4", "c5"]
    assert "less than 0.01 of their voxels are labelled (2 of 6): c1, c3" in caplog.text
    assert len(usable(recipe("nnunet"), cases)) == 6
