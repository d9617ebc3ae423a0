"""Augmentation: a draw decides its own changes, labels follow, the background stays."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raybrats.config import AugmentConfig, TrainConfig, override
from raybrats.data.augment import augment as augmentation
from raybrats.data.augment.augment import apply_changes, augment
from raybrats.data.augment.change import Change, draw_change
from raybrats.data.augment.intensity import bias_fields, gaussian
from raybrats.data.augment.resample import Warp, sampling_grid
from raybrats.data.batch import collate, normalise
from raybrats.data.patch import cut, to_row
from raybrats.data.prepare import prepare
from raybrats.errors import UsageError
from raybrats.phantom.phantom import make_phantom
from raybrats.recipes import domain_shift

SIZE = (16, 16, 16)
SEED = 5
CPU = torch.device("cpu")
NEVER = AugmentConfig(**dict.fromkeys(AugmentConfig.CHANGES, 0))
ALWAYS = AugmentConfig(**dict.fromkeys(AugmentConfig.CHANGES, 1))
Samples = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def make_samples(size: tuple[int, int, int], count: int = 4) -> Samples:
    """Normalised patches of phantoms, some reaching beyond the head: image, labels, brain."""
    parts = []
    for index in range(count):
        whole, labels = make_phantom(index, shape=(24, 24, 20))
        inside = (whole != 0).any(axis=0)
        values = whole[:, inside].astype(np.float32)
        image = np.zeros(whole.shape, np.float32)
        image[:, inside] = (values - values.mean(1, keepdims=True)) / values.std(1, keepdims=True)
        first = [10 if n == 1 else 2 + index for n in size]
        box = tuple(slice(f, f + n) for f, n in zip(first, size, strict=True))
        for part in (image, labels, inside[None]):
            padded = np.pad(part, [(0, 0)] * (part.ndim - 3) + [(0, 32)] * 3)
            parts.append(torch.from_numpy(padded[..., *box].copy()))
    return tuple(torch.stack(parts[n::3]) for n in range(3))


@pytest.fixture(scope="module")
def samples() -> Samples:
    return make_samples(SIZE)


@pytest.fixture(scope="module")
def smooth() -> Samples:
    """One sample with brain everywhere, unequal edges, smooth values and four labels."""
    i, j, k = torch.meshgrid(*(torch.linspace(0, 3, n) for n in (24, 16, 12)), indexing="ij")
    image = torch.stack([torch.sin(i + 0.3 * j) + 0.2 * k, torch.cos(j) * i])[None]
    labels = ((i > 1).int() + (j > 1).int() + (k > 1.5).int()).to(torch.uint8)[None]
    return image, labels, torch.ones(1, 1, 24, 16, 12, dtype=torch.bool)


def changed(change: Change, samples: Samples) -> tuple[torch.Tensor, torch.Tensor]:
    return apply_changes([change] * len(samples[0]), *samples)


def only(operation: str) -> AugmentConfig:
    return replace(NEVER, **{operation: 1})


def test_normalising_on_the_device_is_numpys_zscore():
    rows = []
    for index in range(4):
        prepared = prepare(list(make_phantom(index, shape=(24, 24, 20))[0]))
        rows.append(to_row(prepared, cut(prepared, (index, 0, 1), SIZE), index))
    batch = collate(rows)
    image, brain = normalise(batch.image, batch.scaling)
    for index in range(4):
        whole, _ = make_phantom(index, shape=(24, 24, 20))
        inside = (whole != 0).any(axis=0)
        values = whole[:, inside].astype(np.float64)
        mean, std = values.mean(axis=1), values.std(axis=1)
        expected = (whole - mean[:, None, None, None]) / std[:, None, None, None] * inside
        first = [
            span.start + corner
            for span, corner in zip(prepare(list(whole)).box, (index, 0, 1), strict=True)
        ]
        padded = np.pad(expected, ((0, 0), *[(0, 16)] * 3))
        box = tuple(slice(f, f + n) for f, n in zip(first, SIZE, strict=True))
        within = np.pad(inside, ((0, 16),) * 3)[box]
        assert image.dtype == torch.float32
        assert np.allclose(image[index].numpy(), padded[:, *box], atol=1e-4)
        assert np.array_equal(brain[index, 0].numpy(), within)


def test_a_draw_is_changed_alike_whatever_else_is_in_the_batch(samples):
    draws = torch.tensor([40, 41, 42, 43])
    mixed = AugmentConfig(elastic=0.5, bias_field=0.5, drop_modality=0.5)
    for config in (ALWAYS, mixed, domain_shift().augment):
        together = augment(config, SEED, draws, samples)
        for order in ([2], [3, 0], [1, 3, 2, 0]):
            parts = augment(config, SEED, draws[order], tuple(part[order] for part in samples))
            for whole, part in zip(together, parts, strict=True):
                assert torch.equal(part, whole[order])


@pytest.mark.parametrize("size", [(15, 13, 11), (40, 36, 33)])
def test_the_same_holds_for_any_extent(size):
    draws, few = torch.tensor([7, 8, 9]), make_samples(size, count=3)
    together = augment(ALWAYS, SEED, draws, few)
    for n in range(3):
        alone = augment(ALWAYS, SEED, draws[n : n + 1], tuple(part[n : n + 1] for part in few))
        assert torch.equal(alone[0], together[0][n : n + 1])
        assert torch.equal(alone[1], together[1][n : n + 1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_the_host_never_waits_and_bits_do_not_depend_on_the_batch(samples):
    draws, batch = torch.arange(4), tuple(part.cuda() for part in samples)
    together = augment(ALWAYS, SEED, draws, batch)
    try:
        torch.cuda.set_sync_debug_mode("error")
        augment(ALWAYS, SEED, draws, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for order in ([2], [1, 3, 2, 0]):
        parts = augment(ALWAYS, SEED, draws[order], tuple(part[order] for part in batch))
        assert torch.equal(parts[0], together[0][order])
        assert torch.equal(parts[1], together[1][order])


@pytest.mark.parametrize("size", [SIZE, (15, 13, 11), (16, 12, 1)])
def test_modalities_are_changed_together_as_each_alone(monkeypatch, size):
    """The neighbours of a GPU, on a CPU: there too, what is next to a modality changes no bit."""
    runs, draws, batch = augmentation._runs, torch.arange(4), make_samples(size)
    configs = (ALWAYS, replace(ALWAYS, gamma_keeps="range", contrast_keeps_range=0.5))
    alone = [augment(config, SEED, draws, batch) for config in configs]
    monkeypatch.setattr(augmentation, "_runs", lambda values, _: runs(values, torch.device("meta")))
    assert list(augmentation._runs((1, 2, None, 3), CPU)) == [slice(0, 2), slice(3, 4)]
    for config, before in zip(configs, alone, strict=True):
        for together, single in zip(augment(config, SEED, draws, batch), before, strict=True):
            assert torch.equal(together, single)


@pytest.mark.parametrize("operation", [name for name in AugmentConfig.CHANGES if name != "mirror"])
def test_other_draws_and_seeds_are_changed_otherwise(samples, operation: str):
    one = tuple(part[:1].expand(12, *part.shape[1:]) for part in samples)
    images, _ = augment(only(operation), SEED, torch.arange(12), one)
    other, _ = augment(only(operation), SEED + 1, torch.arange(12), one)
    assert not all(torch.equal(images[0], image) for image in images[1:])
    assert not torch.equal(images, other)
    differing = sum(not torch.equal(image, samples[0][0]) for image in images)
    assert differing > 6  # a rectangle may lie beside the brain


@pytest.mark.parametrize("operation", AugmentConfig.CHANGES)
def test_no_operation_reaches_beyond_the_brain_or_makes_labels(samples, operation: str):
    images, labels = augment(only(operation), SEED, torch.arange(4), samples)
    # The brain itself moved: it travels as the labels of a batch of its own.
    masks = samples[2][:, 0].to(torch.uint8)
    _, brains = augment(only(operation), SEED, torch.arange(4), (samples[0], masks, samples[2]))
    assert images.shape == samples[0].shape
    assert images.dtype == torch.float32
    assert torch.isfinite(images).all()
    assert not images[(brains == 0)[:, None].expand_as(images)].any()
    assert labels.dtype == samples[1].dtype
    for label, before in zip(labels, samples[1], strict=True):
        assert set(label.unique().tolist()) <= {0, *before.unique().tolist()}


@given(
    draw=st.integers(0, 10**6),
    probabilities=st.tuples(*[st.sampled_from([0.0, 0.5, 1.0])] * len(AugmentConfig.CHANGES)),
)
@settings(max_examples=30)
def test_any_mix_keeps_background_and_inputs(samples, draw: int, probabilities):
    config = AugmentConfig(**dict(zip(AugmentConfig.CHANGES, probabilities, strict=True)))
    sample = tuple(part[1:2] for part in samples)
    masks = sample[2][:, 0].to(torch.uint8)
    image, brain = augment(config, SEED, torch.tensor([draw]), (sample[0], masks, sample[2]))
    assert torch.isfinite(image).all()
    assert not (image * (brain == 0)).any()


def test_probability_zero_changes_nothing(samples):
    images, labels = augment(NEVER, SEED, torch.arange(4), samples)
    assert torch.equal(images, samples[0])
    assert torch.equal(labels, samples[1])


def test_inputs_stay_and_their_strides_do_not_matter(samples):
    kept = [part.clone() for part in samples]
    turned = tuple(part.transpose(-1, -3).contiguous().transpose(-1, -3) for part in samples)
    results = [augment(ALWAYS, SEED, torch.arange(4), batch) for batch in (samples, turned)]
    assert all(torch.equal(part, before) for part, before in zip(samples, kept, strict=True))
    assert all(torch.equal(part, before) for part, before in zip(turned, kept, strict=True))
    for straight, strided in zip(*results, strict=True):
        assert torch.equal(straight, strided)
        assert strided.is_contiguous()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_mirrored_labels_follow_the_image(samples, axis: int):
    change = Change(mirrored=tuple(n == axis for n in range(3)))
    image, labels = changed(change, samples)
    assert torch.equal(image, samples[0].flip(axis - 3))
    assert torch.equal(labels, samples[1].flip(axis - 3))
    again = changed(change, (image, labels, samples[2].flip(axis - 3)))
    assert torch.equal(again[0], samples[0])
    assert torch.equal(again[1], samples[1])


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("quarters", [0, 1, 2, 3, 4])
def test_a_right_angle_is_a_turn_of_the_array(samples, axis: int, quarters: int):
    angles = tuple(90.0 * quarters * (n == axis) for n in range(3))
    image, labels = changed(Change(warp=Warp(angles)), samples)
    plane = [(axis + 1) % 3 - 3, (axis + 2) % 3 - 3]
    assert torch.allclose(image, samples[0].rot90(-quarters, plane), atol=1e-5)
    assert torch.equal(labels, samples[1].rot90(-quarters, plane))


def test_half_a_turn_of_unequal_edges_is_two_mirrorings(smooth):
    image, labels = changed(Change(warp=Warp((0.0, 180.0, 0.0))), smooth)
    assert torch.allclose(image, smooth[0].flip(-3, -1), atol=1e-4)
    assert torch.equal(labels, smooth[1].flip(-3, -1))


@given(
    angles=st.tuples(*[st.floats(-180, 180)] * 3),
    scale=st.floats(0.5, 2),
    shape=st.tuples(*[st.integers(2, 12)] * 3),
)
@settings(max_examples=30)
def test_distances_in_the_source_are_those_of_the_patch_times_the_scale(angles, scale, shape):
    grid = sampling_grid(Warp(angles, scale), shape, CPU)
    places = grid.flip(-1) * torch.tensor(shape) / 2  # in voxels from the centre
    for axis in range(3):
        steps = places.diff(dim=axis).norm(dim=-1)
        assert torch.allclose(steps, torch.tensor(scale), atol=1e-4)
    along_i, along_j = places[1:, :1] - places[:-1, :1], places[:1, 1:] - places[:1, :-1]
    assert (along_i[:1, :, 0] * along_j[:, :1, 0]).sum().abs() < 1e-4 * scale**2
    assert torch.allclose(places.mean(dim=(0, 1, 2)), torch.zeros(3), atol=1e-4)


def test_scale_above_one_shows_more(smooth):
    image, labels, brain = (part.clone() for part in smooth)
    small, few = changed(Change(warp=Warp(scale=2.0)), (image, labels, brain))
    assert not small[..., 0, :, :].any()
    assert not few[..., 0, :, :].any()
    assert torch.allclose(small[..., 12, 8, 6], image[..., 12:14, 8:10, 6:8].mean((-1, -2, -3)))
    large, _ = changed(Change(warp=Warp(scale=0.5)), (image, labels, brain))
    assert large.std() < image.std()


def test_labels_move_with_the_image(smooth):
    """An image that is the labels' mask is, after any warp, near 1 in the mask, 0 outside."""
    _, labels, brain = smooth
    image = (labels == 2).float()[:, None]
    warp = Warp((12.0, -20.0, 25.0), 1.1, elastic_voxels=3.0, spacing_voxels=8.0, seed=3)
    moved, label = changed(Change(warp=warp), (image, labels, brain))
    inside = label[:, None] == 2
    assert moved[inside].min() >= 0.1
    assert moved[inside].mean() > 0.8
    assert moved[~inside].mean() < 0.1


