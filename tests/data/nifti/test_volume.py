"""NIfTI bytes: what nibabel reads is what we read, and no damaged byte becomes a voxel."""

import gzip
import itertools
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nibabel import orientations
from niftis import LPS, canonical, nifti, with_fields, zipped

from raybrats.data.cohort import source
from raybrats.data.nifti.header import MAX_EDGE_VOXELS, Grid
from raybrats.data.nifti.volume import (
    canonical_spacing,
    decode,
    encode_labels,
    from_canonical,
    to_canonical,
)
from raybrats.errors import ChangedObjectError, DataError, MissingObjectError

CODES = [
    "".join(sides)
    for order in itertools.permutations(["LR", "PA", "SI"])
    for sides in itertools.product(*order)
]
RNG = np.random.default_rng(20)
VOXELS = RNG.integers(-50, 900, (9, 8, 7)).astype(np.int16)


def axes_affine(codes: str, spacing: tuple[float, float, float], tilt: float = 0.0) -> np.ndarray:
    """An affine with these axis codes, off the axes by up to `tilt`."""
    turn = orientations.inv_ornt_aff(orientations.axcodes2ornt(codes), (1, 1, 1))[:3, :3]
    affine = np.eye(4)
    affine[:3, :3] = (np.linalg.inv(turn) + tilt * np.sin(np.arange(9)).reshape(3, 3)) * spacing
    affine[:3, 3] = (5, -7, 11)
    return affine


@pytest.mark.parametrize("codes", CODES)
def test_every_orientation_is_read_as_lps_and_written_back(codes: str):
    affine = axes_affine(codes, (1, 1.5, 2))
    image = nib.Nifti1Image(VOXELS, affine)
    assert "".join(nib.aff2axcodes(affine)) == codes
    volume = decode(image.to_bytes(), codes)
    assert np.array_equal(volume.voxels, canonical(image))
    assert volume.grid.shape == VOXELS.shape
    assert volume.grid.spacing == pytest.approx((1, 1.5, 2))
    assert np.array_equal(from_canonical(volume.voxels, volume.grid), VOXELS)
    spacing = canonical_spacing(volume.grid)
    for code, edge in zip(codes, (1, 1.5, 2), strict=True):
        (axis,) = (n for n, pair in enumerate(("LR", "PA", "SI")) if code in pair)
        assert spacing[axis] == pytest.approx(edge)


@given(
    codes=st.sampled_from(CODES),
    shape=st.tuples(*[st.integers(1, 6)] * 3),
    tilt=st.floats(0, 0.2),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_labels_written_are_labels_read(codes, shape, tilt, seed):
    affine = axes_affine(codes, (0.9, 1.0, 3.0), tilt)
    grid = Grid(shape, affine, oriented=True)
    stored = np.random.default_rng(seed).integers(0, 5, shape).astype(np.uint8)
    labels = to_canonical(stored, grid)
    assert np.array_equal(from_canonical(labels, grid), stored)
    data = encode_labels(labels, grid)
    again = decode(data, "labels")
    assert np.array_equal(again.voxels, labels)
    assert again.voxels.dtype == np.uint8
    assert again.grid.shape == shape
    assert again.grid.oriented
    assert np.allclose(again.grid.affine, affine, atol=1e-5)
    image = nib.Nifti1Image.from_bytes(gzip.decompress(data))
    assert np.array_equal(np.asarray(image.dataobj), stored)


def test_a_written_header_says_nothing_of_the_patient():
    header = nib.Nifti1Image.from_bytes(
        gzip.decompress(encode_labels(np.zeros((3, 4, 5), np.uint8), Grid((3, 4, 5), LPS, True)))
    ).header
    assert [bytes(header[f].item()) for f in ("descrip", "aux_file", "db_name")] == [b""] * 3
    assert list(header.extensions) == []
    assert header.get_xyzt_units()[0] == "mm"


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "f4", "f8"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_every_stored_type_is_read_in_both_byte_orders(dtype: str, order: str, kind: type):
    voxels = np.abs(VOXELS % 100).astype(np.dtype(dtype).newbyteorder(order))
    header = kind.header_class(endianness=order)
    header.set_data_dtype(voxels.dtype)
    data = kind(voxels, LPS, header).to_bytes()
    assert data[:4] == (348 if kind is nib.Nifti1Image else 540).to_bytes(
        4, "little" if order == "<" else "big"
    )
    for stored in (data, zipped(data)):
        volume = decode(stored, "x")
        assert volume.voxels.dtype == np.dtype(dtype)
        assert np.array_equal(volume.voxels, voxels)
        assert (volume.slope, volume.intercept) == (1.0, 0.0)


def test_slope_and_intercept_scale_the_values():
    data = with_fields(nifti(VOXELS), scl_slope=0.25, scl_inter=-7)
    volume = decode(data, "x")
    assert np.array_equal(volume.voxels, VOXELS)
    assert volume.values.dtype == np.float32
    assert np.allclose(volume.values, nib.Nifti1Image.from_bytes(data).get_fdata(), rtol=1e-6)
    unset = decode(with_fields(nifti(VOXELS), scl_slope=0, scl_inter=9), "x")
    assert np.array_equal(unset.values, VOXELS)


def test_header_extensions_are_skipped():
    image = nib.Nifti1Image(VOXELS, LPS)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"x" * 4000))
    data = image.to_bytes()
    assert nib.Nifti1Header(data[:348])["vox_offset"] > 4000
    assert np.array_equal(decode(data, "x").voxels, VOXELS)
    assert np.array_equal(decode(zipped(data), "x").voxels, VOXELS)


