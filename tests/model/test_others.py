"""Networks and losses of others: they train as ours do, and what they do not owe is refused."""

from dataclasses import replace

import pytest
import torch
from own_code import Squares
from ranks import CASES, CONFIG, CPU, batches

from raybrats.config import LossConfig, NetworkConfig, TrainConfig, override_all
from raybrats.errors import UsageError
from raybrats.model.loss import loss_of
from raybrats.model.network import build, heads, load_weights, weights_of
from raybrats.model.rehearsal import rehearse
from raybrats.model.windows import blend_windows
from raybrats.train.learner import new_learner
from raybrats.train.step import train_step

LABELS = {"loss.target": "labels"}


def run(**changes):
    """The small run of these tests with a network or a loss of own_code."""
    named = {f"{what}.name": f"own_code:{name}" for what, name in changes.items()}
    if "network" in changes:
        named |= {"network.deep_supervision": 0}
    return override_all(CONFIG, {**LABELS, **named})


def trained(config, count=3):
    learner, given = new_learner(config, CPU), batches(config, CASES, (0, 1, 0))
    return learner, [float(train_step(learner, next(given))) for _ in range(count)]


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("coarser", [0, 1])
def test_a_network_of_others_is_built_as_ours_are(dims, coarser):
    config = NetworkConfig(name="own_code:levels", widths=(4, 8), deep_supervision=coarser)
    network = build(config, num_modalities=2, spatial_dims=dims, outputs=5)
    image = torch.randn(2, 2, 16, 16, 4)
    found = heads(network.train()(image))
    assert [head.shape[:3] for head in found] == [(2, 5, 16), (2, 5, 8)][: 1 + coarser]
    whole = override_all(run(), {"data.sampling": "volume", "network.widths": [4, 8]})
    validated = blend_windows(network.eval(), image, whole).total
    assert validated.shape == (2, 5, 16, 16, 4)
    torch.testing.assert_close(heads(network(image))[0], found[0])


def test_heads_may_be_a_tuple():
    network = build(NetworkConfig(name="own_code:as_tuple", widths=(4, 8)), 4).train()
    assert [head.shape[2] for head in heads(network(torch.zeros(2, 4, 16, 16, 16)))] == [16, 8]


def test_it_learns_and_goes_on_as_ours_do():
    config = override_all(run(network="levels", loss="squared_error"), {"optim.ema_decay": 0.5})
    learner, losses = trained(config, 12)
    assert losses[-1] < losses[0]
    half, _ = trained(config, 5)
    again, given = new_learner(config, CPU), batches(config, CASES, (0, 1, 5))
    again.restore(half.weights(), half.state(), half.progress())
    for _ in range(7):
        train_step(again, next(given))
    for name, tensor in learner.weights().items():
        assert torch.equal(again.weights()[name], tensor), name


def test_its_first_weights_follow_from_the_seed():
    one, same, other = (
        weights_of(new_learner(override_all(run(network="levels"), {"run.seed": seed}), CPU).bare)
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(same[name], tensor) for name, tensor in one.items())
    assert not all(torch.equal(other[name], tensor) for name, tensor in one.items())


def test_a_loss_of_others_is_weighed_so_that_parts_add_up_to_the_whole():
    config = LossConfig(name="own_code:squared_error", dice_weight=0.7, target="labels")
    loss, torch_seed = loss_of(TrainConfig(loss=config)), torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 8, 8, 8, generator=torch_seed, requires_grad=True)
    labels = torch.randint(0, 4, (3, 8, 8, 8), generator=torch_seed, dtype=torch.uint8)
    whole = loss([logits], labels)
    assert whole == Squares(config)([logits], labels)
    parts = [
        loss([logits[part]], labels[part], weight=len(labels[part]) / 3, fraction=0.5)
        for part in (slice(0, 2), slice(2, 3))
    ]
    torch.testing.assert_close(sum(parts), whole)
    assert loss([logits], labels, weight=0.0) == 0


def test_micro_batches_change_nothing_but_rounding():
    config = run(network="levels", loss="squared_error")
    plain, losses = trained(config)
    small, others = trained(override_all(config, {"optim.micro_batch": 1}))
    assert others == pytest.approx(losses, rel=1e-5)
    for name, tensor in plain.weights().items():
        torch.testing.assert_close(small.weights()[name], tensor, rtol=1e-3, atol=1e-5)


