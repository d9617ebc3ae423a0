"""One draw, one patch: at random and on tumour as often as asked, on a grid, a slice, the whole."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise, product
from typing import get_args, get_type_hints

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from raybrats.config import DataConfig, TrainConfig
from raybrats.data.patch import (
    PatchRule,
    choose_corner,
    covering_grid,
    cut,
    cut_slice,
    draw_patch,
    is_forced,
    volume_size,
)
from raybrats.data.prepare import Prepared, prepare
from raybrats.phantom.phantom import make_phantom

SHAPE = (24, 24, 20)
SAMPLINGS = get_args(get_type_hints(DataConfig)["sampling"])
sizes = st.tuples(*[st.integers(1, 20)] * 3)
boxes = st.tuples(*[st.tuples(st.integers(0, 99), st.integers(1, 99)) for _ in range(3)])


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    image, labels = make_phantom(0, shape=SHAPE)
    return prepare([*image, np.full(SHAPE, -5, np.int16)], labels)


@pytest.fixture(scope="module")
def quantised() -> Prepared:
    """The same of floats, whose background is the lowest int16."""
    image, labels = make_phantom(0, shape=SHAPE)
    return prepare(list(image / np.float32(7)), labels)


def whole(labels: np.ndarray) -> Prepared:
    """A case that is brain in all voxels but the first; a voxel's value tells where it lies."""
    image = np.arange(labels.size, dtype=np.int16).reshape(labels.shape)
    return prepare([image, -image], labels)


def empty(*shape: int) -> Prepared:
    return whole(np.zeros(shape, np.uint8))


def rule(size: tuple[int, ...], sampling: str = "random", seed: int = 3, **fields) -> PatchRule:
    flat = {"patch_size": (8, 8, 1)} if sampling == "slices" else {}
    return PatchRule(
        DataConfig(sampling=sampling, **flat, **fields), size, seed, ((1,), (2,), (3,))
    )


def full(case: Prepared) -> np.ndarray:
    """The image in the whole canonical volume."""
    image = np.empty((len(case.image), *case.shape), np.int16)
    image[:] = case.scaling.background[:, None, None, None]
    image[:, *case.box] = case.image
    return image


def drawn(case: Prepared, rule: PatchRule, draws: range) -> list[tuple[np.ndarray, np.ndarray]]:
    return [draw_patch(case, rule, draw=draw, case=0, ordinal=draw) for draw in draws]


# At random


@given(shape=sizes, size=sizes, forced=st.booleans(), seed=st.integers(0, 10**6))
@settings(max_examples=200)
def test_a_patch_lies_within_the_case_or_around_its_middle(shape, size, forced, seed):
    case = whole(np.random.default_rng(seed).integers(0, 4, np.add(shape, 1)).astype(np.uint8))
    shape = case.image.shape[1:]
    corner = choose_corner(case, rule(size), np.random.default_rng(seed), forced=forced)
    for first, edge, length in zip(corner, size, shape, strict=True):
        if edge <= length:
            assert 0 <= first <= length - edge
        else:  # as much beyond one end as beyond the other
            assert abs((-first) - (first + edge - length)) <= 1


def test_random_patches_begin_everywhere_they_can():
    case = empty(10, 9, 8)
    patches = drawn(case, rule((8, 8, 8)), range(200))
    firsts = Counter(int(image[0, 0, 0, 0]) for image, _ in patches)
    corners = [case.image[0, i, j, 0] for i, j in product(range(3), range(2))]
    assert set(firsts) == set(map(int, corners))
    assert min(firsts.values()) > 15


@given(
    share=st.floats(0, 1),
    first=st.integers(0, 10**6),
    count=st.integers(0, 50),
    seed=st.integers(0, 9),
)
def test_of_any_draws_in_a_row_the_share_is_forced(share, first, count, seed):
    forced = sum(is_forced(draw, share, seed) for draw in range(first, first + count))
    assert abs(forced - count * share) < 2.001


