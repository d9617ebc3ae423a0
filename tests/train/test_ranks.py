"""Several ranks learn what one would: without Ray, in processes of their own."""

import pytest
import torch
from faulty import SOAK
from ranks import CONFIG, losses, steps, together, train_rank, weights

from raybrats.config import override, override_all

SELDOM = pytest.mark.skipif(not SOAK, reason="two processes more: make soak")


@pytest.mark.parametrize(
    ("world", "batch", "changes"),
    [
        pytest.param(2, 2, {}, marks=SELDOM),
        (2, 2, {"loss.batch_dice": True}),
        (3, 4, {"loss.batch_dice": True, "loss.focal_weight": 0.5}),
        pytest.param(2, 4, {"optim.micro_batch": 1}, marks=SELDOM),
        pytest.param(3, 5, {"optim.micro_batch": 1}, marks=SELDOM),
    ],
    ids=["each", "batch-dice", "uneven", "micro", "micro-uneven"],
)
def test_several_workers_take_the_step_of_one(tmp_path, world, batch, changes):
    length = {"optim.global_batch": batch, "optim.steps": 3, "cluster.min_workers": 1}
    config = override_all(CONFIG, {**changes, **length, "cluster.workers": world})
    config = override_all(config, {"validation.every_steps": 3, "optim.name": "sgd"})
    assert together(world, train_rank, tmp_path, config) == [0] * world
    learner, expected = steps(override(config, "optim.micro_batch", 0), 3)
    assert list(losses(tmp_path).values()) == pytest.approx(expected, rel=1e-5)
    for name, tensor in weights(tmp_path).items():
        torch.testing.assert_close(tensor, learner.weights()[name], rtol=1e-4, atol=1e-5)


def test_a_dice_over_the_batch_with_micro_batches_is_the_same_on_all_ranks(tmp_path):
    changes = {"loss.batch_dice": True, "optim.micro_batch": 1, "optim.global_batch": 5}
    config = override_all(CONFIG, {**changes, "optim.steps": 3, "cluster.min_workers": 1})
    assert together(3, train_rank, tmp_path, config) == [0, 0, 0], "a rank without a patch hangs"
    assert weights(tmp_path)


def test_workers_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ValueError, match=r"multiple of cluster\.workers"):
        override_all(CONFIG, {"cluster.workers": 3, "optim.global_batch": 4})