def test_a_fourth_axis_is_kept_unless_it_is_one_long():
    four = np.stack([VOXELS, VOXELS + 1], axis=-1)
    affine = axes_affine("RAS", (1, 1, 1))
    volume = decode(nifti(four, affine), "x")
    assert np.array_equal(volume.voxels, canonical(nib.Nifti1Image(four, affine)))
    assert volume.grid.shape == VOXELS.shape
    padded = nib.Nifti1Image(VOXELS[..., None, None], LPS).to_bytes()
    assert np.array_equal(decode(padded, "x").voxels, VOXELS)


def test_a_file_says_whether_it_knows_its_orientation():
    plain = nifti(VOXELS)
    assert decode(plain, "x").grid.oriented
    assert decode(with_fields(plain, sform_code=0, qform_code=1), "x").grid.oriented
    assert not decode(with_fields(plain, sform_code=0, qform_code=0), "x").grid.oriented


@pytest.mark.parametrize("cuts", [[2000], [600, 601, 4000], [0, 700]])
def test_a_file_may_be_several_gzip_members(cuts: list[int]):
    voxels = RNG.integers(0, 900, (20, 20, 20)).astype(np.int16)
    plain = nifti(voxels)
    edges = [0, *cuts, len(plain)] if cuts[0] else [0, cuts[1], len(plain), len(plain)]
    data = b"".join(zipped(plain[a:b]) for a, b in itertools.pairwise(edges))
    assert gzip.decompress(data) == plain
    assert np.array_equal(decode(data, "x").voxels, voxels)
    assert np.array_equal(decode(data + b"\0" * 64, "padded").voxels, voxels)


ZIPPED = zipped(nifti(VOXELS))


@pytest.mark.parametrize("data", [ZIPPED, nifti(VOXELS)], ids=["nii.gz", "nii"])
def test_a_truncated_file_is_refused_at_every_length(data: bytes):
    lengths = {*range(0, len(data), 7), *range(600), *range(len(data) - 40, len(data))}
    for length in sorted(n for n in lengths if n < len(data)):
        with pytest.raises(DataError, match=r"^case\.nii\.gz: "):
            decode(data[:length], "case.nii.gz")


def test_no_flipped_bit_becomes_a_voxel():
    bits = np.random.default_rng(3).permutation(8 * len(ZIPPED))[:400]
    refused = 0
    for bit in [*range(8 * 12), *(8 * len(ZIPPED) - 1 - n for n in range(64)), *bits.tolist()]:
        damaged = bytearray(ZIPPED)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            assert np.array_equal(decode(bytes(damaged), "x").voxels, VOXELS)
        except DataError:
            refused += 1
    assert refused > 450  # the others lie in the gzip header's time and system


