"""A run as a value: frozen dataclasses, checked when made, with a JSON round trip and overrides.

Only the standard library is imported here; pydantic and tyro are reached for inside the functions
that need them, so the mathematics runs where neither is installed.
"""

import hashlib
import json
import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from typing import Any, ClassVar, Literal

from raybrats.brats import MODALITIES, Modality
from raybrats.errors import UsageError, holds_credentials, redacted
from raybrats.label_set import LabelSet, label_set_of
from raybrats.offers import Offers

NUM_FOLDS = 5
"""Folds of every cohort (nnU-Net: 5)."""
Normalisation = Literal["zscore", "minmax", "percentile"]
NETWORKS = Offers(
    "network",
    "raybrats.networks",
    own=("plain", "residual", "dynunet", "mednext", "segresnet", "unet"),
    field="network.name",
)
"""Names of networks: nnU-Net's two, MONAI's, and those of others; see `raybrats.model.others`."""
LOSSES = Offers("loss", "raybrats.losses", own=("sum",), field="loss.name")
"""Names of losses, likewise."""


def _require(holds: bool, name: str, rule: str, value: object) -> None:
    if not holds:
        raise UsageError(f"{name} must be {rule}, got {value!r}")


def _require_no_secret(name: str, uri: str) -> None:
    rule = "a URI without credentials (they would be stored with the run; use the environment)"
    shown = redacted(uri)
    if shown == uri:  # what is not seen at once, such as %70assword=, is not shown at all
        shown = f"{uri.partition('://')[0]}://***"
    _require(not holds_credentials(uri), name, rule, shown)


