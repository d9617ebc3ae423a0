"""Bad input D1 to D9: each is refused, or taken right, in words that name the file and a remedy."""

import gzip
import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from niftis import nifti, with_fields, zipped

from raybrats import storage
from raybrats.brats import EDITIONS, MODALITIES
from raybrats.config import NUM_FOLDS, AugmentConfig, DataConfig, TrainConfig
from raybrats.data.cohort import layout
from raybrats.data.cohort.case import BAD, INCOMPLETE, OK, UNLABELLED, Case, open_case, prepare_case
from raybrats.data.cohort.index import (
    case_of,
    find_cases,
    mark_copies,
    summary,
    verify_case,
    with_folds,
)
from raybrats.data.cohort.rows import read_cohort, write_cohort
from raybrats.data.cohort.usable import usable, with_modalities
from raybrats.data.nifti.volume import decode
from raybrats.errors import ChangedObjectError, DataError, StorageError
from raybrats.label_set import GLIOMA
from raybrats.phantom.phantom import write_phantoms

pytestmark = pytest.mark.faults
SHAPE = (24, 24, 20)
CASE = "BraTS2021_00000"
VOLUME_BYTES = 240 * 240 * 155 * 2


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cases an edition."""
    root = tmp_path_factory.mktemp("trees")
    for edition in EDITIONS:
        write_phantoms(str(root / edition), num_cases=2, shape=SHAPE, edition=edition)
    return root


@pytest.fixture
def tree(trees: Path, tmp_path: Path) -> Path:
    """A tree of two cases of 2021, to be damaged."""
    return Path(shutil.copytree(trees / "2021", tmp_path / "tree"))


def part(tree: Path, end: str, case_id: str = CASE) -> Path:
    return tree / case_id / f"{case_id}_{end}.nii.gz"


def spoil(file: Path, change) -> None:
    """Replaces a file's image by what `change` makes of its voxels and affine."""
    image = nib.load(file)
    file.write_bytes(zipped(change(np.asarray(image.dataobj), image.affine)))


def verified(tree: Path) -> Case:
    """The first case, verified; the second one is sound whatever becomes of the first."""
    cases = [verify_case(case) for case in find_cases(str(tree))]
    assert [case.status for case in cases[1:]] == [OK] * (len(cases) - 1)
    assert len(cases) == 2
    return cases[0]


def run(**fields) -> TrainConfig:
    return TrainConfig(data=DataConfig(cohort="cohort.parquet", **fields))


# D1 damaged files


def cut_trailer(data: bytes) -> bytes:
    return data[:-4]


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]


