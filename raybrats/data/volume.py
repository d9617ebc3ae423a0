"""NIfTI bytes <-> Volume: the header is checked before anything is allocated, the CRC always.

Canonical axes are LPS, the orientation in which BraTS is distributed, so real cases are not moved.
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import deflate
import nibabel as nib
import numpy as np
from nibabel import orientations

from raybrats.errors import DataError

CANONICAL = ("L", "P", "S")
MAX_EDGE_VOXELS = 1024
"""Longest axis that is believed; BraTS has 240, whole-head research scans up to 512."""
MAX_VOXELS = 512**3
"""Most that is believed: a whole-head scan of 512 voxels an edge; 4-D BraTS has 36 million."""
_MAX_OFFSET = 2**24
"""Bytes before the voxels that are believed; the longest header extension seen ends at 4576."""
_DEFLATE_RATIO = 1032
"""Bytes that one deflated byte can hold at most, by its format."""
_HEADER_BYTES = 544
"""Enough for NIfTI-1 (348) and NIfTI-2 (540)."""
_DTYPES = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "float32", "float64")


@dataclass(frozen=True)
class Grid:
    """Where a file's voxels lie: what a prediction needs to be written back as."""

    shape: tuple[int, int, int]
    affine: np.ndarray
    """(4, 4), voxel to mm, RAS+."""
    known: bool
    """Whether the file says its orientation (an sform or a qform)."""

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Edge lengths of a voxel in mm."""
        i, j, k = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(i), float(j), float(k)


@dataclass(frozen=True)
class Volume:
    """One file: voxels as stored, on canonical axes; value = slope * voxel + intercept."""

    voxels: np.ndarray
    """(i, j, k), or (i, j, k, channel) of a 4-D file."""
    slope: float
    intercept: float
    grid: Grid
    """As in the file, before reorientation."""

    @property
    def values(self) -> np.ndarray:
        """The voxels scaled, float32."""
        return self.voxels.astype(np.float32) * np.float32(self.slope) + np.float32(self.intercept)


def decode(data: bytes, name: str) -> Volume:
    """The volume in the bytes of a .nii or .nii.gz file.

    Raises:
        DataError: not NIfTI, truncated, damaged (CRC or length), or a header that breaks a rule.
    """
    zipped = data[:2] == b"\x1f\x8b"
    start = _inflate_start(data, name) if zipped else data[:_HEADER_BYTES]
    header = _header(start, name)
    shape = _checked_shape(header, name)
    grid = _checked_grid(header, shape, name)
    dtype, offset = header.get_data_dtype(), int(header["vox_offset"])
    length = offset + math.prod(shape) * dtype.itemsize
    raw = _inflate(data, length, name) if zipped else data
    if len(raw) < length:
        raise DataError(f"{name}: {len(raw)} bytes where its header needs {length}; fetch it again")
    voxels = np.frombuffer(raw, dtype, math.prod(shape), offset).reshape(shape, order="F")
    voxels = voxels.astype(dtype.newbyteorder("="), copy=False)
    slope, intercept = header.get_slope_inter()
    slope, intercept = float(1.0 if slope is None else slope), float(intercept or 0.0)
    _check_finite(voxels, slope, intercept, name)
    return Volume(to_canonical(voxels, grid), slope, intercept, grid)


def encode_labels(labels: np.ndarray, grid: Grid) -> bytes:
    """A .nii.gz of canonical labels (i, j, k) in the file's own grid; a fresh, anonymous header."""
    stored = from_canonical(labels, grid)
    image = nib.Nifti1Image(np.asarray(stored, np.uint8), grid.affine)
    image.header.set_xyzt_units("mm")
    return bytes(deflate.gzip_compress(image.to_bytes(), 6))


def to_canonical(voxels: np.ndarray, grid: Grid) -> np.ndarray:
    """A view of file voxels with its first three axes canonical."""
    return orientations.apply_orientation(voxels, _turn(grid))


def from_canonical(voxels: np.ndarray, grid: Grid) -> np.ndarray:
    """The inverse of `to_canonical`: canonical voxels in the file's own axes."""
    turn = _turn(grid)
    back = turn[np.argsort(turn[:, 0])].copy()
    back[:, 0] = np.argsort(turn[:, 0])
    return orientations.apply_orientation(voxels, back)


def on_one_grid(case_id: str, names: Sequence[str], volumes: Sequence[Volume]) -> list[Volume]:
    """The volumes of one case, checked to lie on one grid once their axes are canonical.

    A file that does not know its orientation takes that of the others.

    Raises:
        DataError: they differ in shape, or lie more than 0.01 mm apart.
    """
    first = next((v.grid for v in volumes if v.grid.known), volumes[0].grid)
    laid = [v if v.grid.known else _laid(v, first) for v in volumes]
    for volume, name in zip(laid, names, strict=True):
        shape, wanted = volume.voxels.shape[:3], _canonical_shape(first)
        if shape != wanted:
            shapes = f"{shape} and {wanted}"
            raise DataError(f"{case_id}: {name} differs in shape from the others: {shapes}")
        apart = float(np.abs(_canonical_affine(volume.grid) - _canonical_affine(first)).max())
        if apart > 1e-2:
            raise DataError(f"{case_id}: {name} lies elsewhere (affine {apart:.3g} off)")
    return laid


def _canonical_shape(grid: Grid) -> tuple[int, int, int]:
    i, j, k = (grid.shape[axis] for axis in np.argsort(_turn(grid)[:, 0]))
    return i, j, k