class Section:
    """Base of every section: unknown keys are errors when a run is read from JSON."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}


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
    prefetch_batches: int = 2
    """Batches kept ready in front of the training step."""

    def __post_init__(self) -> None:
        _require_no_secret("data.cohort", self.cohort)
        _require(-1 <= self.fold < NUM_FOLDS, "data.fold", "in -1..4", self.fold)
        flat = self.sampling == "slices"
        rule = ">= 8, and 1 along k for slices" if flat else ">= 8"
        fits = min(self.patch_size[: 2 if flat else 3]) >= 8 and (self.patch_size[2] == 1) == flat
        _require(fits, "data.patch_size", rule, self.patch_size)
        low, high = self.percentiles
        _require(0 <= low < high <= 100, "data.percentiles", "0 <= low < high <= 100", (low, high))
        _require(0 <= self.grid_overlap < 1, "data.grid_overlap", "in 0..1", self.grid_overlap)
        _require(self.first_slice >= 0, "data.first_slice", ">= 0", self.first_slice)
        _require(self.num_slices >= 1, "data.num_slices", ">= 1", self.num_slices)
        draws = self.patches_per_case
        _require(1 <= draws <= 16, "data.patches_per_case", "in 1..16", draws)
        _require(0 <= self.cache_gb < math.inf, "data.cache_gb", ">= 0", self.cache_gb)
        folder = self.cache_dir
        local = not folder or folder.startswith("/")
        _require(local, "data.cache_dir", "an absolute local path, or empty", folder)
        _require(len(self.modalities) > 0, "data.modalities", "one or more", self.modalities)
        share = self.foreground_share
        _require(0 <= share <= 1, "data.foreground_share", "in 0..1", share)
        bad = self.max_bad_fraction
        _require(0 <= bad < 1, "data.max_bad_fraction", "in 0..1", bad)
        least = self.min_labelled_fraction
        _require(0 <= least < 1, "data.min_labelled_fraction", "in 0..1", least)
        label_set_of(self.labels)
        _require(self.cpus_per_task > 0, "data.cpus_per_task", "> 0", self.cpus_per_task)
        _require(self.prefetch_batches >= 1, "data.prefetch_batches", ">= 1", self.prefetch_batches)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig(Section):
    """Random changes of a batch: the probability of each a patch, and its range.

    Values are nnU-Net v2's where no other source is named; what it lacks is off, and where that is
    what its trainer DA5 adds (nnunetv2 2.8.1, `nnUNetTrainerDA5`), ranges are DA5's.
    """

    CHANGES: ClassVar[tuple[str, ...]] = (
        *("rotation", "scale", "elastic", "bias_field", "noise", "blur", "median", "brightness"),
        *("brightness_added", "contrast", "low_resolution", "inverted_gamma", "gamma"),
        *("blank_rectangles", "brightness_gradient", "local_gamma", "sharpening"),
        *("drop_modality", "rotate90", "transpose", "mirror"),
    )
    """The fields that are probabilities of a change, in the order in which changes are made."""
    _FRACTIONS: ClassVar[tuple[str, ...]] = (
        *("rotation_per_axis", "blur_per_modality", "contrast_per_modality"),
        *("contrast_keeps_range", "low_resolution_per_modality", "local_per_modality"),
    )

    rotation: float = 0.2
    rotation_degrees: float = 30.0
    """Largest angle about each axis, either way."""
    rotation_per_axis: float = 1.0
    """Fraction of the axes about which a patch that is rotated turns (DA5: half)."""
    scale: float = 0.2
    scale_range: tuple[float, float] = (0.7, 1.4)
    """Source voxels a voxel, as in nnU-Net: 0.7 magnifies, 1.4 makes the head smaller."""
    scale_each_axis: bool = False
    """Whether each axis has a scale of its own (DA5)."""
    elastic: float = 0.0
    """Probability of a smooth deformation (the BraTS 2020 winner: 0.3)."""
    elastic_voxels: tuple[float, float] = (0.0, 7.5)
    """Largest displacement of a control point (TorchIO: 7.5 mm)."""
    elastic_spacing_voxels: float = 32.0
    """Distance of the control points (TorchIO: 7 over a head, about 32 mm)."""
    bias_field: float = 0.0
    """Probability of smooth shading, another for each modality."""
    bias_field_coefficient: float = 0.5
    """Largest coefficient of the polynomial over the patch (TorchIO)."""
    noise: float = 0.1
    noise_variance: tuple[float, float] = (0.0, 0.01)
    """Between the roots of these the deviation is drawn (nnU-Net: up to 0.1; what it calls the
    variance it takes for the deviation)."""
    noise_before_blur: bool = True
    """Whether noise is blurred with the rest, or comes after blur and median (DA5)."""
    blur: float = 0.2
    blur_per_modality: float = 0.5
    """Fraction of the modalities that is blurred where a patch is."""
    blur_sigma_voxels: tuple[float, float] = (0.5, 1.0)
    blur_each_axis: bool = True
    """Whether each axis has a sigma of its own (DA5: one for all)."""
    median: float = 0.0
    """Probability of a median filter; while this and `blur` are at most 1 together, no patch has
    both."""
    median_size_voxels: tuple[int, int] = (2, 7)
    """Edge of the median's window."""
    brightness: float = 0.15
    brightness_range: tuple[float, float] = (0.75, 1.25)
    brightness_added: float = 0.0
    brightness_added_deviation: float = 0.5
    """Deviation of the Gaussian number that is added to a modality."""
    contrast: float = 0.15
    contrast_per_modality: float = 1.0
    """Fraction of the modalities that is changed where a patch is (DA5: half)."""
    contrast_range: tuple[float, float] = (0.75, 1.25)
    contrast_keeps_range: float = 1.0
    """Fraction of those patches that keep the brain's least and greatest value (DA5: half)."""
    low_resolution: float = 0.25
    low_resolution_per_modality: float = 0.5
    """Fraction of the modalities that is coarsened where a patch is."""
    low_resolution_range: tuple[float, float] = (0.5, 1.0)
    """Edge of the coarse grid over the edge of the patch."""
    inverted_gamma: float = 0.1
    """Probability of a gamma of the negative, within the same range."""
    gamma: float = 0.3
    gamma_range: tuple[float, float] = (0.7, 1.5)
    gamma_keeps: Literal["range", "moments"] = "moments"
    """Statistics of the brain that a gamma keeps: least and greatest value, or mean and deviation
    (nnU-Net). Ends are outliers, so with `range` a gamma of 0.7 or 1.5 moves the mean by 0.8 to
    2.3 deviations (measured on two BraTS 2021 cases)."""
    blank_rectangles: float = 0.0
    """Probability that boxes take the mean of what they hold."""
    blank_rectangles_most: int = 4
    """Greatest number of boxes in a modality; the least is 1."""
    blank_rectangles_range: tuple[float, float] = (0.1, 1 / 3)
    """Edge of a box over the edge of the patch, axis by axis."""
    brightness_gradient: float = 0.0
    """Probability that a Gaussian about a place in or near the patch is added."""
    brightness_gradient_range: tuple[float, float] = (1.0, 5.0)
    """Its height, up or down."""
    local_gamma: float = 0.0
    """Probability of a gamma whose weight is such a Gaussian."""
    local_gamma_below: tuple[float, float] = (0.01, 0.8)
    """Exponents of one half of them."""
    local_gamma_above: tuple[float, float] = (1.5, 4.0)
    """Exponents of the other half."""
    sharpening: float = 0.0
    """Probability that edges are raised by the negative Laplacian."""
    sharpening_range: tuple[float, float] = (0.1, 1.0)
    """Factor on it."""
    local_per_modality: float = 0.5
    """Fraction of the modalities that median, added brightness, rectangles, gradient, local gamma
    and sharpening change where they change a patch, each another one."""
    drop_modality: float = 0.0
    """Probability that one modality, never the only one, becomes background."""
    rotate90: float = 0.0
    """Probability of one to three quarter turns in a plane whose two edges are equal."""
    transpose: float = 0.0
    """Probability that axes of equal edges change places."""
    mirror: float = 0.5
    """Probability of mirroring, axis by axis."""

    def __post_init__(self) -> None:
        angle, spacing = self.rotation_degrees, self.elastic_spacing_voxels
        largest = self.bias_field_coefficient
        for name in (*self.CHANGES, *self._FRACTIONS):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"augment.{name}", "a probability", value)
        for name, span in vars(self).items():
            if isinstance(span, tuple):
                holds = 0 <= span[0] <= span[1] < math.inf
                _require(holds, f"augment.{name}", "0 <= low <= high", span)
        _require(self.scale_range[0] > 0, "augment.scale_range", "above 0", self.scale_range)
        coarse = self.low_resolution_range
        holds = coarse[0] > 0 and coarse[1] <= 1
        _require(holds, "augment.low_resolution_range", "above 0 and at most 1", coarse)
        # the windows of a plane are sorted at once: 11 are 1331 numbers a voxel
        window, boxes = self.median_size_voxels, self.blank_rectangles_range
        holds = window[0] >= 1 and window[1] <= 11
        _require(holds, "augment.median_size_voxels", "in 1..11", window)
        _require(boxes[1] <= 1, "augment.blank_rectangles_range", "at most 1", boxes)
        most, spread = self.blank_rectangles_most, self.brightness_added_deviation
        _require(1 <= most <= 64, "augment.blank_rectangles_most", "in 1..64", most)
        _require(0 <= spread < math.inf, "augment.brightness_added_deviation", ">= 0", spread)
        _require(0 <= angle <= 180, "augment.rotation_degrees", "in 0..180", angle)
        rule = ">= 4 and 2.5 times augment.elastic_voxels (else a patch could fold)"
        unfolded = spacing >= max(4, 2.5 * self.elastic_voxels[1])
        _require(unfolded, "augment.elastic_spacing_voxels", rule, spacing)
        _require(0 <= largest < math.inf, "augment.bias_field_coefficient", ">= 0", largest)


