"""What a step costs: the gradients of a convolution as many operations as it has itself, each."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from raybrats.config import DataConfig, NetworkConfig, TrainConfig
from raybrats.model.cost import cost
from raybrats.model.network import heads, network_of


@pytest.mark.parametrize(
    ("network", "first"),
    [
        (NetworkConfig(widths=(4, 8)), "encoder.stages.0.0.convs.0.conv"),
        (NetworkConfig(name="mednext", widths=(4, 8), kernel_size=5), "stem"),
    ],
)
def test_both_gradients_of_every_convolution_are_counted_but_that_of_the_image(network, first):
    config = TrainConfig(data=DataConfig(patch_size=(16, 16, 8)), network=network)
    with torch.device("meta"):
        made, image = network_of(config).eval(), torch.empty(1, 4, 16, 16, 8)
        layer = made.get_submodule(first)
        assert isinstance(layer, nn.Conv3d)
        with FlopCounterMode(display=False) as whole:
            heads(made(image))
        with FlopCounterMode(display=False) as one:
            layer(image)
    expected = 3 * whole.get_total_flops() - one.get_total_flops()
    assert cost(config).gflop * 1e9 == pytest.approx(expected)
