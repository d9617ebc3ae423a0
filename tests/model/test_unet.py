"""Our U-Nets are nnU-Net's: its names, its shapes, its first weights, and what they compute."""

import copy
import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from raybrats.config import NetworkConfig
from raybrats.model.network import weights_of
from raybrats.model.unet import UNet, _ConvNorm

WIDTHS, STRIDES = (8, 16, 32, 40, 40), (1, 2, 2, 2, 2)
BLOCKS = {
    "plain": {"n_conv_per_stage": 2, "n_conv_per_stage_decoder": 2},
    "residual": {"n_blocks_per_stage": (1, 3, 4, 6, 6), "n_conv_per_stage_decoder": 1},
}
OPERATIONS = {
    2: (nn.Conv2d, {"instance": nn.InstanceNorm2d, "batch": nn.BatchNorm2d}),
    3: (nn.Conv3d, {"instance": nn.InstanceNorm3d, "batch": nn.BatchNorm3d}),
}


@pytest.fixture(params=["plain", "residual"])
def name(request):
    return request.param


@pytest.fixture(params=[2, 3])
def dims(request):
    return request.param


@pytest.fixture(params=["instance", "batch"])
def pair(request, name, dims, monkeypatch):
    """Ours, and the same of the library as nnU-Net makes it, which the Makefile puts aside."""
    aside = Path(sys.prefix) / "oracles"
    if not aside.is_dir():
        pytest.skip("no .venv/oracles; make .venv/installed")
    monkeypatch.syspath_prepend(str(aside))
    library = importlib.import_module("dynamic_network_architectures.architectures.unet")
    kind = {"plain": library.PlainConvUNet, "residual": library.ResidualEncoderUNet}[name]
    convolution, norms = OPERATIONS[dims]
    torch.manual_seed(0)
    theirs = kind(
        *(4, len(WIDTHS), WIDTHS, convolution, 3, STRIDES),
        **BLOCKS[name],
        num_classes=3,
        conv_bias=True,
        norm_op=norms[request.param],
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
    )
    theirs.apply(kind.initialize)
    wanted = NetworkConfig(name=name, widths=WIDTHS, deep_supervision=3, norm=request.param)
    return UNet(wanted, dims, 4, 3), theirs


def stored(theirs):
    """What of the library's state is its own: it lists layers up to three times."""
    doubled = ("all_modules", "decoder.encoder.")
    state = theirs.state_dict()
    return {name: state[name] for name in state if not any(part in name for part in doubled)}


def test_weights_go_over_and_back_and_compute_the_same(pair, dims):
    ours, theirs = pair
    assert {n: t.shape for n, t in weights_of(ours).items()} == {
        n: t.shape for n, t in stored(theirs).items()
    }
    image = torch.randn(2, 4, *[32] * dims, generator=torch.Generator().manual_seed(0))
    ours.load_state_dict(stored(theirs))
    expected = theirs(image)
    assert [head.shape[2] for head in expected] == [32, 16, 8, 4]
    torch.testing.assert_close(ours(image), expected, atol=1e-5, rtol=0)
    with torch.no_grad():
        for tensor in ours.parameters():
            tensor.mul_(1.1)
    missing, unknown = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert unknown == []
    assert all("all_modules" in name or "decoder.encoder." in name for name in missing)
    torch.testing.assert_close(theirs(image), ours(image), atol=1e-5, rtol=0)


def test_first_weights_are_drawn_from_the_same_distribution(pair):
    ours, theirs = pair
    large, mine = 0, weights_of(ours)
    for name, tensor in stored(theirs).items():
        if tensor.numel() > 1000:
            large += 1
            torch.testing.assert_close(mine[name].std(), tensor.std(), rtol=0.1, atol=0)
            assert abs(mine[name].mean()) < 5 * tensor.std() / tensor.numel() ** 0.5
        elif tensor.ndim < 2:
            assert torch.equal(mine[name], tensor), name  # biases, norms
    assert large > 10