@dataclass(frozen=True, kw_only=True)
class NetworkConfig(Section):
    """A network by name: nnU-Net's `plain` and `residual`, MONAI's, or one of the user's own."""

    _HAVE: ClassVar[dict[str, tuple[str, ...]]] = {
        "residual_units": ("dynunet", "unet"),
        "blocks": ("mednext",),
        "expansion": ("mednext",),
        "kernel_size": ("mednext",),
        "deep_supervision": ("plain", "residual", "dynunet", "mednext"),
        "norm": ("plain", "residual", "dynunet", "unet"),
        "activation": ("plain", "residual", "dynunet"),
        "pooling": ("plain", "residual"),
        "initial_weights": ("plain", "residual"),
    }
    """Of raybrats' networks, those that have a field; with another it keeps its default."""

    name: str = "plain"
    """`plain` or `residual`, nnU-Net's U-Nets; MONAI's `dynunet`, `mednext`, `segresnet` or `unet`;
    an entry point of the group `raybrats.networks`, or `my.module:function`, which get all fields.
    """
    widths: tuple[int, ...] = (32, 64, 128, 256, 320, 320)
    """Channels of each resolution, finest first; each one halves the edge of the one before."""
    residual_units: int = 0
    """Residual units a stage: DynUNet residual blocks if > 0, `UNet(num_res_units=)`."""
    blocks: tuple[int, ...] = (2,)
    """Blocks of each resolution on either way, finest first; those that follow have as many as the
    last (`mednext`; S and B: 2, M: 3 4, L: 3 4 8)."""
    expansion: tuple[int, ...] = (2,)
    """Channels within a block over those of its resolution, listed as `blocks` are (`mednext`;
    S: 2, B and M: 2 3 4, L: 3 4 8)."""
    kernel_size: Literal[3, 5] = 3
    """Edge of the depthwise convolutions (`mednext`)."""
    deep_supervision: int = 0
    """Coarser heads that the loss also sees (`plain`, `residual`, `dynunet`, `mednext`); as many of
    them as there are stages for."""
    norm: Literal["instance", "batch"] = "instance"
    """Normalisation after every convolution (`plain`, `residual`, `dynunet`, `unet`)."""
    activation: Literal["leaky_relu", "relu"] = "leaky_relu"
    """Activation after it (`plain`, `residual`, `dynunet`)."""
    pooling: Literal["stride", "max"] = "stride"
    """How an edge is halved: by the first convolution of a stage, or before it (`plain`,
    `residual`)."""
    initial_weights: Literal["he_normal", "he_uniform"] = "he_normal"
    """Distribution of the first weights, for the activation (`plain`, `residual`)."""
    init_from: str = ""
    """Registered model, checkpoint or run whose weights a new run begins with; heads for other
    outputs are new, and of the modalities it has those that are wanted are taken."""

    def __post_init__(self) -> None:
        NETWORKS.check(self.name)
        for name, networks in self._HAVE.items() if self.name in NETWORKS.own else ():
            default = type(self).__dataclass_fields__[name].default
            has = self.name in networks or getattr(self, name) == default
            _require(has, f"network.{name}", f"{default!r} with {self.name}", getattr(self, name))
        _require_no_secret("network.init_from", self.init_from)
        enough = 3 if self.name == "dynunet" else 2
        # 2 to the power of 9 is more than the edge of any case, and blocks are made one by one
        rule = f"{enough} to 10 long"
        _require(enough <= len(self.widths) <= 10, "network.widths", rule, self.widths)
        units = self.residual_units
        _require(0 <= units <= 8, "network.residual_units", "in 0..8", units)
        _require(min(self.widths) >= 1, "network.widths", ">= 1 each", self.widths)
        heads = self.deep_supervision
        _require(heads >= 0, "network.deep_supervision", ">= 0", heads)
        for name, most in (("blocks", 32), ("expansion", 64)):
            values = getattr(self, name)
            fits = 1 <= len(values) <= 10 and 1 <= min(values) <= max(values) <= most
            _require(fits, f"network.{name}", f"1 to 10 numbers in 1..{most}", values)
        if self.name in ("segresnet", "mednext"):
            step = 8 if self.name == "segresnet" else 1
            doubled = all(w == self.widths[0] << n for n, w in enumerate(self.widths))
            rule = f"multiples of {step} that double from stage to stage, for {self.name}"
            _require(doubled and self.widths[0] % step == 0, "network.widths", rule, self.widths)

    @property
    def stride(self) -> int:
        """Factor between the finest and the coarsest grid; patch edges are multiples of it."""
        return 2 ** (len(self.widths) - 1)


