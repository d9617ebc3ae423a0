"""The loss: what each term rewards, and how terms and heads are weighted."""

import pytest
import torch
from torch.nn.functional import interpolate

from raybrats.config import LossConfig
from raybrats.model.loss import RegionLoss, region_masks

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


def test_regions_are_nested():
    masks = region_masks(torch.tensor([[[[0, 1, 2, 3]]]]))
    assert masks[0, :, 0, 0].tolist() == [[0, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 1]]
    assert masks.dtype == torch.float32


@pytest.mark.parametrize("term", TERMS)
def test_right_logits_cost_less_than_wrong_ones(term, labels):
    loss = RegionLoss(only(term))
    right, vague, wrong = (loss([logits_for(labels, c)], labels) for c in (6.0, 0.5, -6.0))
    assert 0 <= right < vague < wrong


@pytest.mark.parametrize("term", TERMS)
def test_right_logits_cost_next_to_nothing(term, labels):
    assert RegionLoss(only(term))([logits_for(labels, 20.0)], labels) < 1e-5


@pytest.mark.parametrize("term", TERMS)
def test_the_gradient_points_towards_the_labels(term, labels):
    logits = torch.zeros(2, 3, 8, 8, 8, requires_grad=True)
    RegionLoss(only(term))([logits], labels).backward()
    masks = region_masks(labels).bool()
    assert (logits.grad[masks] < 0).all()
    assert (logits.grad[~masks] > 0).all()


def test_the_loss_is_the_weighted_sum_of_its_terms(labels):
    weights = dict(zip(TERMS, (0.7, 0.2, 1.5), strict=True))
    logits = [some_logits()]
    terms = [w * RegionLoss(only(term))(logits, labels) for term, w in weights.items()]
    torch.testing.assert_close(RegionLoss(LossConfig(**weights))(logits, labels), sum(terms))


@pytest.mark.parametrize("term", TERMS)
def test_a_weight_scales_its_term(term, labels):
    once, thrice = (RegionLoss(only(term, w))([some_logits()], labels) for w in (1.0, 3.0))
    torch.testing.assert_close(thrice, 3 * once)


def test_a_weight_of_zero_leaves_the_term_out(labels):
    endless = [logits_for(labels, -torch.inf)]  # cross-entropy of these is infinite
    assert not torch.isfinite(RegionLoss(LossConfig())(endless, labels))
    assert torch.isfinite(RegionLoss(only("dice_weight"))(endless, labels))


@pytest.mark.parametrize("gamma", [0.5, 2.0, 4.0])
def test_the_focal_term_is_that_of_monai(gamma, labels):
    from monai.losses import FocalLoss

    found = RegionLoss(only("focal_weight", focal_gamma=gamma))([some_logits()], labels)
    expected = FocalLoss(gamma=gamma)(some_logits(), region_masks(labels))
    torch.testing.assert_close(found, expected)


def test_a_head_sees_the_labels_at_its_own_resolution(labels):
    """As nnU-Net samples them, by "nearest-exact"."""
    coarse = interpolate(labels[:, None].float(), scale_factor=0.25, mode="nearest-exact")[:, 0]
    head, loss = some_logits()[..., :2, :2, :2], RegionLoss(LossConfig())
    assert coarse.unique().numel() > 1
    torch.testing.assert_close(loss([head], labels), loss([head], coarse))


def test_the_focal_exponent_spares_what_is_already_right(labels):
    logits = [logits_for(labels, 1.0)]
    mild, strong = (RegionLoss(only("focal_weight", focal_gamma=g))(logits, labels) for g in (1, 4))
    assert strong < mild


def test_one_dice_over_the_batch_is_not_the_mean_of_one_a_patch(labels):
    logits = logits_for(labels)
    logits[1] = -6.0  # the small tumour is missed
    per_patch = RegionLoss(only("dice_weight"))([logits], labels)
    whole = RegionLoss(only("dice_weight", batch_dice=True))([logits], labels)
    assert whole < per_patch
    alone = [
        RegionLoss(only("dice_weight"))([logits[n : n + 1]], labels[n : n + 1]) for n in (0, 1)
    ]
    torch.testing.assert_close(per_patch, sum(alone) / 2)


def test_one_patch_has_the_same_dice_either_way(labels):
    logits, one = [some_logits()[:1]], labels[:1]
    per_patch, whole = (
        RegionLoss(only("dice_weight", batch_dice=batch))(logits, one) for batch in (False, True)
    )
    torch.testing.assert_close(per_patch, whole)


def test_a_coarser_head_counts_half_as_much(labels):
    loss, logits = RegionLoss(LossConfig()), [some_logits(seed) for seed in range(3)]
    fine, middle, coarse = (loss([head], labels) for head in logits)
    torch.testing.assert_close(loss(logits, labels), (4 * fine + 2 * middle + coarse) / 7)


def test_half_precision_logits_cost_what_they_do_in_full(labels):
    logits = some_logits().bfloat16()
    loss = RegionLoss(LossConfig(focal_weight=1.0))
    torch.testing.assert_close(loss([logits], labels), loss([logits.float()], labels))


def test_an_empty_patch_is_no_division_by_zero():
    logits = some_logits().requires_grad_()
    loss = RegionLoss(LossConfig(focal_weight=1.0))([logits], torch.zeros(2, 8, 8, 8))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_autocast_does_not_round_the_loss(kind):
    logits = [torch.randn(2, 3, 8, 8, 8) for _ in range(3)]
    labels = torch.randint(0, 4, (2, 8, 8, 8))
    loss = RegionLoss(LossConfig())
    expected = loss(logits, labels)
    with torch.autocast("cpu", kind):
        assert torch.equal(loss(logits, labels), expected)