def test_a_loss_sees_floats_under_half_precision():
    config = override_all(run(loss="squared_error"), {"optim.precision": "bf16"})
    learner, losses = trained(config, 1)
    logits = torch.randn(2, 4, 8, 8, 8, dtype=torch.bfloat16)
    found = learner.loss([logits.requires_grad_()], torch.zeros(2, 8, 8, 8, dtype=torch.uint8))
    assert found.dtype == torch.float32
    assert losses[0] > 0


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("one_too_few", r"gives \(2, 3, 8, 8, 8\) for .*owes \(2, 4, 8, 8, 8\)"),
        ("coarse_only", r"gives \(2, 4, 4, 4, 4\) for images of \(2, 4, 8, 8, 8\)"),
        ("wrong_later", r"gives \(2, 4, 8, 8, 8\), \(2, 4, 7, 8, 8\) for"),
        ("whole_numbers", r"owes \(2, 4, 8, 8, 8\)"),
        ("nothing", "owes"),
        ("as_text", "gives str for"),
        ("wrong_in_validation", r"gives \(2, 8, 8, 8\) for"),
        ("fails", "TypeError: unsupported operand"),
        ("real_only", r'device\("meta"\) too'),
        ("no_module", "makes tuple, not a Module"),
        ("stops", "SystemExit: no licence"),
        ("unheard_of", "AttributeError: .*unheard_of"),
    ],
)
def test_a_network_that_does_not_do_is_refused_before_a_run(name, said):
    with pytest.raises(UsageError, match=f"^network own_code:{name}: .*{said}") as refusal:
        rehearse(run(network=name))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a_value_each", r"gives \(2,\), not a scalar"),
        ("a_number", "gives float, not a scalar"),
        ("no_gradient", "without a gradient"),
        ("loss_fails", "TypeError: unsupported operand"),
        ("learns", "has weights to learn"),
        ("function", "makes method, not a Module"),
    ],
)
def test_a_loss_that_does_not_do_is_refused_before_a_run(name, said):
    with pytest.raises(UsageError, match=f"^loss own_code:{name}: .*{said}") as refusal:
        rehearse(run(loss=name))
    assert "\n" not in str(refusal.value)


def test_several_workers_need_a_gradient_everywhere():
    rehearse(run(network="unused"))
    with pytest.raises(UsageError, match=r"no gradient reaches spare\.weight \(2 in all\)"):
        rehearse(override_all(run(network="unused"), {"cluster.workers": 2}))
    assert CONFIG.network.deep_supervision == 1
    rehearse(run(loss="squared_error"))
    with pytest.raises(UsageError, match="no gradient reaches head 1 of 2"):
        rehearse(override_all(run(loss="squared_error"), {"cluster.workers": 2}))


def test_what_does_is_rehearsed_without_a_trace():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    rehearse(run(network="levels", loss="squared_error"))
    slices = {"data.sampling": "slices", "data.patch_size": [16, 16, 1]}
    rehearse(override_all(run(network="levels"), slices))
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_wrong_with_later_images_is_told_too():
    """As of a network that is right in the rehearsal only."""
    network = build(NetworkConfig(name="own_code:levels", widths=(4, 8)), 4)
    network(torch.zeros(1, 4, 16, 16, 16))
    network.levels = torch.nn.ModuleList(torch.nn.Conv3d(4, 2, 3, padding=1) for _ in range(2))
    with pytest.raises(UsageError, match=r"gives \(1, 2, 16, 16, 16\) for images of \(1, 4, 16"):
        network(torch.zeros(1, 4, 16, 16, 16))


def test_weights_go_from_a_network_to_another_of_the_same_code():
    config = NetworkConfig(name="own_code:levels", widths=(4, 8))
    one, other = build(config, 4), build(config, 4)
    load_weights(other, weights_of(one))
    image = torch.randn(1, 4, 8, 8, 8)
    assert torch.equal(one(image), other(image))


@pytest.mark.parametrize("field", ["norm", "residual_units", "kernel_size", "blocks"])
def test_every_field_is_theirs_to_use(field):
    value = {"norm": "batch", "residual_units": 3, "kernel_size": 5, "blocks": (1, 2)}[field]
    config = NetworkConfig(name="own_code:levels", widths=(4, 8))
    assert getattr(replace(config, **{field: value}), field) == value


@pytest.mark.parametrize("name", ["vnet", "", "plian"])
def test_a_name_that_stands_for_nothing_is_refused_by_its_field(name):
    with pytest.raises(UsageError, match=r"^network\.name: no network .* there are plain, resid"):
        NetworkConfig(name=name)
    config = override_all(CONFIG, {"loss.name": name}) if name else None
    if config is not None:
        with pytest.raises(UsageError, match=r"^loss\.name: no loss .*; there are sum, and my"):
            rehearse(config)
