"""One draw -> one patch of a prepared case: placed at random, on a grid, a slice, or the whole."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from scipy import ndimage

from raybrats.config import DataConfig, TrainConfig
from raybrats.data.plan import generator
from raybrats.data.prepare import Prepared

Corner = tuple[int, int, int]
Size = tuple[int, int, int]
Row = dict[str, np.ndarray | int]
"""A patch as it travels to a worker, where `collate` makes batches of rows."""

_PLACE, _FORCED = 0, 3
"""Purposes of random numbers: placing a draw's patch, and which of some draws is forced; changing
the patch has 1 and 2."""


@dataclass(frozen=True)
class PatchRule:
    """How the patches of a run are placed."""

    data: DataConfig
    size: Size
    """Extent of every patch, (i, j, k): `DataConfig.patch_size`, or that of `volume_size`."""
    seed: int
    """Seed of the run."""
    classes: tuple[tuple[int, ...], ...] = TrainConfig().classes
    """Labels of each class that patches are centred on."""


def volume_size(boxes: Iterable[tuple[int, ...]], stride: int) -> Size:
    """Least multiple of the network's stride that every case's foreground box fits in.

    Args:
        boxes: first and one-past-last voxel of i, j and k, as `Case.box` has them.
        stride: factor between the finest and the coarsest grid of the network.

    Example:
        >>> volume_size([(0, 33, 5, 20, 0, 16), (2, 22, 0, 30, 1, 9)], stride=16)
        (48, 32, 16)
    """
    edges = np.array([np.reshape(box, (3, 2)) @ (-1, 1) for box in boxes]).max(axis=0)
    i, j, k = (int(-(-edge // stride) * stride) for edge in edges)
    return i, j, k


def draw_patch(
    prepared: Prepared, rule: PatchRule, *, draw: int, case: int, ordinal: int
) -> tuple[np.ndarray, np.ndarray]:
    """The patch of a draw: image int16 (modality, i, j, k) and labels uint8 (i, j, k).

    The draw and the index of its case in the plan seed it; the ordinal, which is the number of the
    case's draws before this one, walks along grids and slices.

    Example:
        >>> from raybrats.data.prepare import prepare
        >>> from raybrats.phantom.phantom import make_phantom
        >>> image, labels = make_phantom(0, shape=(24, 24, 20))
        >>> rule = PatchRule(DataConfig(), size=(16, 16, 16), seed=0)
        >>> draw_patch(prepare(list(image), labels), rule, draw=7, case=0, ordinal=0)[0].shape
        (4, 16, 16, 16)
    """
    sampling, shape = rule.data.sampling, prepared.image.shape[1:]
    if sampling == "slices":
        first = min(rule.data.first_slice, prepared.shape[2] - 1)
        count = min(rule.data.num_slices, prepared.shape[2] - first)
        return cut_slice(prepared, first + _nth(ordinal, count, (rule.seed, case)), rule.size)
    if sampling == "volume":
        corner = _corner(np.subtract(shape, rule.size) // 2)
    elif sampling == "grid":
        corners = covering_grid(shape, rule.size, rule.data.grid_overlap)
        corner = corners[_nth(ordinal, len(corners), (rule.seed, case))]
    else:
        forced = is_forced(draw, rule.data.foreground_share, rule.seed)
        corner = choose_corner(prepared, rule, generator(rule.seed, draw, _PLACE), forced=forced)
    return cut(prepared, corner, rule.size)


def is_forced(draw: int, share: float, seed: int) -> bool:
    """Whether a draw is centred on tumour: with a share of 1/n, one at random of each n in a row.

    So of the two draws of a step with a share of a half it is one, never both or none (nnU-Net
    forces the last `round(share * batch)` patches of every batch), and every rank has both kinds.

    Example:
        >>> [is_forced(draw, 1 / 2, seed=0) for draw in range(6)]
        [False, True, True, False, True, False]
    """
    part = Fraction(share).limit_denominator(10**6)  # a third is one, not the float beside it
    if not part:
        return False
    block = int(draw * part)
    first, end = (math.ceil(number / part) for number in (block, block + 1))
    return draw == first + int(generator(seed, block, _FORCED).integers(end - first))


def choose_corner(
    prepared: Prepared, rule: PatchRule, rng: np.random.Generator, *, forced: bool
) -> Corner:
    """First voxel of a random patch; negative along axes where the case is smaller than it.

    One that is forced is centred on tumour: a class, which is a region or a label, is drawn
    uniformly among those present, then one of its voxels uniformly (nnU-Net); the patch is moved as
    far as needed to stay within the case.

    Example:
        >>> from raybrats.data.prepare import prepare
        >>> whole = prepare([np.arange(64, dtype=np.int16).reshape(4, 4, 4)])
        >>> rule, rng = PatchRule(DataConfig(), (4, 4, 6), 0), np.random.default_rng(0)
        >>> choose_corner(whole, rule, rng, forced=False)
        (0, 0, -1)
    """
    shape = prepared.image.shape[1:]
    room = np.subtract(shape, rule.size)
    low, high = np.minimum(0, room // 2), np.maximum(room, room // 2)
    corner = rng.integers(low, high + 1)
    if forced and prepared.counts[1:].any():
        place = _tumour_voxel(prepared, rule.classes, rng)
        centre = np.unravel_index(place, shape[::-1])[::-1]
        corner = np.clip(np.subtract(centre, np.floor_divide(rule.size, 2)), low, high)
    return _corner(corner)


def covering_grid(shape: tuple[int, ...], size: Size, overlap: float) -> list[Corner]:
    """First voxels of the patches that cover a case, overlapping by this fraction or more.

    Example:
        >>> covering_grid((10, 4, 4), (6, 4, 4), overlap=0.5)
        [(0, 0, 0), (2, 0, 0), (4, 0, 0)]
    """
    axes = []
    for length, edge in zip(shape, size, strict=True):
        room = length - edge
        step = max(1, int(edge * (1 - overlap)))
        count = -(-room // step) + 1 if room > 0 else 1
        axes.append(np.linspace(min(0, room // 2), max(room, room // 2), count).astype(int))
    return [_corner(corner) for corner in np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, 3)]


def cut(prepared: Prepared, corner: Corner, size: Size) -> tuple[np.ndarray, np.ndarray]:
    """Image (modality, i, j, k) and labels (i, j, k) of a patch; background beyond the case.

    Both are views of memory in which i lies closest, like those of the case.

    Example:
        >>> from raybrats.data.prepare import prepare
        >>> whole = prepare([np.arange(64, dtype=np.int16).reshape(4, 4, 4)])
        >>> cut(whole, (-1, 2, 3), (3, 1, 1))[0].ravel().tolist()
        [0, 11, 27]
    """
    shape = prepared.image.shape[1:]
    source = tuple(
        slice(max(c, 0), min(c + s, n)) for c, s, n in zip(corner, size, shape, strict=True)
    )
    target = tuple(slice(p.start - c, p.stop - c) for p, c in zip(source, corner, strict=True))
    image = np.empty((len(prepared.image), *size[::-1]), np.int16).transpose(0, 3, 2, 1)
    labels = np.empty(size[::-1], np.uint8).T
    if any(span.stop - span.start < edge for span, edge in zip(source, size, strict=True)):
        image[:] = prepared.scaling.background[:, None, None, None]
        labels[:] = 0
    image[:, *target] = prepared.image[:, *source]
    labels[target] = 0 if prepared.labels is None else prepared.labels[source]
    return image, labels


def to_row(prepared: Prepared, patch: tuple[np.ndarray, np.ndarray], draw: int) -> Row:
    """The row of a patch: image and labels in memory order, its case's scaling, and its draw.

    Example:
        >>> from raybrats.data.prepare import prepare
        >>> whole = prepare([np.arange(64, dtype=np.int16).reshape(4, 4, 4)])
        >>> list(to_row(whole, cut(whole, (0, 0, 0), (2, 2, 2)), draw=7))
        ['image', 'labels', 'gain', 'bias', 'low', 'high', 'background', 'draw']
    """
    image, labels = patch
    arrays = {"image": image.transpose(0, 3, 2, 1), "labels": labels.T}
    return {**arrays, **vars(prepared.scaling), "draw": draw}


def cut_slice(prepared: Prepared, k: int, size: Size) -> tuple[np.ndarray, np.ndarray]:
    """Slice k of the whole canonical volume, resized to (i, j, 1).

    Voxels are interpolated linearly among those of the brain; the brain and the labels are taken
    from the nearest voxel, so that the edge does not fade into the background.

    Example:
        >>> from raybrats.data.prepare import prepare
        >>> from raybrats.phantom.phantom import make_phantom
        >>> case = prepare(*map(list, make_phantom(0, shape=(24, 24, 20))[:1]))
        >>> cut_slice(case, k=10, size=(32, 32, 1))[0].shape
        (4, 32, 32, 1)
    """
    frame = (*prepared.shape[:2], 1)
    corner = (-prepared.box[0].start, -prepared.box[1].start, k - prepared.box[2].start)
    if not 0 <= corner[2] < prepared.image.shape[3]:  # above or below the head
        image = np.zeros((len(prepared.image), *size), np.int16)
        image[:] = prepared.scaling.background[:, None, None, None]
        return image, np.zeros(size, np.uint8)
    image, labels = cut(prepared, corner, frame)
    factors = (size[0] / frame[0], size[1] / frame[1])

    def resized(plane: np.ndarray, order: int) -> np.ndarray:
        return ndimage.zoom(plane, factors, order=order, mode="nearest", grid_mode=True)

    planes, outside = image[..., 0], prepared.scaling.background[:, None, None]
    brain = (planes != outside).any(axis=0)
    weight = resized(brain.astype(np.float32), 1)
    sums = np.stack([resized(plane.astype(np.float32) * brain, 1) for plane in planes])
    kept = (resized(brain.astype(np.uint8), 0) > 0) & (weight > 0)
    means = np.rint(np.divide(sums, weight, out=np.zeros_like(sums), where=kept))
    small = np.where(kept, means, outside).astype(np.int16)
    return small[..., None], resized(labels[..., 0], 0)[..., None]


def _nth(ordinal: int, count: int, key: tuple[int, ...]) -> int:
    """The nth place of a walk that visits all `count` places before it comes to one again."""
    walk, place = divmod(ordinal, count)
    return int(np.random.default_rng((*key, walk)).permutation(count)[place])


def _tumour_voxel(
    prepared: Prepared, classes: Sequence[tuple[int, ...]], rng: np.random.Generator
) -> int:
    """A voxel of one of the classes that are present, counted along the memory."""
    present = [labels for labels in map(np.array, classes) if prepared.counts[labels].any()]
    labels = present[rng.integers(len(present))]
    counts = prepared.counts[labels]
    label = rng.choice(labels, p=counts / counts.sum())
    end = prepared.counts[1 : label + 1].sum()
    return int(prepared.tumour[end - 1 - rng.integers(prepared.counts[label])])


def _corner(voxels: np.ndarray) -> Corner:
    i, j, k = (int(v) for v in voxels)
    return i, j, k
