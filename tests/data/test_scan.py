"""The compiled scans say what plain numpy says, to the ends of int16."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from raybrats.data import scan

LOW, HIGH = -32768, 32767
shapes = st.tuples(*[st.integers(1, 6)] * 3)
voxels = st.one_of(st.sampled_from([LOW, LOW + 1, -1, 0, 1, HIGH]), st.integers(LOW, HIGH))
several = settings(max_examples=60)


@st.composite
def images(draw):
    """Modalities (modality, k, j, i), many of their voxels background, and their backgrounds."""
    shape, number = draw(shapes), draw(st.integers(1, 3))
    outside = draw(arrays(np.int16, number, elements=voxels))
    values = draw(arrays(np.int16, (number, *shape), elements=voxels, fill=voxels))
    brain = draw(arrays(bool, (number, *shape)))
    return np.where(brain, values, outside[:, None, None, None]), outside


def read_only(array: np.ndarray) -> np.ndarray:
    """As `prepare` hands it over."""
    view = array.view()
    view.flags.writeable = False
    return view


def box_of(mask: np.ndarray) -> list[list[int]]:
    where = np.argwhere(mask)
    if not len(where):
        return [[0, 0]] * 3
    return np.stack([where.min(axis=0), where.max(axis=0) + 1], axis=1).tolist()


def sums_of(image: np.ndarray, mask: np.ndarray) -> list[list[int]]:
    """In Python's integers, which do not overflow."""
    rows = [[int(voxel) for voxel in modality[mask]] for modality in image]
    return [[len(r), sum(r), sum(v * v for v in r), min(r), max(r)] for r in rows]


@given(images())
@several
def test_box_and_sums_of_the_brain_are_those_of_numpy(given_image):
    image, outside = given_image
    box, sums = scan.brain(tuple(map(read_only, image)), outside)
    mask = (image != outside[:, None, None, None]).any(axis=0)
    assert box.tolist() == box_of(mask)
    if mask.any():
        assert sums.tolist() == sums_of(image, mask)
    else:
        assert not sums[:, :3].any()


@given(images())
@several
def test_the_histogram_counts_the_brain_by_value(given_image):
    image, outside = given_image
    mask = (image != outside[:, None, None, None]).any(axis=0)
    counts = scan.histogram(image, outside)
    assert counts.shape == (len(image), 2**16)
    for found, modality in zip(counts, image, strict=True):
        values, numbers = np.unique(modality[mask], return_counts=True)
        assert np.flatnonzero(found).tolist() == (values.astype(int) - LOW).tolist()
        assert found[found > 0].tolist() == numbers.tolist()


@given(
    shapes.flatmap(lambda shape: arrays(np.uint8, shape)),
    st.integers(1, 6),
)
@several
def test_tumour_voxels_are_boxed_counted_and_listed_class_by_class(labels, num_labels):
    labels %= 1 + num_labels
    box, counts = scan.tumour(read_only(labels), num_labels)
    assert box.tolist() == box_of(labels > 0)
    assert counts.tolist() == np.bincount(labels.ravel(), minlength=1 + num_labels).tolist()
    places = scan.places(labels, counts)
    assert places.dtype == np.int32
    expected = [np.flatnonzero(labels == label) for label in range(1, 1 + num_labels)]
    assert places.tolist() == np.concatenate(expected).tolist()


@given(
    stored=shapes.flatmap(lambda shape: arrays(np.uint8, shape)),
    values=st.permutations(range(1, 256)).map(lambda order: tuple(order[: 1 + order[0] % 6])),
    among=st.booleans(),
)
@several
def test_labels_become_ours_or_one_that_is_unknown_is_named(stored, values, among):
    known = np.array([0, *values])
    if among:
        stored = known[stored % len(known)].astype(np.uint8)
    found, unknown = scan.encoded(read_only(stored), values)
    strange = np.setdiff1d(stored, known)
    if len(strange):
        assert unknown in strange
    else:
        assert unknown == -1
        assert np.array_equal(known[found], stored)


@pytest.mark.parametrize("value", [LOW, -HIGH, HIGH])
@pytest.mark.parametrize("length", [1024, HIGH])  # of the longest axis that NIfTI-1 has
def test_long_rows_of_extreme_voxels_do_not_overflow(value: int, length: int):
    image = np.full((1, 2, 3, length), value, np.int16)
    image[0, 0, 0, 0] = 7
    box, sums = scan.brain((read_only(image[0]),), np.array([7], np.int16))
    number = image.size - 1
    assert box.tolist() == [[0, 2], [0, 3], [0, length]]
    assert sums.tolist() == [[number, number * value, number * value**2, value, value]]


@pytest.mark.parametrize("value", [LOW, 0, HIGH])
def test_one_voxel_is_a_brain_or_nothing(value: int):
    one = np.full((1, 1, 1), value, np.int16)
    box, sums = scan.brain((one,), np.array([5], np.int16))
    assert box.tolist() == [[0, 1]] * 3
    assert sums.tolist() == [[1, value, value**2, value, value]]
    box, sums = scan.brain((one,), np.array([value], np.int16))
    assert (box.any(), sums[0, 0]) == (False, 0)
    assert not scan.histogram(one[None], np.array([value], np.int16)).any()


def test_no_tumour_has_no_place():
    nothing = np.zeros((3, 4, 5), np.uint8)
    box, counts = scan.tumour(nothing, 3)
    assert (box.any(), counts.tolist()) == (False, [60, 0, 0, 0])
    assert scan.places(nothing, counts).shape == (0,)
    assert scan.encoded(nothing, (1, 2, 4))[1] == -1


def test_a_modality_counts_where_another_one_shows_brain():
    first = np.array([[[0, 3, 0, 0]]], np.int16)
    second = np.array([[[0, 0, -4, 0]]], np.int16)
    box, sums = scan.brain((first, second), np.zeros(2, np.int16))
    assert box.tolist() == [[0, 1], [0, 1], [1, 3]]
    assert sums.tolist() == [[2, 3, 9, 0, 3], [2, -4, 16, -4, 0]]


@given(
    whole=shapes.flatmap(lambda shape: arrays(np.float64, shape, elements=st.integers(0, 255))),
    off=st.floats(-scan.WHOLE, scan.WHOLE).map(lambda x: 0.9 * x),
    wrong=st.sampled_from([None, 0.5, 1.01, -1, 256, 1e30, np.nan, np.inf, -np.inf]),
    dtype=st.sampled_from([np.float32, np.float64]),
)
@several
def test_floats_become_whole_numbers_or_nothing(whole, off, wrong, dtype):
    stored = np.where(whole > 0, whole + off, 0).astype(dtype)
    if wrong is not None:
        stored[-1, -1, -1] = wrong
    found = scan.rounded(read_only(stored))
    if wrong is not None:
        assert found is None
    else:
        assert found.dtype == np.uint8
        assert np.array_equal(found, whole)
