"""The network and its loss, by name."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from raybrats.config.section import Section, require, require_no_secret
from raybrats.offers import Offers

NETWORKS = Offers(
    "network",
    "raybrats.networks",
    own=("plain", "residual", "dynunet", "mednext", "segresnet", "unet"),
    field="network.name",
)
"""Names of networks: nnU-Net's two, MONAI's, and those of others; see `raybrats.model.others`."""
LOSSES = Offers("loss", "raybrats.losses", own=("sum",), field="loss.name")
"""Names of losses, likewise."""


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
            require(has, f"network.{name}", f"{default!r} with {self.name}", getattr(self, name))
        require_no_secret("network.init_from", self.init_from)
        enough = 3 if self.name == "dynunet" else 2
        # 2 to the power of 9 is more than the edge of any case, and blocks are made one by one
        rule = f"{enough} to 10 long"
        require(enough <= len(self.widths) <= 10, "network.widths", rule, self.widths)
        units = self.residual_units
        require(0 <= units <= 8, "network.residual_units", "in 0..8", units)
        require(min(self.widths) >= 1, "network.widths", ">= 1 each", self.widths)
        heads = self.deep_supervision
        require(heads >= 0, "network.deep_supervision", ">= 0", heads)
        for name, most in (("blocks", 32), ("expansion", 64)):
            values = getattr(self, name)
            fits = 1 <= len(values) <= 10 and 1 <= min(values) <= max(values) <= most
            require(fits, f"network.{name}", f"1 to 10 numbers in 1..{most}", values)
        if self.name in ("segresnet", "mednext"):
            step = 8 if self.name == "segresnet" else 1
            doubled = all(w == self.widths[0] << n for n, w in enumerate(self.widths))
            rule = f"multiples of {step} that double from stage to stage, for {self.name}"
            require(doubled and self.widths[0] % step == 0, "network.widths", rule, self.widths)

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
        require(fits, "loss.background", "false: regions have none", self.background)
        weights = (self.dice_weight, self.ce_weight, self.focal_weight)
        holds = min(weights) >= 0 and sum(weights) > 0
        require(holds, "loss.*_weight", ">= 0, with one above 0", weights)
        # A model that is looked up needs no loss, so one that is not installed there is no error
        require(bool(self.name), "loss.name", "a name", self.name)
