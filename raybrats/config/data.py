"""Where the cases lie, and how patches are cut from them."""

import math
from dataclasses import dataclass
from typing import Literal

from raybrats.brats import MODALITIES, Modality
from raybrats.config.section import Section, require, require_no_secret
from raybrats.errors import UsageError
from raybrats.label_set import label_set_of

NUM_FOLDS = 5
"""Folds of every cohort (nnU-Net: 5)."""
Normalisation = Literal["zscore", "minmax", "percentile"]


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Where the cases lie and how patches are cut from them."""

    cohort: str = ""
    """Cohort file (.parquet) or tree of cases: a local path or an s3:// URI."""
    fold: int = 0
    """Cross-validation fold held out for validation, 0 to 4; -1 trains and validates on all."""
    modalities: tuple[Modality, ...] = MODALITIES
    """Input channels, in this order."""
    normalisation: Normalisation = "zscore"
    """Scaling inside the brain: to zero mean and unit deviation; to 0..1 from least to greatest
    voxel; to 0..1 between `percentiles`."""
    percentiles: tuple[float, float] = (0.5, 99.5)
    """Percentiles of the brain's voxels at which `percentile` clips each modality."""
    sampling: Literal["random", "grid", "slices", "volume"] = "random"
    """Kind of draw: a random patch, the next of the overlapping patches that cover the case, one of
    its slices, or the case whole, padded to a multiple of the network's stride."""
    patch_size: tuple[int, int, int] = (128, 128, 128)
    """Shape of a draw in voxels, (i, j, k); slices are resized to (i, j, 1). Not for `volume`."""
    foreground_share: float = 1 / 3
    """Fraction of the random draws that is centred on a tumour voxel (nnU-Net: one third)."""
    grid_overlap: float = 0.5
    """Overlap of neighbouring patches of the grid, as a fraction of the patch."""
    first_slice: int = 0
    """Lowest slice that is drawn, counted along k of the whole canonical volume."""
    num_slices: int = 155
    """Slices of each case that are drawn from (BraTS has 155)."""
    patches_per_case: int = 1
    """Draws that one opening of a case serves, in as many steps; useful without a cache.

    Ray's object store holds as many global batches at once."""
    cache_dir: str = ""
    """Node-local folder of prepared cases; empty: raybrats-cache-<user id> of the temporary one."""
    cache_gb: float = 100.0
    """Gigabytes (10^9 bytes) that the folder holds at most (BraTS 2021: 45); 0 keeps nothing.

    All runs of a node share it: one with a smaller cap removes what others kept."""
    max_bad_fraction: float = 0.0
    """Fraction of quarantined cases that training accepts; they are left out and named."""
    min_labelled_fraction: float = 0.0
    """Least fraction of the voxels of a case's foreground box that has a label; cases with less are
    left out on both sides of the split."""
    labels: str = ""
    """What is told apart: glioma, treated, paediatric, gtv, or a label set as JSON; empty: what the
    cohort's masks tell apart."""
    cpus_per_task: float = 0.5
    """CPUs that one decoding task reserves on the cluster."""
    prefetch_batches: int = 0
    """Batches kept ready in front of the training step; 0: two for a CPU, and for a GPU a second of
    its patches, as far as a quarter of its node's object store holds them."""

    def __post_init__(self) -> None:
        require_no_secret("data.cohort", self.cohort)
        require(-1 <= self.fold < NUM_FOLDS, "data.fold", "in -1..4", self.fold)
        flat = self.sampling == "slices"
        rule = ">= 8, and 1 along k for slices" if flat else ">= 8"
        fits = min(self.patch_size[: 2 if flat else 3]) >= 8 and (self.patch_size[2] == 1) == flat
        require(fits, "data.patch_size", rule, self.patch_size)
        low, high = self.percentiles
        require(0 <= low < high <= 100, "data.percentiles", "0 <= low < high <= 100", (low, high))
        require(0 <= self.grid_overlap < 1, "data.grid_overlap", "in 0..1", self.grid_overlap)
        require(self.first_slice >= 0, "data.first_slice", ">= 0", self.first_slice)
        require(self.num_slices >= 1, "data.num_slices", ">= 1", self.num_slices)
        draws = self.patches_per_case
        require(1 <= draws <= 16, "data.patches_per_case", "in 1..16", draws)
        require(0 <= self.cache_gb < math.inf, "data.cache_gb", ">= 0", self.cache_gb)
        folder = self.cache_dir
        local = not folder or folder.startswith("/")
        require(local, "data.cache_dir", "an absolute local path, or empty", folder)
        require(len(self.modalities) > 0, "data.modalities", "one or more", self.modalities)
        share = self.foreground_share
        require(0 <= share <= 1, "data.foreground_share", "in 0..1", share)
        bad = self.max_bad_fraction
        require(0 <= bad < 1, "data.max_bad_fraction", "in 0..1", bad)
        least = self.min_labelled_fraction
        require(0 <= least < 1, "data.min_labelled_fraction", "in 0..1", least)
        try:
            label_set_of(self.labels)
        except UsageError as error:
            raise UsageError(f"data.labels: {error}") from None
        require(self.cpus_per_task > 0, "data.cpus_per_task", "> 0", self.cpus_per_task)
        require(self.prefetch_batches >= 0, "data.prefetch_batches", ">= 0", self.prefetch_batches)