@dataclass(frozen=True, kw_only=True)
class LossConfig(Section):
    """Weighted sum of Dice, cross-entropy and focal terms; a weight of 0 leaves a term out."""

    name: str = "sum"
    """`sum`, this one; an entry point of the group `raybrats.losses`, or `my.module:function`,
    which get all fields."""
    target: Literal["regions", "labels"] = "regions"
    """What the network tells apart: nested regions, a sigmoid each, or background and labels, one
    softmax."""
    background: bool = False
    """Whether Dice and focal term also count the background, where `labels` are the target."""
    dice_weight: float = 1.0
    ce_weight: float = 1.0
    focal_weight: float = 0.0
    focal_gamma: float = 2.0
    """Focusing exponent (Lin et al. 2017)."""
    batch_dice: bool = False
    """One Dice over the batch instead of one a patch (nnU-Net: where it has a low resolution)."""

    def __post_init__(self) -> None:
        fits = self.target == "labels" or not self.background
        _require(fits, "loss.background", "false: regions have none", self.background)
        weights = (self.dice_weight, self.ce_weight, self.focal_weight)
        holds = min(weights) >= 0 and sum(weights) > 0
        _require(holds, "loss.*_weight", ">= 0, with one above 0", weights)
        # A model that is looked up needs no loss, so one that is not installed there is no error
        _require(bool(self.name), "loss.name", "a name", self.name)


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Section):
    """Optimiser, its schedule and the length of the run."""

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = 3e-4
    weight_decay: float = 1e-4
    momentum: float = 0.99
    """Nesterov momentum of SGD (nnU-Net: 0.99)."""
    schedule: Literal["poly", "cosine"] = "poly"
    """Shape of the fall of the learning rate to 0 at the last step."""
    poly_power: float = 0.9
    """Exponent of `lr * (1 - step / steps) ** power` (nnU-Net: 0.9)."""
    warmup_steps: int = 0
    """Steps at the start over which the learning rate rises from 0."""
    clip_norm: float = 12.0
    """Norm to which a larger gradient is scaled down (nnU-Net: 12)."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type to which forward pass and loss are autocast; fp16 scales the loss. Under fp32 the
    convolutions of a GPU use TF32, which is torch's default."""
    steps: int = 250_000
    """Optimiser steps of the whole run."""
    global_batch: int = 2
    """Patches a step, over all workers."""
    micro_batch: int = 0
    """Patches that a worker takes at once; the gradients of several are added up. 0: all."""
    ema_decay: float = 0.0
    """Decay of the averages of the weights over steps, which are then what is validated and
    registered; 0 averages nothing."""
    max_skipped: int = 20
    """Steps in a row without a finite gradient, each of them skipped, after which the run stops;
    fp16 finds its scale in 16 at most."""

    def __post_init__(self) -> None:
        _require(0 < self.lr < math.inf, "optim.lr", "> 0", self.lr)
        _require(0 < self.momentum < 1, "optim.momentum", "in 0..1", self.momentum)
        _require(self.weight_decay >= 0, "optim.weight_decay", ">= 0", self.weight_decay)
        _require(self.poly_power >= 0, "optim.poly_power", ">= 0", self.poly_power)
        _require(self.clip_norm > 0, "optim.clip_norm", "> 0", self.clip_norm)
        _require(self.steps >= 1, "optim.steps", ">= 1", self.steps)
        _require(self.global_batch >= 1, "optim.global_batch", ">= 1", self.global_batch)
        warm, decay = self.warmup_steps, self.ema_decay
        _require(0 <= warm < self.steps, "optim.warmup_steps", "in 0..optim.steps", warm)
        _require(self.micro_batch >= 0, "optim.micro_batch", ">= 0", self.micro_batch)
        _require(0 <= decay < 1, "optim.ema_decay", "in 0..1", decay)
        _require(self.max_skipped >= 1, "optim.max_skipped", ">= 1", self.max_skipped)