@pytest.mark.parametrize(("share", "batch"), [(1 / 2, 2), (1 / 2, 4), (1 / 3, 3), (1.0, 2)])
def test_every_step_has_as_many_patches_on_tumour_at_any_of_its_places(share, batch):
    """nnU-Net forces the last `round(share * batch)` of a batch."""
    labels = np.zeros((40, 40, 40), np.uint8)
    labels[8, 8, 8] = 3
    case, places = whole(labels), np.zeros((200, batch), bool)
    for draw in range(places.size):
        places.flat[draw] = is_forced(draw, share, seed=3)
        if places.flat[draw]:
            asked = rule((8, 8, 8), foreground_share=share)
            assert draw_patch(case, asked, draw=draw, case=0, ordinal=draw)[1].any()
    assert set(places.sum(axis=1)) == {round(share * batch)}
    assert places.mean(axis=0) == pytest.approx(share, abs=0.12)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_tumour_is_hit_as_often_as_asked_each_class_alike_and_each_of_its_voxels(share: float):
    labels = np.zeros((30, 30, 30), np.uint8)
    labels[6, 6, 6], labels[15, 13:19, 15], labels[24, 24, 14:24] = 1, 2, 3
    case = whole(labels)
    asked, centres = rule((8, 8, 8)), Counter()
    for n in range(1200):
        forced = is_forced(n, share, seed=3)
        corner = choose_corner(case, asked, np.random.default_rng(n), forced=forced)
        centres[tuple(np.add(corner, 4))] += 1
    hits = {at: number for at, number in centres.items() if labels[at]}
    assert abs(sum(hits.values()) - 1200 * share) < 60
    for label in (1, 2, 3):
        voxels = [hits.get(tuple(at), 0) for at in np.argwhere(labels == label).tolist()]
        assert abs(sum(voxels) - sum(hits.values()) / 3) < 60
        expected = max(1, sum(voxels) / len(voxels))
        assert sum((n - expected) ** 2 / expected for n in voxels) < 28  # p = 0.001 of 9


def test_regions_are_hit_alike_and_each_of_their_voxels():
    labels = np.zeros((30, 30, 30), np.uint8)
    labels[6, 6, 6:14], labels[15, 6:18, 15], labels[24, 24, 14:18] = 1, 2, 3
    case, asked = whole(labels), replace(rule((8, 8, 8)), classes=TrainConfig().classes)
    sources = map(np.random.default_rng, range(1200))
    corners = [choose_corner(case, asked, source, forced=True) for source in sources]
    centres = Counter(int(labels[tuple(np.add(corner, 4))]) for corner in corners)
    whole_tumour = {1: 8 / 24, 2: 12 / 24, 3: 4 / 24}
    core, enhancing = {1: 8 / 12, 2: 0, 3: 4 / 12}, {1: 0, 2: 0, 3: 1}
    for label in (1, 2, 3):
        due = (whole_tumour[label] + core[label] + enhancing[label]) / 3
        assert abs(centres[label] - 1200 * due) < 60


def test_a_class_that_is_absent_leaves_its_share_to_the_others():
    labels = np.zeros((24, 24, 24), np.uint8)
    labels[8, 8, 8], labels[14, 14, 10:16] = 1, 3
    patches = drawn(whole(labels), rule((8, 8, 8), foreground_share=1.0), range(300))
    centres = Counter(int(found[4, 4, 4]) for _, found in patches)
    assert set(centres) == {1, 3}
    assert abs(centres[1] - 150) < 35


@given(shape=sizes, size=sizes, seed=st.integers(0, 10**6), label=st.integers(1, 3))
@settings(max_examples=100)
def test_a_patch_that_is_forced_holds_the_voxel_that_was_chosen(shape, size, seed, label):
    shape = np.add(shape, 1)
    labels = np.zeros(shape, np.uint8)
    labels[tuple(np.random.default_rng(seed).integers(0, shape))] = label
    _, found = draw_patch(
        whole(labels), rule(size, foreground_share=1.0), draw=seed, case=0, ordinal=0
    )
    assert (found == label).sum() == 1


