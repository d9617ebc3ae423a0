"""Small NIfTI files for the tests, made by nibabel or by hand where nibabel would refuse."""

import gzip
from typing import Any

import nibabel as nib
import numpy as np
from nibabel import orientations

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def nifti(voxels: np.ndarray, affine: np.ndarray = LPS, kind: type = nib.Nifti1Image) -> bytes:
    """A plain .nii whose voxels are stored as they are."""
    return kind(voxels, affine, dtype=voxels.dtype).to_bytes()


def with_fields(plain: bytes, kind: type = nib.Nifti1Header, **fields: Any) -> bytes:
    """The file with header fields changed, however senseless."""
    header = kind(plain[: kind.sizeof_hdr], check=False)
    for name, value in fields.items():
        header[name] = value
    return header.binaryblock + plain[kind.sizeof_hdr :]


def canonical(image: nib.Nifti1Image) -> np.ndarray:
    """What nibabel reads of an image, in LPS."""
    own = orientations.io_orientation(image.affine)
    turn = orientations.ornt_transform(own, orientations.axcodes2ornt("LPS"))
    return orientations.apply_orientation(np.asarray(image.dataobj), turn)


def zipped(plain: bytes) -> bytes:
    return gzip.compress(plain, 6, mtime=0)
