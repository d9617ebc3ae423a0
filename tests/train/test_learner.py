"""A network that learns: schedules, averages, precision, layout, and states that are refused."""

import copy
import math
import warnings
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import CASES, CONFIG, CPU, batches, steps

from raybrats.config import OptimConfig, override, override_all
from raybrats.errors import UsageError
from raybrats.model.network import weights_of
from raybrats.train import learner as learning
from raybrats.train import loop
from raybrats.train.learner import new_learner
from raybrats.train.optimizer import learning_rate
from raybrats.train.ranks import check_precision, make_ready
from raybrats.train.step import train_step


@given(
    schedule=st.sampled_from(["poly", "cosine"]),
    warmup=st.integers(0, 20),
    rest=st.integers(2, 100),
)
def test_the_rate_rises_over_the_warmup_and_then_falls_to_nothing(schedule, warmup, rest):
    optim = OptimConfig(lr=0.1, schedule=schedule, warmup_steps=warmup, steps=warmup + rest)
    rates = [learning_rate(optim, step) for step in range(optim.steps + 1)]
    assert max(rates) == pytest.approx(0.1)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert rates[-1] == pytest.approx(0)
    assert all(rate > 0 for rate in rates[:-1])


def test_a_warmup_as_long_as_the_run_is_refused():
    with pytest.raises(UsageError, match=r"optim\.warmup_steps"):
        OptimConfig(steps=10, warmup_steps=10)


def test_averages_follow_the_weights_and_are_what_is_validated():
    config = override(CONFIG, "optim.ema_decay", 0.75)
    learner, given_batches = new_learner(config, CPU), batches(config, CASES, (0, 1, 0))
    expected = None
    for _ in range(4):
        train_step(learner, next(given_batches))
        now = {name: tensor.clone() for name, tensor in weights_of(learner.bare).items()}
        expected = expected or now
        expected = {n: 0.75 * expected[n] + 0.25 * now[n] for n in now}
    validated = learner.weights()
    assert validated.keys() == expected.keys()
    for name, tensor in validated.items():
        torch.testing.assert_close(tensor, expected[name])
    assert any(not torch.equal(validated[n], t) for n, t in weights_of(learner.bare).items())
    plain, _ = steps(CONFIG, 4)
    assert all(torch.equal(t, weights_of(learner.bare)[n]) for n, t in plain.weights().items())


def test_half_precision_scales_the_loss_and_learns():
    learner, losses = steps(override(CONFIG, "optim.precision", "fp16"), 12)
    assert learner.scaler.is_enabled()
    assert all(map(torch.isfinite, map(torch.tensor, losses)))
    assert all(torch.isfinite(t).all() for t in learner.weights().values())
    assert losses[-1] < losses[0]
    assert learner.state()["scaler"]["scale"] > 0


def test_channels_last_is_the_same_network():
    plain, expected = steps(CONFIG, 3)
    learner, losses = steps(override(CONFIG, "cluster.channels_last", True), 3)
    assert losses == pytest.approx(expected, rel=1e-4)
    kernel = next(t for t in learner.bare.parameters() if t.ndim == 5 and t.shape[1] > 1)
    assert kernel.is_contiguous(memory_format=torch.channels_last_3d)
    kernels = next(t for t in plain.bare.parameters() if t.ndim == 5 and t.shape[1] > 1)
    assert not kernels.is_contiguous(memory_format=torch.channels_last_3d)


