"""One draw, one box: inside the case where it fits, centred on tumour as often as asked."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raybrats.data.patch import PatchRule, choose_corner, cut
from raybrats.data.phantom import make_phantom
from raybrats.data.prepare import Prepared, prepare

sizes = st.tuples(*[st.integers(1, 20)] * 3)


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    image, labels = make_phantom(0, shape=(24, 24, 20))
    return prepare([*image, np.full((24, 24, 20), -5, np.int16)], labels)


@given(shape=sizes, size=sizes, share=st.floats(0, 1), seed=st.integers(0, 10**6))
@settings(max_examples=200, deadline=None)
def test_a_patch_lies_within_the_case_or_around_its_middle(shape, size, share, seed):
    labels = np.random.default_rng(seed).integers(0, 4, shape).astype(np.uint8)
    corner = choose_corner(labels, PatchRule(size, share), np.random.default_rng(seed))
    for first, edge, length in zip(corner, size, shape, strict=True):
        if edge <= length:
            assert 0 <= first <= length - edge
        else:  # as much beyond one end as beyond the other
            assert abs((-first) - (first + edge - length)) <= 1


def test_the_same_draw_gives_the_same_corner(prepared: Prepared):
    rule = PatchRule((8, 8, 8), 0.5)
    first, second = (
        [choose_corner(prepared.labels, rule, np.random.default_rng((3, n))) for n in range(50)]
        for _ in range(2)
    )
    assert first == second
    assert len(set(first)) > 25


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_tumour_is_hit_as_often_as_asked_and_each_label_alike(share: float):
    labels = np.zeros((40, 40, 40), np.uint8)
    labels[10, 10, 10], labels[20, 20:26, 20], labels[30, 30, 24:34] = 1, 2, 3
    centres = Counter()
    for n in range(1200):
        corner = choose_corner(labels, PatchRule((8, 8, 8), share), np.random.default_rng(n))
        centres[int(labels[tuple(np.add(corner, 4))])] += 1
    tumour = 1200 - centres[0]
    assert abs(tumour - 1200 * share) < 60
    for label in (1, 2, 3):
        assert abs(centres[label] - tumour / 3) < 60


def test_a_case_without_tumour_is_cut_anywhere():
    empty = np.zeros((16, 16, 16), np.uint8)
    corners = {
        choose_corner(empty, PatchRule((8, 8, 8), 1.0), np.random.default_rng(n)) for n in range(40)
    }
    assert len(corners) > 20


@given(data=st.data(), size=sizes)
@settings(max_examples=150, deadline=None)
def test_a_patch_is_the_padded_case_cut(prepared: Prepared, data, size):
    corner = tuple(
        data.draw(st.integers(min(0, n - s), max(0, n - s)))
        for n, s in zip(prepared.labels.shape, size, strict=True)
    )
    image, labels = cut(prepared, corner, size)
    assert (image.dtype, labels.dtype) == (np.int16, np.uint8)
    pad = 24
    box = tuple(slice(c + pad, c + pad + s) for c, s in zip(corner, size, strict=True))
    for channel, modality in enumerate(prepared.image):
        background = prepared.background[channel]
        padded = np.pad(modality, pad, constant_values=background)
        assert np.array_equal(image[channel], padded[box])
    assert np.array_equal(labels, np.pad(prepared.labels, pad)[box])


def test_a_case_without_labels_is_cut_with_none(prepared: Prepared):
    bare = Prepared(**{**vars(prepared), "labels": None})
    image, labels = cut(bare, (0, 0, 0), (8, 8, 8))
    assert np.array_equal(image, prepared.image[:, :8, :8, :8])
    assert not labels.any()
