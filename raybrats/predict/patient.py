"""One patient's files, under any names -> a raw case: image, grid, and remarks on both.

Nothing here needs Ray.
"""

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np
from nibabel import Nifti1Image
from nibabel.processing import resample_from_to

from raybrats import storage
from raybrats.brats import MODALITIES, UNKNOWN
from raybrats.data.cohort import index, layout, source
from raybrats.data.cohort.case import BAD, INCOMPLETE, Case, open_case
from raybrats.data.cohort.dataset_json import MODALITY_NAMES
from raybrats.data.cohort.usable import with_modalities
from raybrats.data.nifti.header import Grid
from raybrats.data.nifti.volume import Volume, from_canonical, on_one_grid, to_canonical
from raybrats.data.prepare import prepare
from raybrats.errors import DataError, GridError, UsageError
from raybrats.registry.load import Model

PathLike = str | os.PathLike[str]
Files = PathLike | Sequence[PathLike] | Mapping[str, PathLike]
"""A folder with one case, a path for each modality of the model, or modality -> path."""

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""Affine of an array without one: the orientation of BraTS, voxels of 1 mm."""
SPACING_TOLERANCE_MM = 0.1
"""Difference from BraTS' 1 mm that is not remarked on: what resampling tools leave."""
MAX_BRAIN_LITRES = 2.0
"""Foreground above which a head is taken to have its skull. Measured: eight BraTS cases 1.27 to
1.56; nibabel's and niivue's samples, unstripped, 2.43 and 3.85."""
MAX_BORDER_FRACTION = 0.05
"""Fraction of the volume's outermost voxels in the foreground above which it is, too, or cut off.
Measured: eight BraTS cases 0.009 at most, 0.021 cropped tightly; the samples 0.089 to 1."""
_TRAINED_ON = "models of raybrats are trained on skull-stripped, co-registered heads at 1 mm"


@dataclass(frozen=True)
class RawCase:
    """A case as models take it."""

    case_id: str
    image: np.ndarray = field(repr=False)
    """float32 (modality, i, j, k), voxels as stored, axes LPS; a missing modality is 0."""
    grid: Grid
    """Grid of the first file, onto which the labels are written back."""
    missing: tuple[str, ...] = ()
    """Modalities of the model without a file."""

    def remarks(self) -> tuple[str, ...]:
        """Sentences on what is unlike the heads that models are trained on.

        Raises:
            DataError: the image is all background.
        """
        found = [f"no {m} file: background is in its place, as in training" for m in self.missing]
        spacing = self.grid.spacing
        if any(abs(edge - 1) > SPACING_TOLERANCE_MM for edge in spacing):
            found.append(f"its voxels are {_lengths(spacing)} mm; {_TRAINED_ON}")
        if self._has_skull():
            found.append(f"it does not look skull-stripped; {_TRAINED_ON}")
        return tuple(found)

    def _has_skull(self) -> bool:
        try:
            prepared = prepare(list(self.image))
        except DataError as error:
            raise DataError(f"{self.case_id}: {error}") from error
        background = prepared.scaling.background[:, None, None, None]
        brain = np.zeros(prepared.shape, bool)
        brain[prepared.box] = (prepared.image != background).any(axis=0)
        inner = brain[1:-1, 1:-1, 1:-1]
        litres = float(brain.sum() * np.prod(self.grid.spacing)) / 1e6
        border = float(brain.sum() - inner.sum()) / (brain.size - inner.size)
        return litres > MAX_BRAIN_LITRES or border > MAX_BORDER_FRACTION


def find_case(files: Files, modalities: Sequence[str]) -> Case:
    """The case that a caller means, not opened yet.

    Args:
        files: a folder with exactly one case, in a layout that raybrats knows; or one path for
            each of the modalities, in their order; or a mapping of modality (by any edition's
            name for it) to path.
        modalities: those of the model.

    Raises:
        UsageError: the paths cannot be told apart, or are none.
        DataError: the folder holds no case, several, or one whose files contradict each other.
        StorageError: there is no such folder, or it is out of reach.

    Example:
        >>> case = find_case({"t1n": "a.nii.gz", "t2f": "b.nii.gz"}, ("flair", "t1"))
        >>> case.case_id, case.missing
        ('b', ('t1ce', 't2'))
    """
    if isinstance(files, str | os.PathLike):
        return _only_case(os.fspath(files))
    if isinstance(files, Mapping):
        return _case_of(files)
    if len(files) != len(modalities):
        names = ", ".join(modalities)
        raise UsageError(f"{len(files)} paths; expected {len(modalities)}, in the order {names}")
    return _case_of(dict(zip(modalities, files, strict=True)))


