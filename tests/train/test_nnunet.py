"""A fold that nnU-Net has trained: what is taken over, and what is refused by name."""

import importlib
import io
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from raybrats.errors import DataError, UsageError
from raybrats.label_set import GLIOMA
from raybrats.model.network import load_weights, network_of
from raybrats.train.nnunet import read_fold

WIDTHS = (8, 16, 24)
REGIONS = {"background": 0, "tumor core": [2, 3], "whole tumor": [1, 2, 3], "enhancing tumor": [3]}
LABELS = {"background": 0, "edema": 1, "non-enhancing tumor": 2, "enhancing tumor": 3}
OTHERS = {"background": 0, "liver": 1, "lesion": 2}
CHANNELS = {"0": "T1", "1": "T1ce", "2": "T2", "3": "Flair"}
BLOCKS = {
    "PlainConvUNet": {"n_conv_per_stage": [2, 2, 2], "n_conv_per_stage_decoder": [2, 2]},
    "ResidualEncoderUNet": {"n_blocks_per_stage": [1, 3, 4], "n_conv_per_stage_decoder": [1, 1]},
}


def plan(kind="PlainConvUNet", **changes):
    """One configuration of plans.json, as nnU-Net 2.8 writes it."""
    built = {
        "n_stages": 3,
        "features_per_stage": list(WIDTHS),
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * 3,
        "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
        **BLOCKS[kind],
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    whole = {
        "batch_size": 2,
        "patch_size": [32, 24, 16],
        "spacing": [1.0, 1.0, 1.0],
        "normalization_schemes": ["ZScoreNormalization"] * 4,
        "use_mask_for_norm": [True] * 4,
        "architecture": {
            "network_class_name": f"dynamic_network_architectures.architectures.unet.{kind}",
            "arch_kwargs": built | {k: v for k, v in changes.items() if k in built},
        },
    }
    return whole | {k: v for k, v in changes.items() if k in whole}


def library(kind, num_outputs):
    aside = Path(sys.prefix) / "oracles"
    if not aside.is_dir():
        pytest.skip("no .venv/oracles; make .venv/installed")
    sys.path.insert(0, str(aside))
    try:
        unet = importlib.import_module("dynamic_network_architectures.architectures.unet")
    finally:
        sys.path.remove(str(aside))
    torch.manual_seed(0)
    network = getattr(unet, kind)(
        *(4, 3, WIDTHS, nn.Conv3d, 3, (1, 2, 2)),
        **BLOCKS[kind],
        num_classes=num_outputs,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


@pytest.fixture
def fold(tmp_path):
    """Writes the three files, and returns their places."""

    def write(state, plans, labels=REGIONS, channels=CHANNELS):
        places = [tmp_path / name for name in ("final.pth", "plans.json", "dataset.json")]
        torch.save(state, places[0])
        places[1].write_text(json.dumps(plans))
        places[2].write_text(json.dumps({"channel_names": channels, "labels": labels}))
        return list(map(str, places))

    return write


def state_of(network, **more):
    """A checkpoint as nnU-Net saves it, with the figures of its log."""
    return {
        "network_weights": network.state_dict(),
        "optimizer_state": torch.optim.SGD(network.parameters(), 0.1).state_dict(),
        "grad_scaler_state": None,
        "logging": {"ema_fg_dice": [np.float64(0.5)], "train_losses": [np.float32(-0.3)]},
        "_best_ema": np.float64(0.5),
        "current_epoch": 1000,
        "init_args": {"configuration": "3d_fullres", "fold": 0},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1, 2),
        **more,
    }


def plans_of(configuration, transpose=(0, 1, 2)):
    return {"transpose_forward": transpose, "configurations": {"3d_fullres": configuration}}


@pytest.mark.parametrize("transpose", [(0, 1, 2), (1, 0, 2), (2, 0, 1)])
@pytest.mark.parametrize("labels", [REGIONS, LABELS, OTHERS])
@pytest.mark.parametrize("kind", BLOCKS)
def test_the_network_computes_what_nnunets_does(fold, kind, labels, transpose):
    theirs = library(kind, 4 if labels == LABELS else 3)
    found = read_fold(*fold(state_of(theirs), plans_of(plan(kind), transpose), labels))
    ours = network_of(found.config).eval()
    load_weights(ours, found.weights)
    image = torch.randn(1, 4, 16, 8, 12, generator=torch.Generator().manual_seed(0))  # (i, j, k)
    read = image.permute(0, 1, 4, 3, 2)  # as SimpleITK gives it, then as the plans turn it
    turned = read.permute(0, 1, *(2 + axis for axis in transpose))
    expected = theirs(turned)[0]
    back = [transpose.index(axis) for axis in range(3)]
    expected = expected.permute(0, 1, *(2 + axis for axis in back)).permute(0, 1, 4, 3, 2)
    # WT, TC, ET, which the data set names in another order; or background, NCR, ED, ET
    outputs = [1, 0, 2] if labels == REGIONS else [0, 2, 1, 3] if labels == LABELS else [0, 1, 2]
    torch.testing.assert_close(ours(image), expected[:, outputs], atol=1e-5, rtol=1e-5)
    assert found.config.loss.target == ("regions" if labels == REGIONS else "labels")
    assert found.config.labels.names == (("liver", "lesion") if labels == OTHERS else GLIOMA.names)
    assert found.config.data.modalities == ("t1", "t1ce", "t2", "flair")
    patch = dict(zip((2 - axis for axis in transpose), (32, 24, 16), strict=True))
    assert found.config.data.patch_size == tuple(patch[axis] for axis in range(3))
    assert found.config.prediction.mirror == (0, 1, 2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"spacing": [1.0, 1.0, 3.0]}, "spacing"),
        ({"kernel_sizes": [[1, 3, 3]] * 3}, "kernel_sizes"),
        ({"strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]]}, "strides"),
        ({"n_conv_per_stage": [2, 3, 2]}, "convolutions per stage"),
        ({"norm_op": "torch.nn.modules.batchnorm.BatchNorm3d"}, "norm_op"),
        ({"normalization_schemes": ["CTNormalization"] * 4}, "normalization_schemes"),
        ({"use_mask_for_norm": [False] * 4}, "use_mask_for_norm"),
    ],
)
def test_a_plan_of_another_network_is_refused_by_name(fold, changes, said):
    places = fold(state_of(nn.Conv3d(1, 1, 1)), plans_of(plan(**changes)))
    with pytest.raises(UsageError, match=said):
        read_fold(*places)


