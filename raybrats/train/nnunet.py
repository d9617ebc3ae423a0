"""A trained fold of nnU-Net as a run of raybrats: its plans, its data set and its weights."""

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy._core import multiarray
from torch import Tensor

from raybrats import storage
from raybrats.brats import Modality
from raybrats.config import DataConfig, NetworkConfig, TrainConfig
from raybrats.data.cohort.dataset_json import labels_of
from raybrats.errors import DataError, UsageError
from raybrats.label_set import LabelSet, as_text
from raybrats.model.unet import blocks_of
from raybrats.recipes import nnunet

_ALLOWED: list[Any] = [
    (multiarray.scalar, "numpy._core.multiarray.scalar"),
    (multiarray.scalar, "numpy.core.multiarray.scalar"),  # NumPy 1's
    *(np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType, np.dtypes.Int64DType),
]
"""What nnU-Net's checkpoints hold besides tensors and plain values: the figures of its log."""
_MODALITIES: tuple[tuple[Modality, str], ...] = (
    ("flair", r"flair|t2f"),
    ("t1ce", r"t1.?c|t1.?gd|contrast|gado"),
    ("t1", r"t1"),
    ("t2", r"t2"),
)
"""What the names of channels hold, by ours; the first one that fits."""
_KINDS: dict[str, Literal["plain", "residual"]] = {
    "PlainConvUNet": "plain",
    "ResidualEncoderUNet": "residual",
}
_THEIR_OWN = ("all_modules", "decoder.encoder.")
"""Parts of the names under which nnU-Net's state lists a layer once more."""


@dataclass(frozen=True)
class Fold:
    """A trained fold of nnU-Net."""

    config: TrainConfig
    weights: Mapping[str, Tensor]


def read_fold(checkpoint_uri: str, plans_uri: str, dataset_uri: str) -> Fold:
    """A fold as nnU-Net has trained it, whose network is one of ours.

    nnU-Net's axes are those of SimpleITK, (k, j, i), and what its plans make of them; ours are
    (i, j, k), so kernels are transposed.

    Args:
        checkpoint_uri: `checkpoint_final.pth`; no pickled code in it is run.
        plans_uri: `plans.json`.
        dataset_uri: `dataset.json`.

    Raises:
        UsageError: the plans are of another network, spacing or normalisation, the channels are
            no modalities of BraTS, or the labels do not fit together.
        DataError: a file is damaged, or the checkpoint holds anything but weights and figures.
        StorageError: a file is missing or out of reach.

    Example:
        >>> read_fold("checkpoint_final.pth", "plans.json", "dataset.json")  # doctest: +SKIP
    """
    state = _state(checkpoint_uri)
    plans, dataset = _document(plans_uri), _document(dataset_uri)
    try:
        name = state["init_args"]["configuration"]
        plan = plans["configurations"][name]
        order = [2 - axis for axis in plans.get("transpose_forward", (0, 1, 2))]
        target, outputs, labels = _outputs(dataset)
        config = _config(plan, order, dataset, target)
        config = replace(config, data=replace(config.data, labels=as_text(labels)))
        weights = _weights(state["network_weights"], order, outputs)
        mirrored = state.get("inference_allowed_mirroring_axes") or ()
        axes = tuple(sorted(order[axis] for axis in mirrored))
    except UsageError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        where = f"{checkpoint_uri}, {plans_uri}, {dataset_uri}"
        raise DataError(
            f"{where}: not those of one fold of nnU-Net ({error!r} is missing)"
        ) from error
    return Fold(replace(config, prediction=replace(config.prediction, mirror=axes)), weights)


def _state(uri: str) -> Mapping[str, Any]:
    data = storage.read_bytes(uri)
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch has no kind of its own for what it refuses
        words = " ".join(str(error).split())
        refused = re.search(r"GLOBAL ([\w.]+)", words)
        why = f"it holds {refused[1]}" if refused else "it is damaged"
        raise DataError(f"{uri}: no checkpoint of nnU-Net ({why})") from None


def _document(uri: str) -> Mapping[str, Any]:
    try:
        found = json.loads(storage.read_bytes(uri))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise DataError(f"{uri}: no JSON document of nnU-Net")
    return found


