"""Synthetic BraTS cases: stylised heads with gliomas, drawn by seed, in an edition's own file tree.

The healthy head comes from `raybrats.phantom.anatomy`; here a tumour grows into it
and a scanner looks.
"""

import json
import math
from collections.abc import Iterator

import deflate
import nibabel as nib
import numpy as np
from scipy import ndimage

from raybrats import storage
from raybrats.brats import EDITIONS, MODALITIES
from raybrats.errors import UsageError
from raybrats.label_set import ED, ET, NCR, LabelSet, label_set_of
from raybrats.phantom.anatomy import (
    CSF,
    FIELD_MM,
    GM,
    NECROSIS,
    OEDEMA,
    RIM,
    Frame,
    Shape,
    Tumour,
    draw_head,
    make_frame,
)

MAX_VOXELS = 256**3
"""Voxels of a phantom at most: nearly twice those of a BraTS case (240 x 240 x 155)."""
MAX_CASES = 100_000
"""Cases of a tree: as many as five digits of an id tell apart."""

CONTRASTS = {  # signal of each tissue, white matter in T1 being 1; after published BraTS figures
    "flair": (0.56, 0.70, 0.20, 0.35, 1.00, 0.92, 0.66),
    "t1": (1.00, 0.76, 0.38, 0.60, 0.68, 0.70, 0.50),
    "t1ce": (1.00, 0.79, 0.40, 1.45, 0.71, 1.50, 0.52),
    "t2": (0.48, 0.64, 1.30, 0.35, 0.92, 0.84, 1.10),
}


