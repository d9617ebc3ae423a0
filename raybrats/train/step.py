"""One step of a network that learns: batch -> input -> gradient -> weights."""

import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from raybrats.data.augment.augment import augment
from raybrats.data.batch import Batch, normalise
from raybrats.errors import DivergedError
from raybrats.model.network import heads
from raybrats.train.learner import Learner
from raybrats.train.optimizer import learning_rate
from raybrats.train.ranks import world_size
from raybrats.train.verdict import read, sent

PRIORITY = -1
"""Of the stream in which a GPU makes the next batch ready: its kernels are small, and the next step
waits for the last of them, so they go before those of the step that runs."""


class Inputs(NamedTuple):
    """What the network and its loss see of a batch, on the device."""

    image: Tensor
    labels: Tensor
    wait_s: float = 0.0
    """Seconds for which the batch was waited for."""
    ready: torch.cuda.Event | None = None
    """Event after which it is there, if it is made beside the training step."""


def inputs(learner: Learner, batches: Iterable[Batch]) -> Iterator[Inputs]:
    """Batches as network input; on a GPU copied and augmented beside the step that runs.

    Example:
        >>> from raybrats.recipes import tiny
        >>> from raybrats.train.learner import new_learner
        >>> list(inputs(new_learner(tiny(), torch.device("cpu")), batches=[]))
        []
    """
    gpu = learner.device.type == "cuda"
    side = torch.cuda.Stream(learner.device, priority=PRIORITY) if gpu else None
    source = iter(batches)
    while True:
        began = time.perf_counter()
        batch = next(source, None)
        if batch is None:
            return
        wait_s = time.perf_counter() - began
        with torch.cuda.stream(side) if side else nullcontext():
            image, labels = augmented(learner, batch)
            ready = side.record_event() if side else None
        yield Inputs(image, labels, wait_s, ready)


def augmented(learner: Learner, batch: Batch) -> tuple[Tensor, Tensor]:
    """Network input, float32 (batch, modality, i, j, k), and labels (batch, i, j, k).

    Example:
        >>> from raybrats.data.prepare import Scaling
        >>> from raybrats.recipes import tiny
        >>> from raybrats.train.learner import new_learner
        >>> learner = new_learner(tiny(), torch.device("cpu"))
        >>> image, labels = torch.ones(1, 4, 32, 32, 32).short(), torch.zeros(1, 32, 32, 32).byte()
        >>> batch = Batch(image, labels, Scaling(*torch.zeros(5, 1, 4)), torch.tensor([0]))
        >>> [tuple(tensor.shape) for tensor in augmented(learner, batch)]
        [(1, 4, 32, 32, 32), (1, 32, 32, 32)]
    """
    draws, config = batch.draw, learner.config
    batch = batch.to(learner.device)
    image, brain = normalise(batch.image, batch.scaling)
    image, labels = augment(config.augment, config.run.seed, draws, (image, batch.labels, brain))
    return learner.in_memory_format(image), labels


def train_step(learner: Learner, batch: Batch) -> Tensor:
    """The loss of one optimiser step on this rank's batch, still on the device.

    Example:
        >>> from raybrats.data.prepare import Scaling
        >>> from raybrats.recipes import tiny
        >>> from raybrats.train.learner import new_learner
        >>> learner = new_learner(tiny(), torch.device("cpu"))
        >>> image, labels = torch.ones(4, 4, 32, 32, 32).short(), torch.zeros(4, 32, 32, 32).byte()
        >>> batch = Batch(image, labels, Scaling(*torch.zeros(5, 4, 4)), torch.arange(4))
        >>> loss = train_step(learner, batch)
        >>> learner.step, bool(loss > 0)
        (1, True)
    """
    loss = backward(learner, Inputs(*augmented(learner, batch)))
    update(learner)
    return loss