@dataclass(frozen=True, kw_only=True)
class ValidationConfig(Section):
    """How often the held-out cases are segmented whole, and how."""

    every_steps: int = 2_500
    """Steps between validations; each also writes a checkpoint, and so does the end."""
    overlap: float = 0.5
    """Overlap of the sliding windows, as a fraction of the patch."""
    mirror: bool = False
    """Whether a window is seen in all its mirror images, whose logits are summed (nnU-Net)."""
    max_cases: int = 0
    """Held-out cases that are used, the first in cohort order; 0 uses all."""
    patience: int = 0
    """Validations in a row without a better mean region Dice after which the run ends; 0: never."""

    def __post_init__(self) -> None:
        _require(self.patience >= 0, "validation.patience", ">= 0", self.patience)
        _require(self.every_steps >= 1, "validation.every_steps", ">= 1", self.every_steps)
        _require(0 <= self.overlap < 1, "validation.overlap", "in 0..1", self.overlap)
        _require(self.max_cases >= 0, "validation.max_cases", ">= 0", self.max_cases)


@dataclass(frozen=True, kw_only=True)
class ClusterConfig(Section):
    """What the run asks of the Ray cluster."""

    workers: int = 1
    """DDP workers; the most that an elastic run has."""
    min_workers: int = 0
    """Workers with which an elastic run goes on while nodes are missing; 0: with all or none."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Device of each worker; `auto` takes one GPU a worker where the cluster has GPUs."""
    cpus_per_worker: float = 1.0
    max_failures: int = 3
    """Restarts of the workers before the run gives up; those after a preemption notice are free."""
    collective_timeout_s: float = 600.0
    """Seconds that a worker waits for the others in a step before it gives up."""
    stall_s: float = 1800.0
    """Seconds without any progress, neither a step nor a validated case, after which the run is
    ended; also the time that workers wait for each other after a validation."""
    grace_s: float = 30.0
    """Seconds that a last checkpoint may take once the driver gets SIGTERM."""
    channels_last: bool = False
    """Whether tensors are laid out with the channels closest."""
    compile: bool = False
    """Whether the network is compiled (torch.compile); where that fails the run goes on without."""

    def __post_init__(self) -> None:
        _require(self.workers >= 1, "cluster.workers", ">= 1", self.workers)
        fewest = self.min_workers
        rule = f"in 0..cluster.workers ({self.workers})"
        _require(0 <= fewest <= self.workers, "cluster.min_workers", rule, fewest)
        for name in ("collective_timeout_s", "stall_s", "grace_s"):
            _require(
                0 < getattr(self, name) < math.inf, f"cluster.{name}", "> 0", getattr(self, name)
            )
        cpus = self.cpus_per_worker
        _require(cpus > 0, "cluster.cpus_per_worker", "> 0", cpus)
        _require(self.max_failures >= 0, "cluster.max_failures", ">= 0", self.max_failures)


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """Name, place and seed of the run."""

    name: str = ""
    """Name of the run, whose checkpoints lie at <storage_uri>/<name>/checkpoints; empty: recipe
    and time."""
    storage_uri: str = "runs"
    """Local path or s3:// URI under which runs are kept."""
    seed: int = 0
    resume: Literal["never", "auto", "must"] = "auto"
    """Whether the run goes on with an earlier attempt of its name: `never` refuses one, `auto`
    takes one where it is there, `must` requires one."""
    save_every_steps: int = 250
    """Steps between checkpoints, beside those of validations."""
    continue_from: str = ""
    """Run that has ended, or a checkpoint, that a new run goes on from to a later `optim.steps`:
    with its weights, optimiser, averages and step, and the draws that follow. Only length, learning
    rate and schedule may be others; the rate is that of the new schedule at the step."""

    def __post_init__(self) -> None:
        allowed = all(c.isalnum() or c in "-_." for c in self.name) and self.name[:1] != "."
        rule = "letters, digits, '-', '_' and '.', 200 at most"  # a file name has 255 bytes
        _require(allowed and len(self.name.encode()) <= 200, "run.name", rule, self.name)
        _require_no_secret("run.storage_uri", self.storage_uri)
        _require(bool(self.storage_uri), "run.storage_uri", "a path or URI", self.storage_uri)
        _require(self.seed >= 0, "run.seed", ">= 0", self.seed)
        _require(self.save_every_steps >= 1, "run.save_every_steps", ">= 1", self.save_every_steps)
        source = self.continue_from
        _require_no_secret("run.continue_from", source)
        rule = "a run or a checkpoint (of a model there are weights alone: network.init_from)"
        _require(not source.startswith("models:"), "run.continue_from", rule, source)