@pytest.mark.parametrize("seed", range(5))
def test_elastic_deformation_is_smooth_bounded_and_does_not_fold(seed: int):
    shape = (32, 24, 16)
    still = sampling_grid(Warp(), shape, CPU)
    warp = Warp(elastic_voxels=3.2, spacing_voxels=8.0, seed=seed)
    places = sampling_grid(warp, shape, CPU).flip(-1) * torch.tensor(shape) / 2
    shift = places - still.flip(-1) * torch.tensor(shape) / 2
    assert 0.5 < shift.abs().max() <= 3.2
    gradients = torch.gradient(places, dim=(0, 1, 2))
    assert (torch.linalg.det(torch.stack(gradients, -1)) > 0).all()
    for axis in range(3):
        assert shift.diff(dim=axis, n=2).abs().max() < 0.4  # cubic: curvature 4 / spacing^2 * 3.2


def test_no_warp_is_the_identity(smooth):
    image, labels = changed(Change(warp=Warp()), smooth)
    assert torch.allclose(image, smooth[0], atol=1e-5)
    assert torch.equal(labels, smooth[1])


@given(sigma=st.floats(0.3, 3))
@settings(max_examples=30)
def test_the_blurs_variance_is_sigma_squared(sigma: float):
    weights = gaussian(sigma)
    assert weights[0] + 2 * sum(weights[1:]) == pytest.approx(1)
    variance = 2 * sum(w * n**2 for n, w in enumerate(weights))
    assert variance == pytest.approx(sigma**2, rel=2e-3)
    assert min(weights) > 0


