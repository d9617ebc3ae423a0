"""A run as plain torch, without Ray: steps, validations, checkpoints, and figures of them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor

from raybrats.data.batch import Batch
from raybrats.model.inference import Uploaded, predict_case
from raybrats.model.regions import region_dice, region_sizes
from raybrats.train.learner import Learner
from raybrats.train.optimizer import learning_rate
from raybrats.train.pace import Marks, Watch
from raybrats.train.ranks import world_size
from raybrats.train.step import Inputs, backward, inputs, settle, take_over, update

LOG_EVERY_STEPS = 10
"""Steps between two figures of the training."""


@dataclass(frozen=True)
class Hooks:
    """What a run does besides steps."""

    validate: Callable[[], list[list[float]]]
    """Returns the Dice of each region of each held-out case, of all ranks."""
    log: Callable[[Mapping[str, float]], None]
    """Takes figures of the last steps, or of a validation."""
    save: Callable[[Mapping[str, float], bool], None]
    """Saves the learner with the metrics of a validation, and whether the run ends with it."""
    check_in: Callable[[], None]
    """Runs after every step, and saves at once where that was asked for."""


def run(learner: Learner, batches: Iterable[Batch], hooks: Hooks) -> dict[str, float]:
    """Trains to the end of the run, with its validations and checkpoints.

    Args:
        learner: the learner at the step to go on from.
        batches: the batches of this rank from that step on.
        hooks: what is done besides.

    Returns:
        The metrics of the last validation.

    Raises:
        DivergedError: no step of the last ones had a finite gradient.

    Example:
        >>> from raybrats.recipes import tiny
        >>> from raybrats.train.learner import new_learner
        >>> learner = new_learner(tiny(), torch.device("cpu"))
        >>> learner.step = learner.config.optim.steps  # only the last validation is left to do
        >>> hooks = Hooks(lambda: [[0.75, 0.5, 0.25]], print, lambda *_: None, lambda: None)
        >>> metrics = run(learner, [], hooks)
        {'val/dice_WT': 0.75, 'val/dice_TC': 0.5, 'val/dice_ET': 0.25, 'val/dice_mean': 0.5}
    """
    config, coming = learner.config, None
    feed, watch = inputs(learner, batches), Watch(learner.device, config.optim.global_batch)
    losses: list[Tensor] = []  # of the steps since the last figures, on the device
    while True:
        if _is_due(learner):
            metrics = _validated(learner, hooks) | watch.whole()
            patience, waited = config.validation.patience, learner.validations_since_best
            ended = learner.step >= config.optim.steps or 0 < patience <= waited
            hooks.save(metrics, ended)
            if ended:
                return metrics
            watch.pause()
        loss, coming = _timed_step(learner, coming or next(feed), feed, watch)
        losses.append(loss)
        if learner.step % LOG_EVERY_STEPS == 0 or learner.step == config.optim.steps:
            hooks.log(_figures(learner, losses, watch))
            losses.clear()
        if learner.step % config.run.save_every_steps == 0 and not _is_due(learner):
            hooks.save({}, False)
            watch.pause()
        hooks.check_in()


def validate(learner: Learner, cases: Iterable[Uploaded]) -> list[list[float]]:
    """Dice of each region of each case, segmented whole.

    Of a GPU a case's figures are read when the next one has been given to it, so it goes on.

    Example:
        >>> from raybrats.data.prepare import prepare
        >>> from raybrats.model.inference import uploaded
        >>> from raybrats.phantom.phantom import make_phantom
        >>> from raybrats.recipes import tiny
        >>> from raybrats.train.learner import new_learner
        >>> image, labels = make_phantom(0, shape=(24, 24, 20))
        >>> learner = new_learner(tiny(), torch.device("cpu"))
        >>> (dice,) = validate(learner, [uploaded(prepare(list(image), labels), learner.device)])
        >>> len(dice), 0 <= min(dice) <= max(dice) <= 1
        (3, True)
    """
    network, sizes, scores = learner.validated, [], []
    network.eval()
    for case in cases:
        assert case.labels is not None, "validation cases have labels"
        found = predict_case(network, learner.config, case)[0]
        sizes.append(region_sizes(found, case.labels, learner.config.labels))
        scores += map(region_dice, sizes[-2:-1])
    return scores + [region_dice(last) for last in sizes[-1:]]


def gathered(
    scores: list[list[float]], group: torch.distributed.ProcessGroup | None = None
) -> list[list[float]]:
    """The scores of all ranks in the order of the cases; rank r has cases r, r + world, ...

    Example:
        >>> gathered([[0.9, 0.8, 0.7]])  # one rank alone
        [[0.9, 0.8, 0.7]]
    """
    world = world_size()
    if world == 1:
        return scores
    everyone: list[list[list[float]]] = [[] for _ in range(world)]
    torch.distributed.all_gather_object(everyone, scores, group=group)
    count = sum(map(len, everyone))
    return [everyone[place % world][place // world] for place in range(count)]


def mean_scores(scores: Sequence[Sequence[float]], regions: Sequence[str]) -> dict[str, float]:
    """Mean over cases of each region's Dice, and the unweighted mean of the regions.

    Example:
        >>> mean_scores([[1.0, 0.5, 0.0], [0.5, 0.5, 0.5]], ("WT", "TC", "ET"))
        {'WT': 0.75, 'TC': 0.5, 'ET': 0.25, 'mean': 0.5}
    """
    columns = list(zip(*scores, strict=True))
    means = {r: sum(column) / len(column) for r, column in zip(regions, columns, strict=True)}
    return {**means, "mean": sum(means.values()) / len(means)}


def _is_due(learner: Learner) -> bool:
    """Whether the last step is one that is validated, and has not been yet."""
    step, config = learner.step, learner.config
    due = step % config.validation.every_steps == 0 or step >= config.optim.steps
    return step > 0 and due and learner.validated_at != step


def _validated(learner: Learner, hooks: Hooks) -> dict[str, float]:
    """The Dice of a validation, counted and logged."""
    settle(learner)
    metrics = mean_scores(hooks.validate(), learner.config.labels.region_names)
    learner.add_validation(metrics["mean"])
    hooks.log({f"val/dice_{name}": value for name, value in metrics.items()})
    return metrics


def _timed_step(
    learner: Learner, coming: Inputs, feed: Iterator[Inputs], watch: Watch
) -> tuple[Tensor, Inputs | None]:
    """A step's loss, and the next batch, made ready meanwhile; None after the last step."""
    take_over(coming)
    begin = watch.mark()
    loss, following = backward(learner, coming), None
    gradient = watch.mark()
    if learner.step + 1 < learner.config.optim.steps:
        following = next(feed)
    fetched = watch.mark()
    update(learner)
    marks = Marks(begin, gradient, fetched, watch.mark())
    watch.add(marks, following.wait_s if following else 0.0)
    return loss, following


def _figures(learner: Learner, losses: Sequence[Tensor], watch: Watch) -> dict[str, float]:
    """Mean of the losses over all ranks, the pace, and memory and load of the device."""
    settle(learner)
    every = torch.stack(list(losses))
    loss = every[torch.isfinite(every)].mean()  # not those of steps that were skipped
    world = world_size()
    if world > 1:
        torch.distributed.all_reduce(loss)
    figures = {
        "train/loss": float(loss) / world,
        "train/lr": learning_rate(learner.config.optim, learner.step - 1),
        "train/skipped": learner.skipped,
        **watch.recent(),
        "patches_per_s_overall": watch.whole()["patches_per_s_overall"],
    }
    if learner.device.type == "cuda":
        figures["gpu/memory_gb"] = torch.cuda.max_memory_allocated(learner.device) / 1e9
        with suppress(Exception):  # a container may hide NVIDIA's library, or forbid the question
            figures["gpu/utilisation"] = torch.cuda.utilization(learner.device) / 100
    return figures
