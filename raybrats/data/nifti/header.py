"""NIfTI headers, checked before a voxel is allocated: shape, type, place in the file and in space.

nibabel says what the fields mean; what it lets through and should not is refused here.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import nibabel as nib
import numpy as np
from nibabel import orientations
from nibabel.spatialimages import HeaderDataError

from raybrats.errors import DataError

MAX_EDGE_VOXELS = 1024
"""Longest axis that is accepted; BraTS has 240, whole-head research scans up to 512."""
MAX_VOXELS = 512**3
"""Voxels that are accepted: a whole-head scan of 512 voxels an edge; 4-D BraTS has 36 million."""
MAX_BYTES = 544
"""Bytes that hold any header: NIfTI-1 has 348, NIfTI-2 540."""
_MAX_OFFSET = 2**24
"""Bytes before the voxels that are accepted; the longest header extension seen ends at 4576."""
_DTYPES = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "float32", "float64")
_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Grid:
    """Where a file's voxels lie in space; predictions are written back onto it."""

    shape: tuple[int, int, int]
    affine: np.ndarray
    """(4, 4), voxel to mm, RAS+."""
    oriented: bool
    """Whether the file states its orientation (an sform or a qform)."""

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Edge lengths of a voxel in mm."""
        i, j, k = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(i), float(j), float(k)


@dataclass(frozen=True)
class Header:
    """The voxels as a header describes them; value = slope * voxel + intercept."""

    shape: tuple[int, ...]
    """(i, j, k), or (i, j, k, channel)."""
    dtype: np.dtype
    """Type of the voxels, in the file's byte order."""
    offset: int
    """Bytes before the voxels."""
    slope: float
    intercept: float
    grid: Grid

    @property
    def num_bytes(self) -> int:
        """Bytes of the file, up to the last voxel."""
        return self.offset + math.prod(self.shape) * self.dtype.itemsize


def parse(start: bytes, name: str) -> Header:
    """The header at the start of a .nii file.

    Raises:
        DataError: it is not a NIfTI header, or breaks a rule.

    Example:
        >>> image = nib.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.eye(4))
        >>> header = parse(image.to_bytes(), "t1.nii")
        >>> header.shape, header.dtype.name, header.offset
        ((4, 5, 6), 'int16', 352)
    """
    raw = _raw(start, name)
    shape = _shape(raw, name)
    dtype, offset = _dtype(raw, name), _offset(raw, name)
    slope, intercept = _scaling(raw, name)
    return Header(shape, dtype, offset, slope, intercept, _grid(raw, shape, name))


def as_single(start: bytes, name: str) -> tuple[bytes, int]:
    """The header of a .hdr file as a .nii file starts, and the offset of its voxels in the .img.

    Raises:
        DataError: it is not a NIfTI header, or its offset breaks a rule.

    Example:
        >>> pair = nib.Nifti1Pair(np.zeros((4, 5, 6), np.int16), np.eye(4))
        >>> start, offset = as_single(pair.header.binaryblock, "t1.hdr")
        >>> len(start), offset
        (352, 0)
    """
    raw = _raw(start, name)
    offset = float(raw["vox_offset"])
    if not 0 <= offset <= _MAX_OFFSET:
        raise DataError(f"{name}: vox_offset {offset}; expected 0..{_MAX_OFFSET}")
    raw["magic"], raw["vox_offset"] = raw.single_magic, raw.single_vox_offset
    return raw.binaryblock + bytes(raw.single_vox_offset - raw.sizeof_hdr), int(offset)


def _raw(start: bytes, name: str) -> nib.Nifti1Header:
    sizes = {int.from_bytes(start[:4], order) for order in ("little", "big")}
    kind = nib.Nifti1Header if 348 in sizes else nib.Nifti2Header if 540 in sizes else None
    if kind is None or len(start) < kind.sizeof_hdr:
        raise DataError(f"{name}: not a NIfTI file; fetch it again")
    raw = kind(start[: kind.sizeof_hdr], check=False)
    magic = raw["magic"].item()
    if magic not in (raw.single_magic, raw.pair_magic):
        raise DataError(
            f"{name}: magic is not {raw.single_magic!r}: damaged, or Analyze 7.5, "
            "which does not say left from right; convert it to NIfTI"
        )
    return raw


