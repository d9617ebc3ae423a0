"""What makes a GPU or its host wait, reads and launches, told on a CPU by their operators."""

import copy
import traceback
from collections import Counter

import pytest
import torch
from ranks import CASES, CONFIG, CPU, batches
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from raybrats.config import AugmentConfig, override_all
from raybrats.data.augment.augment import augment
from raybrats.data.batch import normalise
from raybrats.errors import DivergedError
from raybrats.model.inference import uploaded
from raybrats.recipes import recipe
from raybrats.train import learner as learning
from raybrats.train import loop
from raybrats.train.learner import new_learner
from raybrats.train.step import Inputs, augmented, backward, settle, update

READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
}
"""Operators that need the device's answer before the host can go on."""
FREE = ("aten::empty", "aten::_unsafe_view")
"""Names of operators that launch nothing, beside views, begin with one of them."""
EVERYTHING = dict.fromkeys(
    (
        *("rotation", "scale", "elastic", "bias_field", "noise", "blur", "brightness", "contrast"),
        *("low_resolution", "inverted_gamma", "gamma", "drop_modality"),
    ),
    1.0,
)


class Reads(TorchDispatchMode):
    """Counts them by the line of raybrats that is behind each."""

    def __init__(self):
        super().__init__()
        self.lines = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator in READS:
            ours = [f for f in traceback.extract_stack() if "/raybrats/" in f.filename]
            self.lines[f"{ours[-1].filename.rpartition('/')[2]}: {ours[-1].line}"] += 1
        return operator(*args, **(kwargs or {}))


