"""Steps and validation as plain torch: learning, resuming bit by bit, and scoring."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from raybrats.config import (
    AugmentConfig,
    DataConfig,
    LossConfig,
    NetworkConfig,
    OptimConfig,
    TrainConfig,
    override,
)
from raybrats.data.batch import collate
from raybrats.data.patch import PatchRule, cut, draw_patch, to_row, volume_size
from raybrats.data.prepare import prepare
from raybrats.label_set import ED, ET, GLIOMA, NCR
from raybrats.model.inference import uploaded
from raybrats.model.network import weights_of
from raybrats.phantom.phantom import make_phantom
from raybrats.train import checkpoint, loop
from raybrats.train.checkpoint import Snapshot
from raybrats.train.learner import new_learner
from raybrats.train.optimizer import learning_rate
from raybrats.train.step import train_step

CPU = torch.device("cpu")
STILL = AugmentConfig(mirror=0, noise=0, brightness=0, contrast=0, gamma=0)
PATCH = (16, 16, 16)
CONFIG = TrainConfig(
    data=DataConfig(patch_size=PATCH),
    network=NetworkConfig(widths=(4, 8, 8), deep_supervision=1),
    loss=LossConfig(focal_weight=0.5),
    optim=OptimConfig(lr=1e-2, steps=8, global_batch=2),
)


@pytest.fixture(scope="module")
def cases():
    return [prepare(*make_phantom(index, shape=(32, 32, 24))) for index in range(2)]


@pytest.fixture(scope="module")
def batches(cases):
    """One a step, the patches moving over the cases."""

    def batch(step):
        draws = [2 * step, 2 * step + 1]
        patches = [cut(case, (step, 2, 1), PATCH) for case in cases]
        return collate([to_row(*each) for each in zip(cases, patches, draws, strict=True)])

    return [batch(step) for step in range(8)]


def assert_equal(one, other):
    ours, theirs = weights_of(one.bare), weights_of(other.bare)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_loss_falls_on_a_batch_seen_again_and_again(batches):
    config = replace(CONFIG, augment=STILL, optim=OptimConfig(lr=3e-2, steps=12, global_batch=2))
    learner = new_learner(config, CPU)
    losses = [float(train_step(learner, batches[0])) for _ in range(12)]
    assert learner.step == 12
    assert losses[-1] < 0.9 * losses[0]


def test_a_seed_decides_the_initial_weights():
    assert_equal(new_learner(CONFIG, CPU), new_learner(CONFIG, CPU))
    other = new_learner(override(CONFIG, "run.seed", 5), CPU)
    with pytest.raises(AssertionError):
        assert_equal(new_learner(CONFIG, CPU), other)


def test_a_step_changes_every_weight(batches):
    learner = new_learner(CONFIG, CPU)
    before = {name: tensor.clone() for name, tensor in learner.bare.named_parameters()}
    train_step(learner, batches[0])
    same = [n for n, p in learner.bare.named_parameters() if torch.equal(before[n], p)]
    assert same == []


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_resumed_learner_ends_bit_equal_to_an_uninterrupted_one(
    batches, tmp_path, optimizer, stop
):
    config = override(CONFIG, "optim.name", optimizer)
    whole = new_learner(config, CPU)
    losses = [train_step(whole, batch) for batch in batches]

    first = new_learner(config, CPU)
    for batch in batches[:stop]:
        train_step(first, batch)
    checkpoint.write(
        str(tmp_path), config, Snapshot(stop, first.weights(), first.state(), first.progress())
    )
    del first
    torch.manual_seed(99)

    found = checkpoint.newest(str(tmp_path))
    second = new_learner(config, CPU)
    second.restore(found.weights, found.state, found.progress)
    assert second.step == stop
    again = [train_step(second, batch) for batch in batches[stop:]]
    assert torch.equal(torch.stack(again), torch.stack(losses[stop:]))
    assert_equal(second, whole)


def test_a_checkpoint_of_the_first_version_is_resumed_by_its_names(batches, tmp_path):
    """Stored progress keeps the names that it first had: what is validated was `judged_at`."""
    first = new_learner(CONFIG, CPU)
    for batch in batches[:3]:
        train_step(first, batch)
    progress = {"step": 3, "best": 0.25, "stale": 2, "skipped": 1, "judged_at": 2}
    checkpoint.write(str(tmp_path), CONFIG, Snapshot(3, first.weights(), first.state(), progress))
    found = checkpoint.newest(str(tmp_path))
    second = new_learner(CONFIG, CPU)
    second.restore(found.weights, found.state, found.progress)
    assert_equal(second, first)
    assert (second.step, second.best, second.skipped) == (3, 0.25, 1)
    assert (second.validations_since_best, second.validated_at) == (2, 2)
    assert second.progress() == progress


def test_random_numbers_go_on_where_they_were():
    learner = new_learner(CONFIG, CPU)
    torch.rand(7)
    weights, state = learner.weights(), learner.state()
    expected = torch.rand(5)
    new_learner(CONFIG, CPU).restore(weights, state, learner.progress())
    assert torch.equal(torch.rand(5), expected)


def test_the_learning_rate_falls_polynomially_from_lr_to_nothing(batches):
    optim = OptimConfig(lr=0.02, steps=10, poly_power=0.9)
    rates = [learning_rate(optim, step) for step in range(11)]
    assert rates[0] == 0.02
    assert rates[5] == pytest.approx(0.02 * 0.5**0.9)
    assert rates[10] == 0
    assert rates == sorted(rates, reverse=True)
    learner = new_learner(CONFIG, CPU)
    for batch in batches[:3]:
        train_step(learner, batch)
    assert learner.optimizer.param_groups[0]["lr"] == learning_rate(CONFIG.optim, 2)


def test_gradients_are_clipped(batches):
    learner = new_learner(override(CONFIG, "optim.clip_norm", 1e-3), CPU)
    train_step(learner, batches[0])
    norm = torch.stack([p.grad.norm() for p in learner.bare.parameters()]).norm()
    assert norm <= 1e-3 * (1 + 1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_loss_and_gradients_are_finite(batches, precision):
    learner = new_learner(override(CONFIG, "optim.precision", precision), CPU)
    for batch in batches[:3]:
        assert torch.isfinite(train_step(learner, batch))
        assert all(torch.isfinite(p.grad).all() for p in learner.bare.parameters())
    assert all(p.dtype == torch.float32 for p in learner.bare.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_validation_scores_every_region_of_every_case(cases, precision):
    learner = new_learner(override(CONFIG, "optim.precision", precision), CPU)
    scores = loop.validate(learner, (uploaded(case, CPU) for case in cases))
    assert np.array(scores).shape == (len(cases), len(GLIOMA.regions))
    assert all(0 <= score <= 1 for row in scores for score in row)


def test_a_network_that_reads_the_answer_off_the_image_scores_one():
    """Its modalities light up where the regions are."""
    labels = np.zeros((20, 18, 17), np.uint8)
    labels[2:14, 2:14, 2:14], labels[4:10, 4:10, 4:10], labels[5:8, 5:8, 5:8] = ED, NCR, ET
    wt, tc, et = labels > 0, np.isin(labels, (NCR, ET)), labels == ET
    image = [10 + 90 * mask.astype(np.int16) for mask in (wt, tc, et, wt)]
    image[0][0, 0, 0] = 0  # a corner that differs: the background is 0, everything else is brain
    learner = new_learner(CONFIG, CPU)
    learner.bare = nn.Conv3d(4, 3, 1, bias=False)
    with torch.no_grad():
        learner.bare.weight.copy_(torch.eye(3, 4)[..., None, None, None])
    assert loop.validate(learner, [uploaded(prepare(image, labels), CPU)]) == [[1, 1, 1]]
    with torch.no_grad():
        learner.bare.weight.neg_()
    assert max(loop.validate(learner, [uploaded(prepare(image, labels), CPU)])[0]) < 0.5


@pytest.mark.parametrize("sampling", ["slices", "volume"])
def test_slices_and_whole_volumes_are_learned_and_scored(cases, sampling):
    size = (32, 32, 1) if sampling == "slices" else PATCH
    data = DataConfig(sampling=sampling, patch_size=size, num_slices=4, first_slice=12)
    config = replace(CONFIG, data=data, augment=AugmentConfig(rotation=1.0, blur=1.0))
    learner = new_learner(config, CPU)
    boxes = [[edge for span in case.box for edge in (span.start, span.stop)] for case in cases]
    cut_size = size if sampling == "slices" else volume_size(boxes, config.network.stride)
    rule = PatchRule(data, cut_size, seed=0)
    patches = [draw_patch(case, rule, draw=n, case=n, ordinal=0) for n, case in enumerate(cases)]
    batch = collate([to_row(case, patches[n], n) for n, case in enumerate(cases)])
    losses = [float(train_step(learner, batch)) for _ in range(8)]
    assert losses[-1] < losses[0]
    scores = loop.validate(learner, (uploaded(case, CPU) for case in cases))
    assert np.array(scores).shape == (2, len(GLIOMA.regions))


def test_means_go_over_cases_first_and_then_over_regions():
    means = loop.mean_scores([[1.0, 0.5, 0.0], [0.0, 0.5, 0.4]], GLIOMA.region_names)
    assert means == pytest.approx({"WT": 0.5, "TC": 0.5, "ET": 0.2, "mean": 0.4})
    assert loop.mean_scores([[1.0, 1.0, 1.0]], GLIOMA.region_names)["mean"] == 1
