"""F12 and F19: states that do not fit, and gradients that are not finite."""

from dataclasses import replace

import pytest
import torch
from ranks import CASES, CONFIG, CPU, batches, steps

from raybrats.config import NetworkConfig, override, override_all
from raybrats.errors import CheckpointError, DivergedError
from raybrats.train.learner import new_learner
from raybrats.train.step import train_step

pytestmark = pytest.mark.faults


def poisoned(config, bad_steps):
    """Batches of which some have a gain that is not a number."""
    for step, batch in enumerate(batches(config, CASES, (0, 1, 0))):
        gain = torch.full_like(batch.scaling.gain, torch.nan)
        scaling = replace(batch.scaling, gain=gain)
        yield replace(batch, scaling=scaling) if step in bad_steps else batch


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_without_a_finite_gradient_is_skipped_and_counted(precision):
    """F19, once."""
    config = override_all(CONFIG, {"optim.precision": precision, "optim.ema_decay": 0.5})
    learner, given_batches = new_learner(config, CPU), poisoned(config, {2})
    before = None
    for step in range(5):
        before = {n: t.clone() for n, t in learner.weights().items()}
        loss = train_step(learner, next(given_batches))
        assert bool(torch.isfinite(loss)) == (step != 2), "the fault fires once"
        same = all(torch.equal(t, before[n]) for n, t in learner.weights().items())
        assert same == (step == 2)
        assert all(torch.isfinite(t).all() for t in learner.weights().values())
    assert (learner.step, learner.skipped, learner.skipped_in_a_row) == (5, 1, [])


def test_many_in_a_row_end_the_run_and_name_the_draws():
    """F19, for good."""
    config = override(CONFIG, "optim.max_skipped", 3)
    learner, given_batches = new_learner(config, CPU), poisoned(config, range(4, 9))
    with pytest.raises(DivergedError, match=r"3 steps before step 7, draws 8 to 13;.*optim\.lr"):
        all(train_step(learner, batch) is not None for batch in given_batches)
    assert (learner.step, learner.skipped) == (7, 3)
    assert all(torch.isfinite(t).all() for t in learner.weights().values())


@pytest.mark.parametrize("part", ["optimizer", "scaler", "torch_rng", "averaged"])
def test_a_state_without_a_part_is_refused(part):
    """F12."""
    learner, _ = steps(override(CONFIG, "optim.ema_decay", 0.5), 1)
    weights, state = learner.weights(), learner.state()
    del state[part]
    with pytest.raises(CheckpointError, match=f"{part} is missing"):
        new_learner(learner.config, CPU).restore(weights, state, learner.progress())


def test_a_state_of_another_optimiser_or_network_is_refused():
    """F12."""
    learner, _ = steps(CONFIG, 1)
    weights, state, progress = learner.weights(), learner.state(), learner.progress()
    with pytest.raises(CheckpointError, match=r"optimizer\.(betas|momentum)"):
        new_learner(override(CONFIG, "optim.name", "sgd"), CPU).restore(weights, state, progress)
    wider = replace(CONFIG, network=NetworkConfig(widths=(8, 8, 8), deep_supervision=1))
    with pytest.raises(CheckpointError, match=r"optimizer exp_avg.*\(4, 4, 3, 3, 3\), not \(8, 4"):
        new_learner(wider, CPU).restore(weights, state, progress)
    with pytest.raises(CheckpointError, match=r"weights of another network"):
        new_learner(CONFIG, CPU).restore({**weights, "more": torch.zeros(1)}, state, progress)
    extra = {**state, "surprise": 1}
    with pytest.raises(CheckpointError, match="surprise is unknown"):
        new_learner(CONFIG, CPU).restore(weights, extra, progress)