@dataclass(frozen=True, kw_only=True)
class TrackingConfig(Section):
    """Where metrics go and under which name the model is registered."""

    uri: str = ""
    """MLflow server; empty: MLFLOW_TRACKING_URI, else SQLite beside local runs."""
    required: bool = True
    """Whether training stops at the start when the server is out of reach; if not, metrics wait in
    the run's folder."""
    experiment: str = "raybrats"
    model: str = "raybrats"
    """Name of the registered model; empty registers nothing."""

    def __post_init__(self) -> None:
        _require_no_secret("tracking.uri", self.uri)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """Everything that decides a run."""

    recipe: str = "custom"
    """Name of the recipe that it was made from."""
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    run: RunConfig = field(default_factory=RunConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        stride, patch = self.network.stride, self.data.patch_size
        rule = f"multiples of {stride} (network.widths has {len(self.network.widths)} stages)"
        edges = patch[: self.spatial_dims]
        _require(all(n % stride == 0 for n in edges), "data.patch_size", rule, patch)
        batch, workers = self.optim.global_batch, self.cluster.workers
        if self.cluster.min_workers:  # shares differ by a patch at most, and are weighted
            _require(
                batch >= workers, "optim.global_batch", f">= cluster.workers ({workers})", batch
            )
        else:
            rule = f"a multiple of cluster.workers ({workers})"
            _require(batch % workers == 0, "optim.global_batch", rule, batch)

    @property
    def labels(self) -> LabelSet:
        """What the network tells apart: glioma where nothing else is said."""
        return label_set_of(self.data.labels)

    @property
    def classes(self) -> tuple[tuple[int, ...], ...]:
        """Labels of each class that the network tells apart: the regions', or each label's own."""
        known = self.labels
        if self.loss.target == "regions":
            return tuple(region.labels for region in known.regions)
        return tuple((label,) for label in range(1, len(known.names) + 1))

    @property
    def of_others(self) -> bool:
        """Whether its network or its loss is not raybrats' own."""
        return self.network.name not in NETWORKS.own or self.loss.name not in LOSSES.own

    @property
    def spatial_dims(self) -> int:
        """Axes along which the network convolves: 2 for slices, else 3."""
        return 2 if self.data.sampling == "slices" else 3


def to_json(config: TrainConfig) -> str:
    """The run as indented JSON.

    Example:
        >>> from raybrats.recipes import tiny
        >>> from_json(to_json(tiny())) == tiny()
        True
    """
    return json.dumps(asdict(config), indent=1)


def from_json(text: str | bytes) -> TrainConfig:
    """The run that `to_json` wrote; fields that it lacks have their defaults.

    Raises:
        UsageError: a key is unknown or a value does not fit.

    Example:
        >>> from_json('{"recipe": "mine", "optim": {"steps": 100}}').optim.steps
        100
    """
    from pydantic import TypeAdapter

    with _named_by_field():
        return TypeAdapter(TrainConfig).validate_json(text)


def digest(config: TrainConfig) -> str:
    """The sha256 of what decides the weights and how they are scored; places and workers do not.

    Example:
        >>> from raybrats.recipes import tiny
        >>> digest(tiny()) == digest(override(tiny(), "cluster.workers", 1))
        True
    """
    return hashlib.sha256(json.dumps(deciding(asdict(config)), sort_keys=True).encode()).hexdigest()


def deciding(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a run, as nested dicts, that decides the weights and how they are scored.

    Example:
        >>> sorted(deciding(asdict(TrainConfig())))
        ['augment', 'data', 'loss', 'network', 'optim', 'run', 'validation']
    """
    ignored = ("recipe", "run", "cluster", "tracking")
    places = ("cpus_per_task", "prefetch_batches", "cache_dir", "cache_gb")
    kept = {name: section for name, section in tree.items() if name not in ignored}
    kept["data"] = {name: v for name, v in tree["data"].items() if name not in places}
    run = {"seed": tree["run"]["seed"], "continue_from": tree["run"].get("continue_from", "")}
    return {**kept, "run": run}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Dotted fields that decide the weights or how they are scored, and differ.

    Example:
        >>> from raybrats.recipes import tiny
        >>> differences(asdict(tiny()), asdict(override(tiny(), "optim.steps", 300)))
        ['optim.steps']
    """
    old, new = deciding(before), deciding(now)
    return [
        f"{section}.{name}"
        for section, values in new.items()
        for name, value in values.items()
        if old.get(section, {}).get(name) != value
    ]


def override(config: TrainConfig, path: str, value: object) -> TrainConfig:
    """The same run with the field at a dotted path changed; see `override_all`.

    Example:
        >>> override(TrainConfig(), "optim.lr", 1e-3).optim.lr
        0.001
    """
    return override_all(config, {path: value})


def override_all(config: TrainConfig, changes: Mapping[str, object]) -> TrainConfig:
    """The same run with the fields at dotted paths changed, and checked together.

    Raises:
        UsageError: there is no such field (the nearest name is suggested), or the value has
            another type or breaks a rule.

    Example:
        >>> changed = override_all(TrainConfig(), {"data.fold": 3, "data.patch_size": [64, 64, 64]})
        >>> changed.data.fold, changed.data.patch_size
        (3, (64, 64, 64))
    """
    from pydantic import TypeAdapter

    tree = asdict(config)
    for path, value in changes.items():
        section: object = config
        branch = parent = tree
        for name in path.split("."):
            _require_field(section, name, path)
            section, parent, branch = getattr(section, name), branch, branch[name]
        parent[name] = value
    with _named_by_field():
        return TypeAdapter(TrainConfig).validate_python(tree)


def _require_field(section: object, name: str, path: str) -> None:
    names = [f.name for f in fields(section)] if is_dataclass(section) else []
    if name not in names:
        near = get_close_matches(name, names, n=1)
        there = f"; there are {', '.join(names)}" if names else ""
        hint = f"; did you mean {near[0]!r}?" if near else there
        raise UsageError(f"{path}: no field {name!r} in {type(section).__name__}{hint}")


@contextmanager
def _named_by_field() -> Generator[None]:
    """Turns pydantic's first complaint into one line that names the field.

    Raises:
        UsageError: there was a complaint.
    """
    from pydantic import ValidationError

    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        broken = first.get("ctx", {}).get("error")
        if isinstance(broken, UsageError):
            raise broken from None
        where = ".".join(str(part) for part in first["loc"]) or "the configuration"
        raise UsageError(f"{where}: {first['msg']}") from None
