"""The loss: what each term rewards, and how terms and heads are weighted."""

import pytest
import torch
from monai.losses import DiceLoss, FocalLoss
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, interpolate

from raybrats.config import LossConfig, TrainConfig
from raybrats.model.loss import SegmentationLoss, label_masks, region_masks
from raybrats.model.network import num_outputs

KINDS = ({}, {"target": "labels"}, {"target": "labels", "background": True})
TERMS = ("dice_weight", "ce_weight", "focal_weight")


def only(term, weight=1.0, **others):
    return LossConfig(**dict.fromkeys(TERMS, 0.0) | {term: weight} | others)


@pytest.fixture
def labels():
    """Two cases: a large tumour of all labels and a small one."""
    found = torch.zeros(2, 8, 8, 8, dtype=torch.uint8)
    found[0, 1:7, 1:7, 1:7] = 2
    found[0, 2:6, 2:6, 2:6] = 1
    found[0, 3:5, 3:5, 3:5] = 3
    found[1, 2:4, 2:4, 2:4] = 3
    return found


def logits_for(labels, certainty=6.0):
    return (region_masks(labels) * 2 - 1) * certainty


def some_logits(seed=0):
    return torch.randn(2, 3, 8, 8, 8, generator=torch.Generator().manual_seed(seed))


def logits_of(config, seed=0):
    generator = torch.Generator().manual_seed(seed)
    outputs = num_outputs(TrainConfig(loss=config))
    return torch.randn(2, outputs, 8, 8, 8, generator=generator)


def masks_of(config, labels):
    return region_masks(labels) if config.target == "regions" else label_masks(labels)


def test_regions_are_nested():
    masks = region_masks(torch.tensor([[[[0, 1, 2, 3]]]]))
    assert masks[0, :, 0, 0].tolist() == [[0, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 1]]
    assert masks.dtype == torch.float32


@pytest.mark.parametrize("term", TERMS)
def test_right_logits_cost_less_than_wrong_ones(term, labels):
    loss = SegmentationLoss(only(term))
    right, vague, wrong = (loss([logits_for(labels, c)], labels) for c in (6.0, 0.5, -6.0))
    assert 0 <= right < vague < wrong


@pytest.mark.parametrize("term", TERMS)
def test_right_logits_cost_next_to_nothing(term, labels):
    assert SegmentationLoss(only(term))([logits_for(labels, 20.0)], labels) < 1e-5


@pytest.mark.parametrize("term", TERMS)
def test_the_gradient_points_towards_the_labels(term, labels):
    logits = torch.zeros(2, 3, 8, 8, 8, requires_grad=True)
    SegmentationLoss(only(term))([logits], labels).backward()
    masks = region_masks(labels).bool()
    assert (logits.grad[masks] < 0).all()
    assert (logits.grad[~masks] > 0).all()


def test_the_loss_is_the_weighted_sum_of_its_terms(labels):
    weights = dict(zip(TERMS, (0.7, 0.2, 1.5), strict=True))
    logits = [some_logits()]
    terms = [w * SegmentationLoss(only(term))(logits, labels) for term, w in weights.items()]
    torch.testing.assert_close(SegmentationLoss(LossConfig(**weights))(logits, labels), sum(terms))


@pytest.mark.parametrize("term", TERMS)
def test_a_weight_scales_its_term(term, labels):
    once, thrice = (SegmentationLoss(only(term, w))([some_logits()], labels) for w in (1.0, 3.0))
    torch.testing.assert_close(thrice, 3 * once)


def test_a_weight_of_zero_leaves_the_term_out(labels):
    endless = [logits_for(labels, -torch.inf)]  # cross-entropy of these is infinite
    assert not torch.isfinite(SegmentationLoss(LossConfig())(endless, labels))
    assert torch.isfinite(SegmentationLoss(only("dice_weight"))(endless, labels))