@pytest.mark.parametrize(
    ("labels", "channels", "said"),
    [
        ({"background": 0, "whole": [1, 2], "core": [2]}, CHANNELS, "one label of regions_class_o"),
        ({**REGIONS, "tumor core": [1, 4]}, CHANNELS, "one label of regions_class_order a region"),
        ({"background": 0}, CHANNELS, "expected values of 1 to 255"),
        (REGIONS, {**CHANNELS, "1": "CT"}, "'CT', which is none of flair, t1ce, t1, t2"),
    ],
)
def test_labels_and_channels_that_are_none_are_refused(fold, labels, channels, said):
    places = fold(state_of(nn.Conv3d(1, 1, 1)), plans_of(plan()), labels, channels)
    with pytest.raises(UsageError, match=said):
        read_fold(*places)


class Mine:
    """What an attacker would have unpickled."""

    def __reduce__(self):
        return print, ("this code was run",)


def test_no_code_of_a_checkpoint_is_run(fold, capsys):
    places = fold(state_of(nn.Conv3d(1, 1, 1), logging=Mine()), plans_of(plan()))
    with pytest.raises(DataError, match=r"no checkpoint of nnU-Net \(it holds print\)"):
        read_fold(*places)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("data", [b"", b"garbage", pickle.dumps({"network_weights": {}})])
def test_what_is_no_checkpoint_is_bad_data(fold, data):
    places = fold(state_of(nn.Conv3d(1, 1, 1)), plans_of(plan()))
    Path(places[0]).write_bytes(data)
    with pytest.raises(DataError):
        read_fold(*places)


def test_files_that_do_not_belong_together_are_bad_data(fold):
    places = fold(state_of(nn.Conv3d(1, 1, 1), init_args={"configuration": "2d"}), plans_of(plan()))
    with pytest.raises(DataError, match="not those of one fold of nnU-Net"):
        read_fold(*places)
    buffer = io.BytesIO()
    torch.save([1], buffer)
    Path(places[0]).write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match="not those of one fold of nnU-Net"):
        read_fold(*places)
    Path(places[1]).write_text("[")
    with pytest.raises(DataError, match="no JSON document"):
        read_fold(*places)
