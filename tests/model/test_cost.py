"""What a step costs: the gradients of a convolution as many operations as it has itself, each."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from raybrats.config import DataConfig, NetworkConfig, TrainConfig, override, override_all
from raybrats.errors import UsageError
from raybrats.model.cost import check_memory, cost, memory
from raybrats.model.loss import loss_of
from raybrats.model.network import heads, network_of
from raybrats.recipes import nnunet
from raybrats.train.learner import new_learner
from raybrats.train.step import update


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


SMALL = override_all(
    TrainConfig(network=NetworkConfig(widths=(4, 8, 8), deep_supervision=1)),
    {"data.patch_size": (32, 32, 16), "optim.global_batch": 6},
)


def test_what_a_patch_keeps_is_the_costs_and_less_in_half_precision():
    whole = override(SMALL, "optim.precision", "fp32")
    assert memory(whole).patch_bytes == cost(whole).activation_bytes
    half = memory(override(SMALL, "optim.precision", "bf16"))
    assert 0.4 < half.patch_bytes / memory(whole).patch_bytes < 0.8
    assert half.fixed_bytes == memory(whole).fixed_bytes


@pytest.mark.parametrize(
    ("changes", "numbers"),
    [
        ({"optim.name": "sgd"}, 3),
        ({"optim.name": "adamw"}, 4),
        ({"optim.name": "adamw", "optim.ema_decay": 0.9}, 5),
    ],
)
def test_each_weight_has_a_gradient_and_what_the_optimiser_keeps(changes, numbers):
    config = override_all(SMALL, {**changes, "optim.precision": "fp32"})
    learner = new_learner(config, torch.device("cpu"))
    for weight in learner.bare.parameters():
        weight.grad = torch.ones_like(weight)
    update(learner)
    state = [kept for each in learner.optimizer.state.values() for kept in each.values()]
    tensors = [*learner.bare.parameters(), *(w.grad for w in learner.bare.parameters()), *state]
    if learner.average is not None:
        tensors += learner.average.parameters()
    held = sum(each.nbytes for each in tensors if each.ndim)
    assert memory(config).fixed_bytes == held == 4 * numbers * cost(config).parameters


def test_a_patch_of_nnunets_keeps_no_more_than_it_has_to():
    """Its network in half precision, heads of their own resolution, and the loss: bytes a voxel."""
    config, kept = nnunet(), {}
    voxels = math.prod(config.data.patch_size)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        image, labels = (torch.empty(1, *n, *config.data.patch_size) for n in ((4,), ()))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found = heads(network_of(config).train()(image))
            of_network = sum(kept.values())
            loss_of(config)(found, labels)
    assert config.optim.precision == "bf16"
    assert of_network / voxels < 890
    assert sum(head.nbytes for head in found) / voxels < 1.15 * 3 * 2  # three outputs, and coarser
    assert (sum(kept.values()) - of_network) / voxels < 97


@given(fraction=st.floats(0.01, 1.5), micro=st.integers(0, 6))
@settings(deadline=None)
def test_what_is_advised_fits(fraction, micro):
    config = override_all(SMALL, {"optim.micro_batch": micro, "optim.precision": "fp32"})
    device_bytes = int(fraction * memory(config).of(micro or 6))
    if fraction >= 1:
        check_memory(config, device_bytes)
        return
    with pytest.raises(UsageError, match=r"^a step holds .* GB at least, and the GPU has ") as said:
        check_memory(config, device_bytes)
    field, *value = str(said.value).rpartition("--")[2].split()
    if field == "network.widths":
        assert device_bytes < memory(config).of(1)
        return
    changed = override(config, field, int(value[0]) if len(value) == 1 else tuple(map(int, value)))
    if field == "data.patch_size":
        changed = override(changed, "optim.micro_batch", 1)
    check_memory(changed, device_bytes)
