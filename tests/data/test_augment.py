"""Augmentation: a draw decides its own changes, and nothing appears outside the brain."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raybrats.config import AugmentConfig
from raybrats.data.augment import apply_change, augment, draw_change
from raybrats.data.batch import Batch, normalise
from raybrats.data.patch import cut
from raybrats.data.phantom import make_phantom
from raybrats.data.prepare import prepare

SIZE = (16, 16, 16)
NEVER = AugmentConfig(mirror=0, noise=0, brightness=0, contrast=0, gamma=0)
ALWAYS = AugmentConfig(mirror=1, noise=1, brightness=1, contrast=1, gamma=1)
SEED = 5


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Patches of four phantoms, some beyond the head."""
    rows = []
    for index in range(4):
        image, labels = make_phantom(index, shape=(24, 24, 20))
        prepared = prepare(list(image), labels)
        patch, mask = cut(prepared, (index, 0, 1), SIZE)
        rows.append((patch, mask, prepared.gain, prepared.bias, prepared.background, 40 + index))
    columns = [torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True)]
    return Batch(*columns)


@pytest.fixture(scope="module")
def samples(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    image, brain = normalise(batch)
    return image, batch.labels, brain


def test_normalising_on_the_device_is_numpys_zscore(batch: Batch):
    image, brain = normalise(batch)
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
    together = augment(ALWAYS, SEED, draws, samples)
    for order in ([2], [3, 0], [1, 3, 2, 0]):
        parts = augment(ALWAYS, SEED, draws[order], tuple(part[order] for part in samples))
        for whole, part in zip(together, parts, strict=True):
            assert torch.equal(part, whole[order])


def test_other_draws_and_seeds_are_changed_otherwise(samples):
    one = tuple(part[:1].expand(3, *part.shape[1:]) for part in samples)
    images, _ = augment(ALWAYS, SEED, torch.tensor([1, 2, 3]), one)
    other, _ = augment(ALWAYS, SEED + 1, torch.tensor([1, 2, 3]), one)
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[1], images[2])
    assert not torch.equal(images, other)


@given(
    draw=st.integers(0, 10**6),
    probabilities=st.tuples(*[st.sampled_from([0.0, 0.5, 1.0])] * 5),
)
@settings(max_examples=60, deadline=None)
def test_outside_the_brain_stays_zero(samples, draw: int, probabilities):
    config = AugmentConfig(
        **dict(
            zip(("mirror", "noise", "brightness", "contrast", "gamma"), probabilities, strict=True)
        )
    )
    image, labels, brain = (part[1] for part in samples)
    change = draw_change(config, SEED, draw)
    changed, moved = apply_change(change, image, labels, brain)
    axes = [axis - 3 for axis in range(3) if change.mirrored[axis]]
    assert changed.shape == image.shape
    assert torch.isfinite(changed).all()
    assert not changed.where(~brain.flip(axes), torch.zeros(())).any()
    assert torch.equal(moved, labels.flip(axes))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_mirrored_labels_follow_the_image(samples, axis: int):
    image, labels, brain = (part[0] for part in samples)
    mirrored = tuple(n == axis for n in range(3))
    change = replace(draw_change(NEVER, SEED, 0), mirrored=mirrored)
    changed, moved = apply_change(change, image, labels, brain)
    assert np.array_equal(changed.numpy(), np.flip(image.numpy(), axis + 1))
    assert np.array_equal(moved.numpy(), np.flip(labels.numpy(), axis))
    again = apply_change(change, changed, moved, brain.flip(axis + 1))
    assert torch.equal(again[0], image)
    assert torch.equal(again[1], labels)


def test_probability_zero_changes_nothing(samples):
    images, labels = augment(NEVER, SEED, torch.arange(4), samples)
    assert torch.equal(images, samples[0])
    assert torch.equal(labels, samples[1])


def test_neither_input_is_changed_in_place(samples):
    kept = [part.clone() for part in samples]
    augment(ALWAYS, SEED, torch.arange(4), samples)
    assert all(torch.equal(part, before) for part, before in zip(samples, kept, strict=True))


def test_brightness_and_contrast_do_what_they_say(samples):
    image, labels, brain = (part[2] for part in samples)
    still = draw_change(NEVER, SEED, 0)
    inside = (slice(None), brain[0])
    brighter, _ = apply_change(replace(still, brightness=1.5), image, labels, brain)
    assert torch.allclose(brighter, image * 1.5)
    flat, _ = apply_change(replace(still, contrast=0.5), image, labels, brain)
    bent, _ = apply_change(replace(still, gamma=1.5), image, labels, brain)
    for before, halved, curved in zip(
        *(part[inside].numpy() for part in (image, flat, bent)), strict=True
    ):
        assert halved.mean() == pytest.approx(before.mean(), abs=1e-4)
        assert halved.std() == pytest.approx(before.std() / 2, rel=1e-3)
        assert (curved.min(), curved.max()) == pytest.approx((before.min(), before.max()), abs=1e-4)
        assert (np.diff(curved[np.argsort(before)]) >= 0).all()
        assert curved.mean() < before.mean()


def test_noise_has_the_deviation_drawn(samples):
    image, labels, _ = (part[0] for part in samples)
    everywhere = torch.ones_like(image[:1], dtype=torch.bool)
    change = replace(draw_change(NEVER, SEED, 0), noise_deviation=0.3)
    noisy, _ = apply_change(change, image, labels, everywhere)
    assert (noisy - image).std().item() == pytest.approx(0.3, rel=0.05)


def test_changes_happen_as_often_and_as_far_as_configured():
    config = AugmentConfig(mirror=0.5, noise=0.2, gamma=0.3)
    changes = [draw_change(config, SEED, draw) for draw in range(2000)]
    for axis in range(3):
        assert np.mean([c.mirrored[axis] for c in changes]) == pytest.approx(0.5, abs=0.05)
    noise = [c.noise_deviation for c in changes if c.noise_deviation > 0]
    assert len(noise) / 2000 == pytest.approx(0.2, abs=0.04)
    assert 0 < max(noise) <= config.noise_variance[1] ** 0.5
    gamma = [c.gamma for c in changes if c.gamma != 1]
    assert len(gamma) / 2000 == pytest.approx(0.3, abs=0.04)
    assert config.gamma_range[0] <= min(gamma) < max(gamma) <= config.gamma_range[1]


def test_a_patch_without_brain_stays_empty():
    image, labels = torch.zeros(4, *SIZE), torch.zeros(SIZE, dtype=torch.uint8)
    brain = torch.zeros(1, *SIZE, dtype=torch.bool)
    for draw in range(5):
        changed, _ = apply_change(draw_change(ALWAYS, SEED, draw), image, labels, brain)
        assert not changed.any()