def test_blur_keeps_constants_and_spreads_a_point_as_far_as_it_says():
    image = torch.full((1, 2, 17, 17, 17), 3.0)
    image[0, 1] = 0
    image[0, 1, 8, 8, 8] = 1
    brain = torch.ones(1, 1, 17, 17, 17, dtype=torch.bool)
    sigmas = (0.5, 0.8, 1.0)
    blurred, _ = changed(Change(blur=(sigmas, sigmas)), (image, brain[:, 0].byte(), brain))
    assert torch.allclose(blurred[0, 0], image[0, 0], atol=1e-5)
    assert blurred[0, 1].sum().item() == pytest.approx(1, abs=1e-5)
    squares = (torch.arange(17.0) - 8) ** 2
    for axis, sigma in enumerate(sigmas):
        profile = blurred[0, 1].sum(dim=tuple(a for a in range(3) if a != axis))
        assert (profile @ squares).item() == pytest.approx(sigma**2, rel=5e-3)
        assert torch.allclose(profile, profile.flip(0), atol=1e-6)


def test_low_resolution_at_one_is_the_identity_and_at_half_loses_detail(samples):
    image, brain = samples[0], torch.ones_like(samples[2])
    same, _ = changed(Change(low_resolution=(1.0,) * 4), (image, samples[1], brain))
    assert torch.equal(same, image)
    coarse, _ = changed(Change(low_resolution=(0.5,) * 4), (image, samples[1], brain))
    for axis in (-3, -2, -1):
        assert coarse.diff(dim=axis).square().mean() < image.diff(dim=axis).square().mean()
    assert coarse.min() >= image.min()
    assert coarse.max() <= image.max()


