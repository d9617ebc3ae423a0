"""Whole cases: sliding windows, regions and labels, and the raw case's own grid."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from monai.inferers import SlidingWindowInferer
from torch import nn
from torch.testing import assert_close

from raybrats.config import (
    DataConfig,
    LossConfig,
    NetworkConfig,
    OptimConfig,
    PredictionConfig,
    TrainConfig,
    override_all,
)
from raybrats.data.patch import cut_slice
from raybrats.data.prepare import bounding_box, prepare
from raybrats.errors import DataError
from raybrats.model.decision import labels_of, probabilities
from raybrats.model.inference import (
    Member,
    predict_case,
    prepared_for,
    segment,
    segment_prepared,
    uploaded,
)
from raybrats.model.loss import region_masks
from raybrats.model.network import build
from raybrats.model.windows import blend_windows
from raybrats.phantom.phantom import make_phantom

SHAPES = st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
CONFIG = TrainConfig(
    data=DataConfig(patch_size=(16, 16, 16)),
    network=NetworkConfig(widths=(4, 8, 16)),
)


def pointwise(weights, bias):
    """A network whose logits at a voxel depend on that voxel alone."""
    network = nn.Conv3d(4, len(bias), kernel_size=1)
    with torch.no_grad():
        network.weight.copy_(torch.tensor(weights)[..., None, None, None])
        network.bias.copy_(torch.tensor(bias))
    return network.eval()


def run(size=(16, 16, 16), **prediction):
    """A run with windows of this size."""
    network = NetworkConfig(widths=(4, 8), deep_supervision=0)
    prediction = PredictionConfig(**prediction)
    return TrainConfig(data=DataConfig(patch_size=size), network=network, prediction=prediction)


def small(seed, modalities=4, outputs=3):
    torch.manual_seed(seed)
    return build(run().network, modalities, outputs=outputs).eval()


EVERYWHERE = pointwise([[0.0] * 4] * 3, [1.0, 1.0, 1.0])
BRIGHT_FLAIR = pointwise([[1.0, 0, 0, 0], [0.0] * 4, [0.0] * 4], [0.0, -1.0, -1.0])


@given(hnp.arrays(np.uint8, SHAPES, elements=st.integers(0, 3)))
def test_labels_come_back_from_their_regions(labels):
    labels = torch.from_numpy(labels)
    found = labels_of(region_masks(labels).bool())
    assert found.dtype == torch.uint8
    assert torch.equal(found, labels)


@given(hnp.arrays(np.uint8, SHAPES, elements=st.integers(0, 3)))
def test_nested_regions_come_back_from_their_labels(depth):
    nested = torch.from_numpy(np.stack([depth >= 1, depth >= 2, depth >= 3], axis=1))
    assert torch.equal(region_masks(labels_of(nested)).bool(), nested)


@pytest.mark.parametrize("at_once", [2, 5, 100])
def test_windows_seen_together_say_what_they_say_one_by_one(at_once):
    network, config = small(0, modalities=2), run((8, 12, 12), mirror=(0, 1, 2))
    image, seen = torch.randn(1, 2, 20, 24, 17), []
    alone = blend_windows(network, image, config).total
    network.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    together = blend_windows(network, image, config, at_once).total
    assert_close(together, alone, rtol=0, atol=1e-4)
    assert (max(seen), sum(seen)) == (min(at_once, 24), 8 * 24)


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("shape", [(16, 16, 16), (21, 17, 30), (40, 9, 5)])
def test_windows_of_a_pointwise_network_add_up_to_the_whole(shape, overlap):
    # whole numbers and a bias of a half: no logit is near 0, where rounding could turn it over
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(-3, 4, (2, 4, *shape), generator=generator).float()
    network = pointwise([[1.0, -1, 2, 0], [0, 1, 1, -2], [1, 0, 0, 1]], [0.5, -0.5, 0.5])
    said = blend_windows(network, image, run(overlap=overlap))
    assert torch.equal(said.total > 0, network(image) > 0)
    assert_close(said.total / said.weight, network(image))


def test_a_patch_as_large_as_the_image_is_the_network_itself():
    torch.manual_seed(0)
    network = build(CONFIG.network, 4).eval()
    image = torch.randn(1, 4, 16, 16, 16)
    with torch.no_grad():
        expected = network(image) > 0
    assert torch.equal(blend_windows(network, image, CONFIG).total > 0, expected)


@pytest.mark.parametrize("shape", [(40, 36, 30), (24, 20, 16), (16, 16, 16)])
def test_segment_fills_the_brain_box_and_nothing_else(shape):
    image, _ = make_phantom(0, shape=shape)
    labels = segment(EVERYWHERE, CONFIG, image.astype(np.float32))
    expected = np.zeros(shape, np.uint8)
    expected[bounding_box((image != 0).any(axis=0))] = 3
    np.testing.assert_array_equal(labels, expected)
    assert labels.dtype == np.uint8


@pytest.mark.parametrize("shape", [(40, 36, 30), (16, 16, 16)])
@pytest.mark.parametrize("scaled", [False, True])
def test_segment_labels_each_voxel_of_the_raw_case(shape, scaled):
    image, _ = make_phantom(1, shape=shape)
    raw = image.astype(np.float32) / (3.0 if scaled else 1.0)
    labels = segment(BRIGHT_FLAIR, CONFIG, raw)
    brain = (image != 0).any(axis=0)
    bright = brain & (image[0] > image[0][brain].mean())
    np.testing.assert_array_equal(labels, np.where(bright, 2, 0))


@pytest.mark.parametrize("shape", [(1, 6, 40), (5, 5, 5)])
def test_a_case_far_smaller_than_the_patch(shape):
    image = np.zeros((4, *shape), np.float32)
    image[:, :, 1:5, 1:4] = np.arange(1, 1 + 4 * 3).reshape(4, 3)
    labels = segment(BRIGHT_FLAIR, CONFIG, image)
    np.testing.assert_array_equal(labels, np.where(image[0] > 6.5, 2, 0))


def test_a_trained_shape_of_network_segments_in_the_grid_of_the_case():
    torch.manual_seed(0)
    image, _ = make_phantom(2, shape=(30, 26, 20))
    labels = segment(build(CONFIG.network, 4).eval(), CONFIG, image.astype(np.float32))
    assert labels.shape == (30, 26, 20)
    assert set(np.unique(labels)) <= {0, 1, 2, 3}
    outside = np.ones(labels.shape, bool)
    outside[bounding_box((image != 0).any(axis=0))] = False
    assert not labels[outside].any()


@pytest.mark.parametrize("shape", [(40, 36, 30), (24, 30, 17)])
def test_a_whole_volume_is_one_window_of_the_networks_stride(shape):
    image, _ = make_phantom(1, shape=shape)
    config = replace(CONFIG, data=DataConfig(sampling="volume"))
    seen = []

    def watching(window):
        seen.append(tuple(window.shape[2:]))
        return BRIGHT_FLAIR(window)

    prepared = prepare(list(image))
    found = predict_case(watching, config, uploaded(prepared, torch.device("cpu")))
    box = [-(-(span.stop - span.start) // 4) * 4 for span in prepared.box]
    assert seen == [tuple(box)]
    assert found.shape[1:] == prepared.image.shape[1:]


@pytest.mark.parametrize("shape", [(40, 36, 30), (24, 30, 17)])
def test_slices_of_their_own_size_are_segmented_as_they_are(shape):
    image, _ = make_phantom(1, shape=shape)
    size = tuple(-(-edge // 4) * 4 for edge in shape[:2])
    data = DataConfig(sampling="slices", patch_size=(*size, 1))
    labels = segment(BRIGHT_FLAIR, replace(CONFIG, data=data), image.astype(np.float32))
    brain = (image != 0).any(axis=0)
    bright = np.where(brain & (image[0] > image[0][brain].mean()), 2, 0)
    if size == shape[:2]:
        np.testing.assert_array_equal(labels, bright)
    else:  # resized and back: the edges of what is bright may move by a voxel
        assert (labels == bright).mean() > 0.95


def test_slices_are_resized_in_prediction_as_in_training():
    image, labels = make_phantom(3, shape=(60, 52, 20))
    size = (32, 28, 1)
    config = replace(CONFIG, data=DataConfig(sampling="slices", patch_size=size))
    prepared, seen = prepare(list(image), labels), []

    def watching(small):
        seen.append(small)
        return BRIGHT_FLAIR(small)

    predict_case(watching, config, uploaded(prepared, torch.device("cpu")))
    predicted = torch.cat(seen, dim=4)[0].numpy()
    gain, bias = (v[:, None, None] for v in (prepared.scaling.gain, prepared.scaling.bias))
    for k in range(prepared.image.shape[3]):
        planes, _ = cut_slice(prepared, prepared.box[2].start + k, size)
        brain = (planes != prepared.scaling.background[:, None, None, None]).any(axis=0)[..., 0]
        trained = np.where(brain, planes[..., 0] * gain + bias, 0)
        step = gain.max() / 2  # the training's voxels are rounded
        assert np.abs(predicted[..., k] - trained).max() <= step + 1e-3


def test_exclusive_labels_are_the_greatest_of_a_softmax():
    bright = pointwise([[0.0] * 4, [0.0] * 4, [1.0, 0, 0, 0], [0.0] * 4], [0.5, 0.0, 0.5, 0.0])
    image, _ = make_phantom(1, shape=(40, 36, 30))
    config = replace(CONFIG, loss=LossConfig(target="labels"))
    labels = segment(bright, config, image.astype(np.float32))
    brain = (image != 0).any(axis=0)
    expected = np.where(brain & (image[0] > image[0][brain].mean()), 2, 0)
    np.testing.assert_array_equal(labels, expected)


def test_an_empty_case_is_refused():
    with pytest.raises(DataError, match="background"):
        segment(EVERYWHERE, CONFIG, np.zeros((4, 16, 16, 16), np.float32))


@pytest.mark.parametrize(
    ("shape", "overlap"), [((32, 24, 16), 0.5), ((16, 40, 24), 0.5), ((32, 16, 48), 0.0)]
)
def test_windows_are_blended_as_monai_does(shape, overlap):
    """MONAI's windows lie as ours where whole steps end at the edge.

    Its Gaussian is centred between two voxels and nowhere below 0.001, ours is nnU-Net's; so it is
    given our weights, which a single window tells.
    """
    network, config = small(0), run(overlap=overlap)
    weights = blend_windows(network, torch.ones(1, 4, 16, 16, 16), config).weight
    middle = weights[8, 8].numpy()
    at = np.arange(16) - 8
    np.testing.assert_allclose(middle, np.exp(-0.5 * (at / 2) ** 2), rtol=1e-5)  # 16 x 0.125
    image = torch.randn(1, 4, *shape, generator=torch.Generator().manual_seed(1))
    said = blend_windows(network, image, config)
    inferer = SlidingWindowInferer((16, 16, 16), 2, overlap, mode="gaussian", sigma_scale=0.125)
    inferer.roi_weight_map = weights
    with torch.no_grad():
        expected = inferer(image, network)
    assert_close(said.total / said.weight, expected, rtol=0, atol=1e-4)


def test_mirror_images_along_some_axes_are_averaged():
    network, image = small(0), torch.randn(1, 4, 16, 16, 16)
    said = blend_windows(network, image, run(mirror=(0, 2)))
    with torch.no_grad():
        turned = [network(image.flip(axes)).flip(axes) for axes in ((), (2,), (4,), (2, 4))]
    assert_close(said.total / said.weight, torch.stack(turned).mean(dim=0))


def test_only_windows_with_brain_are_seen_and_the_rest_is_background():
    image = torch.zeros(1, 4, 40, 16, 16)
    image[..., 3:9, 5:9, 4:8] = 1
    config, seen = run(overlap=0.0), []

    def watching(window):
        seen.append(window)
        return EVERYWHERE(window)

    said = blend_windows(watching, image, config)
    assert [bool(window.any()) for window in seen] == [True]
    inside = torch.arange(40) < 16
    assert torch.equal(said.weight.gt(0).flatten(1).all(dim=1), inside)
    found = probabilities(config, said)
    assert found[:, :, inside].min() > 0.7
    assert not found[:, :, ~inside].any()
    low = override_all(config, {"prediction.threshold": [0.01] * 3})
    labels = predict_case(EVERYWHERE, low, uploaded(_box(image), torch.device("cpu")))
    assert torch.equal(labels[0].flatten(1).all(dim=1), torch.ones(6, dtype=torch.bool))


def _box(image):
    """The prepared case of an image of zeros and ones."""
    return prepare(list((image[0] * 100 + torch.rand(image.shape[1:])).mul(image[0]).numpy()))


def test_softmax_without_a_window_is_background():
    image = torch.zeros(1, 4, 40, 16, 16)
    image[..., :4, :, :] = 1
    config = replace(run(overlap=0.0), loss=LossConfig(target="labels"))
    found = probabilities(config, blend_windows(small(0, outputs=4), image, config))
    assert_close(found.sum(dim=1), torch.ones(1, 40, 16, 16))
    assert torch.equal(found[0, 0, 20], torch.ones(16, 16))


def case(seed=0, shape=(30, 26, 20)):
    image, _ = make_phantom(seed, shape=shape)
    return prepared_for(CONFIG, image)


@pytest.mark.parametrize("target", ["regions", "labels"])
def test_an_ensemble_of_one_is_the_model(target):
    config = replace(run(), loss=LossConfig(target=target))
    network = small(0, outputs=3 + (target == "labels"))
    alone = segment_prepared([Member(network, config)], case())
    asked = segment_prepared([Member(network, config)], case(), probabilities=True)
    np.testing.assert_array_equal(alone.labels, asked.labels)
    assert (alone.probabilities, alone.agreement, asked.agreement) == (None, None, None)
    assert asked.probabilities.shape == (3, 30, 26, 20)
    assert asked.probabilities.dtype == np.float16
    if target == "regions":
        tumour = asked.probabilities.astype(np.float32).max(axis=0) > 0.5
        assert (tumour == (alone.labels > 0)).mean() > 0.999  # rounded to float16


def test_an_ensemble_says_the_mean_of_its_members_probabilities():
    members = [Member(small(seed), run(overlap=0.25 * seed)) for seed in range(3)]
    alone = [segment_prepared([member], case(), probabilities=True) for member in members]
    found = segment_prepared(members, case(), probabilities=True)
    mean = np.mean([each.probabilities.astype(np.float32) for each in alone], axis=0)
    np.testing.assert_allclose(found.probabilities, mean, atol=1e-3)
    sure = (abs(mean - 0.5) > 1e-3).all(axis=0)
    expected = labels_of(torch.from_numpy(mean)[None] > 0.5)[0].numpy()
    np.testing.assert_array_equal(found.labels[sure], expected[sure])
    pairs = [(0, 1), (0, 2), (1, 2)]
    for name, numbers in (("WT", (1, 2, 3)), ("TC", (1, 3)), ("ET", (3,))):
        masks = [np.isin(each.labels, numbers) for each in alone]
        sizes = [mask.sum() for mask in masks]
        dice = [2 * (masks[a] & masks[b]).sum() / (sizes[a] + sizes[b]) for a, b in pairs]
        assert found.agreement[name] == pytest.approx(np.mean(dice))


def test_a_temperature_moves_probabilities_and_no_label():
    network, hot = small(0), override_all(run(), {"prediction.temperature": [3.0, 1.0, 0.5]})
    plain, heated = (
        segment_prepared([Member(network, config)], case(), probabilities=True)
        for config in (run(), hot)
    )
    np.testing.assert_array_equal(plain.labels, heated.labels)
    p = plain.probabilities.astype(np.float64)
    told = (p > 0.02) & (p < 0.98)  # what float16 has of them says enough of their odds
    power = np.broadcast_to(np.array([1 / 3, 1, 2])[:, None, None, None], p.shape)[told]
    odds = (p[told] / (1 - p[told])) ** power
    np.testing.assert_allclose(heated.probabilities[told], odds / (1 + odds), atol=2e-3)
    assert not heated.probabilities[p == 0].any()


def test_a_case_is_predicted_in_the_precision_in_which_it_was_validated():
    config, seen = replace(CONFIG, optim=OptimConfig(precision="bf16")), []

    def watching(window):
        seen.append(torch.is_autocast_enabled("cpu"))
        return EVERYWHERE(window)

    predict_case(watching, config, uploaded(case(), torch.device("cpu")))
    assert set(seen) == {True}
