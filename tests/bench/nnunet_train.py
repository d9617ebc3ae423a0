"""nnU-Net's own trainer on a plan of another size, and what its own predictor makes of a case."""

import json
import os
import random
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import nibabel as nib
import nnunet
import numpy as np
import torch
from nnunetv2.inference import export_prediction
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerNoDA import (
    nnUNetTrainerNoDA,
)
from step import STILL

from raybrats.config import TrainConfig

VALUES = np.array([0, 2, 1, 3], np.uint8)
"""What our labels 0, NCR, ED and ET are in its files, and what its values are here."""
CONFIGURATION = "3d_fullres"


class Trainer(nnUNetTrainer):
    """nnU-Net's trainer that tells of every step; its epochs validate, save and print nothing."""

    after_step: Callable[[float, float], None]
    """Takes the loss of a step, as it is there, and the seconds that it and its batch took."""

    def on_epoch_start(self) -> None:
        self._began = time.perf_counter()
        super().on_epoch_start()

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        seconds = time.perf_counter() - self._began
        super().on_train_epoch_end(train_outputs)
        self.after_step(float(np.mean([o["loss"] for o in train_outputs])), seconds)

    def on_validation_epoch_end(self, val_outputs: list[dict[str, Any]]) -> None:
        assert not val_outputs, "there are none"

    def on_epoch_end(self) -> None:
        self.current_epoch += 1

    def print_to_log_file(self, *_: object, **__: object) -> None:
        return


class Still(Trainer, nnUNetTrainerNoDA):
    """The same without augmentation."""


def new_trainer(
    made: nnunet.Dataset,
    config: TrainConfig,
    device: torch.device,
    *,
    batch_dice: bool | None = None,
    changes: Mapping[str, Any] = MappingProxyType({}),
) -> Trainer:
    """Its trainer with our patch, widths, batch, seed and steps, each of which is an epoch.

    So its learning rate falls with every step, as ours does.

    Args:
        made: the data set, preprocessed.
        config: our run.
        device: where it trains.
        batch_dice: whether the Dice is one over the batch; as its planner says, if not given.
        changes: what differs from its `dataset.json`.
    """
    if device.type == "cpu":  # batches in this process, or seeds would decide nothing
        os.environ.setdefault("nnUNet_n_proc_DA", "0")
    os.environ.setdefault("nnUNet_compile", "f")
    plans = made.read("nnUNetPlans.json") | {"continue_training": False}
    plan = plans["configurations"][CONFIGURATION]
    nnunet.reshape(plan, config.data.patch_size, config.network.widths)
    plan["batch_size"] = config.optim.global_batch
    if batch_dice is not None:
        plan["batch_dice"] = batch_dice
    description = json.loads((made.raw / "dataset.json").read_text()) | dict(changes)
    random.seed(config.run.seed)
    np.random.seed(config.run.seed)
    torch.manual_seed(config.run.seed)
    kind = Still if config.augment == STILL else Trainer
    trainer = kind(plans, CONFIGURATION, 0, description, device=device)
    trainer.num_epochs, trainer.num_iterations_per_epoch = config.optim.steps, 1
    trainer.num_val_iterations_per_epoch, trainer.disable_checkpointing = 0, True
    trainer.initialize()
    return trainer


def segmented(trainer: Trainer, case_id: str, *, mirror: bool) -> np.ndarray:
    """Labels (k, j, i) of a preprocessed case in our values, as its last validation makes them."""
    dataset = trainer.dataset_class(trainer.preprocessed_dataset_folder, [case_id])
    image, _, _, properties = dataset.load_case(case_id)
    predictor = nnUNetPredictor(
        use_mirroring=mirror, device=trainer.device, perform_everything_on_device=True
    )
    predictor.allow_tqdm = False
    of = trainer.plans_manager, trainer.configuration_manager
    axes = trainer.inference_allowed_mirroring_axes
    predictor.manual_initialization(
        trainer.network, *of, None, trainer.dataset_json, type(trainer).__name__, axes
    )
    trainer.set_deep_supervision_enabled(False)
    logits = predictor.predict_sliding_window_return_logits(torch.from_numpy(image[:])).cpu()
    trainer.set_deep_supervision_enabled(True)
    made = export_prediction.convert_predicted_logits_to_segmentation_with_correct_shape(
        logits, *of, trainer.label_manager, properties
    )
    return VALUES[made]


def reference(made: nnunet.Dataset, case_id: str) -> np.ndarray:
    """Labels (k, j, i) of a case's file in our values."""
    _, path = made.files(case_id)
    return VALUES[np.asarray(nib.load(path).dataobj)].T
