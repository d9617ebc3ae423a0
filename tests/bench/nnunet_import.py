"""What nnU-Net's own predictor makes of a case, and what its fold, imported here, makes of it.

The checkpoint, the plans and the data set are written by nnU-Net's own trainer and planner. Its
predictor sums in half precision, which turns over voxels whose logits are next to 0; so it is also
run with `torch.half` meaning single precision.

    .venv-bench/bin/python tests/bench/nnunet_import.py
"""

import json
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import nibabel as nib
import nnunet
import numpy as np
import torch

from raybrats.data.cohort.case import Case
from raybrats.data.cohort.index import find_cases, verify_case
from raybrats.model.inference import segment
from raybrats.model.network import trained_network
from raybrats.phantom.phantom import write_phantoms
from raybrats.train.nnunet import Fold, read_fold

SHAPE, PATCH, WIDTHS = (72, 64, 56), (32, 48, 40), (8, 16, 32, 32)
MOST_TURNED = 1e-4
"""Fraction of the voxels that may differ where both sum in single precision, by its rounding."""


def trained(cases: list[Case], folder: Path) -> Path:
    """The folder of a fold that nnU-Net's trainer has saved; its weights are random ones."""
    made = nnunet.make(cases, folder, preprocess=True)
    plans, dataset = (
        made.read("nnUNetPlans.json"),
        json.loads((made.raw / "dataset.json").read_text()),
    )
    plan = plans["configurations"]["3d_fullres"]
    nnunet.reshape(plan, PATCH, WIDTHS)
    plan["spacing"] = [1.0] * 3  # small phantoms have large voxels

    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    given = {**plans, "continue_training": False}
    trainer = nnUNetTrainer(given, "3d_fullres", 0, dataset, device=torch.device("cpu"))
    trainer.initialize()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    trainer.logger.log("ema_fg_dice", 0.5, 0)
    place = folder / "results" / "fold"
    (place / "fold_0").mkdir(parents=True)
    trainer.save_checkpoint(str(place / "fold_0" / "checkpoint_final.pth"))
    (place / "plans.json").write_text(json.dumps(plans))
    (place / "dataset.json").write_text(json.dumps(dataset))
    return place


def theirs(place: Path, images: list[str], precision: torch.dtype) -> np.ndarray:
    """Labels (i, j, k) by nnU-Net's predictor, with all its mirrorings."""
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(place), (0,))
    image, _ = SimpleITKIO().read_images(images)
    with patch.object(torch, "half", precision):
        found = predictor.predict_single_npy_array(image, {"spacing": (1.0,) * 3})
    return found.transpose(2, 1, 0)


def ours(fold: Fold, images: list[str]) -> np.ndarray:
    """The same by the imported fold, in nnU-Net's values: 1 ED, 2 NCR, 3 ET."""
    network = trained_network(fold.config, fold.weights, "cpu")
    volumes = np.stack([np.asarray(nib.load(path).dataobj, np.float32) for path in images])
    labels = segment(network, fold.config, volumes)
    return np.array([0, 2, 1, 3], np.uint8)[labels]


def main() -> int:
    """Prints how many voxels differ; 1 if too many do."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_phantoms(str(folder / "tree"), num_cases=5, shape=SHAPE, edition="2021")
        cases = [verify_case(case) for case in find_cases(str(folder / "tree"))]
        place = trained(cases, folder)
        files = [str(place / f) for f in ("fold_0/checkpoint_final.pth", "plans.json")]
        fold = read_fold(*files, str(place / "dataset.json"))
        worst = 0.0
        for case in cases[:2]:
            images = list(case.image_uris)
            found = ours(fold, images)
            for precision in (torch.float16, torch.float32):
                expected = theirs(place, images, precision)
                differ = float((expected != found).mean())
                shares = np.bincount(expected.ravel(), minlength=4) / expected.size
                print(f"{case.case_id}, {precision}: labels {shares.round(3)}, differ {differ:.2e}")
            worst = max(worst, differ)
    return int(worst > MOST_TURNED)


if __name__ == "__main__":
    sys.exit(main())