def test_noise_has_the_deviation_drawn(samples):
    everywhere = torch.ones_like(samples[2])
    change = Change(noise=((0.3, 1), (0.3, 2), None, (0.6, 1)))
    noisy, _ = changed(change, (samples[0], samples[1], everywhere))
    noise = (noisy - samples[0])[0]
    assert noise.std(dim=(1, 2, 3)).tolist() == pytest.approx([0.3, 0.3, 0, 0.6], rel=0.05)
    assert abs(torch.corrcoef(noise[:2].flatten(1))[0, 1]) < 0.1


def test_brightness_and_contrast_do_what_they_say(samples):
    image, _, brain = samples
    brighter, _ = changed(Change(brightness=(1.5, None, 0.5, 1.0)), samples)
    factors = torch.tensor([1.5, 1, 0.5, 1])[:, None, None, None]
    assert torch.allclose(brighter, image * factors)
    flat, _ = changed(Change(contrast=(0.5,) * 4), samples)
    steep, _ = changed(Change(contrast=(1.5,) * 4), samples)
    for before, low, high in zip(
        *(p[2][:, brain[2, 0]] for p in (image, flat, steep)), strict=True
    ):
        assert low.mean().item() == pytest.approx(before.mean().item(), abs=1e-4)
        assert low.std().item() == pytest.approx(before.std().item() / 2, rel=1e-3)
        assert high.std() > before.std()
        assert (high.min(), high.max()) == (before.min(), before.max())