@pytest.mark.parametrize("gamma", [0.5, 2.0, 4.0])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_focal_term_is_that_of_monai(gamma, kind, labels):
    loss = SegmentationLoss(only("focal_weight", focal_gamma=gamma, **kind))
    softmax = loss._config.target == "labels"
    theirs = FocalLoss(gamma=gamma, use_softmax=softmax, reduction="none")
    # MONAI leaves the background out of the softmax too, where it is not to count
    counted = slice(1 if softmax and not loss._config.background else 0, None)
    logits = logits_of(loss._config).requires_grad_()
    found, each = loss([logits], labels), theirs(logits, masks_of(loss._config, labels))
    expected = each[:, counted].mean()
    torch.testing.assert_close(found, expected)
    (ours,), (due,) = (torch.autograd.grad(value, logits) for value in (found, expected))
    torch.testing.assert_close(ours, due)


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_dice_and_cross_entropy_are_those_of_monai(batch, kind, labels):
    config = LossConfig(batch_dice=batch, **kind)
    softmax = config.target == "labels"
    dice = DiceLoss(
        softmax=softmax,
        sigmoid=not softmax,
        include_background=not softmax or config.background,
        batch=batch,
    )
    entropy = cross_entropy if softmax else binary_cross_entropy_with_logits
    logits, target = logits_of(config).requires_grad_(), masks_of(config, labels)
    found = SegmentationLoss(config)([logits], labels)
    expected = dice(logits, target) + entropy(logits, target)
    torch.testing.assert_close(found, expected)
    (ours,), (due,) = (torch.autograd.grad(value, logits) for value in (found, expected))
    torch.testing.assert_close(ours, due)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", KINDS, ids=str)
def test_nothing_but_background_is_finite(kind, target):
    config = LossConfig(focal_weight=1.0, focal_gamma=0.5, batch_dice=True, **target)
    sure = (30 * logits_of(config)).to(kind).requires_grad_()
    loss = SegmentationLoss(config)([sure], torch.zeros(2, 8, 8, 8))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(sure.grad).all()


def test_a_head_sees_the_labels_at_its_own_resolution(labels):
    """As nnU-Net samples them, by "nearest-exact"."""
    coarse = interpolate(labels[:, None].float(), scale_factor=0.25, mode="nearest-exact")[:, 0]
    head, loss = some_logits()[..., :2, :2, :2], SegmentationLoss(LossConfig())
    assert coarse.unique().numel() > 1
    torch.testing.assert_close(loss([head], labels), loss([head], coarse))


def test_the_focal_exponent_spares_what_is_already_right(labels):
    logits = [logits_for(labels, 1.0)]
    mild, strong = (
        SegmentationLoss(only("focal_weight", focal_gamma=g))(logits, labels) for g in (1, 4)
    )
    assert strong < mild


def test_one_dice_over_the_batch_is_not_the_mean_of_one_a_patch(labels):
    logits = logits_for(labels)
    logits[1] = -6.0  # the small tumour is missed
    per_patch = SegmentationLoss(only("dice_weight"))([logits], labels)
    whole = SegmentationLoss(only("dice_weight", batch_dice=True))([logits], labels)
    assert whole < per_patch
    alone = [
        SegmentationLoss(only("dice_weight"))([logits[n : n + 1]], labels[n : n + 1])
        for n in (0, 1)
    ]
    torch.testing.assert_close(per_patch, sum(alone) / 2)


def test_one_patch_has_the_same_dice_either_way(labels):
    logits, one = [some_logits()[:1]], labels[:1]
    per_patch, whole = (
        SegmentationLoss(only("dice_weight", batch_dice=batch))(logits, one)
        for batch in (False, True)
    )
    torch.testing.assert_close(per_patch, whole)


def test_a_coarser_head_counts_half_as_much(labels):
    loss, logits = SegmentationLoss(LossConfig()), [some_logits(seed) for seed in range(3)]
    fine, middle, coarse = (loss([head], labels) for head in logits)
    torch.testing.assert_close(loss(logits, labels), (4 * fine + 2 * middle + coarse) / 7)


def test_half_precision_logits_cost_what_they_do_in_full(labels):
    logits = some_logits().bfloat16()
    loss = SegmentationLoss(LossConfig(focal_weight=1.0))
    torch.testing.assert_close(loss([logits], labels), loss([logits.float()], labels))


def test_an_empty_patch_is_no_division_by_zero():
    logits = some_logits().requires_grad_()
    loss = SegmentationLoss(LossConfig(focal_weight=1.0))([logits], torch.zeros(2, 8, 8, 8))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_autocast_does_not_round_the_loss(kind):
    logits = [torch.randn(2, 3, 8, 8, 8) for _ in range(3)]
    labels = torch.randint(0, 4, (2, 8, 8, 8))
    loss = SegmentationLoss(LossConfig())
    expected = loss(logits, labels)
    with torch.autocast("cpu", kind):
        assert torch.equal(loss(logits, labels), expected)