DAMAGE = {
    "truncated": (lambda data: data[: len(data) // 2], "truncated"),
    "4-byte trailer cut": (cut_trailer, "truncated"),
    "one byte lacks": (lambda data: data[:-1], "truncated"),
    "bit flipped": (flipped, "damaged gzip"),
    "trailing bytes": (lambda data: data + b"<html>", "damaged gzip"),
    "gzip of text": (lambda _: zipped(b"not a volume" * 99), "not a NIfTI file"),
    "html page": (lambda _: b"<html><body>403 Forbidden</body></html>", "not a NIfTI file"),
    "lfs pointer": (lambda _: b"version https://git-lfs.github.com/spec/v1", "not a NIfTI file"),
    "0 bytes": (lambda _: b"", "not a NIfTI file"),
    "half a .nii": (lambda data: gzip.decompress(data)[:9000], "truncated"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_d1_a_damaged_file_is_quarantined_by_its_name(tree: Path, name: str):
    damage, said = DAMAGE[name]
    file = part(tree, "t1ce")
    file.write_bytes(damage(file.read_bytes()))
    case = verified(tree)
    assert case.status == BAD
    assert case.reason.startswith(f"{file.name}: ")
    assert said in case.reason
    assert "fetch it again" in case.reason
    assert "\n" not in case.reason
    with pytest.raises(DataError, match=rf"^1 of 2 .*{CASE} \({file.name}.*max_bad_fraction"):
        usable(run(), [case, replace(case, case_id="other", status=OK)])


def test_d1_a_nii_gz_that_is_not_zipped_is_read(tree: Path):
    file = part(tree, "t1ce")
    expected = open_case(verified(tree)).volumes[2]
    file.write_bytes(gzip.decompress(file.read_bytes()))
    case = verified(tree)
    assert case.status == OK
    assert np.array_equal(open_case(case).volumes[2], expected)


@pytest.mark.parametrize("wrap", [bytes, zipped], ids=["nii", "nii.gz"])
def test_d1_what_changed_after_indexing_is_told_from_what_was_bad(tree: Path, wrap):
    file = part(tree, "t2")
    file.write_bytes(wrap(gzip.decompress(file.read_bytes())))
    case = verified(tree)
    file.write_bytes(flipped(file.read_bytes()))
    with pytest.raises(ChangedObjectError, match=f"{file.name}: other bytes than were recorded"):
        open_case(case)


def escaped(damaged: bytes, sound: bytes) -> bool:
    """Whether decoding takes the damaged file; then it must have taken no other voxel from it."""
    try:
        volume = decode(damaged, "copy")
    except DataError:
        return False
    whole = decode(sound, "sound")
    assert np.array_equal(volume.voxels, whole.voxels)
    assert np.array_equal(volume.grid.affine, whole.grid.affine)
    return True


@pytest.mark.real
def test_d1_no_flipped_bit_of_real_files_is_missed(real_cases: Path, tmp_path: Path):
    draw = random.Random(20)
    folders = ("brats2020/BraTS20_Training_001", "brats2021/BraTS2021_00006", "brats2023/*")
    files = [file for folder in folders for file in sorted(real_cases.glob(f"{folder}/*.nii.gz"))]
    copy, harmless, caught = tmp_path / "copy.nii.gz", 0, 0
    for file in files:
        sound = file.read_bytes()
        digest = storage.digest_of(sound)
        for _ in range(300 // len(files)):
            bit = draw.randrange(8 * len(sound))
            damaged = bytearray(sound)
            damaged[bit // 8] ^= 1 << bit % 8
            harmless += escaped(bytes(damaged), sound)
            copy.write_bytes(damaged)
            with pytest.raises(ChangedObjectError, match="other bytes than were recorded"):
                decode(storage.read_bytes(str(copy), size=len(sound), digest=digest), "copy")
            caught += 1
    print(f"{caught} bits flipped, {caught} caught; {caught - harmless} by decoding alone")
    assert caught == 300
    assert harmless < 30  # two codes for the same zeros, or the gzip header's time


# D2 bombs and senseless headers: see also test_volume.py

BOMBS = r"""
import gzip, resource, sys, zlib
import nibabel as nib, numpy as np
from raybrats.data.nifti.volume import decode
from raybrats.errors import DataError

def header(shape, dtype=np.int16):
    h = nib.Nifti1Header()
    h.set_data_dtype(dtype)
    h.set_data_shape(shape)
    h["vox_offset"], h["magic"], h["sform_code"] = 352, b"n+1", 1
    h["srow_x"], h["srow_y"], h["srow_z"] = np.eye(4)[:3]
    return h.binaryblock + bytes(4)

def zeros(start, megabytes):
    pack = zlib.compressobj(9, wbits=31)
    parts = [pack.compress(start + bytes(2**20)), pack.flush(zlib.Z_FULL_FLUSH)]
    repeated = pack.compress(bytes(2**20)) + pack.flush(zlib.Z_FULL_FLUSH)
    size = (len(start) + (megabytes + 1) * 2**20).to_bytes(4, "little")
    return b"".join(parts) + repeated * megabytes + b"\3\0" + bytes(4) + size

big = header((512, 512, 512), np.float64)
forged = gzip.compress(big)[:-4] + (352 + 8 * 512**3).to_bytes(4, "little")
far = nib.Nifti1Header(header((4, 4, 4))[:348])
far["vox_offset"] = 5e8
bombs = {
    "header, .nii": header((1000, 1000, 700), np.float32),
    "header, .nii.gz": gzip.compress(header((1000, 1000, 700), np.float32)),
    "header of the largest shape": gzip.compress(big),
    "header and trailer agree": forged,
    "zeros behind a small volume": zeros(header((64, 64, 64)), 600),
    "zeros without a header": zeros(b"", 600),
    "zeros with their header": zeros(header((1024, 1024, 512)), 600),
    "an offset of 500 MB": zeros(far.binaryblock, 600),
}
small = header((64, 64, 64)) + bytes(2 * 64**3)
decode(gzip.compress(small), "small")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name, data in bombs.items():
    assert len(data) < 2**20, name
    try:
        decode(data, "bomb")
    except DataError as error:
        print(name, "|", error)
    else:
        sys.exit(name + " was decoded")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_d2_bombs_are_refused_before_they_are_unpacked():
    done = subprocess.run([sys.executable, "-c", BOMBS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *refusals, grown_kb = done.stdout.splitlines()
    assert len(refusals) == 8
    assert all(" | bomb: " in line for line in refusals)
    assert int(grown_kb) * 1024 < 2 * VOLUME_BYTES


SENSELESS = {
    "dimension 0": {"dim": [3, 24, 0, 20, 1, 1, 1, 1]},
    "dimension below 0": {"dim": [3, 24, -24, 20, 1, 1, 1, 1]},
    "rank below 0": {"dim": [-3, 24, 24, 20, 1, 1, 1, 1]},
    "unknown type": {"datatype": 87},
    "infinite slope": {"scl_slope": np.inf},
    "vox_offset NaN": {"vox_offset": np.nan},
}


@pytest.mark.parametrize("name", SENSELESS)
def test_d2_a_senseless_header_quarantines_the_case(tree: Path, name: str):
    file = part(tree, "flair")
    spoil(file, lambda voxels, affine: with_fields(nifti(voxels, affine), **SENSELESS[name]))
    case = verified(tree)
    assert case.status == BAD
    assert case.reason.startswith(f"{file.name}: ")
    assert any(remedy in case.reason for remedy in ("repair the header", "convert it"))


# D3 grids: see also test_cohort.py


@pytest.mark.parametrize("codes", ["RAS", "LAS", "PIR"])
def test_d3_files_of_one_case_in_other_orientations_are_reoriented(tree: Path, codes: str):
    whole = open_case(verified(tree))

    def turned(voxels: np.ndarray, affine: np.ndarray) -> bytes:
        image = nib.Nifti1Image(voxels, affine)
        own = nib.orientations.io_orientation(affine)
        wanted = nib.orientations.axcodes2ornt(codes)
        other = image.as_reoriented(nib.orientations.ornt_transform(own, wanted))
        assert "".join(nib.aff2axcodes(other.affine)) == codes
        return nifti(np.asarray(other.dataobj), other.affine)

    for end in ("t1", "seg"):
        spoil(part(tree, end), turned)
    case = verified(tree)
    opened = open_case(case)
    assert (case.status, case.reason, case.shape) == (OK, "", SHAPE)
    assert np.array_equal(opened.labels, whole.labels)
    assert np.array_equal(opened.volumes[1], whole.volumes[1])


def test_d3_a_4_d_file_where_a_3_d_one_is_due_is_named(tree: Path):
    spoil(part(tree, "t2"), lambda v, a: nifti(np.stack([v, v], axis=-1), a))
    case = verified(tree)
    assert case.status == BAD
    assert case.reason.startswith(f"{CASE}: ")
    assert "(24, 24, 20, 2) is not four modalities" in case.reason
    assert "expected one 3-D file a modality" in case.reason


def test_d3_a_trailing_axis_of_one_and_a_header_extension_are_borne_with(tree: Path):
    def extended(voxels: np.ndarray, affine: np.ndarray) -> bytes:
        image = nib.Nifti1Image(voxels[..., None], affine)
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"x" * 4000))
        return image.to_bytes()

    before = verified(tree)
    spoil(part(tree, "t2"), extended)
    after = verified(tree)
    assert (after.status, after.mean, after.box) == (OK, before.mean, before.box)


# D4 missing files


def test_d4_a_missing_modality_is_an_error_unless_the_recipe_drops_modalities(tree: Path):
    part(tree, "t1ce").unlink()
    cases = [verify_case(case) for case in find_cases(str(tree))]
    first, second = cases
    assert (first.status, first.reason) == (INCOMPLETE, "no t1ce file")
    assert (first.sizes[2], first.digests[2], first.mean[2]) == (0, "", 0)
    assert first.label_counts != ()
    assert verify_case(first) == first
    empty = open_case(first).volumes[2]
    assert (empty.dtype, empty.shape, empty.any()) == (np.int16, SHAPE, False)
    assert prepare_case(first, DataConfig()).scaling.gain[2] == 0
    with pytest.raises(DataError, match=rf"{CASE} \(no t1ce file; augment\.drop_modality takes"):
        usable(run(fold=-1), cases)
    dropping = replace(run(fold=-1), augment=AugmentConfig(drop_modality=0.2))
    assert usable(dropping, cases) == [first, second]
    bare = replace(first, label_uri=None)
    with pytest.raises(DataError, match=rf"{CASE} \(no label file"):
        usable(dropping, [bare, second])


def test_d4_only_a_model_trained_with_modalities_dropped_takes_an_incomplete_case(tree: Path):
    from torch import nn

    from raybrats.model.inference import Member
    from raybrats.predict.predict import segment_case
    from raybrats.registry.load import Model

    part(tree, "t1ce").unlink()
    case = find_cases(str(tree))[0]
    everywhere = nn.Conv3d(4, 3, kernel_size=1)
    nn.init.zeros_(everywhere.weight)
    nn.init.ones_(everywhere.bias)
    model = Model("models:/m/1", MODALITIES, GLIOMA, False, (Member(everywhere, TrainConfig()),))
    with pytest.raises(DataError, match=rf"^{CASE}: no t1ce file; complete it, or use a model"):
        segment_case(case, model, str(tree / "out"))
    segment_case(case, replace(model, takes_incomplete=True), str(tree / "out"))
    assert set(np.unique(nib.load(tree / "out" / f"{CASE}.nii.gz").dataobj)) == {0, 4}


def test_d4_the_files_of_an_incomplete_case_are_verified_all_the_same(tree: Path):
    part(tree, "t1ce").unlink()
    part(tree, "t2").write_bytes(b"")
    case = verified(tree)
    assert case.status == BAD
    assert part(tree, "t2").name in case.reason


def test_d4_an_incomplete_case_comes_back_from_the_cohort_file(tree: Path):
    part(tree, "flair").unlink()
    cases = [verify_case(case) for case in find_cases(str(tree))]
    write_cohort(cases, str(tree / "cohort.parquet"))
    assert read_cohort(str(tree / "cohort.parquet")) == cases
    assert summary(cases)["quarantined"] == [
        {"case_id": CASE, "reason": "no flair file; augment.drop_modality takes such cases"}
    ]


def test_d4_a_missing_mask_is_named_but_validation_folders_need_none(tree: Path):
    part(tree, "seg").unlink()
    cases = [verify_case(case) for case in find_cases(str(tree))]
    assert [case.status for case in cases] == [UNLABELLED, OK]
    with pytest.raises(DataError, match=rf"{CASE} \(no label file\)"):
        usable(run(fold=-1), cases)
    tree.rename(tree.parent / "BraTS2021_ValidationData")
    found = find_cases(str(tree.parent))
    assert usable(run(fold=-1), [verify_case(case) for case in found])


def test_d4_case_355_of_2020_is_verified_with_its_renamed_mask(trees: Path, tmp_path: Path):
    folder = tmp_path / "BraTS20_Training_355"
    shutil.copytree(trees / "2020", tmp_path / "from")
    source = next((tmp_path / "from").rglob("BraTS20_Training_001"))
    folder.mkdir()
    for file in source.iterdir():
        end = file.name.removeprefix("BraTS20_Training_001")
        new = "W39_1998.09.19_Segm.nii.gz" if "seg" in end else f"BraTS20_Training_355{end}"
        file.rename(folder / new)
    (case,) = find_cases(str(folder))
    assert verify_case(case).status == OK


# D5 odd values


def test_d5_a_modality_of_zeros_or_of_one_value_is_flagged_and_divides_nothing(tree: Path):
    spoil(part(tree, "t1"), lambda v, a: nifti(np.zeros_like(v), a))
    spoil(part(tree, "t2"), lambda v, a: nifti(np.full_like(v, 7), a))
    with np.errstate(all="raise"):
        case = verified(tree)
        prepared = prepare_case(case, DataConfig())
    assert (case.status, case.reason) == (INCOMPLETE, "t1, t2 constant inside the brain")
    assert np.isfinite([*prepared.scaling.gain, *prepared.scaling.bias]).all()
    assert (prepared.scaling.gain[1], prepared.scaling.gain[3]) == (0, 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_d5_nan_and_infinite_voxels_are_refused_and_counted(tree: Path, value: float):
    def changed(voxels: np.ndarray, affine: np.ndarray) -> bytes:
        voxels = voxels.astype(np.float32)
        voxels[3:5, 4, 5] = value
        return nifti(voxels, affine)

    spoil(part(tree, "flair"), changed)
    case = verified(tree)
    said = f"{part(tree, 'flair').name}: 2 voxels are NaN or infinite; repair the file"
    assert (case.status, case.reason) == (BAD, said)


def test_d5_negative_brain_voxels_and_minus_zero_stay_what_they_are(tree: Path):
    def changed(voxels: np.ndarray, affine: np.ndarray) -> bytes:
        voxels = voxels.astype(np.float32)
        return nifti(np.where(voxels == 0, np.float32(-0.0), voxels - 300.5), affine)

    before = verified(tree)
    brain = open_case(before).volumes[0] != 0
    spoil(part(tree, "flair"), changed)
    after = verified(tree)
    assert (after.status, after.box) == (OK, before.box)
    volume = open_case(after).volumes[0]
    assert (volume[brain] < 0).any()
    assert np.array_equal(volume != 0, brain)


# D6 labels


@pytest.mark.parametrize(
    ("edition", "taken", "unknown"),
    [("2020", (1, 2, 4), 3), ("2021", (1, 2, 4), 5), ("2023", (1, 2, 3), 4)],
)
def test_d6_an_edition_has_its_labels_and_no_other(trees, tmp_path, edition, taken, unknown):
    tree = Path(shutil.copytree(trees / edition, tmp_path / "tree"))
    found = find_cases(str(tree))
    sound = verify_case(found[0])
    assert (sound.status, sound.label_values) == (OK, taken)
    assert min(sound.label_counts[:2]) > 0

    def relabelled(voxels: np.ndarray, affine: np.ndarray) -> bytes:
        return nifti(np.where(voxels == 2, unknown, voxels).astype(np.uint8), affine)

    spoil(Path(found[0].label_uri), relabelled)
    case = verify_case(found[0])
    assert case.status == BAD
    assert case.reason.startswith(f"{case.case_id}: unknown label {unknown}; this edition has 0, ")
    assert "leave the case out" in case.reason


@pytest.mark.parametrize("factor", [0.9999, 1.00001])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_d6_float_masks_count_as_the_whole_numbers_they_mean(tree: Path, factor: float, dtype):
    before = verified(tree)
    spoil(part(tree, "seg"), lambda v, a: nifti((v * factor).astype(dtype), a))
    assert verified(tree).label_counts == before.label_counts


def test_d6_a_resampled_mask_is_refused(tree: Path):
    spoil(part(tree, "seg"), lambda v, a: nifti((v * 0.75).astype(np.float32), a))
    case = verified(tree)
    assert case.status == BAD
    assert case.reason == f"{CASE}: labels are not whole numbers; was it resampled?"


# D7 twins and leaks


@pytest.mark.parametrize("same_order", [True, False])
def test_d7_one_content_under_two_ids_is_bad(tree: Path, same_order: bool):
    other = tree / "BraTS2021_00077"
    other.mkdir()
    ends = dict(zip(MODALITIES, MODALITIES if same_order else MODALITIES[::-1], strict=True))
    for end in (*MODALITIES, "seg"):
        shutil.copy(part(tree, end), part(tree, ends.get(end, end), other.name))
    cases = mark_copies([verify_case(c) for c in find_cases(str(tree))])
    assert [case.status for case in cases] == [OK, OK, BAD]
    assert cases[2].reason == f"same image files as {CASE}; remove one of the two"
    assert mark_copies(cases) == cases


def test_d7_cases_that_could_not_be_read_are_not_copies_of_each_other(tree: Path):
    for case_id in (CASE, "BraTS2021_00001"):
        part(tree, "t1", case_id).write_bytes(b"")
    cases = [verify_case(case) for case in find_cases(str(tree))]
    assert mark_copies(cases) == cases


@given(
    visits=st.dictionaries(st.integers(0, 99_999), st.integers(1, 4), min_size=1, max_size=30),
    kind=st.sampled_from(["GLI", "MEN", "MET", "PED", "SSA"]),
    seed=st.integers(0, 9),
)
@settings(max_examples=60)
def test_d7_no_subject_is_in_two_folds(visits: dict[int, int], kind: str, seed: int):
    ids = [f"BraTS-{kind}-{n:05d}-{t:03d}" for n, times in visits.items() for t in range(times)]
    random.Random(seed).shuffle(ids)
    blank = layout.Files("", "2023", "brats", ("",) * 4, None, (1, 2, 3))
    cases = with_folds([case_of(replace(blank, case_id=i)) for i in ids])
    folds: dict[str, set[int]] = {}
    for case in cases:
        folds.setdefault(case.case_id[:-4], set()).add(case.fold)
    assert len(folds) == len(visits)
    assert all(len(found) == 1 for found in folds.values())
    assert all(0 <= case.fold < NUM_FOLDS for case in cases)


ROW = Case("BraTS-GLI-00012-000", "BraTS-GLI-00012", "2023", "brats", ("/a",) * 4, "/b", (1, 2, 3))
BOXED = {"case_id": "a", "subject": "a", "shape": (9, 9, 7)}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"case_id": "BraTS-GLI-00012-001", "fold": 3}, "subject BraTS-GLI-00012 is in folds -1"),
        ({}, "case BraTS-GLI-00012-000 has two rows"),
        ({"case_id": "../../evil"}, "'../../evil' is no file name"),
        ({"case_id": "a\\b"}, "is no file name"),
        ({"case_id": ".hidden"}, "is no file name"),
        ({"case_id": ""}, "is no file name"),
        (BOXED | {"box": (0, 9, 0, 9, 0, 8)}, "box (0, 9, 0, 9, 0, 8) in a shape of (9, 9, 7)"),
        (BOXED | {"box": (0, 9, 4, 4, 0, 7)}, "box (0, 9, 4, 4, 0, 7) in a shape"),
        (BOXED | {"box": (0, 9, 0, 9)}, "box (0, 9, 0, 9) in a shape"),
        (BOXED | {"box": (0, 9, 0, 9, 0, 7), "shape": ()}, "in a shape of ()"),
        (BOXED | {"box": None}, "the row of case 'a' lacks a value"),
        (BOXED | {"sizes": (1,) * 4}, "has fewer sizes or digests than files"),
    ],
)
def test_d7_d8_a_cohort_file_that_was_edited_wrongly_is_refused(tmp_path, changes, said):
    uri = str(tmp_path / "cohort.parquet")
    write_cohort([ROW, replace(ROW, **changes)], uri)
    with pytest.raises(DataError) as caught:
        read_cohort(uri)
    assert str(caught.value).startswith(f"{uri}: ")
    assert said in str(caught.value)
    assert "raybrats index" in str(caught.value)


# D8 names and links: see also test_layout.py


def test_d8_a_link_within_the_tree_is_a_file_and_one_out_of_it_is_not(tree: Path):
    file = part(tree, "t1")
    (tree / ".annex").mkdir()
    file.rename(tree / ".annex" / "object")
    file.symlink_to(Path("..", ".annex", "object"))
    assert verified(tree).status == OK
    outside = tree.parent / "outside.nii.gz"
    (tree / ".annex" / "object").rename(outside)
    for target in (outside, Path("..", "..", outside.name)):
        file.unlink()
        file.symlink_to(target)
        case = verified(tree)
        assert case.status == BAD
        assert case.reason.startswith(
            f"{file.name} links out of {tree} or in a circle; copy the file"
        )


def test_d8_the_tree_may_itself_be_a_link(tree: Path):
    (tree.parent / "link").symlink_to(tree)
    assert verified(tree.parent / "link").status == OK


def test_d8_a_folder_that_is_a_link_is_refused_by_name(tree: Path):
    (tree / CASE).rename(tree.parent / CASE)
    (tree / CASE).symlink_to(tree.parent / CASE)
    with pytest.raises(StorageError, match=f"{CASE}: a link to a folder is not followed; name"):
        find_cases(str(tree))


def test_d8_a_broken_link_is_a_missing_file(tree: Path):
    part(tree, "t1").unlink()
    part(tree, "t1").symlink_to("nothing.nii.gz")
    case = verified(tree)
    assert case.status == BAD
    assert "does not exist" in case.reason


def test_d8_paths_that_a_dataset_json_declares_are_not_read(trees: Path, tmp_path: Path):
    tree = Path(shutil.copytree(trees / "msd", tmp_path / "tree"))
    file = next(tree.rglob("dataset.json"))
    secret = tmp_path / "secret.nii.gz"
    secret.write_bytes(b"")
    declared = [{"image": "../../secret.nii.gz", "label": "/etc/passwd"}]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"training": declared}))
    cases = find_cases(str(tree))
    assert len(cases) == 2
    uris = [uri for case in cases for uri in (*case.image_uris, case.label_uri)]
    assert all(Path(uri).is_relative_to(tree) for uri in uris)
    moved = tmp_path / "dataset.json"
    file.rename(moved)
    file.symlink_to(moved)
    with pytest.raises(DataError, match=r"dataset\.json: a link out of the tree .* copy the file"):
        find_cases(str(tree))


def test_d8_a_dataset_json_of_a_million_brackets_is_no_crash(trees: Path, tmp_path: Path):
    tree = Path(shutil.copytree(trees / "msd", tmp_path / "tree"))
    next(tree.rglob("dataset.json")).write_text("[" * 10**6)
    with pytest.raises(DataError, match=r"dataset\.json: not JSON"):
        find_cases(str(tree))


def test_d8_names_with_spaces_dots_and_any_script_are_verified(tree: Path):
    strange = "BraTS2021_Fälle .. 東 #1%20 'a'"
    (tree / CASE).rename(tree / strange)
    for file in (tree / strange).iterdir():
        file.rename(file.with_name(file.name.replace(CASE, strange).replace(".nii.gz", ".NII.GZ")))
    shadow = next((tree / strange).iterdir())
    (shadow.parent / f"._{shadow.name}").write_bytes(b"\0\5\26\7Mac OS X")
    cases = [verify_case(case) for case in find_cases(str(tree))]
    assert {case.case_id: case.status for case in cases} == {strange: OK, "BraTS2021_00001": OK}
    write_cohort(cases, str(tree / "cohort.parquet"))
    assert read_cohort(str(tree / "cohort.parquet")) == cases


# D9 too few cases: see also tests/train/test_run.py


def test_d9_no_case_no_label_or_an_empty_side_is_refused_before_workers_start(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no BraTS case found in 0 files; see README"):
        find_cases(str(tmp_path / "empty"))
    with pytest.raises(DataError, match=r"no case has labels; training needs them"):
        usable(run(), [])
    with pytest.raises(DataError, match=r"no case for training: .*choose another fold, or -1"):
        usable(run(fold=0), with_folds([ROW]))
    with pytest.raises(DataError, match=r"no case for validation: .*choose another fold, or -1"):
        usable(run(fold=4), with_folds([ROW]))


def test_d9_fewer_cases_than_workers_are_enough_since_draws_are_dealt_not_cases():
    four = replace(
        run(fold=-1),
        cluster=replace(TrainConfig().cluster, workers=4),
        optim=replace(TrainConfig().optim, global_batch=4),
    )
    assert usable(four, [ROW]) == [ROW]


def test_an_incomplete_case_is_whole_for_a_run_that_does_not_want_what_it_lacks(tree: Path):
    next(tree.glob("*/*_t1.nii.gz")).unlink()
    (lacking,) = [c for c in map(verify_case, find_cases(str(tree))) if c.missing]
    assert lacking.status == "incomplete"
    statuses = {
        modalities: with_modalities([lacking], modalities)[0].status
        for modalities in (("flair", "t2"), ("t1", "t2"), ("t1",))
    }
    assert list(statuses.values()) == ["ok", "incomplete", "bad"]


def test_a_label_file_of_four_dimensions_is_bad_by_name(tree: Path):
    path = sorted(tree.glob("*/*_seg.nii.gz"))[0]
    image = nib.load(path)
    stacked = np.stack([np.asarray(image.dataobj)] * 2, axis=-1)
    nib.save(nib.Nifti1Image(stacked, image.affine), path)
    first, second = map(verify_case, find_cases(str(tree)))
    assert (first.status, second.status) == ("bad", "ok")
    assert first.case_id in first.reason
    assert "expected one 3-D volume" in first.reason