def _shape(raw: nib.Nifti1Header, name: str) -> tuple[int, ...]:
    dims = [int(n) for n in raw["dim"]]
    shape = tuple(dims[1 : 1 + max(dims[0], 0)])
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) not in (3, 4) or not all(1 <= n <= MAX_EDGE_VOXELS for n in shape):
        rule = f"expected 3 or 4 axes of 1..{MAX_EDGE_VOXELS}; repair the header"
        raise DataError(f"{name}: dimensions {dims}; {rule}")
    if math.prod(shape) > MAX_VOXELS:
        raise DataError(f"{name}: {shape} is more than {MAX_VOXELS} voxels; crop or resample it")
    return shape


def _dtype(raw: nib.Nifti1Header, name: str) -> np.dtype:
    try:
        dtype = raw.get_data_dtype()
        found = dtype.newbyteorder("=").name
    except (HeaderDataError, KeyError):
        found = f"code {int(raw['datatype'])}"
    if found not in _DTYPES:
        rule = f"expected one of {', '.join(_DTYPES)}; convert it"
        raise DataError(f"{name}: data type {found}; {rule}")
    return dtype


def _offset(raw: nib.Nifti1Header, name: str) -> int:
    """Bytes before the voxels.

    0 is refused although nibabel takes it: nibabel then reads the header as voxels, niftilib
    starts at 348 and the standard at 352.
    """
    offset, least = float(raw["vox_offset"]), raw.single_vox_offset
    if least <= offset <= _MAX_OFFSET:
        return int(offset)
    if raw["magic"].item() == raw.pair_magic:
        raise DataError(f"{name}: a header without its .img file; keep both together as .hdr, .img")
    rule = f"expected {least}..{_MAX_OFFSET}; repair the header"
    raise DataError(f"{name}: vox_offset {offset}; {rule}")


def _scaling(raw: nib.Nifti1Header, name: str) -> tuple[float, float]:
    """Slope and intercept; a slope of 0 or NaN means none, as in the standard and nibabel."""
    slope, intercept = float(raw["scl_slope"]), float(raw["scl_inter"])
    if slope == 0 or math.isnan(slope):
        return 1.0, 0.0
    for field, value in (("scl_slope", slope), ("scl_inter", intercept)):
        if not abs(value) <= _FLOAT32_MAX:
            raise DataError(f"{name}: {field} is {value}, not a finite number; repair the header")
    return slope, intercept


def orientation(affine: np.ndarray) -> np.ndarray:
    """Nibabel's orientation (axis, 2): the axis of space next to each of the file's, and its sign.

    Raises:
        LinAlgError: the matrix is not finite.

    Example:
        >>> orientation(np.diag([-1.0, -1.0, 1.0, 1.0]))
        array([[ 0., -1.], [ 1., -1.], [ 2., 1.]])
    """
    return _orientation(np.asarray(affine, np.float64).tobytes())


@lru_cache(maxsize=64)  # one matrix a case, asked for twenty times: 9 ms of its 80
def _orientation(affine: bytes) -> np.ndarray:
    return orientations.io_orientation(np.frombuffer(affine).reshape(4, 4))


def _grid(raw: nib.Nifti1Header, shape: tuple[int, ...], name: str) -> Grid:
    oriented = int(raw["sform_code"]) > 0 or int(raw["qform_code"]) > 0
    try:
        affine = raw.get_best_affine()
        with np.errstate(all="ignore"):
            invertible = bool(np.isfinite(orientation(affine)).all())
    except (ValueError, np.linalg.LinAlgError):  # not a quaternion, NaN
        invertible = False
    if not invertible:
        raise DataError(f"{name}: its sform or qform is no orientation in space; repair the header")
    return Grid((shape[0], shape[1], shape[2]), affine, oriented)
