"""A cohort as an nnU-Net v2 raw dataset, planned (and preprocessed) by nnU-Net's own code."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from raybrats.brats import MODALITIES
from raybrats.data.cohort.case import Case

DATASET_ID = 501
_NAME = f"Dataset{DATASET_ID}_BraTS"


@dataclass(frozen=True)
class Dataset:
    """Where nnU-Net keeps this cohort."""

    raw: Path
    preprocessed: Path
    case_ids: tuple[str, ...]

    def files(self, case_id: str) -> tuple[list[str], str]:
        """Image files and label file of a case."""
        images = [f"{self.raw}/imagesTr/{case_id}_{m:04d}.nii.gz" for m, _ in enumerate(MODALITIES)]
        return images, f"{self.raw}/labelsTr/{case_id}.nii.gz"

    def read(self, name: str) -> dict[str, Any]:
        """A JSON file of the preprocessed dataset."""
        return json.loads((self.preprocessed / name).read_text())


def make(cases: Sequence[Case], folder: Path, *, preprocess: bool) -> Dataset:
    """Raw files (links; labels as 0..3), fingerprint and plans; preprocessed cases if asked for."""
    for kind in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{kind}"] = str(folder / kind)
    raw = folder / "raw" / _NAME
    made = Dataset(raw, folder / "preprocessed" / _NAME, tuple(case.case_id for case in cases))
    _write_raw(cases, made)

    from nnunetv2.experiment_planning import plan_and_preprocess_api as api

    api.extract_fingerprints([DATASET_ID], num_processes=1, show_progress_bar=False)
    api.plan_experiments([DATASET_ID])
    if preprocess:
        api.preprocess_dataset(
            DATASET_ID,
            configurations=("3d_fullres",),
            num_processes=[1],
            show_progress_bar=False,
        )
    return made


def split(made: Dataset, train: Sequence[Case], held_out: Sequence[Case]) -> None:
    """Makes these its fold 0."""
    fold = {"train": [case.case_id for case in train], "val": [case.case_id for case in held_out]}
    (made.preprocessed / "splits_final.json").write_text(json.dumps([fold]))


def reshape(plan: dict[str, Any], patch_size: Sequence[int], widths: Sequence[int]) -> None:
    """Gives a plan another patch, and a plain U-Net of these widths, whose stages halve edges."""
    stages, built = len(widths), plan["architecture"]["arch_kwargs"]
    plan["patch_size"] = list(patch_size)
    built |= {
        "n_stages": stages,
        "features_per_stage": list(widths),
        "kernel_sizes": [[3, 3, 3]] * stages,
        "strides": [[1, 1, 1]] + [[2, 2, 2]] * (stages - 1),
        "n_conv_per_stage": [2] * stages,
        "n_conv_per_stage_decoder": [2] * (stages - 1),
    }


def supervised(widths: Sequence[int]) -> int:
    """Our `network.deep_supervision` of its U-Net, whose coarsest head has weight 0 in training."""
    return max(0, len(widths) - 3)


def _write_raw(cases: Sequence[Case], made: Dataset) -> None:
    """Links to the image files, label files renumbered as nnU-Net's BraTS converter does."""
    for part in ("imagesTr", "labelsTr"):
        (made.raw / part).mkdir(parents=True)
    for case in cases:
        images, labels = made.files(case.case_id)
        for uri, link in zip(case.image_uris, images, strict=True):
            Path(link).symlink_to(Path(uri).resolve())
        necrosis, oedema, enhancing = case.label_values
        nifti = nib.load(case.label_uri)
        stored = np.asarray(nifti.dataobj)
        renumbered = np.zeros(stored.shape, np.uint8)
        for value, new in ((oedema, 1), (necrosis, 2), (enhancing, 3)):
            renumbered[stored == value] = new
        nib.save(nib.Nifti1Image(renumbered, nifti.affine), labels)
    description = {
        "channel_names": {str(m): name for m, name in enumerate(MODALITIES)},
        "labels": {"background": 0, "WT": [1, 2, 3], "TC": [2, 3], "ET": [3]},
        "regions_class_order": [1, 2, 3],
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
    }
    (made.raw / "dataset.json").write_text(json.dumps(description))
