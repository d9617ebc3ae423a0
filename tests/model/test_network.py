"""Networks by name: shapes, heads, weights out and in, and gradients as DDP needs them."""

from dataclasses import replace
from itertools import permutations

import pytest
import torch

from raybrats.brats import MODALITIES
from raybrats.config import (
    DataConfig,
    LossConfig,
    NetworkConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from raybrats.errors import CheckpointError, UsageError
from raybrats.model.loss import SegmentationLoss
from raybrats.model.network import (
    build,
    fitting,
    heads,
    load_weights,
    network_of,
    weights_of,
)
from raybrats.recipes import recipe
from raybrats.train.learner import new_learner

NETWORKS = {
    "plain": NetworkConfig(widths=(4, 8, 16)),
    "plain-supervised": NetworkConfig(widths=(4, 8, 8, 8), deep_supervision=2),
    "plain-pooled": NetworkConfig(widths=(4, 16), pooling="max", activation="relu"),
    "residual": NetworkConfig(name="residual", widths=(4, 8, 16)),
    "residual-supervised": NetworkConfig(name="residual", widths=(4, 8, 8), deep_supervision=1),
    "batch": NetworkConfig(widths=(4, 8), norm="batch", initial_weights="he_uniform"),
    "dynunet": NetworkConfig(name="dynunet", widths=(4, 8, 16)),
    "dynunet-residual": NetworkConfig(name="dynunet", widths=(4, 8, 16), residual_units=1),
    "dynunet-supervised": NetworkConfig(name="dynunet", widths=(4, 8, 8, 8), deep_supervision=2),
    "mednext": NetworkConfig(name="mednext", widths=(4, 8)),
    "mednext-large": NetworkConfig(
        name="mednext", widths=(4, 8, 16), blocks=(1, 2), expansion=(2, 3), kernel_size=5
    ),
    "mednext-supervised": NetworkConfig(name="mednext", widths=(4, 8, 16, 32), deep_supervision=2),
    "segresnet": NetworkConfig(name="segresnet", widths=(8, 16)),
    "unet": NetworkConfig(name="unet", widths=(4, 8)),
    "unet-residual": NetworkConfig(name="unet", widths=(4, 8, 16), residual_units=2),
}


@pytest.fixture(params=NETWORKS.values(), ids=NETWORKS.keys())
def config(request):
    return request.param


def image(num_modalities=4, size=(16, 16, 8)):
    return torch.randn(2, num_modalities, *size, generator=torch.Generator().manual_seed(0))


def made(config, seed=0):
    torch.manual_seed(seed)
    return build(config, 4)


def test_an_image_becomes_one_logit_a_region_and_voxel(config):
    network = made(config).eval()
    found = heads(network(image()))
    assert [head.shape for head in found] == [(2, 3, 16, 16, 8)]


def shapes(config):
    """Of the heads: each halves the finer one's edges, but MONAI blows all up to full size."""
    coarser = range(1 + config.deep_supervision)
    steps = [1 if config.name == "dynunet" else 2**n for n in coarser]
    return [(2, 3, 16 // step, 16 // step, 8 // step) for step in steps]


def test_a_training_network_has_a_head_for_each_level_of_supervision(config):
    found = heads(made(config).train()(image()))
    assert [head.shape for head in found] == shapes(config)
    assert all(not torch.equal(found[0], coarser) for coarser in found[1:])


@pytest.mark.parametrize("num_modalities", [1, 2])
def test_a_network_takes_as_many_modalities_as_it_was_built_for(config, num_modalities):
    network = build(config, num_modalities).eval()
    assert heads(network(image(num_modalities)))[0].shape == (2, 3, 16, 16, 8)


def test_the_first_head_in_training_is_the_one_of_validation(config):
    if config.norm == "batch":
        pytest.skip("BatchNorm has other statistics in training")
    network = made(config)
    with torch.no_grad():
        trained = heads(network.train()(image()))[0]
        validated = heads(network.eval()(image()))[0]
    torch.testing.assert_close(trained, validated)


def test_weights_carry_a_network_over(config):
    one, other = made(config, seed=1).eval(), made(config, seed=2).eval()
    with torch.no_grad():
        before = heads(other(image()))[0]
        load_weights(other, {name: tensor.clone() for name, tensor in weights_of(one).items()})
        expected, after = heads(one(image()))[0], heads(other(image()))[0]
    assert torch.equal(after, expected)
    assert not torch.equal(after, before)


def test_weights_list_every_tensor_once(config):
    network = made(config)
    tensors = list(weights_of(network).values())
    assert len({t.data_ptr() for t in tensors}) == len(tensors)
    own = {t.data_ptr() for t in network.state_dict().values()}
    assert {t.data_ptr() for t in tensors} == own


@pytest.mark.parametrize(("one", "other"), list(permutations(NETWORKS, 2)))
def test_weights_of_another_network_are_refused(one, other):
    with pytest.raises(CheckpointError, match="another network"):
        load_weights(made(NETWORKS[one]), weights_of(made(NETWORKS[other])))


def test_weights_of_other_shapes_are_refused_and_nothing_is_loaded():
    network = made(NetworkConfig(widths=(4, 8, 16)))
    wider = weights_of(made(NetworkConfig(widths=(4, 8, 32)), seed=1))
    before = {name: tensor.clone() for name, tensor in weights_of(network).items()}
    with pytest.raises(CheckpointError, match="another network"):
        load_weights(network, wider)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights_of(network).items())


def test_every_parameter_gets_a_gradient(config):
    network = made(config).train()
    labels = torch.randint(0, 4, (2, 16, 16, 8), generator=torch.Generator().manual_seed(0))
    SegmentationLoss(LossConfig())(heads(network(image())), labels).backward()
    without = [name for name, p in network.named_parameters() if p.grad is None]
    assert without == []
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())


def test_a_flat_network_takes_each_slice_by_itself(config):
    torch.manual_seed(0)
    network = build(config, 4, spatial_dims=2).eval()
    whole = heads(network(image()))[0]
    assert whole.shape == (2, 3, 16, 16, 8)
    for k in range(8):
        alone = heads(network(image()[..., k : k + 1]))[0]
        torch.testing.assert_close(whole[..., k : k + 1], alone)
    trained = heads(network.train()(image()))
    assert [head.shape for head in trained] == [(*shape[:4], 8) for shape in shapes(config)]


@pytest.mark.parametrize(
    ("size", "kernel", "count"),
    [
        ("S", 3, 5_551_043),
        ("S", 5, 5_980_675),
        ("B", 3, 10_526_435),
        ("B", 5, 10_956_067),
        ("M", 3, 17_549_091),
        ("M", 5, 18_260_963),
        ("L", 3, 61_779_395),
        ("L", 5, 62_993_027),
    ],
)
def test_a_mednext_has_the_parameters_of_its_authors(size, kernel, count):
    """Counted of `create_mednext_v1(4, 3, size, kernel)`, without the tensor that it never uses."""
    blocks = {"S": (2,), "B": (2,), "M": (3, 4), "L": (3, 4, 8)}[size]
    expansion = {"S": (2,), "B": (2, 3, 4), "M": (2, 3, 4), "L": (3, 4, 8)}[size]
    config = replace(recipe("mednext").network, kernel_size=kernel, deep_supervision=0)
    config = replace(config, blocks=blocks, expansion=expansion)
    with torch.device("meta"):
        tensors = weights_of(build(config, 4))
    assert sum(tensor.numel() for tensor in tensors.values()) == count


@pytest.mark.parametrize("stages", [2, 3, 4, 5])
@pytest.mark.parametrize("heads_wanted", [0, 1, 3, 9])
def test_a_mednext_has_the_heads_that_there_are_stages_for(stages, heads_wanted):
    widths = tuple(2 << n for n in range(stages))
    network = build(NetworkConfig(name="mednext", widths=widths, deep_supervision=heads_wanted), 4)
    images = torch.zeros(2, 4, 16, 16, 16)
    found = heads(network.train()(images))
    assert [head.shape[2] for head in found] == [16 >> n for n in range(len(found))]
    assert len(found) == 1 + min(heads_wanted, stages - 1)
    assert sum(name.startswith("out") for name in weights_of(network)) == 2 * len(found)


def run(name="plain", modalities=MODALITIES, target="regions", heads=1):
    return TrainConfig(
        data=DataConfig(modalities=modalities),
        network=NetworkConfig(name=name, widths=(4, 8, 16), deep_supervision=heads),
        loss=LossConfig(target=target),
    )


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("plain", "decoder.seg_layers.1"),
        ("residual", "decoder.seg_layers.1"),
        ("mednext", "out_0.conv_out"),
    ],
)
def test_a_run_begins_with_the_modalities_and_layers_that_it_shares(name, head):
    theirs, ours = run(name), run(name, ("t2", "flair"), "labels", heads=0)
    weights = weights_of(network_of(theirs))
    kept, new = fitting(ours, theirs, weights)
    assert new == [f"{head}.weight", f"{head}.bias"]
    assert kept.keys() | new == weights_of(network_of(ours)).keys()
    first = next(iter(weights))
    assert torch.equal(kept[first], weights[first][:, [3, 0]])
    assert all(torch.equal(kept[n], weights[n]) for n in kept if n != first)


