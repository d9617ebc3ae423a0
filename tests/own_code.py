"""Networks and losses of a user's own: right ones, and what is wrong with others."""

import torch
from torch import nn
from torch.nn.functional import avg_pool2d, avg_pool3d, one_hot


class Levels(nn.Module):
    """A convolution at each level of an image that is halved; the finest logits see them all."""

    def __init__(self, in_channels, out_channels, dims, heads):
        super().__init__()
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.pool = {2: avg_pool2d, 3: avg_pool3d}[dims]
        self.levels = nn.ModuleList(conv(in_channels, out_channels, 3, padding=1) for _ in range(2))
        self.heads = heads

    def forward(self, image):
        coarse = self.levels[1](self.pool(image, 2))
        mode = "bilinear" if image.ndim == 4 else "trilinear"
        fine = self.levels[0](image) + nn.functional.interpolate(coarse, scale_factor=2, mode=mode)
        return [fine, coarse][: self.heads] if self.training and self.heads > 1 else fine


def levels(in_channels, out_channels, spatial_dims, config):
    return Levels(in_channels, out_channels, spatial_dims, 1 + config.deep_supervision)


def as_tuple(*given):
    class Both(Levels):
        def forward(self, image):
            return tuple(super().forward(image))

    return Both(*given[:3], 2)


class Spoilt(Levels):
    """`Levels`, whose logits are changed before they are returned."""

    def __init__(self, given, change):
        super().__init__(*given[:3], 1)
        self.change = change

    def forward(self, image):
        return self.change(super().forward(image))


def one_too_few(*given):
    return Spoilt(given, lambda logits: logits[:, 1:])


def coarse_only(*given):
    return Spoilt(given, lambda logits: avg_pool3d(logits, 2))


def wrong_later(*given):
    return Spoilt(given, lambda logits: [logits, logits[:, :, 1:]])


def whole_numbers(*given):
    return Spoilt(given, lambda logits: logits.long())


def nothing(*given):
    return Spoilt(given, lambda _: [])


def as_text(*given):
    return Spoilt(given, lambda _: "logits")


def wrong_in_validation(*given):
    class Twofold(Levels):
        def forward(self, image):
            logits = super().forward(image)
            return logits if self.training else logits.argmax(1)

    return Twofold(*given[:3], 1)


def fails(*given):
    return Spoilt(given, lambda logits: logits / "two")


def unused(*given):
    network = Levels(*given[:3], 1)
    network.spare = nn.Linear(2, 2)
    return network


def real_only(*given):
    network = Levels(*given[:3], 1)
    float(network.levels[0].weight.detach().sum())
    return network


def no_module(*given):
    return given


def stops(*_):
    raise SystemExit("no licence")


class Squares(nn.Module):
    """Mean squared distance of the finest softmax to the labels, weighed as the Dice is."""

    def __init__(self, config):
        super().__init__()
        self.register_buffer("share", torch.tensor(config.dice_weight))

    def forward(self, logits, labels):
        found = torch.softmax(logits[0], dim=1)
        wanted = one_hot(labels.long(), found.shape[1]).movedim(-1, 1)
        return self.share * ((found - wanted) ** 2).mean()


def squared_error(config):
    return Squares(config)


class Changed(Squares):
    def __init__(self, config, change):
        super().__init__(config)
        self.change = change

    def forward(self, logits, labels):
        return self.change(super().forward(logits, labels))


def a_value_each(config):
    return Changed(config, lambda loss: loss.expand(2))


def a_number(config):
    return Changed(config, torch.Tensor.tolist)


def no_gradient(config):
    return Changed(config, torch.Tensor.detach)


def loss_fails(config):
    return Changed(config, lambda loss: loss / "two")


def learns(config):
    loss = Squares(config)
    loss.scale = nn.Parameter(torch.ones(()))
    return loss


def function(config):
    return config.__eq__
