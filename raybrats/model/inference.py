"""Whole cases through one network or several -> labels, probabilities, and how far they agree."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from torch import Tensor, nn

from raybrats.config import TrainConfig
from raybrats.data.batch import normalise
from raybrats.data.prepare import Prepared, prepare, restore
from raybrats.model import decision
from raybrats.model.network import trained_network
from raybrats.model.regions import region_dice, region_sizes
from raybrats.model.windows import Blend, blend_slices, blend_windows

WINDOWS_AT_ONCE = {"cuda": 2}
"""Windows that a kind of device takes together, else one. Nothing of them is kept to go back, so
two need less memory than a patch in training."""
_SLAB = 16
"""Planes that are normalised together, so that what is made on the way stays small."""


@dataclass(frozen=True)
class Uploaded:
    """A prepared case on the device of a network."""

    prepared: Prepared
    image: Tensor
    """Network input, float32 (1, modality, i, j, k)."""
    labels: Tensor | None
    """Labels 0, 1, 2, ... of the case's label set, uint8 (i, j, k)."""


@dataclass(frozen=True)
class Member:
    """A network and its run: a model, or one of those that make it up."""

    network: nn.Module
    config: TrainConfig


@dataclass(frozen=True)
class Segmented:
    """What a model, or several together, say of a case."""

    labels: np.ndarray
    """uint8 (i, j, k): 0, 1, 2, ... of the label set."""
    probabilities: np.ndarray | None = None
    """Of the regions, in the order of the label set, at the model's temperatures: float16 (region,
    i, j, k), 0 outside the brain's box; None where nobody asked."""
    agreement: dict[str, float] | None = None
    """Mean Dice of each region over the pairs of members, 1 where neither has it; None of one."""


def uploaded(prepared: Prepared, device: torch.device) -> Uploaded:
    """A prepared case on a device; copies to a GPU are under way when this returns.

    Example:
        >>> from raybrats.phantom.phantom import make_phantom
        >>> prepared = prepare(*make_phantom(0, shape=(24, 24, 20)))
        >>> uploaded(prepared, torch.device("cpu")).image[0].shape == prepared.image.shape
        True
    """

    def moved(array: np.ndarray) -> Tensor:
        # Cached arrays are read-only maps of a file, which torch does not take: one copy of a case.
        tensor = torch.from_numpy(np.array(array))
        if device.type == "cuda":  # from pageable memory the copy would wait for the device
            tensor = tensor.pin_memory()
        return tensor.to(device, non_blocking=True)

    scaling = prepared.scaling.map(lambda numbers: moved(numbers)[None])
    labels = None if prepared.labels is None else moved(prepared.labels)
    voxels = moved(prepared.image)[None]
    image = torch.empty_like(voxels, dtype=torch.float32)
    for made, slab in zip(image.split(_SLAB, dim=4), voxels.split(_SLAB, dim=4), strict=True):
        made.copy_(normalise(slab, scaling)[0])
    return Uploaded(prepared, image, labels)


@torch.inference_mode()
def predict_case(
    network: nn.Module, config: TrainConfig, case: Uploaded, at_once: int = 0
) -> Tensor:
    """Labels of a case, uint8 (1, i, j, k), by the prediction section of the run.

    Args:
        network: the network.
        config: its run.
        case: the case, on its device.
        at_once: windows that it sees together; 0: as many as that kind of device takes.

    Example:
        >>> from raybrats.phantom.phantom import make_phantom
        >>> from raybrats.recipes import tiny
        >>> prepared = prepare(*make_phantom(0, shape=(24, 24, 20)))
        >>> network, case = nn.Conv3d(4, 3, kernel_size=1), uploaded(prepared, torch.device("cpu"))
        >>> predict_case(network, tiny(), case)[0].shape == prepared.image.shape[1:]
        True
    """
    return decision.decided(config, _blend(network, config, case, at_once))


def _blend(network: nn.Module, config: TrainConfig, case: Uploaded, at_once: int = 0) -> Blend:
    """The network sees pieces as in training: patches, slices, or the whole case."""
    if config.data.sampling == "slices":
        return blend_slices(network, case.image, config, case.prepared)
    at_once = at_once or WINDOWS_AT_ONCE.get(case.image.device.type, 1)
    return blend_windows(network, case.image, config, at_once)