def backward(learner: Learner, coming: Inputs) -> Tensor:
    """The loss of this rank's part of the global batch, with its gradients, in micro-batches.

    Parts of ranks may differ in size: each counts by its patches, so the mean that DDP takes of
    the gradients is that over the global batch.

    Example:
        >>> from raybrats.recipes import tiny
        >>> from raybrats.train.learner import new_learner
        >>> learner = new_learner(tiny(), torch.device("cpu"))
        >>> image, labels = torch.rand(4, 4, 32, 32, 32), torch.ones(4, 32, 32, 32)
        >>> loss = backward(learner, Inputs(image, labels))
        >>> all(weight.grad is not None for weight in learner.bare.parameters())
        True
    """
    learner.network.train()
    learner.optimizer.zero_grad(set_to_none=True)
    world, batch = world_size(), learner.config.optim.global_batch
    most = -(-batch // world)
    pieces = -(-most // (learner.config.optim.micro_batch or most))
    total = torch.zeros((), device=learner.device)
    images, labels = (tensor.tensor_split(pieces) for tensor in coming[:2])
    for number, (image, label) in enumerate(zip(images, labels, strict=True), 1):
        weight = len(image) * world / batch
        if not weight:  # the others have one more: DDP's exchanges must stay in step
            image, label = images[0], labels[0]
        with learner.exchange(on=number == pieces):
            with learner.autocast():
                logits = heads(learner.network(image))
                loss = learner.loss(logits, label, weight=weight, fraction=1 / pieces)
            learner.scaler.scale(loss).backward()
        total += loss.detach()
    return total


def update(learner: Learner) -> None:
    """Takes the optimiser's step; where the gradient is not finite, it is skipped and counted.

    A GPU decides that by itself, and is asked a step later, so that it never waits for the host.

    Raises:
        DivergedError: that happened `optim.max_skipped` times in a row; a GPU's last one may come
            with the next step, or with `settle`.

    Example:
        >>> from raybrats.recipes import tiny
        >>> from raybrats.train.learner import new_learner
        >>> learner = new_learner(tiny(), torch.device("cpu"))
        >>> for weight in learner.bare.parameters():
        ...     weight.grad = torch.full_like(weight, torch.nan)
        >>> update(learner)
        >>> learner.step, learner.skipped
        (1, 1)
    """
    config, optimizer = learner.config.optim, learner.optimizer
    settle(learner)
    learner.scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(learner.bare.parameters(), config.clip_norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, learner.step)
    learner.step += 1
    finite, late = torch.isfinite(norm), learner.skips_itself
    learner.unread = sent(finite)
    if late:
        # torch's protocol of optimisers in one kernel, by which its GradScaler has steps skipped
        optimizer.found_inf = (~finite).float()  # ty: ignore[missing-attribute]
        optimizer.step()
        learner.add_to_average(finite)
    elif read(learner.unread):
        learner.scaler.step(optimizer)
        learner.add_to_average()
    if learner.scaler.is_enabled():
        learner.scaler.update()
    if not late:
        settle(learner)


def settle(learner: Learner) -> None:
    """Waits for what the last step came to, where the host has not read it yet, and counts it.

    Raises:
        DivergedError: as `update`.

    Example:
        >>> from raybrats.recipes import tiny
        >>> from raybrats.train.learner import new_learner
        >>> settle(new_learner(tiny(), torch.device("cpu")))
    """
    learner.settle()
    if len(learner.skipped_in_a_row) >= learner.config.optim.max_skipped:
        raise DivergedError(_diverged(learner))


def take_over(coming: Inputs) -> None:
    """Makes the current stream wait for what another one has made.

    Example:
        >>> take_over(Inputs(torch.zeros(1), torch.zeros(1)))
    """
    if coming.ready is not None:
        stream = torch.cuda.current_stream(coming.image.device)
        stream.wait_event(coming.ready)
        for tensor in coming[:2]:
            tensor.record_stream(stream)


def _diverged(learner: Learner) -> str:
    row, batch = learner.skipped_in_a_row, learner.config.optim.global_batch
    return (
        f"no finite gradient in the {len(row)} steps before step {learner.step}, draws "
        f"{row[0] * batch} to {(row[-1] + 1) * batch - 1}; the last checkpoint is finite: "
        "lower optim.lr or loss weights, or take another optim.precision"
    )
