"""nnU-Net's two U-Nets, plain and with a residual encoder, by its own names for every layer.

So weights go to and from nnU-Net's checkpoints by name and shape. A test holds them to
`PlainConvUNet` and `ResidualEncoderUNet` of dynamic-network-architectures 0.4.4, which is not
imported: it wants einops and timm (so torchvision), and lists a layer up to three times.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from raybrats.config import NetworkConfig

LEAK = 0.01
"""Slope of the leaky ReLU below 0 (nnU-Net)."""
RESIDUAL_BLOCKS = (1, 3, 4, 6)
"""Blocks of each stage of the residual encoder; those that follow have as many as the last
(nnU-Net ResEnc: 1, 3, 4, 6, 6, 6)."""
_CONV = {2: nn.Conv2d, 3: nn.Conv3d}
_UP = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_MAX_POOL = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
_MEAN_POOL = {2: nn.AvgPool2d, 3: nn.AvgPool3d}
_NORM = {
    "instance": {
        2: partial(nn.InstanceNorm2d, affine=True),
        3: partial(nn.InstanceNorm3d, affine=True),
    },
    "batch": {2: nn.BatchNorm2d, 3: nn.BatchNorm3d},
}
_ACTIVATION = {
    "leaky_relu": partial(nn.LeakyReLU, LEAK, inplace=True),
    "relu": partial(nn.ReLU, inplace=True),
}


class _ConvNorm(nn.Module):
    """Convolution, norm and, where it has one, an activation."""

    def __init__(
        self,
        config: NetworkConfig,
        dims: int,
        channels: tuple[int, int],
        *,
        kernel: int = 3,
        stride: int = 1,
        active: bool = True,
    ) -> None:
        super().__init__()
        bias = kernel > 1  # nnU-Net's projections have none
        self.conv = _CONV[dims](*channels, kernel, stride, padding=kernel // 2, bias=bias)
        self.norm = _NORM[config.norm][dims](channels[1])
        self.nonlin = _ACTIVATION[config.activation]() if active else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if not isinstance(self.norm, nn.InstanceNorm2d | nn.InstanceNorm3d):
            return self.nonlin(self.norm(x))
        if torch.compiler.is_compiling() and not x.is_contiguous():
            return self.nonlin(_normed(x, self.norm))
        # `instance_norm` does the same and returns a view of it; to change that in place, autograd
        # copies all of it twice more in the backward pass.
        rows = x.reshape(1, -1, *x.shape[2:])
        weight, bias = (each.repeat(len(x)) for each in (self.norm.weight, self.norm.bias))
        normed = batch_norm(rows, None, None, weight, bias, training=True, eps=self.norm.eps)
        return self.nonlin(normed).view(x.shape)


def _normed(x: Tensor, norm: nn.InstanceNorm2d | nn.InstanceNorm3d) -> Tensor:
    """The norm of channels that lie closest, written out for a compiler.

    It makes one kernel of it and the activation, and the channels stay; the other way it copies all
    of them to the other layout and back.
    """
    axes, each = tuple(range(2, x.ndim)), (-1, *[1] * (x.ndim - 2))
    var, mean = torch.var_mean(x.float(), axes, correction=0, keepdim=True)
    gain = torch.rsqrt(var + norm.eps) * norm.weight.view(each)
    return ((x - mean) * gain + norm.bias.view(each)).to(x.dtype)


class _Residual(nn.Module):
    """Two convolutions and a way around them, which is averaged where they have a stride."""

    def __init__(
        self, config: NetworkConfig, dims: int, channels: tuple[int, int], *, stride: int = 1
    ) -> None:
        super().__init__()
        self.conv1 = _ConvNorm(config, dims, channels, stride=stride)
        self.conv2 = _ConvNorm(config, dims, (channels[1], channels[1]), active=False)
        self.nonlin2 = _ACTIVATION[config.activation]()
        around: list[nn.Module] = [_MEAN_POOL[dims](stride)] if stride > 1 else []
        if channels[0] != channels[1]:
            around.append(_ConvNorm(config, dims, channels, kernel=1, active=False))
        self.skip = nn.Sequential(*around)

    def forward(self, x: Tensor) -> Tensor:
        return self.nonlin2(self.conv2(self.conv1(x)) + self.skip(x))


def _row(
    name: str,
    config: NetworkConfig,
    dims: int,
    channels: tuple[int, int],
    *,
    length: int,
    stride: int = 1,
) -> nn.Sequential:
    """Convolutions (`convs`) or residual blocks (`blocks`), the first of which has the stride."""
    kind = {"convs": _ConvNorm, "blocks": _Residual}[name]
    first = kind(config, dims, channels, stride=stride)
    more = [kind(config, dims, (channels[1], channels[1])) for _ in range(length - 1)]
    return nn.Sequential(OrderedDict({name: nn.Sequential(first, *more)}))


class _Encoder(nn.Module):
    """An image as what each resolution makes of it, finest first."""

    def __init__(self, config: NetworkConfig, dims: int, num_channels: int) -> None:
        super().__init__()
        residual, before, stages = config.name == "residual", num_channels, []
        if residual:
            self.stem = _row("convs", config, dims, (num_channels, config.widths[0]), length=1)
            before = config.widths[0]
        for number, width in enumerate(config.widths):
            pooled = number > 0 and config.pooling == "max"
            stride = 1 if number == 0 or pooled else 2
            length = blocks_of(config)[number]
            name = "blocks" if residual else "convs"
            stage = _row(name, config, dims, (before, width), length=length, stride=stride)
            pool = [_MAX_POOL[dims](2)] if pooled else []
            # nnU-Net wraps the stages of the plain one, and of those that pool
            stages.append(stage if residual and not pool else nn.Sequential(*pool, stage))
            before = width
        self.stages = nn.Sequential(*stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x) if hasattr(self, "stem") else x
        found = []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found


class _Decoder(nn.Module):
    """What the resolutions found, put together from the coarsest to the finest: the heads."""

    def __init__(self, config: NetworkConfig, dims: int, num_logits: int) -> None:
        super().__init__()
        pairs = list(zip(config.widths[:0:-1], config.widths[-2::-1], strict=True))
        length = 1 if config.name == "residual" else 2
        self.transpconvs = nn.ModuleList(_UP[dims](deep, width, 2, 2) for deep, width in pairs)
        self.stages = nn.ModuleList(
            _row("convs", config, dims, (2 * width, width), length=length) for _, width in pairs
        )
        # Those of nnU-Net, by its numbers, that the loss sees: DDP wants a gradient for each
        heads = list(enumerate(width for _, width in pairs))[-1 - config.deep_supervision :]
        self.seg_layers = nn.ModuleDict({str(n): _CONV[dims](w, num_logits, 1) for n, w in heads})

    def forward(self, skips: Sequence[Tensor]) -> list[Tensor]:
        x, logits, finest = skips[-1], [], len(self.stages) - 1
        for number, (up, stage) in enumerate(zip(self.transpconvs, self.stages, strict=True)):
            x = stage(torch.cat([up(x), skips[-2 - number]], dim=1))
            if str(number) in self.seg_layers and (self.training or number == finest):
                logits.append(self.seg_layers[str(number)](x))
        return logits[::-1]


def blocks_of(config: NetworkConfig) -> tuple[int, ...]:
    """Residual blocks, or plain convolutions, of each stage of the encoder.

    Example:
        >>> blocks_of(NetworkConfig(name="residual")), blocks_of(NetworkConfig(widths=(8, 16)))
        ((1, 3, 4, 6, 6, 6), (2, 2))
    """
    if config.name != "residual":
        return (2,) * len(config.widths)
    return tuple(RESIDUAL_BLOCKS[min(number, 3)] for number in range(len(config.widths)))


class UNet(nn.Module):
    """An image (batch, channel, ...) as logits: the finest, or in training a list of every head's.

    Every head has its own resolution: each halves the edges of the finer one.

    Example:
        >>> network = UNet(NetworkConfig(widths=(4, 8, 8), deep_supervision=1), 3, 4, 3)
        >>> [tuple(head.shape) for head in network(torch.zeros(2, 4, 16, 16, 8))]
        [(2, 3, 16, 16, 8), (2, 3, 8, 8, 4)]
    """

    def __init__(
        self, config: NetworkConfig, dims: int, num_channels: int, num_logits: int
    ) -> None:
        super().__init__()
        self.encoder = _Encoder(config, dims, num_channels)
        self.decoder = _Decoder(config, dims, num_logits)
        self.apply(_initialiser(config))

    def forward(self, image: Tensor) -> list[Tensor] | Tensor:
        """The logits, finest first where there are several."""
        logits = self.decoder(self.encoder(image))
        return logits if len(logits) > 1 else logits[0]


def _initialiser(config: NetworkConfig) -> Callable[[nn.Module], None]:
    """He's weights, biases of 0, and residual blocks that begin as their way around (nnU-Net)."""
    leak = LEAK if config.activation == "leaky_relu" else 0.0
    fill = {"he_normal": nn.init.kaiming_normal_, "he_uniform": nn.init.kaiming_uniform_}

    def initialise(module: nn.Module) -> None:
        if isinstance(module, (*_CONV.values(), *_UP.values())):
            fill[config.initial_weights](module.weight, a=leak)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, _Residual):
            nn.init.zeros_(module.conv2.norm.weight)

    return initialise