def _canonical_affine(grid: Grid) -> np.ndarray:
    return grid.affine @ orientations.inv_ornt_aff(_turn(grid), grid.shape)


def _laid(volume: Volume, grid: Grid) -> Volume:
    """The volume with its file's voxels taken to lie on another file's grid."""
    stored = from_canonical(volume.voxels, volume.grid)
    own = replace(grid, shape=volume.grid.shape)
    return replace(volume, voxels=to_canonical(stored, own), grid=own)


def canonical_spacing(grid: Grid) -> tuple[float, float, float]:
    """Edge lengths in mm along the canonical axes."""
    order = np.argsort(_turn(grid)[:, 0])
    i, j, k = (grid.spacing[axis] for axis in order)
    return i, j, k


def _turn(grid: Grid) -> np.ndarray:
    own = orientations.io_orientation(grid.affine)
    return orientations.ornt_transform(own, orientations.axcodes2ornt(CANONICAL))


def _header(start: bytes, name: str) -> nib.Nifti1Header:
    sizes = {int.from_bytes(start[:4], order) for order in ("little", "big")}
    kind = nib.Nifti1Header if 348 in sizes else nib.Nifti2Header if 540 in sizes else None
    length = 348 if kind is nib.Nifti1Header else 540
    if kind is None or len(start) < length:
        raise DataError(f"{name}: not a NIfTI file ({start[:24]!r}); fetch it again")
    return kind(start[:length], check=False)


def _checked_shape(header: nib.Nifti1Header, name: str) -> tuple[int, ...]:
    dims = [int(n) for n in header["dim"]]
    rank = dims[0]
    shape = tuple(dims[1 : 1 + max(rank, 0)])
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) not in (3, 4) or not all(1 <= n <= MAX_EDGE_VOXELS for n in shape):
        raise DataError(f"{name}: dimensions {dims}; expected 3 or 4 axes of 1..{MAX_EDGE_VOXELS}")
    if math.prod(shape) > MAX_VOXELS:
        raise DataError(f"{name}: {shape} is more than {MAX_VOXELS} voxels")
    try:
        dtype = header.get_data_dtype().newbyteorder("=").name
    except (nib.spatialimages.HeaderDataError, KeyError):
        dtype = f"code {int(header['datatype'])}"
    if dtype not in _DTYPES:
        raise DataError(f"{name}: data type {dtype}; expected one of {', '.join(_DTYPES)}")
    offset = float(header["vox_offset"])
    if not header.sizeof_hdr <= offset <= _MAX_OFFSET:
        raise DataError(f"{name}: vox_offset {offset}; expected {header.sizeof_hdr}..{_MAX_OFFSET}")
    if not (math.isfinite(header["scl_slope"]) and math.isfinite(header["scl_inter"])):
        raise DataError(f"{name}: scl_slope or scl_inter is not finite; repair the header")
    return shape


def _checked_grid(header: nib.Nifti1Header, shape: tuple[int, ...], name: str) -> Grid:
    known = int(header["sform_code"]) > 0 or int(header["qform_code"]) > 0
    try:
        affine = header.get_best_affine()
        with np.errstate(all="ignore"):
            usable = bool(np.isfinite(orientations.io_orientation(affine)).all())
    except (ValueError, np.linalg.LinAlgError):  # a quaternion that is none, NaN
        usable = False
    if not usable:
        raise DataError(f"{name}: its sform or qform is no orientation in space; repair the header")
    return Grid(shape[:3], affine, known)


def _check_finite(voxels: np.ndarray, slope: float, intercept: float, name: str) -> None:
    if voxels.dtype.kind == "f" and not np.isfinite(voxels).all():
        bad = int(np.size(voxels) - np.isfinite(voxels).sum())
        raise DataError(f"{name}: {bad} voxels are NaN or infinite; repair the file")
    if (slope, intercept) != (1.0, 0.0):
        ends = [slope * float(end) + intercept for end in (voxels.min(), voxels.max())]
        if max(map(abs, ends)) > float(np.finfo(np.float32).max):
            raise DataError(f"{name}: scl_slope {slope} makes voxels infinite; repair the header")


def _inflate_start(data: bytes, name: str) -> bytes:
    try:
        return zlib.decompressobj(wbits=31).decompress(data, _HEADER_BYTES)
    except zlib.error as error:
        raise DataError(f"{name}: damaged gzip ({error}); fetch it again") from error


def _inflate(data: bytes, length: int, name: str) -> bytes:
    """The member inflated; never more is allocated than the header and the trailer both claim."""
    claim = int.from_bytes(data[-4:], "little")
    if not length <= claim <= min(length + 2**20, _DEFLATE_RATIO * len(data)):
        return _inflate_members(data, length, name)
    try:
        raw = bytes(deflate.gzip_decompress(data, claim))
    except deflate.DeflateError:
        return _inflate_members(data, length, name)
    return raw if len(raw) == claim else _inflate_members(data, length, name)


def _inflate_members(data: bytes, length: int, name: str) -> bytes:
    """For files of several gzip members (bgzip), and to name what is wrong with the others."""
    out, rest = bytearray(), data
    try:
        while rest and len(out) < length + 2**20:
            member = zlib.decompressobj(wbits=31)
            out += member.decompress(rest, length + 2**20 - len(out))
            if not member.eof:
                raise DataError(
                    f"{name}: truncated, or longer than its header says; fetch it again"
                )
            rest = member.unused_data.lstrip(b"\0")
    except zlib.error as error:
        raise DataError(f"{name}: damaged gzip ({error}); fetch it again") from error
    return bytes(out)
