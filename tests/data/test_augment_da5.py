"""What nnU-Net's trainer DA5 adds to augmentation: each does what SciPy does, and no more."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import laplace, median_filter
from scipy.stats import norm

from raybrats.config import AugmentConfig
from raybrats.data.augment.augment import apply_changes, augment
from raybrats.data.augment.axes import turned
from raybrats.data.augment.change import Change, draw_change
from raybrats.data.augment.intensity import bend, gaussian
from raybrats.data.augment.local import bend_locally, blank, bump, median, sharpen, shine
from raybrats.data.augment.resample import Warp, sampling_grid
from raybrats.recipes import domain_shift

SEED = 3
CPU = torch.device("cpu")
NEVER = AugmentConfig(**dict.fromkeys(AugmentConfig.CHANGES, 0))
DA5 = domain_shift().augment
SHAPES = [(17, 12, 9), (16, 12, 1), (1, 9, 11)]
places = st.tuples(st.tuples(*[st.floats(-0.5, 1.5)] * 3), st.tuples(*[st.floats(1 / 6, 1)] * 3))


def noise(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ball(shape: tuple[int, ...]) -> torch.Tensor:
    """A brain that leaves the corners of the patch free."""
    grids = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in shape), indexing="ij")
    return sum(grid**2 for grid in grids) < 1.3


def changed(change: Change, image: torch.Tensor, labels: torch.Tensor, brain: torch.Tensor):
    """One sample changed: image (modality, i, j, k), labels and brain (i, j, k)."""
    image, labels = apply_changes([change], image[None], labels[None], brain[None, None])
    return image[0], labels[0]


def drawn(count: int = 3000, **fields: object) -> list[Change]:
    return [draw_change(replace(DA5, **fields), SEED, draw, 4) for draw in range(count)]


@pytest.mark.parametrize("size", range(2, 8))
@pytest.mark.parametrize("shape", SHAPES)
def test_the_median_is_scipys(shape, size: int):
    before = noise(shape)
    after = before.clone()
    median(after, ball(shape), size)
    window = [size if n > 1 else 1 for n in shape]
    assert np.array_equal(after, median_filter(before.numpy(), window, mode="nearest"))


@given(strength=st.floats(0.1, 1), shape=st.sampled_from(SHAPES))
@settings(max_examples=20)
def test_sharpening_takes_away_scipys_laplacian(strength: float, shape):
    before = noise(shape)
    after = before.clone()
    sharpen(after, ball(shape), strength)
    expected = before.numpy() - strength * laplace(before.numpy(), mode="nearest")
    assert np.allclose(after, expected, atol=1e-5)


@given(place=places, shape=st.sampled_from([(32, 32, 32), (48, 24, 1)]))
@settings(max_examples=30)
def test_a_bump_is_a_gaussian_from_0_to_1(place, shape):
    """nnU-Net integrates it over each voxel, which at these deviations is its value there."""
    found = bump(place, shape, CPU).numpy()
    rows = [
        np.diff(norm.cdf(np.arange(n + 1), loc=centre * n, scale=deviation * n))
        for n, centre, deviation in zip(shape, *place, strict=True)
    ]
    expected = np.einsum("i,j,k->ijk", *rows)
    expected -= expected.min()
    assert (found.min(), found.max()) == (0, 1)
    assert np.allclose(found, expected / expected.max(), atol=0.01)


@given(place=places, height=st.floats(-5, 5))
@settings(max_examples=20)
def test_a_gradient_reaches_its_height_and_adds_nothing_elsewhere(place, height: float):
    before = noise((16, 12, 8))
    after = before.clone()
    shine(after, ball((16, 12, 8)), (height, place))
    added = (after - before) * (1 if height > 0 else -1)
    assert added.max().item() == pytest.approx(abs(height), abs=1e-5)
    assert added.min().item() == pytest.approx(0, abs=1e-5)


@given(place=places, gamma=st.one_of(st.floats(0.01, 0.8), st.floats(1.5, 4)))
@settings(max_examples=20)
def test_a_local_gamma_lies_between_nothing_and_the_gamma(place, gamma: float):
    shape = (16, 12, 8)
    before, brain, weight = noise(shape), ball(shape), bump(place, shape, CPU)
    local, whole = before.clone(), before.clone()
    bend_locally(local, brain, (gamma, place))
    bend(whole[None], brain, [gamma])
    assert torch.equal(local[weight == 0], before[weight == 0])
    assert torch.equal(local[weight == 1], whole[weight == 1])
    share = (local - before)[brain], (whole - before)[brain] * weight[brain]
    assert torch.allclose(*share, atol=1e-5)
    assert before[brain].min() - 1e-5 <= local[brain].min()
    assert local[brain].max() <= before[brain].max() + 1e-5


@given(
    edges=st.tuples(*[st.floats(0.1, 1 / 3)] * 3),
    room=st.tuples(*[st.floats(0, 1, exclude_max=True)] * 3),
)
@settings(max_examples=30)
def test_a_rectangle_has_its_edges_and_the_mean_of_its_brain(edges, room):
    shape = (32, 24, 12)
    before, brain = noise(shape), ball(shape)
    whole, after = before.clone(), before.clone()
    blank(whole, torch.ones(shape) > 0, [(edges, room)])
    blank(after, brain, [(edges, room)])
    touched = (whole != before).nonzero()
    first, last = touched.amin(0), touched.amax(0)
    assert (last - first + 1).tolist() == [int(e * n) for e, n in zip(edges, shape, strict=True)]
    assert len(touched) == (last - first + 1).prod()
    box = tuple(slice(a, b + 1) for a, b in zip(first.tolist(), last.tolist(), strict=True))
    inside = before[box][brain[box]]
    assert after[box].unique().numel() == 1
    assert torch.equal(after[whole == before], before[whole == before])
    if len(inside):
        assert after[box].mean().item() == pytest.approx(inside.mean().item(), abs=1e-5)


def test_every_place_of_a_rectangle_is_as_likely():
    before, firsts = noise((12, 1, 1)), []
    for number in range(100):
        after = before.clone()
        blank(after, after > -9, [((0.25, 1.0, 1.0), ((number + 0.5) / 100, 0.5, 0.5))])
        firsts.append(int((after != before).nonzero()[0, 0]))
    assert [firsts.count(first) for first in range(12)] == [10] * 10 + [0] * 2


def test_contrast_may_leave_the_range():
    image, brain = noise((1, 16, 16, 16)), ball((16, 16, 16))
    change = Change(contrast=(2.0,), contrast_keeps_range=False)
    after, _ = changed(change, image, brain.byte(), brain)
    before, after = image[0][brain], after[0][brain]
    assert after.mean().item() == pytest.approx(before.mean().item(), abs=1e-5)
    assert after.std().item() == pytest.approx(2 * before.std().item(), rel=1e-5)


def test_added_brightness_moves_the_brain_alone():
    image, brain = noise((2, 16, 16, 16)), ball((16, 16, 16))
    after, _ = changed(Change(brightness_added=(0.7, None)), image, brain.byte(), brain)
    assert torch.allclose(after[0], (image[0] + 0.7) * brain)
    assert torch.equal(after[1], image[1] * brain)


def test_noise_after_the_blur_is_not_blurred():
    brain = torch.ones(24, 24, 24) > 0
    same, next_one = gaussian(2**0.5)[:2]  # of what is blurred twice by 1
    for first, correlation in ((True, next_one / same), (False, 0.0)):
        change = Change(noise=((1.0, 5),), blur=((1.0,) * 3,), noise_before_blur=first)
        after, _ = changed(change, torch.zeros(1, 24, 24, 24), brain.byte(), brain)
        pairs = torch.stack([after[0, 1:].flatten(), after[0, :-1].flatten()])
        assert torch.corrcoef(pairs)[0, 1].item() == pytest.approx(correlation, abs=0.05)


@pytest.mark.parametrize("operation", ["rotate90", "transpose"])
@pytest.mark.parametrize(
    "shape", [(12, 12, 12), (12, 12, 7), (7, 12, 12), (12, 7, 12), (12, 12, 1)]
)
def test_exchanged_axes_have_equal_edges_and_take_the_labels_along(operation: str, shape):
    labels = torch.arange(np.prod(shape) % 251, np.prod(shape) + np.prod(shape) % 251) % 256
    labels = labels.to(torch.uint8).view(shape)
    brain, config = torch.ones(shape) > 0, replace(NEVER, **{operation: 1.0})
    odd = [axis for axis, n in enumerate(shape) if shape.count(n) == 1]
    seen = set()
    for draw in range(60):
        change = draw_change(config, SEED, draw, 1)
        image, moved = changed(change, labels[None].float(), labels, brain)
        assert torch.equal(image[0], moved.float())
        assert torch.equal(moved.flatten().sort().values, labels.flatten().sort().values)
        for axis in odd:
            planes = [part.movedim(axis, 0).flatten(1).sort().values for part in (moved, labels)]
            assert torch.equal(*planes)
        seen.add(moved.numpy().tobytes())
    ways = {("rotate90", 0): 9, ("rotate90", 1): 3, ("transpose", 0): 5, ("transpose", 1): 2}
    assert len(seen) == ways[operation, len(odd)]


def test_edges_that_all_differ_stay_where_they_are():
    image, brain = noise((2, 12, 10, 8)), ball((12, 10, 8))
    for draw in range(20):
        change = draw_change(replace(NEVER, rotate90=1, transpose=1), SEED, draw, 2)
        after, labels = changed(change, image, brain.byte(), brain)
        assert torch.equal(after, image * brain)
        assert torch.equal(labels, brain.byte())


@pytest.mark.parametrize("quarters", [1, 2, 3])
@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_a_turn_and_the_rest_of_it_are_none(quarters: int, axes):
    patch = noise((2, 6, 6, 6))
    there = turned(patch, quarters, axes)
    assert not torch.equal(there, patch)
    assert torch.equal(turned(there, 4 - quarters, axes), patch)


@given(angles=st.tuples(*[st.floats(-180, 180)] * 3), scales=st.tuples(*[st.floats(0.5, 2)] * 3))
@settings(max_examples=20)
def test_each_axis_may_have_a_scale_of_its_own(angles, scales):
    shape = (9, 6, 4)
    grid = sampling_grid(Warp(angles, scales), shape, CPU)
    there = grid.flip(-1) * torch.tensor(shape) / 2  # in voxels from the centre
    for axis, scale in enumerate(scales):
        steps = there.diff(dim=axis).norm(dim=-1)
        assert torch.allclose(steps, torch.tensor(scale), atol=1e-4)


def test_a_patch_has_blur_or_median():
    changes = drawn(blur=0.3, median=0.2, blur_per_modality=1.0, local_per_modality=1.0)
    assert not any(c.blur and c.median for c in changes)
    assert np.mean([bool(c.blur) for c in changes]) == pytest.approx(0.3, abs=0.03)
    assert np.mean([bool(c.median) for c in changes]) == pytest.approx(0.2, abs=0.03)


def test_changes_happen_as_often_as_the_recipe_says():
    changes = drawn()
    for name in (
        *("noise", "blur", "median", "brightness", "brightness_added", "contrast"),
        *("low_resolution", "inverted_gamma", "gamma", "blank_rectangles", "brightness_gradient"),
        *("local_gamma", "sharpening", "rotate90", "transpose"),
    ):
        fraction = np.mean([bool(getattr(c, name)) for c in changes])
        assert fraction == pytest.approx(getattr(DA5, name), abs=0.03), name
    for name in ("blank_rectangles", "brightness_gradient", "local_gamma", "contrast"):
        kept = [value is not None for c in changes for value in getattr(c, name)]
        assert np.mean(kept) == pytest.approx(0.5, abs=0.03), name
    kept = [c.contrast_keeps_range for c in changes if c.contrast]
    assert np.mean(kept) == pytest.approx(0.5, abs=0.06)
    about = [[angle != 0 for angle in (c.warp or Warp()).angles_degrees] for c in changes]
    assert np.mean(about) == pytest.approx(0.2, abs=0.02)


def test_changes_go_as_far_as_the_recipe_says():
    changes = drawn(600, **dict.fromkeys(AugmentConfig.CHANGES, 1.0))

    def values(name: str) -> np.ndarray:
        return np.array([v for c in changes for v in getattr(c, name) if v is not None])

    for name, (low, high) in (
        ("median", DA5.median_size_voxels),
        ("contrast", DA5.contrast_range),
        ("sharpening", DA5.sharpening_range),
        ("low_resolution", DA5.low_resolution_range),
    ):
        room = (high - low) / 20
        assert low <= values(name).min() < low + room < high - room < values(name).max() <= high
    assert set(values("median")) == set(range(2, 8))
    assert values("brightness_added").std() == pytest.approx(0.5, rel=0.1)
    assert abs(values("brightness_added").mean()) < 0.05
    sigmas = values("blur")
    assert (sigmas == sigmas[:, :1]).all()
    assert 0.3 <= sigmas.min() < 0.35 < 1.45 < sigmas.max() <= 1.5
    scales = np.array([c.warp.scale for c in changes])
    assert 0.7 <= scales.min() < 0.72 < 1.41 < scales.max() <= 1.43
    assert abs(np.corrcoef(scales.T)[0, 1]) < 0.15


def test_bumps_and_rectangles_go_as_far_as_they_should():
    changes = drawn(600, **dict.fromkeys(AugmentConfig.CHANGES, 1.0))
    gradients = [v for c in changes for v in c.brightness_gradient if v is not None]
    gammas = [v for c in changes for v in c.local_gamma if v is not None]
    heights = np.array([height for height, _ in gradients])
    assert 1 <= abs(heights).min() < 1.1 < 4.9 < abs(heights).max() <= 5
    assert np.mean(heights > 0) == pytest.approx(0.5, abs=0.06)
    exponents = np.array([gamma for gamma, _ in gammas])
    below, above = exponents[exponents < 1], exponents[exponents > 1]
    assert len(below) / len(exponents) == pytest.approx(0.5, abs=0.06)
    assert 0.01 <= below.min() < 0.03 < 0.78 < below.max() <= 0.8
    assert 1.5 <= above.min() < 1.55 < 3.95 < above.max() <= 4
    centres, deviations = np.moveaxis([place for _, place in gradients + gammas], 1, 0)
    assert -0.5 <= centres.min() < -0.48 < 1.48 < centres.max() <= 1.5
    assert 1 / 6 <= deviations.min() < 0.17 < 0.99 < deviations.max() <= 1
    assert np.median(deviations) == pytest.approx(6**-0.5, rel=0.05)
    boxes = [v for c in changes for v in c.blank_rectangles if v is not None]
    assert {len(each) for each in boxes} == {1, 2, 3, 4}
    edges = np.array([box[0] for each in boxes for box in each])
    assert 0.1 <= edges.min() < 0.11 < 0.32 < edges.max() <= 1 / 3


def test_the_same_draw_is_the_same_batch_and_every_change_leaves_the_background():
    brain = ball((24, 24, 24))[None, None].expand(3, 1, 24, 24, 24)
    image, labels = noise((3, 4, 24, 24, 24)) * brain, brain[:, 0].to(torch.uint8)
    batch, draws = (image, labels, brain), torch.tensor([4, 5, 6])
    for config in (DA5, replace(DA5, **dict.fromkeys(AugmentConfig.CHANGES, 1.0))):
        first, again = (augment(config, SEED, draws, batch) for _ in range(2))
        assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
        assert torch.isfinite(first[0]).all()
        assert not (first[0] * (first[1] == 0)[:, None]).any()
