"""A model from wherever it lies, one case -> its labels, in memory or as a NIfTI file; no Ray."""

import gzip
import logging
from dataclasses import dataclass, field

import numpy as np

from raybrats import storage
from raybrats.data.nifti.header import Grid
from raybrats.data.nifti.volume import encode_labels, from_canonical, to_canonical
from raybrats.errors import UsageError
from raybrats.label_set import GLIOMA, LabelSet
from raybrats.predict import patient
from raybrats.predict.patient import Files, PathLike
from raybrats.predict.target import check_target
from raybrats.registry import load as loading
from raybrats.registry import tracking
from raybrats.table import table

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Segmentation:
    """Labels of one case.

    Example:
        >>> labels = np.zeros((24, 24, 20), np.uint8)
        >>> labels[4:8, 4:8, 4:8] = 2
        >>> grid = Grid((24, 24, 20), np.diag([-1.0, -1.0, 1.0, 1.0]), oriented=True)
        >>> print(Segmentation("case7", labels, grid, "models:/raybrats/3"))
        case7, 24 x 24 x 20 voxels, by models:/raybrats/3
        region  volume_mm3
        WT              64
        TC               0
        ET               0
    """

    case_id: str
    labels: np.ndarray = field(repr=False)
    """uint8 (i, j, k): 0, 1, 2, ... as the label set has them (glioma: 1 NCR, 2 ED, 3 ET), on the
    axes of the first file, or of the array: voxel by voxel what
    `nibabel.load(first_file).get_fdata()` shows."""
    grid: Grid
    """Shape and affine of that file."""
    model: str
    """Model that it is from: `models:/name/version`, or the URI of a checkpoint."""
    label_set: LabelSet = field(default=GLIOMA, repr=False)
    """What the model tells apart."""
    remarks: tuple[str, ...] = ()
    """Sentences on what is unlike the heads that the model was trained on."""

    @property
    def volumes_mm3(self) -> dict[str, float]:
        """Volume of each region in cubic millimetres."""
        voxel = abs(float(np.linalg.det(self.grid.affine[:3, :3])))
        return {
            region.name: voxel * int(np.isin(self.labels, region.labels).sum())
            for region in self.label_set.regions
        }

    def encode(self, label_values: tuple[int, ...] = ()) -> bytes:
        """A .nii.gz in the grid of the first file, with these values for the labels.

        Raises:
            UsageError: there are not as many values as labels.
        """
        known = self.label_set.names
        values = np.array([0, *(label_values or range(1, len(known) + 1))], np.uint8)
        if len(values) != 1 + len(known):
            raise UsageError(f"label values {label_values}; expected those of {', '.join(known)}")
        return encode_labels(to_canonical(values[self.labels], self.grid), self.grid)

    def save(self, uri: PathLike, label_values: tuple[int, ...] = ()) -> str:
        """Writes the labels as NIfTI in the first file's grid, orientation and affine.

        Args:
            uri: .nii or .nii.gz: a local path or an s3:// URI.
            label_values: values of the labels in the file, 1, 2, ... where not given; BraTS up to
                2021 has 1, 2, 4.

        Returns:
            The URI, absolute.

        Raises:
            UsageError: the URI is not that of a NIfTI file, or there are not as many values as
                labels.
            StorageError: it cannot be written.
        """
        out = check_target(uri)
        data = self.encode(label_values)
        storage.write_bytes(out, data if out.endswith(".gz") else gzip.decompress(data))
        return out

    def __str__(self) -> str:
        shape = " x ".join(map(str, self.grid.shape))
        rows = [(region, round(volume)) for region, volume in self.volumes_mm3.items()]
        title = f"{self.case_id}, {shape} voxels, by {self.model}"
        return f"{title}\n{table(('region', 'volume_mm3'), rows)}"


@dataclass(frozen=True)
class Segmenter:
    """A model that segments one case at a time, in this process."""

    model: loading.Model

    @property
    def name(self) -> str:
        """`models:/name/version`, or the URI of a checkpoint."""
        return self.model.name

    @property
    def modalities(self) -> tuple[str, ...]:
        """Modalities that it takes, in the order in which paths and arrays are given."""
        return self.model.modalities

    def segment(
        self,
        case: Files | np.ndarray,
        *,
        affine: np.ndarray | None = None,
        resample: bool = False,
    ) -> Segmentation:
        """Labels of one case, on the axes of its first file (flair before t1, t1ce, t2).

        What is unlike BraTS about the case, such as a skull, is logged as a warning.

        Args:
            case: a path for each of `modalities`, in their order; a mapping of modality to path; a
                folder with one case; or raw voxels (modality, i, j, k).
            affine: (4, 4) of an array, as nibabel has it; LPS at 1 mm where not given.
            resample: put volumes that lie on other grids on that of the first; else they are
                refused.

        Raises:
            UsageError: the paths cannot be told apart, or the array has other axes.
            DataError: a file is damaged, files lie on different grids, or the model needs more
                modalities.
            StorageError: a file is missing or out of reach.

        Example:
            >>> model = load("models:/raybrats@champion")  # doctest: +SKIP
            >>> found = model.segment("BraTS2021_00000")  # doctest: +SKIP
            >>> found.save("BraTS2021_00000_labels.nii.gz")  # doctest: +SKIP
        """
        if isinstance(case, np.ndarray):
            if case.shape[:1] != (len(self.modalities),):
                names = ", ".join(self.modalities)
                raise UsageError(f"an array of {case.shape}; expected ({names}; i, j, k)")
            raw = patient.from_array(case, affine)
        else:
            found = patient.find_case(case, self.modalities)
            raw = patient.open_case_for(self.model, found, resample=resample)
        remarks = raw.remarks()
        for remark in remarks:
            _LOG.warning("%s: %s", raw.case_id, remark)
        labels = from_canonical(self.model.segment(raw.image).labels, raw.grid)
        known = self.model.label_set
        return Segmentation(raw.case_id, labels, raw.grid, self.name, known, remarks)


def load(uri: str, tracking_uri: str = "", network: str = "") -> Segmenter:
    """The model behind a URI, on the GPU of this machine if it has one.

    Args:
        uri: `models:/name@alias`, `models:/name/version`, a checkpoint
            (`.../checkpoints/step-00000150`), or a run, of which the best checkpoint is taken.
        tracking_uri: MLflow server of a `models:/`; MLFLOW_TRACKING_URI, else runs/mlflow.db,
            where not given.
        network: `my.module:function`, if that is the network of a checkpoint.

    Raises:
        UsageError: a `models:/` URI of another form, or a network of the user's own that was not
            named.
        TrackingError: the server is out of reach, or there is no such model.
        CheckpointError: the checkpoint is damaged, or the run has none that can be loaded.
        StorageError: there is nothing at the URI, or it is out of reach.

    Example:
        >>> load("s3://bucket/runs/one").modalities  # doctest: +SKIP
        ('flair', 't1', 't1ce', 't2')
    """
    return Segmenter(loading.load(uri, tracking_uri or _default_uri(uri), network))


def _default_uri(uri: str) -> str:
    """The MLflow server of a registered model; a checkpoint needs none."""
    return tracking.default_uri() if uri.startswith("models:") else ""
