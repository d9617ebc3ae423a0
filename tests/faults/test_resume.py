"""F23 and F24: a run that is killed goes on exactly, with as many workers as there are then."""

import random
import signal

import pytest
import torch
from faulty import SOAK
from ranks import CASES, CONFIG, draws, losses, steps, together, train_rank, weights

from raybrats.config import override, override_all
from raybrats.data.plan import Plan

pytestmark = pytest.mark.faults
NUM_SEEDS = 20 if SOAK else 2


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


@pytest.mark.slow
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


def test_resumed_with_fewer_and_more_workers_it_takes_the_same_steps(tmp_path):
    """F23: the global batch is fixed, so the order of the draws and the loss are too."""
    first, second, third = (4, 2, 3) if SOAK else (2, 1, 2)
    changes = {"optim.global_batch": 12, "optim.lr": 1e-3, "loss.batch_dice": True}
    config = override_all(CONFIG, {**changes, "cluster.min_workers": 1, "cluster.workers": 4})
    assert together(first, train_rank, tmp_path, config, 5) == [-signal.SIGKILL] * first
    assert together(second, train_rank, tmp_path, config, 9) == [-signal.SIGKILL] * second
    assert together(third, train_rank, tmp_path, config) == [0] * third
    _, expected = steps(config, config.optim.steps)
    found = losses(tmp_path)
    assert [found[step] for step in sorted(found)] == pytest.approx(expected, abs=1e-5)
    plan = Plan(len(CASES), 12, config.run.seed)
    assert draws(tmp_path, first, 4) == [list(range(12 * s, 12 * s + 12)) for s in range(4)]
    assert len({plan.cases(step) for step in range(12)}) > 1