@given(gamma=st.floats(0.5, 2), moments=st.booleans())
@settings(max_examples=20)
def test_gamma_is_monotone_and_keeps_what_it_should(samples, gamma: float, moments: bool):
    image, labels, brain = samples

    def bend(batch: Samples, name: str = "gamma") -> torch.Tensor:
        return changed(Change(**{name: (gamma,) * 4}, gamma_keeps_moments=moments), batch)[0]

    inverted, bent = bend(samples, "inverted_gamma"), bend(samples)
    assert torch.equal(inverted, -bend((-image, labels, brain)))
    for before, curved in zip(*(p[2][:, brain[2, 0]].numpy() for p in (image, bent)), strict=True):
        assert (np.diff(curved[np.argsort(before)]) >= 0).all()
        kept = (np.mean, np.std) if moments else (np.min, np.max)
        assert [f(curved) for f in kept] == pytest.approx([f(before) for f in kept], abs=1e-3)
        if not moments and abs(gamma - 1) > 0.01:
            assert (curved.mean() < before.mean()) == (gamma > 1)


def test_the_bias_field_is_smooth_positive_and_one_at_the_centre_without_a_constant(samples):
    change = draw_change(only("bias_field"), SEED, 3, 4)
    for coefficients in change.bias_field:
        a, b, c = np.nonzero(coefficients)
        assert (a + b + c).max() <= 3
        assert np.abs(coefficients).max() <= 0.5
        (field,) = bias_fields([coefficients], (32, 24, 16), CPU)
        assert field.min() > 0
        assert field.log().diff(dim=0, n=4).abs().max() < 1e-4  # a cubic has no fourth difference
    linear = np.zeros((4, 4, 4))
    linear[1, 0, 0] = np.log(2)
    ends = bias_fields([linear], (5, 2, 1), CPU)[0][:, 0, 0]
    assert ends.tolist() == pytest.approx([0.5, 2**-0.5, 1, 2**0.5, 2])
    image, _ = changed(Change(bias_field=(linear,) * 4), samples)
    inside = samples[2][0, 0]
    assert image[0, 0][inside].min() >= samples[0][0, 0][inside].min()