@pytest.mark.parametrize("fields", [1, 3])
@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_senseless_header_is_read_or_refused_in_one_line(fields: int, data):
    damaged = bytearray(nifti(VOXELS))
    for _ in range(fields):
        damaged[data.draw(st.integers(0, 347))] = data.draw(st.integers(0, 255))
    try:
        volume = decode(bytes(damaged), "case")
    except DataError as error:
        said = str(error)
        volume = None
    if volume is None:
        assert said.startswith("case: ")
        assert "\n" not in said
    else:
        assert np.isfinite(volume.values).all()
        assert np.isfinite(volume.grid.affine).all()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x1f\x8b",
        b"<html><body>403 Forbidden</body></html>" * 40,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2345678\n",
        zipped(b"not a volume" * 100),
        bytes(4000),
    ],
    ids=["empty", "two bytes", "html", "lfs pointer", "zipped text", "zeros"],
)
def test_what_is_no_nifti_is_refused(data: bytes):
    with pytest.raises(DataError, match=r"^t1\.nii\.gz: .*fetch it again"):
        decode(data, "t1.nii.gz")


def test_zipped_bytes_without_their_gz_and_with_wrong_names_are_told_by_content():
    assert np.array_equal(decode(ZIPPED, "no_suffix").voxels, VOXELS)
    assert np.array_equal(decode(nifti(VOXELS), "case.nii.gz").voxels, VOXELS)


SHAPE = list(VOXELS.shape)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"dim": [3, 9, 0, 7, 1, 1, 1, 1]}, "dimensions"),
        ({"dim": [3, 9, -8, 7, 1, 1, 1, 1]}, "dimensions"),
        ({"dim": [3, 9, 8, MAX_EDGE_VOXELS + 1, 1, 1, 1, 1]}, "dimensions"),
        ({"dim": [2, 9, 8, 1, 1, 1, 1, 1]}, "dimensions"),
        ({"dim": [5, *SHAPE, 2, 2, 1, 1]}, "dimensions"),
        ({"dim": [3, 1024, 1024, 1024, 1, 1, 1, 1]}, "voxels"),
        ({"datatype": 32, "bitpix": 64}, "data type complex64"),
        ({"datatype": 128, "bitpix": 24}, "data type"),
        ({"datatype": 87}, "data type code 87"),
        ({"scl_slope": np.inf}, "scl_slope"),
        ({"scl_slope": 1, "scl_inter": -np.inf}, "scl_inter"),
        ({"scl_slope": 2, "scl_inter": np.nan}, "scl_inter"),
        ({"scl_slope": 3e38}, "scl_slope"),
        ({"vox_offset": np.nan}, "vox_offset"),
        ({"vox_offset": np.inf}, "vox_offset"),
        ({"vox_offset": -352}, "vox_offset"),
        ({"vox_offset": 0}, "vox_offset"),
        ({"vox_offset": 2**31}, "vox_offset"),
        ({"srow_x": [np.nan] * 4}, "sform"),
        ({"srow_x": [0] * 4}, "sform"),
        ({"sform_code": 0, "qform_code": 1, "quatern_b": 5}, "qform"),
        ({"sform_code": 0, "qform_code": 0, "pixdim": [1, 0, 1, 1, 0, 0, 0, 0]}, "sform"),
    ],
)
@pytest.mark.parametrize("wrap", [bytes, zipped], ids=["nii", "nii.gz"])
def test_a_header_that_breaks_a_rule_is_refused(fields: dict, said: str, wrap):
    with pytest.raises(DataError, match=rf"^t1\.nii: .*{said}"):
        decode(wrap(with_fields(nifti(VOXELS), **fields)), "t1.nii")