def test_a_case_without_tumour_is_cut_anywhere():
    bare = prepare([np.arange(16**3, dtype=np.int16).reshape(16, 16, 16)])
    for case in (empty(16, 16, 16), bare):
        sources, asked = map(np.random.default_rng, range(40)), rule((8, 8, 8))
        corners = {choose_corner(case, asked, source, forced=True) for source in sources}
        assert len(corners) > 20


def test_a_patch_larger_than_the_case_is_padded_with_each_background(prepared: Prepared):
    size = tuple(n + 2 * m for n, m in zip(prepared.labels.shape, (3, 0, 5), strict=True))
    image, labels = draw_patch(prepared, rule(size), draw=0, case=0, ordinal=0)
    pad = ((3, 3), (0, 0), (5, 5))
    background = prepared.scaling.background
    for patch, modality, outside in zip(image, prepared.image, background, strict=True):
        assert np.array_equal(patch, np.pad(modality, pad, constant_values=outside))
    assert np.array_equal(labels, np.pad(prepared.labels, pad))
    assert prepared.scaling.background.tolist() == [0, 0, 0, 0, -5]


# On a grid


@given(shape=sizes, size=sizes, overlap=st.floats(0, 0.99))
@settings(max_examples=200)
def test_the_grid_covers_the_case_and_overlaps_as_asked(shape, size, overlap):
    corners = covering_grid(shape, size, overlap)
    axes = [sorted(set(axis)) for axis in zip(*corners, strict=True)]
    assert sorted(corners) == sorted(product(*axes))  # each once
    for firsts, length, edge in zip(axes, shape, size, strict=True):
        assert firsts[0] <= 0
        assert firsts[-1] + edge >= length
        if edge <= length:
            assert (firsts[0], firsts[-1]) == (0, length - edge)
        else:
            assert len(firsts) == 1
        for one, other in pairwise(firsts):
            assert other - one <= max(1, edge * (1 - overlap))


def test_turns_walk_through_the_grid_before_a_place_comes_again():
    case, asked = empty(20, 18, 12), rule((8, 8, 8), "grid", grid_overlap=0.5)
    corners = covering_grid((20, 18, 12), (8, 8, 8), 0.5)
    count = len(corners)
    assert count == 4 * 4 * 2
    places = [int(image[0, 0, 0, 0]) for image, _ in drawn(case, asked, range(3 * count))]
    walks = [places[n * count : (n + 1) * count] for n in range(3)]
    every = sorted(int(case.image[0][corner]) for corner in corners)
    assert [sorted(walk) for walk in walks] == [every] * 3
    assert walks[0] != walks[1] != walks[2] != walks[0]


@pytest.mark.parametrize("sampling", ["grid", "slices"])
def test_cases_and_seeds_are_walked_through_in_orders_of_their_own(sampling: str):
    case, size = empty(16, 16, 16), (8, 8, 1 if sampling == "slices" else 8)

    def walk(index: int, seed: int) -> tuple[int, ...]:
        asked = rule(size, sampling, seed)
        patches = [draw_patch(case, asked, draw=0, case=index, ordinal=n) for n in range(16)]
        return tuple(int(image[0, 0, 0, 0]) for image, _ in patches)

    assert len({walk(index, seed) for index in range(4) for seed in range(4)}) == 16


# The whole


@given(found=st.lists(boxes, min_size=1, max_size=6), stride=st.sampled_from([1, 8, 16, 32]))
def test_the_size_of_volumes_is_the_least_multiple_that_holds_every_case(found, stride):
    lengths = [[length for _, length in box] for box in found]
    rows = [[edge for first, n in box for edge in (first, first + n)] for box in found]
    size = volume_size(rows, stride)
    for edge, longest in zip(size, np.max(lengths, axis=0), strict=True):
        assert edge % stride == 0
        assert edge - stride < longest <= edge
        assert type(edge) is int


