"""Crop, quantise, normalise: the numbers a network sees are those of plain numpy."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from raybrats.brats import EDITIONS
from raybrats.data.nifti.header import Grid
from raybrats.data.nifti.labels import labels_from
from raybrats.data.nifti.volume import Volume
from raybrats.data.prepare import Prepared, bounding_box, prepare, restore
from raybrats.errors import DataError
from raybrats.phantom.phantom import make_phantom

SHAPE = (24, 24, 20)
GRID = Grid(SHAPE, np.diag([-1.0, -1.0, 1.0, 1.0]), oriented=True)


@pytest.fixture(scope="module")
def phantom() -> tuple[np.ndarray, np.ndarray]:
    return make_phantom(0, shape=SHAPE)


def flat(prepared: Prepared) -> dict[str, object]:
    """Its fields and those of its scaling."""
    fields = {**vars(prepared), **vars(prepared.scaling)}
    del fields["scaling"]
    return fields


def inside(prepared: Prepared) -> np.ndarray:
    """The brain, as the device sees it."""
    return (prepared.image != prepared.scaling.background[:, None, None, None]).any(axis=0)


def network_input(prepared: Prepared) -> np.ndarray:
    each = prepared.scaling.map(lambda numbers: numbers[:, None, None, None])
    scaled = each.gain * prepared.image.clip(each.low, each.high) + each.bias
    return np.where(inside(prepared), scaled, 0)


def zscore(image: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """The same from the whole image (modality, i, j, k), in double precision."""
    image = image.astype(np.float64)
    mean, std = (f(image[:, brain], axis=1)[:, None, None, None] for f in (np.mean, np.std))
    return np.where(brain, (image - mean) / np.where(std == 0, np.inf, std), 0)


def test_whole_numbers_are_kept_in_the_smallest_box(phantom):
    image, labels = phantom
    prepared = prepare(list(image), labels)
    brain = (image != 0).any(axis=0)
    assert prepared.image.dtype == np.int16
    assert np.array_equal(prepared.image, image[:, *prepared.box])
    assert np.array_equal(prepared.labels, labels[prepared.box])
    assert prepared.scaling.background.tolist() == [0, 0, 0, 0]
    assert brain.sum() == inside(prepared).sum() == brain[prepared.box].sum()
    for axis in range(3):
        faces = np.moveaxis(inside(prepared), axis, 0)[[0, -1]]
        assert faces.any(axis=(1, 2)).all()


def test_zscore_is_that_of_numpy(phantom):
    image, _ = phantom
    prepared = prepare(list(image))
    expected = zscore(image, (image != 0).any(axis=0))
    assert np.allclose(network_input(prepared), expected[:, *prepared.box], atol=1e-4)
    values = network_input(prepared)[:, inside(prepared)]
    assert np.allclose(values.mean(axis=1), 0, atol=1e-4)
    assert np.allclose(values.std(axis=1), 1, atol=1e-4)


def test_minmax_is_that_of_numpy(phantom):
    image, _ = phantom
    prepared = prepare(list(image), normalisation="minmax")
    brain = (image != 0).any(axis=0)
    low, high = image[:, brain].min(axis=1), image[:, brain].max(axis=1)
    expected = (image - low[:, None, None, None]) / (high - low)[:, None, None, None]
    expected = np.where(brain, expected, 0)[:, *prepared.box]
    assert np.allclose(network_input(prepared), expected, atol=1e-5)


percents = st.one_of(st.sampled_from([0.0, 0.5, 1.0, 50.0, 99.5, 100.0]), st.floats(0, 100))


@given(
    brain=arrays(
        np.int16,
        st.tuples(*[st.integers(1, 6)] * 3),
        elements=st.integers(-32768, 32767).filter(bool),
        fill=st.nothing(),
    ),
    ends=st.tuples(percents, percents).filter(lambda pair: pair[0] < pair[1]),
)
@settings(max_examples=100)
def test_percentiles_are_voxels_as_numpys_inverted_cdf(brain, ends):
    for end in ends:  # where they fall between two voxels, rounding decides
        number = brain.size * end / 100
        assume(end in (0, 50, 100) or abs(number - round(number)) > 1e-6)
    image = np.pad(brain, 1)
    prepared = prepare([image], normalisation="percentile", percentiles=ends)
    low, high = np.percentile(brain, ends, method="inverted_cdf")
    assert (prepared.scaling.low[0], prepared.scaling.high[0]) == (low, high)
    if low < high:
        scaled = (brain.clip(low, high).astype(float) - low) / (float(high) - low)
        assert np.allclose(network_input(prepared)[0], scaled, atol=1e-2 / (float(high) - low))
    else:
        assert (prepared.scaling.gain[0], prepared.scaling.bias[0]) == (0, 0)


def test_percentile_is_from_zero_to_one_between_its_ends(phantom):
    image, _ = phantom
    prepared = prepare(list(image), normalisation="percentile", percentiles=(2, 98))
    brain = (image != 0).any(axis=0)
    low, high = np.percentile(image[:, brain], (2, 98), axis=1, method="inverted_cdf")
    assert prepared.scaling.low.tolist() == low.tolist()
    assert prepared.scaling.high.tolist() == high.tolist()
    low, high = low[:, None, None, None], high[:, None, None, None]
    expected = np.where(brain, (image.clip(low, high) - low) / (high - low), 0)
    assert np.allclose(network_input(prepared), expected[:, *prepared.box], atol=1e-5)
    values = network_input(prepared)[:, inside(prepared)]
    assert np.allclose([values.min(axis=1), values.max(axis=1)], [[0] * 4, [1] * 4], atol=1e-5)


@pytest.mark.parametrize("normalisation", ["zscore", "minmax"])
def test_nothing_is_clipped_by_the_other_normalisations(phantom, normalisation: str):
    prepared = prepare(list(phantom[0]), normalisation=normalisation)
    assert set(prepared.scaling.low.tolist()) == {-32768}
    assert set(prepared.scaling.high.tolist()) == {32767}


@pytest.mark.parametrize("normalisation", ["zscore", "minmax", "percentile"])
@pytest.mark.parametrize("background", [0, -3, 0.25])
def test_a_box_that_is_known_gives_the_case_that_looking_for_it_gives(
    phantom, normalisation: str, background: float
):
    modalities = list(phantom[0] + np.asarray(background))
    looked = prepare(modalities, phantom[1], normalisation)
    known = prepare(modalities, phantom[1], normalisation, box=looked.box)
    for name, value in flat(looked).items():
        assert np.array_equal(flat(known)[name], value), name
    wider = tuple(slice(max(0, s.start - 1), s.stop + 1) for s in looked.box)
    roomy = prepare(modalities, phantom[1], normalisation, box=wider)
    for name, value in vars(looked.scaling).items():
        assert np.array_equal(getattr(roomy.scaling, name), value), name
    assert (roomy.box, roomy.counts[1:].tolist()) == (wider, looked.counts[1:].tolist())


def test_a_box_that_holds_nothing_is_refused(phantom):
    with pytest.raises(DataError, match="every voxel of the box is background; index"):
        prepare(list(phantom[0]), phantom[1], box=(slice(0, 1),) * 3)


def test_tumour_outside_the_brain_is_kept_in_the_box():
    image, labels = np.zeros(SHAPE, np.int16), np.zeros(SHAPE, np.uint8)
    image[8:12, 8:12, 8:12] = np.arange(1, 65).reshape(4, 4, 4)
    labels[2, 9, 9], labels[10, 10, 17], labels[9, 9, 9] = 1, 2, 3
    prepared = prepare([image], labels)
    assert prepared.box == (slice(2, 12), slice(8, 12), slice(8, 18))
    assert np.array_equal(restore(prepared.labels, prepared), labels)
    assert prepared.counts.tolist() == [397, 1, 1, 1]
    bare = prepare([image])
    assert bare.box == (slice(8, 12),) * 3
    assert np.array_equal(prepared.scaling.gain, bare.scaling.gain)
    assert np.array_equal(prepared.scaling.bias, bare.scaling.bias)


@given(
    labels=arrays(
        np.uint8, st.tuples(*[st.integers(1, 7)] * 3), elements=st.integers(0, 3), fill=st.just(0)
    ),
    shown=st.booleans(),
)
@settings(max_examples=60)
def test_the_tumour_is_listed_class_by_class_along_the_memory(labels, shown):
    assume(shown or labels.any())
    image = np.pad(np.full(labels.shape, 9 if shown else 0, np.int16), 1)
    prepared = prepare([image], np.pad(labels, 1))
    in_memory = prepared.labels.T.ravel()
    assert prepared.tumour.dtype == np.int32
    parts = np.split(prepared.tumour, np.cumsum(prepared.counts[1:])[:2])
    for label, part in zip((1, 2, 3), parts, strict=True):
        assert part.tolist() == np.flatnonzero(in_memory == label).tolist()
    assert prepared.counts.tolist() == np.bincount(in_memory, minlength=4).tolist()
    bare = prepare([np.pad(np.full(labels.shape, 9, np.int16), 1)])
    assert (len(bare.tumour), bare.counts.tolist()) == (0, [0, 0, 0, 0])


@pytest.mark.parametrize("background", [-1e6, 1e6, 0.0])
def test_a_background_far_from_the_brain_costs_no_precision(background: float):
    rng = np.random.default_rng(0)
    image = np.full(SHAPE, background, np.float64)
    image[6:16, 6:16, 5:15] = rng.normal(3, 1e-2, (10, 10, 10))
    prepared = prepare([image])
    brain = image != background
    assert np.array_equal(inside(prepared), brain[prepared.box])
    expected = zscore(image[None], brain)[:, *prepared.box]
    assert np.abs(network_input(prepared) - expected).max() < 3e-4  # half a step, in deviations


@given(
    mask=arrays(bool, st.tuples(*[st.integers(1, 7)] * 3)).filter(np.any),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_restoring_undoes_the_crop(mask: np.ndarray, seed: int):
    labels = np.where(mask, np.random.default_rng(seed).integers(1, 4, mask.shape), 0)
    labels = labels.astype(np.uint8)
    padded = np.pad(mask, 1).astype(np.int16)
    prepared = prepare([padded], np.pad(labels, 1))
    assert prepared.box == bounding_box(padded != 0)
    restored = restore(prepared.labels, prepared)
    assert restored.dtype == np.uint8
    assert np.array_equal(restored, np.pad(labels, 1))


def test_a_prepared_case_is_restored_where_it_was(phantom):
    image, labels = phantom
    padded = np.pad(labels, ((3, 0), (0, 5), (2, 2)))
    moved = [np.pad(m, ((3, 0), (0, 5), (2, 2))) for m in image]
    prepared = prepare(moved, padded)
    assert prepared.shape == padded.shape
    assert np.array_equal(restore(prepared.labels, prepared), padded)


def test_negative_brain_voxels_are_brain():
    image = np.zeros((1, *SHAPE), np.int16)
    image[0, 4:9, 4:9, 4:9] = np.arange(125).reshape(5, 5, 5) - 60
    prepared = prepare(list(image))
    assert inside(prepared).sum() == 124  # the one voxel of value 0 is background
    assert prepared.image.min() == -60
    expected = zscore(image, image[0] != 0)
    assert np.allclose(network_input(prepared), expected[:, *prepared.box], atol=1e-5)


def test_the_background_need_not_be_zero(phantom):
    image, labels = phantom
    brain = (image != 0).any(axis=0)
    shifted = zscore(image, np.ones_like(brain)).astype(np.float32)
    plain, odd = prepare(list(image), labels), prepare(list(shifted), labels)
    assert odd.box == plain.box
    assert np.array_equal(inside(odd), inside(plain))
    assert np.allclose(network_input(odd), network_input(plain), atol=2e-3)
    assert np.array_equal(odd.labels, plain.labels)


@given(
    seed=st.integers(0, 10**6),
    level=st.sampled_from([0.0, -3.0, 100.0, 1e6]),
    spread=st.sampled_from([1e-3, 1.0, 1e4]),
    background=st.sampled_from([0.0, -1.7, 0.3, 1e6]),
    full=st.booleans(),
    dtype=st.sampled_from([np.float32, np.float64]),
)
@settings(max_examples=150)
def test_floats_are_kept_within_one_step(seed, level, spread, background, full, dtype):
    rng = np.random.default_rng(seed)
    image = np.full((8, 8, 8), background, dtype)
    brain = np.zeros((8, 8, 8), bool)
    brain[2:6, 1:6, 2:7] = full or rng.random((4, 5, 5)) < 0.8
    image[brain] = rng.normal(level, spread, brain.sum())
    brain = image != image[0, 0, 0]
    assume(brain.any())
    prepared = prepare([image])
    stored, crop = prepared.image[0].astype(np.float64), image[prepared.box].astype(np.float64)
    low, high = (float(f(image[brain])) for f in (np.min, np.max))
    outside, step = float(image[0, 0, 0]), (high - low) / 65_532
    near = 2 * low - high <= outside <= 2 * high - low
    if near:
        step = (max(high, outside) - min(low, outside)) / 65_532
    middle = outside - int(prepared.scaling.background[0]) * step if near else (low + high) / 2
    brain = brain[prepared.box]
    apart = np.abs(stored * step + middle - crop)[brain]
    assert apart.max() <= 1.01 * step + 1e-9 * abs(middle)
    assert np.sort(apart)[:-5].max(initial=0) <= 0.51 * step + 1e-9 * abs(middle)
    assert ((stored == prepared.scaling.background[0]) == ~brain).all()
    stored, crop = stored[brain], crop[brain]
    order = np.argsort(crop.ravel())
    assert all(a <= b for a, b in pairwise(stored.ravel()[order]))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.uint8, np.uint16])
def test_whole_numbers_of_any_type_are_exact(dtype: type):
    image = np.zeros(SHAPE, dtype)
    image[5:9, 5:9, 5:9] = np.arange(64).reshape(4, 4, 4) * 3 + 1
    prepared = prepare([image])
    assert np.array_equal(prepared.image[0], image[prepared.box])
    assert prepared.scaling.background.tolist() == [0]


@pytest.mark.parametrize(
    ("dtype", "low", "high", "background"),
    [
        (np.uint16, 40_000, 65_535, 0),  # a box without one voxel of background
        (np.uint16, 0, 100, 50_000),
        (np.int32, 100_000, 200_000, 0),
        (np.int32, -200_000, 200_000, -200_000),
        (np.float32, 40_000, 50_000, 0),
    ],
)
def test_numbers_beyond_int16_are_spread_over_it(dtype, low, high, background):
    image = np.full(SHAPE, background, dtype)
    image[5:13, 5:13, 5:13] = np.linspace(low, high, 512).reshape(8, 8, 8)
    brain = image != background
    prepared = prepare([image])
    assert np.array_equal(inside(prepared), brain[prepared.box])
    expected = zscore(image[None], brain)[:, *prepared.box]
    step = (float(image.max()) - float(image.min())) / 65_534
    assert np.allclose(network_input(prepared), expected, atol=step / image[brain].std())


@pytest.mark.parametrize("value", [7, 0.3, -5e4])
@pytest.mark.parametrize("normalisation", ["zscore", "minmax"])
def test_a_constant_modality_becomes_zero(phantom, value: float, normalisation: str):
    image, _ = phantom
    brain = (image != 0).any(axis=0)
    flat = np.where(brain, np.float32(value), np.float32(0))
    prepared = prepare([*image[:3], flat], normalisation=normalisation)
    assert (prepared.scaling.gain[3], prepared.scaling.bias[3]) == (0, 0)
    assert not network_input(prepared)[3].any()
    assert np.isfinite(prepared.scaling.gain).all()
    empty = prepare([*image[:3], np.zeros(SHAPE, np.int16)], normalisation=normalisation)
    assert (empty.scaling.gain[3], empty.scaling.bias[3]) == (0, 0)
    assert empty.box == prepared.box


@pytest.mark.parametrize("value", [32_767, -32_003])
def test_a_constant_modality_becomes_zero_however_many_voxels_it_has(value: int):
    flat = np.full((209, 207, 208), value, np.int16)
    flat[0, 0, 0] = 0  # else the value is the background; an odd number of voxels is left
    prepared = prepare([flat])
    assert (prepared.scaling.gain[0], prepared.scaling.bias[0]) == (0, 0)


def test_a_case_without_brain_is_refused():
    with pytest.raises(DataError, match="every voxel is background"):
        prepare([np.full(SHAPE, 7, np.int16)] * 4)


def test_volumes_of_other_shapes_are_refused(phantom):
    image, labels = phantom
    with pytest.raises(DataError, match="differ in shape"):
        prepare([*image[:3], image[3][1:]])
    with pytest.raises(DataError, match="differ in shape"):
        prepare(list(image), labels[:, :, 1:])


def volume(voxels: object, dtype: type, slope: float = 1.0) -> Volume:
    return Volume(np.asarray(voxels, dtype).reshape(-1, 1, 1), slope, 0.0, GRID)


@pytest.mark.parametrize("edition", EDITIONS)
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32, np.float64])
def test_label_values_of_an_edition_become_ours(edition: str, dtype: type):
    values = EDITIONS[edition].label_values
    stored = [0, *values, values[-1], 0]
    labels = labels_from(volume(stored, dtype), values, "case")
    assert labels.dtype == np.uint8
    assert labels.ravel().tolist() == [0, *range(1, len(values) + 1), len(values), 0]


def test_masks_of_floats_are_labels_where_they_are_whole():
    stored = volume([-0.0, 0.9999, 2.0004, 4], np.float32)
    assert labels_from(stored, (1, 2, 4), "case").ravel().tolist() == [0, 1, 2, 3]
    scaled = volume([0, 2, 4, 8], np.uint8, slope=0.5)
    assert labels_from(scaled, (1, 2, 4), "case").ravel().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("value", [0.5, 1.01, 3.9])
def test_a_resampled_mask_is_refused(value: float):
    with pytest.raises(DataError, match="case_7: labels are not whole numbers"):
        labels_from(volume([0, 1, value], np.float64), (1, 2, 4), "case_7")


@pytest.mark.parametrize(
    ("stored", "dtype", "unknown"),
    [
        ([0, 3], np.uint8, 3),
        ([-1, 1], np.int16, -1),
        ([257, 1], np.uint16, 257),
        ([1e30], np.float32, ""),
        ([0, 5, 4], np.float64, 5),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_an_unknown_label_is_refused(stored: list, dtype: type, unknown: object):
    with pytest.raises(DataError, match=f"case_7: unknown label .*{unknown}; .* has 0, 1, 2, 4"):
        labels_from(volume(stored, dtype), (1, 2, 4), "case_7")