def test_a_nifti2_header_is_not_taken_for_voxels():
    plain = nifti(VOXELS, kind=nib.Nifti2Image)
    with pytest.raises(DataError, match="vox_offset 400"):
        decode(with_fields(plain, nib.Nifti2Header, vox_offset=400), "x")
    with pytest.raises(DataError, match="dimensions"):
        decode(with_fields(plain, nib.Nifti2Header, dim=[3, 2**62, 2**62, 1, 1, 1, 1, 1]), "x")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_voxels_that_are_no_numbers_are_counted_and_refused(bad: float, dtype: type):
    voxels = VOXELS.astype(dtype)
    voxels[0, 0, :3] = bad
    with pytest.raises(DataError, match="3 voxels are NaN or infinite"):
        decode(nifti(voxels), "x")


@pytest.mark.real
def test_real_cases_are_read_as_nibabel_reads_them(real_cases: Path):
    files = sorted([*real_cases.glob("brats20*/*/*.nii.gz"), *real_cases.glob("seg*/*.nii.gz")])
    assert len(files) >= 50
    for file in files:
        volume = decode(file.read_bytes(), file.name)
        assert nib.aff2axcodes(volume.grid.affine) == ("L", "P", "S")
        assert np.array_equal(volume.voxels, np.asarray(nib.load(file).dataobj)), file.name


def test_voxels_are_a_view_of_the_inflated_bytes_with_i_closest():
    volume = decode(ZIPPED, "x")
    assert volume.voxels.flags.f_contiguous
    assert not volume.voxels.flags.owndata
    assert not volume.voxels.flags.writeable
    base = volume.voxels
    while isinstance(base, np.ndarray):
        base = base.base
    assert len(memoryview(base)) == 352 + VOXELS.nbytes


def test_an_odd_offset_is_read_and_what_readers_disagree_on_is_refused():
    plain = nifti(VOXELS)
    shifted = with_fields(plain[:352] + b"\0" + plain[352:], vox_offset=353)
    assert np.array_equal(decode(shifted, "x").voxels, VOXELS)
    assert decode(shifted, "x").voxels.flags.aligned
    with pytest.raises(DataError, match=r"x: vox_offset 348.0; expected 352"):
        decode(with_fields(plain, vox_offset=348), "x")


@pytest.mark.parametrize(
    ("slope", "intercept"), [(0, 9), (np.nan, 9), (np.nan, np.nan), (0, np.inf), (2.5, -1)]
)
def test_scaling_that_is_unset_is_none_as_in_nibabel(slope: float, intercept: float):
    data = with_fields(nifti(VOXELS), scl_slope=slope, scl_inter=intercept)
    expected = nib.Nifti1Image.from_bytes(data).get_fdata().astype(np.float32)
    assert np.array_equal(decode(data, "x").values, expected)


@pytest.mark.parametrize("magic", [b"", b"ni2", b"n+2", b"xyz"])
def test_analyze_and_other_magic_is_refused(magic: bytes):
    with pytest.raises(DataError, match=r"^x\.hdr: magic .*Analyze 7\.5.*convert it to NIfTI"):
        decode(with_fields(nifti(VOXELS), magic=magic), "x.hdr")


PAIRS = {".hdr": (".hdr", ".img"), ".hdr.gz": (".hdr.gz", ".img.gz"), "HDR": (".HDR", ".IMG")}


@pytest.mark.parametrize("kind", [nib.Nifti1Pair, nib.Nifti2Pair])
@pytest.mark.parametrize("ends", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("order", ["<", ">"])
def test_a_header_and_its_image_are_one_volume(tmp_path: Path, kind: type, ends: tuple, order: str):
    header = kind.header_class(endianness=order)
    image = kind(VOXELS, axes_affine("RAS", (1, 2, 3)), header)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"x" * 400))
    image.set_data_dtype(np.int16)
    nib.save(image, tmp_path / f"v{ends[0].lower()}")
    for wrote, end in zip(("hdr", "img"), ends, strict=True):
        suffix = ".gz" if ends[0].endswith(".gz") else ""
        (tmp_path / f"v.{wrote}{suffix}").rename(tmp_path / f"v{end}")
    found = source.read(str(tmp_path / f"v{ends[0]}"))
    assert np.array_equal(found.volume().voxels, canonical(image))
    stored = (tmp_path / f"v{ends[0]}").read_bytes() + (tmp_path / f"v{ends[1]}").read_bytes()
    assert (found.size, found.digest) == (len(stored), blake3(stored).hexdigest())
    source.read(found.uri, size=found.size, digest=found.digest)
    (tmp_path / f"v{ends[1]}").write_bytes((tmp_path / f"v{ends[1]}").read_bytes()[:-9])
    with pytest.raises(ChangedObjectError, match=r"and its \.img: other bytes than were recorded"):
        source.read(found.uri, size=found.size, digest=found.digest)
    with pytest.raises(DataError, match=rf"^v{ends[0]}: .*truncated.*fetch it again"):
        source.read(found.uri).volume()