def open_case_for(model: Model, case: Case, *, resample: bool = False) -> RawCase:
    """The case in memory, with the modalities that a model takes.

    Args:
        model: whose modalities are opened.
        case: of a cohort, or as `find_case` gives it.
        resample: put files that lie on other grids on the grid of the first, linearly; else they
            are refused.

    Raises:
        DataError: the case is damaged, or lacks modalities and the model was trained with all.
        GridError: its files lie on different grids.
        StorageError: a file is out of reach.

    Example:
        >>> open_case_for(model, find_case("BraTS20_001", model.modalities))  # doctest: +SKIP
    """
    seen = with_modalities([case], model.modalities)[0]
    if case.status == BAD:
        raise DataError(f"{case.case_id}: {case.reason}")
    if seen.status == BAD or (seen.status == INCOMPLETE and not model.takes_incomplete):
        raise DataError(
            f"{case.case_id}: {case.reason}; complete it, or use a model that was trained with "
            "augment.drop_modality"
        )
    missing = tuple(m for m in model.modalities if m in case.missing)
    try:
        opened = open_case(case, model.modalities, labels=False)
    except GridError as error:
        if not resample:
            hint = "register its files, or put them on the first one's grid with --resample"
            raise GridError(f"{error}; {hint}") from error
        return replace(_resampled(case, model.modalities), missing=missing)
    image = np.stack(opened.volumes).astype(np.float32)
    return RawCase(case.case_id, image, opened.grid, missing)


def from_array(image: np.ndarray, affine: np.ndarray | None = None) -> RawCase:
    """The raw case in an array (modality, i, j, k).

    Args:
        image: raw voxels.
        affine: (4, 4), voxel to mm, RAS+, as nibabel has it; LPS at 1 mm where not given.

    Raises:
        UsageError: the array has not four axes, or holds no numbers.
        DataError: a voxel is NaN or infinite.

    Example:
        >>> from_array(np.ones((4, 24, 24, 20))).grid.shape
        (24, 24, 20)
    """
    if image.ndim != 4 or image.dtype.kind not in "iufb":
        shape = f"{image.dtype} {image.shape}"
        raise UsageError(f"an array of {shape}; expected numbers (modality, i, j, k)")
    if not np.isfinite(image).all():
        raise DataError("the array has voxels that are NaN or infinite")
    _, i, j, k = image.shape
    oriented = affine is not None
    grid = Grid((i, j, k), LPS if affine is None else np.asarray(affine, float), oriented)
    canonical = [to_canonical(volume, grid) for volume in image]
    return RawCase("array", np.stack(canonical).astype(np.float32), grid)


def _only_case(uri: str) -> Case:
    if layout.is_volume(uri):
        raise UsageError(f"{uri}: one file; expected a folder, or a path for each modality")
    found = index.find_cases(uri)
    if len(found) != 1:
        ids = ", ".join(case.case_id for case in found[:3])
        raise DataError(f"{uri}: {len(found)} cases ({ids}, ...); name the folder of one of them")
    return found[0]


def _case_of(files: Mapping[str, PathLike]) -> Case:
    """The case of modality -> path; the id is the name of its first file without the modality."""
    known: dict[str, str] = {}
    for name, path in files.items():
        modality = MODALITY_NAMES.get(name.lower())
        if modality is None or modality in known:
            problem = "given twice" if modality else f"not one of {', '.join(MODALITIES)}"
            raise UsageError(f"modality {name!r} is {problem}")
        known[modality] = storage.absolute(os.fspath(path))
    uris = tuple(known.get(modality, "") for modality in MODALITIES)
    given = [uri for uri in uris if uri]
    if not given or len(set(given)) < len(given):
        problem = "the same file stands for two modalities" if given else "no files"
        raise UsageError(f"{problem}; expected one for each modality")
    suffix = rf"[_-]({'|'.join(MODALITY_NAMES)})$"
    case_id = re.sub(suffix, "", layout.stem(given[0]), flags=re.IGNORECASE)
    return index.case_of(layout.Files(case_id, UNKNOWN, "files", uris, None, (), ""))


def _resampled(case: Case, modalities: Sequence[str]) -> RawCase:
    """The case with its volumes on the grid of the first file that states its orientation."""
    uris = {m: u for m, u in zip(MODALITIES, case.image_uris, strict=True) if u and m in modalities}
    stored = {m: source.read(uri).volume() for m, uri in uris.items()}
    first = next((v for v in stored.values() if v.grid.oriented), next(iter(stored.values())))
    placed = {m: _onto(first, v, f"{case.case_id}: {m}").values for m, v in stored.items()}
    empty = np.zeros(next(iter(placed.values())).shape, np.float32)
    image = np.stack([placed.get(modality, empty) for modality in modalities])
    return RawCase(case.case_id, image, first.grid)


def _onto(first: Volume, volume: Volume, name: str) -> Volume:
    """The volume on another one's grid, by linear interpolation; itself where it lies there.

    Raises:
        GridError: it does not say how it lies.
    """
    with suppress(GridError):
        return on_one_grid("", ("", ""), (first, volume))[1]
    if not volume.grid.oriented or volume.voxels.ndim != 3:
        raise GridError(f"{name} cannot be resampled: it does not state its orientation, or is 4-D")
    values = volume.values
    corners = values[np.ix_(*[(0, -1)] * 3)]  # what lies outside of it is background
    outside = float(corners.flat[0]) if (corners == corners.flat[0]).all() else 0.0
    stored = Nifti1Image(from_canonical(values, volume.grid), volume.grid.affine)
    target = first.grid.shape, first.grid.affine
    moved = np.asarray(resample_from_to(stored, target, order=1, cval=outside).dataobj, np.float32)
    return Volume(to_canonical(moved, first.grid), 1.0, 0.0, first.grid)


def _lengths(edges: Sequence[float]) -> str:
    return " x ".join(f"{edge:.3g}" for edge in edges)