def test_a_compiler_that_fails_is_a_warning(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", broken)
    torch._dynamo.reset()
    config = override(CONFIG, "cluster.compile", True)
    learner = new_learner(config, CPU)
    with pytest.warns(UserWarning, match="compile failed.*goes on without it"):
        make_ready(learner)
    assert learner.network is learner.bare
    assert "torch.compile failed (" in learner.not_compiled
    assert "no compiler" in learner.not_compiled
    assert all(p.grad is None for p in learner.bare.parameters())
    expected = steps(CONFIG, 2)[1]
    given_batches = batches(config, CASES, (0, 1, 0))
    assert [float(train_step(learner, next(given_batches))) for _ in range(2)] == expected


def test_early_stopping_counts_validations_without_a_better_one():
    learner = new_learner(CONFIG, CPU)
    for mean, stale in ((0.3, 0), (0.2, 1), (0.3, 2), (0.31, 0), (0.1, 1)):
        learner.add_validation(mean)
        assert learner.validations_since_best == stale
    again = new_learner(CONFIG, CPU)
    again.restore(learner.weights(), learner.state(), learner.progress())
    assert (again.best, again.validations_since_best) == (pytest.approx(0.31), 1)


def test_a_run_without_progress_ends_early_and_its_best_is_kept():
    config = override_all(CONFIG, {"validation.every_steps": 2, "validation.patience": 2})
    learner = new_learner(config, CPU)
    found, saved = iter([0.2, 0.5, 0.4, 0.3, 0.9]), []
    hooks = loop.Hooks(
        validate=lambda: [[next(found)] * 3],
        log=lambda _: None,
        save=lambda metrics, finished: saved.append((learner.step, bool(metrics), finished)),
        check_in=lambda: None,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics = loop.run(learner, batches(config, CASES, (0, 1, 0)), hooks)
    assert metrics["mean"] == pytest.approx(0.3)
    assert saved == [(2, True, False), (4, True, False), (6, True, False), (8, True, True)]


@pytest.mark.parametrize("at", [6, 12])
def test_a_validation_that_did_not_come_about_is_made_up_for(at):
    """As after a notice in the middle of it: the step is saved, and its validation is due."""
    learner, _ = steps(CONFIG, at)
    done = []
    hooks = loop.Hooks(
        validate=lambda: done.append(learner.step) or [[0.5] * 3],
        log=lambda _: None,
        save=lambda metrics, finished: done.append((bool(metrics), finished)),
        check_in=lambda: None,
    )
    metrics = loop.run(learner, batches(CONFIG, CASES, (0, 1, at)), hooks)
    assert metrics["mean"] == 0.5
    assert done[:2] == [at, (True, at == 12)]
    assert done[-2:] == [12, (True, True)]
    assert learner.validated_at == 12


def test_bf16_is_refused_where_a_gpu_would_emulate_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100")
    gpu = torch.device("cuda", 0)
    for capability, refused in (((7, 5), True), ((8, 0), False), ((10, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, it=capability: it)
        with pytest.raises(UsageError, match=r"V100.* 7\.5.*fp16") if refused else nullcontext():
            check_precision(override(CONFIG, "optim.precision", "bf16"), gpu)
        check_precision(override(CONFIG, "optim.precision", "fp16"), gpu)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_state_of_another_devices_kernels_goes_on_by_ones_own(name, monkeypatch):
    """On a GPU the optimiser is one kernel; its checkpoints and those of a CPU are alike."""
    config = override(CONFIG, "optim.name", name)
    plain, _ = steps(config, 3)
    kernels = learning.new_optimizer
    monkeypatch.setattr(learning, "new_optimizer", lambda *of, **_: kernels(*of, fused=True))
    fused = new_learner(config, CPU)
    fused.restore(plain.weights(), copy.deepcopy(plain.state()), plain.progress())
    assert fused.optimizer.param_groups[0]["fused"] is True
    monkeypatch.undo()
    back = new_learner(config, CPU)
    given_batches = [next(batches(config, CASES, (0, 1, 3))) for _ in range(2)]
    losses = [float(train_step(fused, batch)) for batch in given_batches]
    assert losses == pytest.approx([float(train_step(plain, b)) for b in given_batches], rel=1e-5)
    back.restore(fused.weights(), fused.state(), fused.progress())
    assert back.optimizer.param_groups[0]["fused"] is None
    assert math.isfinite(train_step(back, given_batches[0]))
