"""A fold of nnU-Net becomes a model of the registry by one command, and segments."""

import json

import mlflow
import numpy as np
import torch

from raybrats import cli
from raybrats.config import NetworkConfig
from raybrats.model.unet import UNet
from raybrats.phantom.phantom import make_phantom
from raybrats.registry import load

CONVOLUTION = {
    "kernel_sizes": [[3, 3, 3]] * 3,
    "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
    "features_per_stage": [4, 8, 8],
    "n_conv_per_stage": [2, 2, 2],
    "n_conv_per_stage_decoder": [2, 2],
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "nonlin": "torch.nn.LeakyReLU",
    "dropout_op": None,
}
PLAN = {
    "batch_size": 2,
    "patch_size": [16, 16, 16],
    "spacing": [1.0, 1.0, 1.0],
    "normalization_schemes": ["ZScoreNormalization"] * 2,
    "use_mask_for_norm": [True] * 2,
    "architecture": {"network_class_name": "unet.PlainConvUNet", "arch_kwargs": CONVOLUTION},
}
DATASET = {
    "channel_names": {"0": "T1ce", "1": "FLAIR"},
    "labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]},
}


def test_a_fold_is_registered_and_segments(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    network = UNet(NetworkConfig(widths=(4, 8, 8), deep_supervision=1), 3, 2, 3)
    state = {
        "network_weights": network.state_dict(),
        "init_args": {"configuration": "3d_fullres"},
        "inference_allowed_mirroring_axes": None,
    }
    torch.save(state, "final.pth")
    (tmp_path / "plans.json").write_text(json.dumps({"configurations": {"3d_fullres": PLAN}}))
    (tmp_path / "dataset.json").write_text(json.dumps(DATASET))
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    words = ["final.pth", "plans.json", "dataset.json", "--model", "taken", "--tracking-uri", uri]
    code = cli.main(["import-nnunet", *words, "--json"])
    out, err = capfd.readouterr()
    assert (code, json.loads(out)["model"]) == (
        *(0, {"name": "taken", "version": "1", "alias": "challenger"}),
    ), err
    (row,) = load.versions(uri, "taken")
    assert (row["aliases"], row["dice_mean"]) == ("challenger", "")
    run = mlflow.MlflowClient(uri).get_run(row["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.tags["raybrats.source"] == "nnU-Net: final.pth"
    image = make_phantom(0, shape=(28, 24, 20))[0][[2, 0]].astype(np.float32)
    labels = load.load("models:/taken/1", uri).segment(image).labels
    assert labels.shape == (28, 24, 20)
    assert len(np.unique(labels)) > 1