@pytest.mark.parametrize("kind", ["he_normal", "he_uniform"])
def test_first_weights_have_the_deviation_of_he(kind):
    """He et al. 2015: 2 over the inputs of a unit, for a ReLU."""
    torch.manual_seed(0)
    wanted = NetworkConfig(widths=(16, 32), initial_weights=kind, activation="relu")
    weight = weights_of(UNet(wanted, 3, 4, 3))["encoder.stages.1.0.convs.1.conv.weight"]
    due = (2 / (32 * 27)) ** 0.5
    assert weight.std().item() == pytest.approx(due, rel=0.02)
    bound = due * 3**0.5
    assert (weight.abs().max().item() <= bound) == (kind == "he_uniform")


def test_max_pooling_takes_the_greatest_of_each_block():
    network = UNet(NetworkConfig(widths=(4, 8), pooling="max"), 3, 4, 3).eval()
    pools = [m for m in network.modules() if isinstance(m, nn.MaxPool3d)]
    assert [pool.kernel_size for pool in pools] == [2]
    strides = {m.stride for m in network.encoder.modules() if isinstance(m, nn.Conv3d)}
    assert strides == {(1, 1, 1)}


def nodes(outputs):
    """The names of all nodes of the graph that autograd goes back over."""
    found, ahead = set(), [output.grad_fn for output in outputs]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in found:
            found.add(node)
            ahead += [following for following, _ in node.next_functions]
    return [type(node).__name__ for node in found]


class Plainly(nn.Module):
    """The same layers as `_ConvNorm`, one after another."""

    def __init__(self, layers):
        super().__init__()
        self.conv, self.norm, self.nonlin = layers.conv, layers.norm, layers.nonlin

    def forward(self, x):
        return self.nonlin(self.norm(self.conv(x)))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_norm_and_activation_copy_nothing_to_go_back_and_are_torchs_bit_for_bit(
    name, dims, precision
):
    torch.manual_seed(0)
    widths = (4, 8, 8)
    network = UNet(NetworkConfig(name=name, widths=widths, deep_supervision=1), dims, 4, 3)
    plain = copy.deepcopy(network)
    for module in list(plain.modules()):
        for child, layers in module.named_children():
            if isinstance(layers, _ConvNorm):
                setattr(module, child, Plainly(layers))
    image = torch.randn(2, 4, *[16] * dims)
    results, copies = [], []
    for each in (network, plain):
        with torch.autocast("cpu", precision, precision != torch.float32):
            logits = each(image)
        copies.append(nodes(logits).count("CopySlices"))
        sum(head.float().square().mean() for head in logits).backward()
        results.append([*logits, *(weight.grad for weight in each.parameters())])
    torch.testing.assert_close(*results, atol=0, rtol=0)
    assert copies[0] == 0 < copies[1]


@pytest.mark.parametrize("dims", [2, 3])
def test_channels_that_lie_closest_stay_there_through_a_compiled_norm(dims):
    """So no convolution has to lay them out anew; eager, the norm gives the other layout."""
    layout = {2: torch.channels_last, 3: torch.channels_last_3d}[dims]
    torch.compiler.reset()
    torch.manual_seed(0)
    block = _ConvNorm(NetworkConfig(), dims, (4, 8)).to(memory_format=layout)
    nn.init.normal_(block.norm.weight)
    image = torch.randn(2, 4, *[6] * dims).contiguous(memory_format=layout)
    outputs, gradients = [], []
    for seen in (block, torch.compile(block, backend="aot_eager")):
        given = image.clone().requires_grad_()
        outputs.append(seen(given))
        (outputs[-1] ** 3).sum().backward()
        block.conv.bias.grad = None  # but for rounding it is 0
        gradients += [given.grad, *(p.grad for p in block.parameters() if p.grad is not None)]
        block.zero_grad(set_to_none=True)
    assert [out.is_contiguous(memory_format=layout) for out in outputs] == [False, True]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    half = len(gradients) // 2
    torch.testing.assert_close(gradients[half:], gradients[:half], rtol=1e-4, atol=1e-4)