def test_a_case_lies_whole_in_its_volume(prepared: Prepared):
    box = [edge for span in prepared.box for edge in (span.start, span.stop)]
    size = volume_size([box], 16)
    image, labels = draw_patch(prepared, rule(size, "volume"), draw=5, case=1, ordinal=9)
    assert image.shape == (5, *size)
    inside = tuple(
        slice((edge - n) // 2 + (edge - n) % 2, (edge - n) // 2 + (edge - n) % 2 + n)
        for edge, n in zip(size, prepared.labels.shape, strict=True)
    )
    assert np.array_equal(image[:, *inside], prepared.image)
    assert np.array_equal(labels[inside], prepared.labels)
    image[:, *inside] = prepared.scaling.background[:, None, None, None]
    labels[inside] = 0
    assert (image == prepared.scaling.background[:, None, None, None]).all()
    assert not labels.any()


# Slices


@pytest.mark.parametrize(
    ("first", "count", "expected"),
    [
        (0, 155, range(12)),
        (3, 4, range(3, 7)),
        (9, 99, range(9, 12)),
        (40, 5, range(11, 12)),  # a case with fewer slices gives its last one
    ],
)
def test_each_slice_that_is_asked_for_comes_once_a_walk(first, count, expected):
    case = prepare([np.broadcast_to(np.arange(1, 13, dtype=np.int16), (9, 9, 12))])
    asked = rule((8, 8, 1), "slices", first_slice=first, num_slices=count)
    patches = drawn(case, asked, range(3 * len(expected)))
    assert all((image == image[0, 0, 0, 0]).all() for image, _ in patches)
    found = [int(image[0, 0, 0, 0]) - 1 for image, _ in patches]
    walks = [found[n * len(expected) : (n + 1) * len(expected)] for n in range(3)]
    assert [sorted(walk) for walk in walks] == [list(expected)] * 3


@pytest.mark.parametrize("fixture", ["prepared", "quantised"])
def test_a_slice_at_its_own_size_is_that_of_the_canonical_volume(fixture, request):
    case = request.getfixturevalue(fixture)
    volume, mask = full(case), np.zeros(case.shape, np.uint8)
    mask[case.box] = case.labels
    for k in range(SHAPE[2]):
        image, labels = cut_slice(case, k, (*SHAPE[:2], 1))
        assert (image.dtype, labels.dtype) == (np.int16, np.uint8)
        assert np.array_equal(image, volume[..., k : k + 1])
        assert np.array_equal(labels, mask[..., k : k + 1])


slice_sizes = st.tuples(st.integers(8, 50), st.integers(8, 50), st.just(1))


@given(size=slice_sizes, k=st.integers(0, SHAPE[2] - 1), floats=st.booleans())
@settings(max_examples=100)
def test_the_edge_of_the_brain_does_not_fade(prepared, quantised, size, k, floats):
    case = quantised if floats else prepared
    plane = full(case)[..., k]
    outside = case.scaling.background[:, None, None]
    brain = (plane != outside).any(axis=0)
    image, _ = cut_slice(case, k, size)
    assert image.shape == (len(plane), *size)
    small = (image[..., 0] != outside).any(axis=0)
    if not brain.any():
        assert not small.any()
    for resized, modality in zip(image[..., 0], plane, strict=True):
        if small.any():
            assert modality[brain].min() <= resized[small].min()
            assert resized[small].max() <= modality[brain].max()
    assert (image[..., 0] == outside)[:, ~small].all()
    nearest = [nearby(n, m) for n, m in zip(size[:2], plane.shape[1:], strict=True)]
    for i, j in product(range(size[0]), range(size[1])):
        assert small[i, j] in brain[np.ix_(nearest[0][i], nearest[1][j])]


def nearby(new: int, old: int) -> list[list[int]]:
    """The old places that lie nearest to each new one: one, or the two that it lies between."""
    middles = (np.arange(new) + 0.5) * old / new
    return [sorted({int(m - 1e-6), min(int(m + 1e-6), old - 1)}) for m in middles]


@given(
    labels=arrays(np.uint8, (9, 12, 2), elements=st.integers(0, 3)),
    size=slice_sizes,
)
@settings(max_examples=40)
def test_labels_of_a_slice_are_the_nearest(labels, size):
    _, found = cut_slice(whole(labels), 1, size)
    nearest = [nearby(n, m) for n, m in zip(size[:2], labels.shape[:2], strict=True)]
    for i, j in product(range(size[0]), range(size[1])):
        assert found[i, j, 0] in labels[np.ix_(nearest[0][i], nearest[1][j], [1])]


def test_a_slice_made_smaller_is_between_its_neighbours():
    i, j = np.indices((16, 16))
    image = np.repeat((100 + 2 * i + 40 * j).astype(np.int16)[..., None], 2, axis=2)
    image[0, 0, 0] = 0  # so that the corners do not share a value, which would be background
    found, _ = cut_slice(prepare([image]), 1, (8, 8, 1))
    i, j = np.indices((8, 8)) * 2 + 0.5
    assert np.array_equal(found[0, ..., 0], 100 + 2 * i + 40 * j)


# Whatever the sampling


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_draw_is_a_pure_function_of_its_numbers(prepared: Prepared, sampling: str):
    size = (8, 9, 1) if sampling == "slices" else (8, 9, 10)
    size = (32, 32, 32) if sampling == "volume" else size
    asked = rule(size, sampling, foreground_share=0.5)
    first = drawn(prepared, asked, range(20))
    second = drawn(prepared, asked, range(19, -1, -1))[::-1]
    for (image, labels), (again, same) in zip(first, second, strict=True):
        assert (image.shape, image.dtype) == ((5, *size), np.int16)
        assert (labels.shape, labels.dtype) == (size, np.uint8)
        assert np.array_equal(image, again)
        assert np.array_equal(labels, same)
    assert len({image.tobytes() for image, _ in first}) >= (1 if sampling == "volume" else 10)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_case_without_labels_is_drawn_with_none(prepared: Prepared, sampling: str):
    bare = prepare(list(full(prepared)))
    size = (8, 8, 1) if sampling == "slices" else (8, 8, 8)
    for image, labels in drawn(bare, rule(size, sampling, foreground_share=1.0), range(5)):
        assert image.any()
        assert labels.shape == size
        assert not labels.any()


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_patch_is_no_view_of_its_case(prepared: Prepared, sampling: str):
    size = prepared.labels.shape
    size = (*size[:2], 1) if sampling == "slices" else size
    image, labels = draw_patch(prepared, rule(size, sampling), draw=0, case=0, ordinal=0)
    assert not np.shares_memory(image, prepared.image)
    assert not np.shares_memory(labels, prepared.labels)


@given(data=st.data(), size=sizes)
@settings(max_examples=150)
def test_a_patch_is_the_padded_case_cut(prepared: Prepared, data, size):
    corner = tuple(
        data.draw(st.integers(min(0, n - s), max(0, n - s)))
        for n, s in zip(prepared.labels.shape, size, strict=True)
    )
    image, labels = cut(prepared, corner, size)
    assert (image.dtype, labels.dtype) == (np.int16, np.uint8)
    assert image.transpose(0, 3, 2, 1).flags.c_contiguous
    assert labels.T.flags.c_contiguous
    pad = 24
    box = tuple(slice(c + pad, c + pad + s) for c, s in zip(corner, size, strict=True))
    background = prepared.scaling.background
    for patch, modality, outside in zip(image, prepared.image, background, strict=True):
        assert np.array_equal(patch, np.pad(modality, pad, constant_values=outside)[box])
    assert np.array_equal(labels, np.pad(prepared.labels, pad)[box])
