"""Several ranks learn what one would, and go on exactly: without Ray, in processes of their own."""

import random
import signal
from itertools import chain

import pytest
import torch
from ranks import CASES, CONFIG, CPU, batches, together, train_rank

from raybrats.config import override, override_all
from raybrats.data.plan import Plan
from raybrats.train import checkpoint, loop
from raybrats.train.learner import new_learner

NUM_SEEDS = 20


def weights(folder):
    return checkpoint.newest(str(folder)).weights


def losses(folder):
    """Of each step, the last time that it was done."""
    lines = (line.split() for line in (folder / "losses-0").read_text().splitlines())
    return {int(step): float(loss) for step, loss in lines}


def draws(folder, world, stop):
    """The draws of each step over all ranks, in order, as the surviving weights have seen them."""
    done = {}
    for rank in range(world):
        for line in (folder / f"history-{rank}").read_text().splitlines():
            step, *seen = map(int, line.split())
            done.setdefault(step, {})[rank] = seen
    return [sorted(chain.from_iterable(done[step].values())) for step in range(stop)]


def alone(config, num_steps):
    """The losses and the weights of one process that has the whole batch."""
    learner, given = new_learner(config, CPU), batches(config, CASES, (0, 1, 0))
    return [float(loop.train_step(learner, next(given))) for _ in range(num_steps)], learner


@pytest.mark.parametrize(
    ("world", "batch", "changes"),
    [
        (2, 2, {}),
        (2, 2, {"loss.batch_dice": True}),
        (3, 4, {"loss.batch_dice": True, "loss.focal_weight": 0.5}),
        (2, 4, {"optim.micro_batch": 1}),
        (3, 5, {"optim.micro_batch": 1}),
    ],
    ids=["each", "batch-dice", "uneven", "micro", "micro-uneven"],
)
def test_several_workers_take_the_step_of_one(tmp_path, world, batch, changes):
    length = {"optim.global_batch": batch, "optim.steps": 3, "cluster.min_workers": 1}
    config = override_all(CONFIG, {**changes, **length, "cluster.workers": world})
    config = override_all(config, {"validation.every_steps": 3, "optim.name": "sgd"})
    assert together(world, train_rank, tmp_path, config) == [0] * world
    expected, learner = alone(override(config, "optim.micro_batch", 0), 3)
    assert list(losses(tmp_path).values()) == pytest.approx(expected, rel=1e-5)
    for name, tensor in weights(tmp_path).items():
        torch.testing.assert_close(tensor, learner.weights()[name], rtol=1e-4, atol=1e-5)


def test_a_dice_over_the_batch_with_micro_batches_is_the_same_on_all_ranks(tmp_path):
    changes = {"loss.batch_dice": True, "optim.micro_batch": 1, "optim.global_batch": 5}
    config = override_all(CONFIG, {**changes, "optim.steps": 3, "cluster.min_workers": 1})
    assert together(3, train_rank, tmp_path, config) == [0, 0, 0], "a rank without a patch hangs"
    assert weights(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that nothing has happened to, by their configuration."""
    done = {}

    def run(config):
        if config not in done:
            done[config] = tmp_path_factory.mktemp("whole")
            assert together(1, train_rank, done[config], config) == [0]
        return done[config]

    return run


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_killed_at_a_random_step_it_ends_with_the_same_weights(tmp_path, whole, seed):
    """F24, and F10: the kill falls into the writing of a checkpoint as often as not."""
    config = override(CONFIG, "run.seed", seed % 4)
    config = override(config, "optim.ema_decay", 0.9 if seed % 2 else 0.0)
    kill_at = random.Random(seed).randrange(1, config.optim.steps)
    assert together(1, train_rank, tmp_path, config, kill_at) == [-signal.SIGKILL], "it was killed"
    assert together(1, train_rank, tmp_path, config) == [0]
    expected = weights(whole(config))
    assert weights(tmp_path).keys() == expected.keys()
    assert all(torch.equal(tensor, expected[n]) for n, tensor in weights(tmp_path).items())
    batch = config.optim.global_batch
    due = [list(range(s * batch, (s + 1) * batch)) for s in range(config.optim.steps)]
    assert draws(tmp_path, 1, config.optim.steps) == due, "missing, twice or out of order"
    assert losses(tmp_path) == losses(whole(config))


@pytest.mark.faults
def test_resumed_with_4_2_and_3_workers_it_takes_the_same_steps(tmp_path):
    """F23: the global batch is fixed, so the order of the draws and the loss are too."""
    changes = {"optim.global_batch": 12, "optim.lr": 1e-3, "loss.batch_dice": True}
    config = override_all(CONFIG, {**changes, "cluster.min_workers": 1, "cluster.workers": 4})
    assert together(4, train_rank, tmp_path, config, 5) == [-signal.SIGKILL] * 4
    assert together(2, train_rank, tmp_path, config, 9) == [-signal.SIGKILL] * 2
    assert together(3, train_rank, tmp_path, config) == [0] * 3
    expected, _ = alone(config, config.optim.steps)
    found = losses(tmp_path)
    assert [found[step] for step in sorted(found)] == pytest.approx(expected, abs=1e-5)
    plan = Plan(5, 12, config.run.seed)
    assert draws(tmp_path, 4, 4) == [list(range(12 * s, 12 * s + 12)) for s in range(4)]
    assert len({plan.cases(step) for step in range(12)}) > 1


def test_workers_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ValueError, match=r"multiple of cluster\.workers"):
        override_all(CONFIG, {"cluster.workers": 3, "optim.global_batch": 4})