@torch.inference_mode()
def segment_prepared(
    members: Sequence[Member], prepared: Prepared, *, probabilities: bool = False
) -> Segmented:
    """What a model says of a prepared case, in the canonical volume that it was cropped from.

    Several members' probabilities are averaged; thresholds, other rules and temperatures are those
    of the first. Each has its own windows.

    Memory, a voxel of the brain's box, with M modalities, O outputs, N members and R regions: the
    prepared case 2 M bytes, its copy 2 M, the input 4 M, sums 4 (O + 1), labels 1 + N, and where
    N > 1 the mean 4 O, with probabilities 2 R; and a voxel of the volume 1 + 2 R for what returns.

    Raises:
        DataError: the case is prepared otherwise than the members' cases were.

    Example:
        >>> from raybrats.phantom.phantom import make_phantom
        >>> from raybrats.recipes import tiny
        >>> prepared = prepare(*make_phantom(0, shape=(24, 24, 20)))
        >>> members = [Member(nn.Conv3d(4, 3, kernel_size=1), tiny()) for _ in range(2)]
        >>> found = segment_prepared(members, prepared, probabilities=True)
        >>> found.labels.shape, found.probabilities.shape, list(found.agreement)
        ((24, 24, 20), (3, 24, 24, 20), ['WT', 'TC', 'ET'])
    """
    device, config = _device(members[0].network), members[0].config
    case = uploaded(prepared, device)
    if len(members) == 1 and not probabilities:
        labels = predict_case(members[0].network, config, case)
        return Segmented(restore(labels[0].cpu().numpy(), prepared))
    mean, said = _mean(members, case)
    together = decision.decided_together(config, mean) if len(members) > 1 else said[0]
    made = None
    if probabilities:
        made = _restored(decision.of_regions(config, mean).cpu().numpy(), prepared)
    labels = restore(together[0].cpu().numpy(), prepared)
    return Segmented(labels, made, _agreement(config, said))


def _mean(members: Sequence[Member], case: Uploaded) -> tuple[Tensor, list[Tensor]]:
    """The mean probabilities of the members' outputs, and the labels that each would give."""
    mean, said = torch.zeros(()), []
    for member in _on_device(members, case.image.device):
        blend = _blend(member.network, member.config, case)
        said.append(decision.decided(member.config, blend))
        found = decision.probabilities(member.config, blend)
        mean = mean.add_(found.to(mean.device)) if said[1:] else found
        del blend, found
    return mean.div_(len(said)), said


def _on_device(members: Sequence[Member], device: torch.device) -> Iterator[Member]:
    """The members one after the other, each on the device; where not all fit, only for its turn."""
    for member in members:
        home = _device(member.network)
        member.network.to(device)
        yield member
        member.network.to(home)


def members_of(
    configs: Sequence[TrainConfig], weights: Sequence[Mapping[str, Tensor]]
) -> tuple[Member, ...]:
    """Networks with their weights, on the GPU if there is one.

    The first is there always, others as long as they take half of what is free at most; those that
    are left are on the host, and go to the GPU one at a time.

    Raises:
        CheckpointError: weights are those of another network.

    Example:
        >>> from raybrats.model.network import network_of, weights_of
        >>> from raybrats.recipes import tiny
        >>> (member,) = members_of([tiny()], [weights_of(network_of(tiny()))])
        >>> member.network.training
        False
    """
    made: list[Member] = []
    for config, each in zip(configs, weights, strict=True):
        size = sum(tensor.nbytes for tensor in each.values())
        room = not made or not torch.cuda.is_available() or size < torch.cuda.mem_get_info()[0] / 2
        made.append(Member(trained_network(config, each, "" if room else "cpu"), config))
    return tuple(made)


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


def _agreement(config: TrainConfig, said: Sequence[Tensor]) -> dict[str, float] | None:
    """Mean Dice of each region over the pairs of label maps; None of one."""
    if len(said) == 1:
        return None
    known = config.labels
    pairs = [region_dice(region_sizes(a, b, known)) for a, b in combinations(said, 2)]
    means = np.mean(pairs, axis=0).tolist()
    return dict(zip(known.region_names, means, strict=True))


def _restored(probabilities: np.ndarray, prepared: Prepared) -> np.ndarray:
    return np.stack([restore(region, prepared) for region in probabilities])


def prepared_for(config: TrainConfig, image: np.ndarray) -> Prepared:
    """A raw case (modality, i, j, k) in the orientation of BraTS, LPS, as a network takes it.

    Raises:
        DataError: the image is all background.

    Example:
        >>> from raybrats.phantom.phantom import make_phantom
        >>> from raybrats.recipes import tiny
        >>> prepared_for(tiny(), make_phantom(0, shape=(24, 24, 20))[0]).shape
        (24, 24, 20)
    """
    return prepare(list(image), None, config.data.normalisation, config.data.percentiles)


def segment(network: nn.Module, config: TrainConfig, image: np.ndarray) -> np.ndarray:
    """Labels uint8 (i, j, k) of a raw case (modality, i, j, k) in the orientation of BraTS, LPS.

    Values are 1, 2, ... for the labels of its set, which for glioma are those of BraTS 2023.

    Raises:
        DataError: the image is all background.

    Example:
        >>> from raybrats.phantom.phantom import make_phantom
        >>> from raybrats.recipes import tiny
        >>> image, _ = make_phantom(0, shape=(24, 24, 20))
        >>> segment(nn.Conv3d(4, 3, kernel_size=1), tiny(), image).shape
        (24, 24, 20)
    """
    return segment_prepared([Member(network, config)], prepared_for(config, image)).labels
