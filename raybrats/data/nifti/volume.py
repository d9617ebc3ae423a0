"""NIfTI bytes <-> Volume: the header is checked before anything is allocated, the CRC always.

Canonical axes are LPS, the orientation in which BraTS is distributed, so real cases are not moved.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import deflate
import nibabel as nib
import numpy as np
from nibabel import orientations

from raybrats.data.nifti import header
from raybrats.data.nifti.header import Grid, Header
from raybrats.data.nifti.inflate import inflate, is_zipped, start
from raybrats.errors import DataError

CANONICAL = ("L", "P", "S")
_CANONICAL = orientations.axcodes2ornt(CANONICAL)


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
        """The voxels scaled, float32: nibabel's `get_fdata()` rounded once."""
        if (self.slope, self.intercept) == (1.0, 0.0):
            return self.voxels.astype(np.float32)
        exact = self.voxels.astype(np.float64)
        exact *= self.slope
        exact += self.intercept
        return exact.astype(np.float32)


def decode(data: bytes, name: str) -> Volume:
    """The volume in the bytes of a .nii or .nii.gz file; nothing but big-endian voxels is copied.

    Raises:
        DataError: not NIfTI, truncated, damaged (CRC or length), or a header that breaks a rule.
    """
    zipped = is_zipped(data)
    first = start(data, header.MAX_BYTES, name) if zipped else data[: header.MAX_BYTES]
    said = header.parse(first, name)
    raw = inflate(data, said.num_bytes, name) if zipped else data
    if len(raw) < said.num_bytes:
        needs = f"{len(raw)} bytes where its header needs {said.num_bytes}"
        raise DataError(f"{name}: {needs}; truncated: fetch it again")
    flat = np.frombuffer(raw, said.dtype, math.prod(said.shape), said.offset)
    voxels = flat.reshape(said.shape, order="F").astype(said.dtype.newbyteorder("="), copy=False)
    voxels = np.require(voxels, requirements="A")  # an odd vox_offset
    voxels.flags.writeable = False  # whether the bytes were zipped or not
    _check_finite(voxels, said, name)
    return Volume(to_canonical(voxels, said.grid), said.slope, said.intercept, said.grid)


def joined(pair: tuple[bytes, bytes], name: str) -> bytes:
    """The .nii file that a .hdr and its .img, zipped or not, make together; extensions are left.

    Raises:
        DataError: the header breaks a rule, or a part is damaged.
    """
    first, image = pair
    if is_zipped(first):
        first = start(first, header.MAX_BYTES, name)
    plain, offset = header.as_single(first, name)
    needed = offset + header.parse(plain, name).num_bytes - len(plain)
    body = inflate(image, needed, name) if is_zipped(image) else image
    return plain + body[offset:needed]


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
    own = header.orientation(grid.affine)
    return orientations.ornt_transform(own, _CANONICAL)


def _check_finite(voxels: np.ndarray, said: Header, name: str) -> None:
    """Refuses what is no number in float32, as stored or scaled; most types need no pass for it."""
    kind = voxels.dtype.kind
    if kind == "f" and not np.isfinite(voxels).all():
        bad = int(np.size(voxels) - np.isfinite(voxels).sum())
        raise DataError(f"{name}: {bad} voxels are NaN or infinite; repair the file")
    possible = np.finfo(voxels.dtype) if kind == "f" else np.iinfo(voxels.dtype)
    if _fits(said, float(possible.min), float(possible.max)):
        return
    if not _fits(said, float(voxels.min()), float(voxels.max())):
        scaling = f"scl_slope {said.slope:g} and scl_inter {said.intercept:g}"
        raise DataError(f"{name}: {scaling} make voxels infinite; repair the header")


def _fits(said: Header, low: float, high: float) -> bool:
    """Whether float32 holds these voxels scaled."""
    largest = max(abs(said.slope * end + said.intercept) for end in (low, high))
    return largest <= float(np.finfo(np.float32).max)
