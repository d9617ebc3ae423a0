"""What makes a GPU or its host wait, reads and launches, told on a CPU by their operators."""

import traceback
from collections import Counter

import pytest
import torch
from ranks import CASES, CONFIG, CPU, batches
from torch.utils._python_dispatch import TorchDispatchMode

from raybrats.config import AugmentConfig, override_all
from raybrats.data.augment.augment import augment
from raybrats.data.batch import normalise
from raybrats.recipes import recipe
from raybrats.train import learner as learning
from raybrats.train import loop
from raybrats.train.learner import new_learner
from raybrats.train.step import Inputs, augmented, backward, update

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
    """Whether the gradient was finite; the optimiser is that of a GPU."""
    make = learning.new_optimizer
    monkeypatch.setattr(learning, "new_optimizer", lambda *of, **_: make(*of, fused=True))
    changes = {"optim.name": name, "optim.ema_decay": decay, "loss.batch_dice": True}
    config = override_all(CONFIG, {**changes, "optim.micro_batch": 1})
    learner, given = new_learner(config, CPU), batches(config, CASES, (0, 1, 0))
    coming = [Inputs(*augmented(learner, next(given))) for _ in range(3)]
    with Reads() as reads:
        for each in coming:
            backward(learner, each)
            update(learner)
    assert learner.step == 3
    assert reads.lines == {"step.py: if torch.isfinite(norm):": 3}


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

    def noted(learner, losses, pace):
        kept.append(len(losses))
        return figures(learner, losses, pace)

    monkeypatch.setattr(loop, "_figures", noted)
    monkeypatch.setattr(loop, "LOG_EVERY_STEPS", 5)
    learner = new_learner(CONFIG, CPU)
    hooks = loop.Hooks(lambda: [[0.5] * 3], lambda _: None, lambda *_: None, lambda: None)
    loop.run(learner, batches(CONFIG, CASES, (0, 1, 0)), hooks)
    assert kept == [5, 5, 2]