@pytest.mark.parametrize("name", NETWORKS)
def test_heads_for_other_labels_are_new_though_their_number_is_the_same(name):
    theirs = replace(run(heads=0), network=NETWORKS[name])
    weights = weights_of(network_of(theirs))
    assert fitting(theirs, theirs, weights) == (weights, [])
    three = '{"labels": ["a", "b", "c"]}'
    ours = replace(theirs, data=replace(theirs.data, labels=three))
    kept, new = fitting(ours, theirs, weights)
    assert kept.keys() | new == weights.keys()
    assert new
    assert all(3 in weights[tensor].shape[:2] for tensor in new)


def test_a_learner_begins_with_what_there_is_and_its_average_too():
    config = replace(run(), optim=OptimConfig(ema_decay=0.9))
    learner = new_learner(config, torch.device("cpu"))
    other = weights_of(network_of(replace(config, run=RunConfig(seed=7))))
    given = {name: t + 1 for name, t in other.items() if "seg_layers" not in name}
    before = {name: t.clone() for name, t in weights_of(learner.bare).items()}
    learner.begin(given)
    for network in (learner.bare, learner.validated):
        for name, tensor in weights_of(network).items():
            assert torch.equal(tensor, given.get(name, before[name])), name


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        (run(), run(modalities=("t1", "t2")), "has no flair, t1ce; it was trained on t1, t2"),
        (run("residual"), run(), "another network"),
        (run("dynunet", ("t1",)), run("dynunet"), "a dynunet for flair, t1, t1ce, t2"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(ours, theirs, said):
    with pytest.raises(UsageError, match=said):
        fitting(ours, theirs, weights_of(network_of(theirs)))