def _config(
    plan: Mapping[str, Any], order: Sequence[int], dataset: Mapping[str, Any], target: str
) -> TrainConfig:
    """The run whose network and normalisation are the plan's."""
    kind = plan["architecture"]["network_class_name"].rpartition(".")[2]
    built = plan["architecture"]["arch_kwargs"]
    widths = tuple(built["features_per_stage"])
    network = NetworkConfig(
        name=_KINDS.get(kind, "plain"), widths=widths, deep_supervision=len(widths) - 2
    )
    stages, decoder = len(widths), 1 if kind == "ResidualEncoderUNet" else 2
    blocks = built.get("n_blocks_per_stage", built.get("n_conv_per_stage"))
    schemes = plan["normalization_schemes"]
    due = {
        "network_class_name": (kind in _KINDS, kind, f"one of {', '.join(_KINDS)}"),
        "kernel_sizes": _due(built["kernel_sizes"], [[3] * 3] * stages),
        "strides": _due(built["strides"], [[1] * 3] + [[2] * 3] * (stages - 1)),
        "blocks or convolutions per stage": _due(blocks, list(blocks_of(network))),
        "n_conv_per_stage_decoder": _due(
            built["n_conv_per_stage_decoder"], [decoder] * (stages - 1)
        ),
        "norm_op": _due(built["norm_op"], "torch.nn.modules.instancenorm.InstanceNorm3d"),
        "nonlin": _due(built["nonlin"], "torch.nn.LeakyReLU"),
        "dropout_op": _due(built["dropout_op"], None),
        "spacing": _due([float(mm) for mm in plan["spacing"]], [1.0] * 3),
        "normalization_schemes": _due(schemes, ["ZScoreNormalization"] * len(schemes)),
        "use_mask_for_norm": _due(plan["use_mask_for_norm"], [True] * len(schemes)),
    }
    for name, (holds, found, wanted) in due.items():
        if not holds:
            raise UsageError(f"plans with {name} {found} cannot be imported; expected {wanted}")
    base, patch = nnunet(), [plan["patch_size"][order.index(axis)] for axis in range(3)]
    data = DataConfig(
        modalities=_modalities(dataset["channel_names"]),
        patch_size=(patch[0], patch[1], patch[2]),
        foreground_share=base.data.foreground_share,
    )
    return replace(
        base,
        recipe="nnunet-import",
        data=data,
        network=network,
        loss=replace(base.loss, target=target),
        optim=replace(base.optim, global_batch=plan["batch_size"]),
    )


def _due(found: object, wanted: object) -> tuple[bool, object, object]:
    return found == wanted, found, wanted


def _modalities(channels: Mapping[str, str]) -> tuple[Modality, ...]:
    """Ours, in the order of nnU-Net's channels."""
    return tuple(
        _named(channels[str(number)], _MODALITIES, "channel") for number in range(len(channels))
    )


def _outputs(dataset: Mapping[str, Any]) -> tuple[str, list[int], LabelSet]:
    """What the network tells apart, nnU-Net's number of each of our outputs, and its labels."""
    values, labels = labels_of(dataset)
    foreground = [value for value in dataset["labels"].values() if value not in (0, [0])]
    if not any(isinstance(value, list) for value in foreground):
        return "labels", [0, *values], labels
    parts = [{*value} if isinstance(value, list) else {value} for value in foreground]
    ours = [{values[label - 1] for label in region.labels} for region in labels.regions]
    return "regions", [parts.index(region) for region in ours], labels


def _named(theirs: str, ours: Sequence[tuple[Any, str]], kind: str) -> Any:  # noqa: ANN401
    for name, pattern in ours:
        if re.search(pattern, theirs, re.IGNORECASE):
            return name
    names = ", ".join(name for name, _ in ours)
    raise UsageError(f"dataset.json has a {kind} {theirs!r}, which is none of {names}")


def _weights(
    theirs: Mapping[str, Tensor], order: Sequence[int], outputs: Sequence[int]
) -> dict[str, Tensor]:
    """Their weights by our names, axes and outputs."""
    axes = [0, 1, *(2 + order.index(axis) for axis in range(3))]
    found = {}
    for name, tensor in theirs.items():
        if any(part in name for part in _THEIR_OWN):
            continue
        ours = tensor.permute(axes) if tensor.ndim == 5 else tensor
        if ".seg_layers." in name:
            ours = ours[list(outputs)]
        found[name] = ours.contiguous().float()
    return found
