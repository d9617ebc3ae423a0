"""Steps and validation as plain torch: runs without Ray, in a notebook or on a bare GPU machine."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raybrats.config import OptimConfig, TrainConfig
from raybrats.data.augment import augment
from raybrats.data.batch import Batch, normalise
from raybrats.data.prepare import Prepared
from raybrats.model.inference import labels_of, predict_case
from raybrats.model.loss import RegionLoss
from raybrats.model.metrics import region_dice
from raybrats.model.network import build, heads, load_weights


@dataclass
class Learner:
    """A network while it learns."""

    config: TrainConfig
    device: torch.device
    network: nn.Module
    """Called in training; a DDP wrapper where there are several workers."""
    bare: nn.Module
    """The same network without a wrapper: its weights, and validation."""
    optimizer: torch.optim.Optimizer
    loss: RegionLoss
    step: int = 0

    def state(self) -> dict[str, Any]:
        """Everything but the weights that resuming needs."""
        return {"optimizer": self.optimizer.state_dict(), "torch_rng": torch.get_rng_state()}

    def restore(self, weights: dict[str, Tensor], state: dict[str, Any], step: int) -> None:
        """Continues from a checkpoint."""
        load_weights(self.bare, weights)
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["torch_rng"])
        self.step = step


def new_learner(config: TrainConfig, device: torch.device) -> Learner:
    """A learner at step 0; its initial weights follow from the seed."""
    torch.manual_seed(config.run.seed)
    network = build(config.network, len(config.data.modalities), config.spatial_dims).to(device)
    optimizer = _optimizer(config.optim, network)
    return Learner(config, device, network, network, optimizer, RegionLoss(config.loss))


def train_step(learner: Learner, batch: Batch) -> Tensor:
    """One optimiser step on this rank's batch; returns the loss, still on the device."""
    config = learner.config
    draws = batch.draw
    batch = batch.to(learner.device)
    image, brain = normalise(batch)
    image, labels = augment(config.augment, config.run.seed, draws, (image, batch.labels, brain))
    learner.network.train()
    with torch.autocast(learner.device.type, torch.bfloat16, config.optim.precision == "bf16"):
        loss = learner.loss(heads(learner.network(image)), labels)
    learner.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(learner.bare.parameters(), config.optim.clip_norm)
    for group in learner.optimizer.param_groups:
        group["lr"] = learning_rate(config.optim, learner.step)
    learner.optimizer.step()
    learner.step += 1
    return loss.detach()


def validate(learner: Learner, cases: Iterable[Prepared]) -> list[list[float]]:
    """Dice of each region of each case, segmented whole."""
    config, scores = learner.config, []
    learner.bare.eval()
    for prepared in cases:
        assert prepared.labels is not None, "validation cases have labels"
        with torch.autocast(learner.device.type, torch.bfloat16, config.optim.precision == "bf16"):
            regions = predict_case(learner.bare, config, prepared, learner.device)
        prediction = labels_of(regions)[0].cpu().numpy()
        scores.append(region_dice(prediction, prepared.labels))
    return scores


def mean_scores(scores: Sequence[Sequence[float]], regions: Sequence[str]) -> dict[str, float]:
    """Mean over cases of each region's Dice, and the unweighted mean of the regions."""
    columns = list(zip(*scores, strict=True))
    means = {r: sum(column) / len(column) for r, column in zip(regions, columns, strict=True)}
    return {**means, "mean": sum(means.values()) / len(means)}


def learning_rate(config: OptimConfig, step: int) -> float:
    """Polynomial decay from `lr` towards 0 at the last step."""
    return config.lr * (1 - step / config.steps) ** config.poly_power


def _optimizer(config: OptimConfig, network: nn.Module) -> torch.optim.Optimizer:
    if config.name == "sgd":
        return torch.optim.SGD(
            network.parameters(),
            config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=True,
        )
    return torch.optim.AdamW(network.parameters(), config.lr, weight_decay=config.weight_decay)