def test_drop_out_takes_one_modality_and_never_the_only_one(samples):
    config = only("drop_modality")
    images, labels = augment(config, SEED, torch.arange(4), samples)
    assert torch.equal(labels, samples[1])
    for image, before in zip(images, samples[0], strict=True):
        gone = [m for m in range(4) if not image[m].any()]
        assert len(gone) == 1
        assert all(torch.equal(image[m], before[m]) for m in range(4) if m not in gone)
    assert {draw_change(config, SEED, draw, 4).dropped for draw in range(50)} == {0, 1, 2, 3}
    single, _ = augment(config, SEED, torch.arange(4), (samples[0][:, :1], *samples[1:]))
    assert torch.equal(single, samples[0][:, :1])


def test_changes_happen_as_often_as_configured():
    config = AugmentConfig(elastic=0.3, bias_field=0.2, drop_modality=0.1)
    changes = [draw_change(config, SEED, draw, 4) for draw in range(3000)]
    for name in ("bias_field", "noise", "blur", "brightness", "contrast", "low_resolution"):
        fraction = np.mean([bool(getattr(c, name)) for c in changes])
        assert fraction == pytest.approx(getattr(config, name), abs=0.03), name
    for name in ("inverted_gamma", "gamma"):
        fraction = np.mean([bool(getattr(c, name)) for c in changes])
        assert fraction == pytest.approx(getattr(config, name), abs=0.03), name
    warps = [c.warp or Warp() for c in changes]
    for name, active in (
        ("rotation", [any(w.angles_degrees) for w in warps]),
        ("scale", [w.scale != 1 for w in warps]),
        ("elastic", [w.elastic_voxels > 0 for w in warps]),
        ("drop_modality", [c.dropped is not None for c in changes]),
        *(("mirror", [c.mirrored[axis] for c in changes]) for axis in range(3)),
    ):
        assert np.mean(active) == pytest.approx(getattr(config, name), abs=0.03), name
    for name in ("blur", "low_resolution"):
        values = [v is not None for c in changes for v in getattr(c, name)]
        assert np.mean(values) == pytest.approx(0.5, abs=0.05)


def test_changes_go_as_far_as_configured():
    config = replace(ALWAYS, noise_variance=(0.01, 0.04))
    changes = [draw_change(config, SEED, draw, 4) for draw in range(300)]
    spans = {
        "brightness": config.brightness_range,
        "contrast": config.contrast_range,
        "gamma": config.gamma_range,
        "inverted_gamma": config.gamma_range,
        "low_resolution": config.low_resolution_range,
    }
    for name, (low, high) in spans.items():
        values = [v for c in changes for v in getattr(c, name) if v is not None]
        assert low <= min(values) < low + 0.05 < high - 0.05 < max(values) <= high
        if low < 1 < high:
            assert np.mean(np.array(values) < 1) == pytest.approx(0.5, abs=0.06)
    deviations = [d for c in changes for d, _ in c.noise]
    assert 0.1 <= min(deviations) < max(deviations) <= 0.2
    assert all(len({d for d, _ in c.noise}) == 1 for c in changes)
    angles = np.array([c.warp.angles_degrees for c in changes])
    assert -30 <= angles.min() < -28 < 28 < angles.max() <= 30
    assert all(0.7 <= c.warp.scale <= 1.4 for c in changes)
    sigmas = np.array([s for c in changes for s in c.blur if s is not None])
    assert 0.5 <= sigmas.min() < sigmas.max() <= 1