class Launches(TorchDispatchMode):
    """Counts operators that are at least a kernel or a copy: all but views and empty tensors."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        free = operator.is_view or operator.name().startswith(FREE)
        self.count += not free
        return operator(*args, **(kwargs or {}))


class OfACpu(torch.Generator):
    """A generator for the meta device, which has none."""

    def __new__(cls, _):
        return super().__new__(cls)


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_step_reads_the_device_once(monkeypatch, name, decay):
    """Whether the gradient was finite, of the step before; the optimiser is that of a GPU."""
    make = learning.new_optimizer
    monkeypatch.setattr(learning, "new_optimizer", lambda *of, **_: make(*of, fused=True))
    changes = {"optim.name": name, "optim.ema_decay": decay, "loss.batch_dice": True}
    config = override_all(CONFIG, {**changes, "optim.micro_batch": 1})
    learner, given = new_learner(config, CPU), batches(config, CASES, (0, 1, 0))
    coming = [Inputs(*augmented(learner, next(given))) for _ in range(3)]
    with Reads() as reads:
        for number, each in enumerate(coming):
            backward(learner, each)
            before = learner.unread
            update(learner)
            if number:  # its first step has no momenta to leave alone
                assert learner.unread is not before
                assert learner.unread is not None
    assert learner.step == 3
    assert reads.lines == {"verdict.py: return bool(verdict.finite)": 3}


PRECISE = {"network.norm": "batch", "optim.ema_decay": 0.7}


@pytest.mark.parametrize(
    "changes",
    [PRECISE, {**PRECISE, "optim.name": "sgd"}, {"optim.precision": "fp16", "optim.name": "sgd"}],
)
def test_a_step_that_the_device_leaves_out_is_as_if_the_host_had(monkeypatch, changes):
    """Weights, averages, momenta and counts are the same bits, whichever steps are not finite."""
    make = learning.new_optimizer
    monkeypatch.setattr(learning, "new_optimizer", lambda *of, **_: make(*of, fused=True))
    config = override_all(CONFIG, changes)

    def trained() -> tuple:
        learner, given = new_learner(config, CPU), batches(config, CASES, (0, 1, 0))
        alone = 0
        for bad in (True, False, True, False, True, True, False, True):
            backward(learner, Inputs(*augmented(learner, next(given))))
            if bad:
                next(learner.bare.parameters()).grad.fill_(torch.nan)
            update(learner)
            alone += learner.unread is not None
        state = copy.deepcopy((learner.weights(), learner.state(), learner.progress()))
        return alone, learner.skipped, learner.skipped_in_a_row, *state

    late = trained()
    monkeypatch.setattr(learning.Learner, "skips_itself", False)
    early = trained()
    assert (late[0], early[0]) == (6, 0)
    assert late[1:3] == early[1:3] == (5, [7])
    assert_close(late[3:], early[3:], rtol=0, atol=0)


def test_a_run_that_diverges_ends_a_step_late_at_most(monkeypatch):
    make = learning.new_optimizer
    monkeypatch.setattr(learning, "new_optimizer", lambda *of, **_: make(*of, fused=True))
    learner, given = (
        new_learner(override_all(CONFIG, {"optim.max_skipped": 3}), CPU),
        batches(CONFIG, CASES, (0, 1, 0)),
    )
    for bad in (False, True, True, True):
        backward(learner, Inputs(*augmented(learner, next(given))))
        if bad:
            next(learner.bare.parameters()).grad.fill_(torch.nan)
        update(learner)
    with pytest.raises(DivergedError, match="in the 3 steps before step 4"):
        settle(learner)


def test_a_validation_reads_a_case_when_the_next_is_given_to_the_device(monkeypatch):
    learner, cases = new_learner(CONFIG, CPU), [uploaded(case, CPU) for case in CASES[:3]]
    order, dice = [], loop.region_dice

    def given():
        for number, case in enumerate(cases):
            order.append(f"give {number}")
            yield case

    def noted(sizes):
        order.append("read")
        return dice(sizes)

    alone = [loop.validate(learner, [case])[0] for case in cases]
    monkeypatch.setattr(loop, "region_dice", noted)
    with Reads() as reads:
        scores = loop.validate(learner, given())
    assert order == ["give 0", "give 1", "read", "give 2", "read", "read"]
    assert reads.lines.total() == 0
    assert scores == alone


@pytest.mark.parametrize("of", ["nnunet", "domain-shift", "everything"])
def test_augmentation_never_waits_for_the_device(of, monkeypatch):
    """There is nothing to read on the meta device: whoever tries to gets an error."""
    monkeypatch.setattr(torch, "Generator", OfACpu)
    config = AugmentConfig(**EVERYTHING) if of == "everything" else recipe(of).augment
    seen = 0
    for batch in batches(CONFIG, CASES, (0, 1, 0)):
        there = batch.to(torch.device("meta"))
        image, brain = normalise(there.image, there.scaling)
        image, labels = augment(config, 0, batch.draw, (image, there.labels, brain))
        assert (image.device.type, labels.device.type) == ("meta", "meta")
        seen += len(batch.draw)
    assert seen == CONFIG.optim.steps * CONFIG.optim.global_batch


@pytest.mark.parametrize(
    ("of", "most"), [("nnunet", 92), ("domain-shift", 176), ("everything", 482)]
)
def test_augmentation_launches_few_kernels(of, most, monkeypatch):
    """Each costs the host about 5 us in the very thread that launches those of the network.

    With one for each modality, where one for all will do, a batch of two took 224, 405 and 1233.
    """
    monkeypatch.setattr(torch, "Generator", OfACpu)
    config = AugmentConfig(**EVERYTHING) if of == "everything" else recipe(of).augment
    shape, count = (2, 128, 128, 128), 50
    image, labels, brain = (
        torch.empty(shape[:1] + more + shape[1:], dtype=kind, device="meta")
        for more, kind in (((4,), torch.float32), ((), torch.uint8), ((1,), torch.bool))
    )
    with Launches() as launches:
        for draw in range(0, 2 * count, 2):
            augment(config, 0, torch.tensor([draw, draw + 1]), (image, labels, brain))
    assert launches.count / count <= most


def test_a_run_keeps_the_losses_of_the_last_figures_only(monkeypatch):
    """A loss of each step for a week would be a leak of the device's memory."""
    kept, figures = [], loop._figures

    def noted(learner, losses, watch):
        kept.append(len(losses))
        return figures(learner, losses, watch)

    monkeypatch.setattr(loop, "_figures", noted)
    monkeypatch.setattr(loop, "LOG_EVERY_STEPS", 5)
    learner = new_learner(CONFIG, CPU)
    hooks = loop.Hooks(lambda: [[0.5] * 3], lambda _: None, lambda *_: None, lambda: None)
    loop.run(learner, batches(CONFIG, CASES, (0, 1, 0)), hooks)
    assert kept == [5, 5, 2]