def make_phantom(
    index: int, *, shape: Shape = (240, 240, 155), seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Image (modality, i, j, k), int16, and labels (i, j, k), uint8, of case `index` of a seed.

    Every fifth case, `index % 5 == 3`, is a low-grade glioma without enhancing tumour.

    Raises:
        UsageError: the shape has an axis under 16 voxels or too many in all, or the seed is
            negative.

    Example:
        >>> image, labels = make_phantom(0, shape=(24, 24, 20))
        >>> image.shape, np.unique(labels).tolist()
        ((4, 24, 24, 20), [0, 1, 2, 3])
    """
    _check_drawable(shape, seed)
    rng = np.random.default_rng([seed, index])
    frame = make_frame(rng, shape)
    tumour = _draw_tumour(rng, enhancing=index % 5 != 3)
    brain, fractions = draw_head(frame, tumour)
    labels = np.zeros(shape, np.uint8)
    labels[frame.box] = _grow(frame, tumour, brain, fractions)
    image = np.zeros((len(MODALITIES), *shape), np.int16)
    image[:, *frame.box] = _scan(frame, brain, fractions)
    return image, labels


def write_phantoms(
    out_uri: str,
    *,
    num_cases: int = 12,
    shape: Shape = (240, 240, 155),
    edition: str = "2020",
    seed: int = 0,
) -> list[str]:
    """Writes cases below a folder, as the edition's archive unpacks there; returns the case ids.

    Raises:
        UsageError: no such edition, no folder, no cases or too many, or what `make_phantom`
            refuses; nothing is written.

    Example:
        >>> write_phantoms("phantoms", num_cases=1, shape=(24, 24, 20), edition="2023")
        ['BraTS-GLI-00000-000']
    """
    if edition not in EDITIONS:
        raise UsageError(f"edition must be one of {', '.join(EDITIONS)}, got {edition!r}")
    if num_cases < 1:
        raise UsageError(f"num_cases must be at least 1, got {num_cases}")
    if num_cases > MAX_CASES:
        raise UsageError(f"num_cases must be at most {MAX_CASES}, got {num_cases}")
    _check_drawable(shape, seed)
    out_uri = storage.absolute(out_uri)
    first = 1 if edition in ("2020", "msd") else 0
    case_ids = [EDITIONS[edition].case_id.format(first + n) for n in range(num_cases)]
    values = np.array([0, *EDITIONS[edition].label_values], np.uint8)
    known = label_set_of(EDITIONS[edition].label_set)
    for index, case_id in enumerate(case_ids):
        image, labels = make_phantom(index, shape=shape, seed=seed)
        for path, volume in _volumes(edition, case_id, image, values[_as(known, labels)]):
            storage.write_bytes(storage.join(out_uri, path), _nifti(volume))
    if edition == "msd":
        uri = storage.join(out_uri, "Task01_BrainTumour", "dataset.json")
        storage.write_bytes(uri, _decathlon_index(case_ids))
    return case_ids


def _as(known: LabelSet, labels: np.ndarray) -> np.ndarray:
    """Labels of glioma as those of another set; the inner half of the necrosis is what is hollow.

    Cysts and resection cavities lie within the tumour; a gross tumour volume is all but oedema.
    """
    depth, dead = ndimage.distance_transform_edt(labels == NCR), np.flatnonzero(labels == NCR)
    inner = dead[np.argsort(-depth.flat[dead], kind="stable")][: len(dead) // 2]
    tissue = {NCR: ("NCR", "NETC", "NET", "GTV"), ED: ("ED", "SNFH"), ET: ("ET", "GTV")}
    table = np.zeros(4, np.uint8)
    for label, names in tissue.items():
        table[label] = max((n for n, name in enumerate(known.names, 1) if name in names), default=0)
    found = table[labels]
    for number, name in enumerate(known.names, 1):
        found.flat[inner if name in ("RC", "CC") else []] = number
    return found


def _check_drawable(shape: Shape, seed: int) -> None:
    """Refuses what cannot be drawn, before anything is allocated."""
    if min(shape) < 16:
        raise UsageError(f"a phantom needs at least 16 voxels on every axis, got shape {shape}")
    if math.prod(shape) > MAX_VOXELS:
        raise UsageError(f"a phantom has at most {MAX_VOXELS} voxels, got shape {shape}")
    if seed < 0:
        raise UsageError(f"seed must be at least 0, got {seed}")


def _draw_tumour(rng: np.random.Generator, *, enhancing: bool) -> Tumour:
    side, stretch, rim_cm3 = rng.choice((-1.0, 1.0)), rng.uniform(0.8, 1.25, 3), rng.uniform(7, 34)
    return Tumour(
        centre=(float(side) * rng.uniform(24, 40), rng.uniform(-45, 45), rng.uniform(4, 40)),
        stretch=tuple((stretch / np.cbrt(stretch.prod())).tolist()),
        rim_cm3=rim_cm3 if enhancing else 0,
        necrosis_cm3=rim_cm3 * rng.uniform(0.3, 1.1) if enhancing else rng.uniform(10, 40),
        oedema_cm3=rng.uniform(22, 95),
    )


def _grow(frame: Frame, tumour: Tumour, brain: np.ndarray, fractions: np.ndarray) -> np.ndarray:
    """Labels (i, j, k) of the tumour, which also replaces tissue in the fractions."""
    offsets = zip(frame.mesh, tumour.centre, tumour.stretch, strict=True)
    distance = np.sqrt(sum(((p - c) / s) ** 2 for p, c, s in offsets))
    side = 1 if tumour.centre[0] > 0 else -1
    across = np.maximum(8 - side * frame.mesh[0], 0)
    patchy = 3.5 * frame.noise(12) + 1.8 * frame.noise(6)
    bulk = distance + patchy + 2.5 * across + 12 * fractions[CSF] + np.float32(99) * ~brain
    spread = 0.7 * bulk + 5 * frame.noise(14) + 9 * fractions[GM] + 6 * fractions[CSF]
    inner = bulk + 1.8 * frame.noise(8)
    core_cm3 = tumour.rim_cm3 + tumour.necrosis_cm3
    bulk -= frame.level(bulk, core_cm3)
    spread -= frame.level(np.where(bulk < 0, -99, spread), core_cm3 + tumour.oedema_cm3)
    inner -= frame.level(np.where(bulk < 0, inner, 999), tumour.necrosis_cm3)
    inner = np.maximum(inner, bulk) if tumour.rim_cm3 else bulk
    strength = np.clip(0.8 + 0.05 * patchy, 0.35, 1)
    frame.paint(fractions, OEDEMA, -spread, fraction=strength * (1 - fractions[CSF]))
    if tumour.rim_cm3:
        frame.paint(fractions, RIM, -bulk, fraction=np.clip(strength + 0.15, 0, 1))
    frame.paint(fractions, NECROSIS, -inner, fraction=0.95)
    labels = np.where(inner < 0, NCR, np.where(bulk < 0, ET, np.where(spread < 0, ED, 0)))
    return (labels * brain).astype(np.uint8)


def _scan(frame: Frame, brain: np.ndarray, fractions: np.ndarray) -> np.ndarray:
    """Image (modality, i, j, k): contrast, texture, coil shading and Rician noise."""
    image = np.zeros((len(MODALITIES), *brain.shape), np.int16)
    inside, coil = fractions[:, brain], 0.06 * frame.noise(60)[brain]
    texture = 0.02 * frame.noise(5)[brain]
    gain = 450 * frame.rng.uniform(0.7, 1.5)
    for channel, modality in enumerate(MODALITIES):
        signal = np.array(CONTRASTS[modality], np.float32) @ inside + texture
        signal *= 1 + coil + 0.04 * frame.noise(70)[brain]
        real, imaginary = 0.03 * frame.rng.standard_normal((2, signal.size), dtype=np.float32)
        value = gain * frame.rng.uniform(0.7, 1.4) * np.hypot(signal + real, imaginary)
        image[channel, brain] = np.clip(np.rint(value), 1, 32767)
    return image


def _volumes(
    edition: str, case_id: str, image: np.ndarray, labels: np.ndarray
) -> Iterator[tuple[str, np.ndarray]]:
    """Each file of a case: its path in the edition's tree, and what it holds."""
    if edition == "msd":
        yield f"Task01_BrainTumour/imagesTr/{case_id}.nii.gz", np.moveaxis(image, 0, -1)
        yield f"Task01_BrainTumour/labelsTr/{case_id}.nii.gz", labels
        return
    stem = f"{case_id}/{case_id}{EDITIONS[edition].separator}"
    stem = f"MICCAI_BraTS2020_TrainingData/{stem}" if edition == "2020" else stem
    for suffix, volume in zip(EDITIONS[edition].suffixes, image, strict=True):
        if suffix:
            yield f"{stem}{suffix}.nii.gz", volume
    yield f"{stem}{EDITIONS[edition].label_suffix}.nii.gz", labels


def _nifti(volume: np.ndarray) -> bytes:
    spacing = np.divide(FIELD_MM, volume.shape[:3])
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1])
    affine[1, 3] = (volume.shape[1] - 1) * spacing[1]
    nifti = nib.Nifti1Image(volume, affine, dtype=volume.dtype)
    nifti.header.set_xyzt_units("mm")
    return bytes(deflate.gzip_compress(nifti.to_bytes(), 3))


def _decathlon_index(case_ids: list[str]) -> bytes:
    labels = ("background", "edema", "non-enhancing tumor", "enhancing tumour")
    files = [(f"./imagesTr/{name}.nii.gz", f"./labelsTr/{name}.nii.gz") for name in case_ids]
    index = {
        "name": "BRATS",
        "tensorImageSize": "4D",
        "modality": dict(zip("0123", ("FLAIR", "T1w", "t1gd", "T2w"), strict=True)),
        "labels": dict(zip("0123", labels, strict=True)),
        "numTraining": len(case_ids),
        "numTest": 0,
        "training": [{"image": image, "label": label} for image, label in files],
        "test": [],
    }
    return json.dumps(index, indent=2).encode()