def test_deviations_of_noise_are_uniform_up_to_a_tenth():
    """nnU-Net: `noise_variance=(0, 0.1)`, which batchgeneratorsv2 takes for the deviation."""
    config = AugmentConfig(noise=1.0)
    drawn = [draw_change(config, SEED, draw, 1).noise[0][0] for draw in range(600)]
    shares = np.histogram(drawn, bins=5, range=(0, 0.1))[0] / 600
    assert sum(shares) == 1
    assert shares == pytest.approx(0.2, abs=0.06)


@pytest.mark.parametrize("operation", AugmentConfig.CHANGES)
def test_switching_one_change_off_leaves_the_others(operation: str):
    names = {"rotation": "warp", "scale": "warp", "elastic": "warp"}
    names |= {"drop_modality": "dropped", "mirror": "mirrored"}
    rest = [f.name for f in fields(Change) if f.name != names.get(operation, operation)]
    for config in (AugmentConfig(), ALWAYS):
        for draw in range(10):
            whole = draw_change(config, SEED, draw, 4)
            less = draw_change(replace(config, **{operation: 0}), SEED, draw, 4)
            assert all(repr(getattr(less, name)) == repr(getattr(whole, name)) for name in rest)


@pytest.mark.parametrize("size", [(16, 12, 1), (16, 1, 12), (1, 16, 12)])
def test_a_slice_stays_in_its_plane(size):
    flat = make_samples(size, count=2)
    axis = size.index(1)
    images, labels = augment(ALWAYS, SEED, torch.arange(2), flat)
    assert images.shape == flat[0].shape
    assert labels.shape == flat[1].shape
    assert torch.isfinite(images).all()
    grid = sampling_grid(Warp((20.0, 20.0, 20.0), 1.3, 2.0, 8.0), size, CPU)
    assert not grid[..., 2 - axis].any()
    turned = tuple(90.0 * (n == axis) for n in range(3))
    others = tuple(90.0 * (n != axis) for n in range(3))
    for angles, rotates in ((turned, True), (others, False)):
        image, _ = changed(Change(warp=Warp(angles)), flat)
        assert torch.allclose(image, flat[0], atol=1e-5) != rotates
    kept, _ = changed(Change(mirrored=tuple(n == axis for n in range(3))), flat)
    assert torch.equal(kept, flat[0])


def test_a_patch_without_brain_stays_empty():
    image, labels = torch.zeros(1, 4, *SIZE), torch.zeros(1, *SIZE, dtype=torch.uint8)
    brain = torch.zeros(1, 1, *SIZE, dtype=torch.bool)
    images, _ = augment(ALWAYS, SEED, torch.tensor([7]), (image, labels, brain))
    assert torch.equal(images, image)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rotation", 1.5),
        ("rotation_degrees", 270.0),
        ("scale_range", (0.0, 1.0)),
        ("scale_range", (1.4, 0.7)),
        ("low_resolution_range", (0.5, 1.5)),
        ("elastic_spacing_voxels", 10.0),
        ("blur_per_modality", -0.1),
        ("noise_variance", (-0.1, 0.1)),
        ("local_per_modality", 1.5),
        ("median_size_voxels", (0, 3)),
        ("median_size_voxels", (2, 12)),
        ("blank_rectangles_most", 0),
        ("blank_rectangles_range", (0.1, 1.5)),
        ("brightness_added_deviation", -1.0),
    ],
)
def test_a_value_that_makes_no_sense_is_named(field: str, value):
    with pytest.raises(UsageError, match=f"augment.{field} must be"):
        override(TrainConfig(), f"augment.{field}", value)
