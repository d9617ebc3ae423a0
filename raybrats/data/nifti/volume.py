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
from raybrats.data.nifti.inflate import inflate, inflate_start, is_gzip
from raybrats.errors import DataError, GridError

CANONICAL = ("L", "P", "S")
"""Ends of space to which i, j and k run."""
_CANONICAL = orientations.axcodes2ornt(CANONICAL)


@dataclass(frozen=True)
class Volume:
    """One file: voxels as stored, on canonical axes; value = slope * voxel + intercept."""

    voxels: np.ndarray
    """(i, j, k), or (i, j, k, channel) for a 4-D file."""
    slope: float
    intercept: float
    grid: Grid
    """Grid of the file, before reorientation."""

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

    Example:
        >>> image = nib.Nifti1Image(np.ones((4, 5, 6), np.int16), np.diag([-1, -1, 1, 1]))
        >>> volume = decode(image.to_bytes(), "t1.nii")
        >>> volume.voxels.shape, volume.grid.spacing
        ((4, 5, 6), (1.0, 1.0, 1.0))
    """
    gzipped = is_gzip(data)
    start = inflate_start(data, header.MAX_BYTES, name) if gzipped else data[: header.MAX_BYTES]
    facts = header.parse(start, name)
    raw = inflate(data, facts.num_bytes, name) if gzipped else data
    if len(raw) < facts.num_bytes:
        needs = f"{len(raw)} bytes where its header needs {facts.num_bytes}"
        raise DataError(f"{name}: {needs}; truncated: fetch it again")
    flat = np.frombuffer(raw, facts.dtype, math.prod(facts.shape), facts.offset)
    voxels = flat.reshape(facts.shape, order="F").astype(facts.dtype.newbyteorder("="), copy=False)
    voxels = np.require(voxels, requirements="A")  # an odd vox_offset
    voxels.flags.writeable = False  # whether the bytes were gzipped or not
    _check_finite(voxels, facts, name)
    return Volume(to_canonical(voxels, facts.grid), facts.slope, facts.intercept, facts.grid)


def join_pair(pair: tuple[bytes, bytes], name: str) -> bytes:
    """The .nii file that a .hdr and its .img, each gzipped or not, make; extensions are dropped.

    Raises:
        DataError: the header breaks a rule, or a part is damaged.

    Example:
        >>> pair = nib.Nifti1Pair(np.zeros((4, 5, 6), np.int16), np.eye(4))
        >>> len(join_pair((pair.header.binaryblock, bytes(240)), "t1.hdr"))
        592
    """
    start, image = pair
    if is_gzip(start):
        start = inflate_start(start, header.MAX_BYTES, name)
    plain, offset = header.as_single(start, name)
    needed = offset + header.parse(plain, name).num_bytes - len(plain)
    body = inflate(image, needed, name) if is_gzip(image) else image
    return plain + body[offset:needed]


def encode_labels(labels: np.ndarray, grid: Grid) -> bytes:
    """A .nii.gz of canonical labels (i, j, k) in the file's own grid; a fresh, anonymous header.

    Example:
        >>> grid = Grid((4, 5, 6), np.eye(4), oriented=True)
        >>> decode(encode_labels(np.ones((4, 5, 6), np.uint8), grid), "seg.nii.gz").voxels.shape
        (4, 5, 6)
    """
    stored = from_canonical(labels, grid)
    image = nib.Nifti1Image(np.asarray(stored, np.uint8), grid.affine)
    image.header.set_xyzt_units("mm")
    return bytes(deflate.gzip_compress(image.to_bytes(), 6))


def to_canonical(voxels: np.ndarray, grid: Grid) -> np.ndarray:
    """A view of the file's voxels with the first three axes canonical.

    Example:
        >>> voxels = np.arange(3).reshape(3, 1, 1)
        >>> to_canonical(voxels, Grid((3, 1, 1), np.eye(4), oriented=True)).ravel()
        array([2, 1, 0])
    """
    return orientations.apply_orientation(voxels, _reorientation(grid))


def from_canonical(voxels: np.ndarray, grid: Grid) -> np.ndarray:
    """The inverse of `to_canonical`: canonical voxels in the file's own axes.

    Example:
        >>> grid = Grid((3, 1, 1), np.eye(4), oriented=True)
        >>> from_canonical(to_canonical(np.arange(3).reshape(3, 1, 1), grid), grid).ravel()
        array([0, 1, 2])
    """
    there = _reorientation(grid)
    order = np.argsort(there[:, 0])
    back = there[order]
    back[:, 0] = order
    return orientations.apply_orientation(voxels, back)


def on_one_grid(case_id: str, names: Sequence[str], volumes: Sequence[Volume]) -> list[Volume]:
    """The volumes of one case, checked to lie on one grid once their axes are canonical.

    A file that does not state its orientation takes that of the others.

    Raises:
        GridError: they differ in shape, or lie more than 0.01 mm apart.

    Example:
        >>> image = nib.Nifti1Image(np.ones((4, 5, 6), np.int16), np.eye(4))
        >>> volume = decode(image.to_bytes(), "t1.nii")
        >>> len(on_one_grid("BraTS20_001", ["t1.nii", "t2.nii"], [volume, volume]))
        2
    """
    first = next((v.grid for v in volumes if v.grid.oriented), volumes[0].grid)
    placed = [v if v.grid.oriented else _placed(v, first) for v in volumes]
    if any(_difference(volume.grid, first) for volume in placed):
        raise GridError(f"{case_id}: {_odd_one_out(names, volumes)}")
    return placed


def canonical_spacing(grid: Grid) -> tuple[float, float, float]:
    """Edge lengths of a voxel in mm along the canonical axes.

    Example:
        >>> sagittal = np.array([[0, 0, 5.0, 0], [1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 0, 1]])
        >>> canonical_spacing(Grid((256, 256, 30), sagittal, oriented=True))
        (5.0, 1.0, 1.0)
    """
    i, j, k = (grid.spacing[axis] for axis in np.argsort(_reorientation(grid)[:, 0]))
    return i, j, k


def _odd_one_out(names: Sequence[str], volumes: Sequence[Volume]) -> str:
    """Which file lies unlike most, and how; of two, the second."""
    found: list[list[str]] = []
    for volume in volumes:
        if volume.grid.oriented or not any(v.grid.oriented for v in volumes):
            placed = [v if v.grid.oriented else _placed(v, volume.grid) for v in volumes]
            unlike = [_difference(v.grid, volume.grid) for v in placed]
            found.append([f"{n} {how}" for n, how in zip(names, unlike, strict=True) if how])
    # Of grids that differ by rounding each may be like the next, so one may be like all of them.
    return min(filter(None, found), key=len)[0]


def _difference(grid: Grid, other: Grid) -> str:
    """How a grid, once its axes are canonical, differs from another one; empty if it does not."""
    shape, wanted = _canonical_shape(grid), _canonical_shape(other)
    if shape != wanted:
        return f"differs in shape from the others: {shape} and {wanted}"
    apart = float(np.abs(_canonical_affine(grid) - _canonical_affine(other)).max())
    return f"lies elsewhere (affine {apart:.3g} off)" if apart > 1e-2 else ""


def _canonical_shape(grid: Grid) -> tuple[int, ...]:
    return tuple(grid.shape[axis] for axis in np.argsort(_reorientation(grid)[:, 0]))


def _canonical_affine(grid: Grid) -> np.ndarray:
    return grid.affine @ orientations.inv_ornt_aff(_reorientation(grid), grid.shape)


def _placed(volume: Volume, grid: Grid) -> Volume:
    """The volume with its file's voxels taken to lie on another file's grid."""
    stored = from_canonical(volume.voxels, volume.grid)
    own = replace(grid, shape=volume.grid.shape)
    return replace(volume, voxels=to_canonical(stored, own), grid=own)


def _reorientation(grid: Grid) -> np.ndarray:
    own = header.orientation(grid.affine)
    return orientations.ornt_transform(own, _CANONICAL)


def _check_finite(voxels: np.ndarray, facts: Header, name: str) -> None:
    """Refuses voxels that float32 does not hold, as stored or scaled; most types need no pass."""
    kind = voxels.dtype.kind
    if kind == "f" and not np.isfinite(voxels).all():
        bad = int(np.size(voxels) - np.isfinite(voxels).sum())
        raise DataError(f"{name}: {bad} voxels are NaN or infinite; repair the file")
    possible = np.finfo(voxels.dtype) if kind == "f" else np.iinfo(voxels.dtype)
    if _fits(facts, float(possible.min), float(possible.max)):
        return
    if not _fits(facts, float(voxels.min()), float(voxels.max())):
        scaling = f"scl_slope {facts.slope:g} and scl_inter {facts.intercept:g}"
        raise DataError(f"{name}: {scaling} make voxels infinite; repair the header")


def _fits(facts: Header, low: float, high: float) -> bool:
    """Whether float32 holds voxels from `low` to `high` once they are scaled."""
    largest = max(abs(facts.slope * end + facts.intercept) for end in (low, high))
    return largest <= float(np.finfo(np.float32).max)