def test_a_header_without_its_image_is_named(tmp_path: Path):
    nib.save(nib.Nifti1Pair(VOXELS, LPS), tmp_path / "v.hdr")
    with pytest.raises(DataError, match=r"^v\.hdr: a header without its \.img"):
        decode((tmp_path / "v.hdr").read_bytes(), "v.hdr")
    (tmp_path / "v.img").unlink()
    with pytest.raises(MissingObjectError, match=r"v\.img: does not exist"):
        source.read(str(tmp_path / "v.hdr"))


def test_many_gzip_members_cost_no_more_than_their_bytes():
    voxels = RNG.integers(0, 900, (64, 64, 64)).astype(np.int16)
    plain = nifti(voxels)
    blocks = [zipped(plain[at : at + 64]) for at in range(0, len(plain), 64)]
    began = time.process_time()
    assert np.array_equal(decode(b"".join([*blocks, zipped(b"")]), "bgzip").voxels, voxels)
    assert time.process_time() - began < 2  # 0.06 s in 8192 members; quadratic: 10 s


ODD = {
    "FLOAT64.nii.gz": (),
    "INT16.nii.gz": (),
    "UINT8.nii.gz": (),
    "anatomical.nii": (),
    "example_nifti2.nii.gz": (),
    "minimal.nii.gz": (),
    "shear.nii.gz": (),
    "invalid.nii.gz": "not a NIfTI file",
    "someones_anatomy.nii.gz": "not a NIfTI file",
    "ras.hdr": "a header without its .img",
    "ras.img": "not a NIfTI file",
    "resampled_anat_moved.nii": "153 voxels are NaN",
}


@pytest.mark.real
@pytest.mark.parametrize("name", ODD)
def test_an_odd_file_is_read_as_nibabel_reads_it_or_refused(real_cases: Path, name: str):
    file = real_cases / "odd" / name
    if said := ODD[name]:
        with pytest.raises(DataError, match=f"^{name}: .*{said}"):
            decode(file.read_bytes(), name)
        return
    values = decode(file.read_bytes(), name).values
    assert np.array_equal(values, canonical(nib.load(file)).astype(np.float32))


@pytest.mark.real
def test_a_real_pair_is_read_as_nibabel_reads_it(real_cases: Path):
    file = real_cases / "odd" / "ras.hdr"
    expected = canonical(nib.load(file)).astype(np.float32)
    assert np.array_equal(source.read(str(file)).volume().values, expected)


@pytest.mark.real
def test_the_odd_files_are_all_accounted_for(real_cases: Path):
    assert {file.name for file in (real_cases / "odd").iterdir()} == set(ODD)


@pytest.mark.real
def test_one_brain_in_four_orientations_is_one_brain(real_cases: Path):
    brains = [
        decode(file.read_bytes(), file.name).values
        for file in sorted((real_cases / "orientations").glob("*.nii.gz"))
    ]
    assert len(brains) == 4
    for file, brain in zip(
        sorted((real_cases / "orientations").glob("*.nii.gz")), brains, strict=True
    ):
        assert np.array_equal(brain, canonical(nib.load(file)).astype(np.float32))
    for brain in brains[1:]:
        assert brain.shape == brains[0].shape
        assert np.corrcoef(brain.ravel(), brains[0].ravel())[0, 1] > 0.99
