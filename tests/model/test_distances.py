"""Surface distances against brute force, in every definition that the field has of HD95."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from raybrats.model.distances import (
    Surfaces,
    corner_surfaces,
    directed_hd95,
    pooled_hd95,
    surface_dice,
    voxel_surfaces,
    weighted_hd95,
)

MASKS = hnp.arrays(np.bool_, (5, 4, 3))
ONE_MM = (1.0, 1.0, 1.0)
SPACINGS = st.sampled_from([ONE_MM, (1.0, 2.0, 5.0), (0.4, 0.4, 3.0)])


def border(mask):
    """Voxels of a mask with one of their six neighbours outside it, or outside the volume."""
    padded = np.pad(mask, 1)
    inside = np.ones_like(mask)
    for axis in range(3):
        for step in (-1, 1):
            inside &= np.roll(padded, step, axis)[1:-1, 1:-1, 1:-1]
    return np.argwhere(mask & ~inside)


def brute(one, other, spacing):
    """Distances of border voxels both ways."""
    a, b = (border(mask) * np.array(spacing) for mask in (one, other))
    distances = np.linalg.norm(a[:, None] - b[None], axis=-1)
    return distances.min(axis=1), distances.min(axis=0)


def box(corner, size, shape=(20, 18, 16)):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(c, c + s) for c, s in zip(corner, size, strict=True))] = True
    return mask


@settings(max_examples=50)
@given(MASKS, MASKS, SPACINGS)
def test_distances_are_brute_force_and_symmetric(one, other, spacing):
    assume(one.any() and other.any())
    found, back = voxel_surfaces(one, other, spacing), voxel_surfaces(other, one, spacing)
    there, returned = brute(one, other, spacing)
    np.testing.assert_allclose(found.from_prediction, there)
    np.testing.assert_allclose(found.from_reference, returned)
    both = np.concatenate([there, returned])
    assert pooled_hd95(found) == pytest.approx(np.percentile(both, 95))
    assert directed_hd95(found) == pytest.approx(
        max(np.percentile(d, 95) for d in (there, returned))
    )
    assert directed_hd95(found) == directed_hd95(back)
    assert pooled_hd95(found) == pytest.approx(pooled_hd95(back))
    for tolerance in (0.5, 1.0, 2.5):
        near = ((there <= tolerance).mean() + (returned <= tolerance).mean()) / 2
        assert surface_dice(found, tolerance) == pytest.approx(near)


@pytest.mark.parametrize("spacing", [ONE_MM, (1.0, 2.0, 5.0), (0.4, 0.4, 3.0)])
def test_the_area_of_a_box_is_that_of_its_faces_less_its_edges(spacing):
    """Marching cubes cut edges and corners off, so the area is a little less than the faces'."""
    mask = box((2, 3, 4), (10, 9, 8))
    found = corner_surfaces(mask, mask, spacing)
    edges = np.array([10, 9, 8]) * spacing
    faces = 2 * (edges[0] * edges[1] + edges[1] * edges[2] + edges[0] * edges[2])
    inner = edges - np.array(spacing)
    flat = 2 * (inner[0] * inner[1] + inner[1] * inner[2] + inner[0] * inner[2])
    assert flat < found.areas_prediction.sum() < faces
    assert weighted_hd95(found) == 0


@settings(max_examples=30)
@given(MASKS, SPACINGS, st.permutations([0, 1, 2]), st.integers(0, 7))
def test_an_orientation_changes_nothing(mask, spacing, axes, flips):
    assume(mask.any())
    other = np.roll(mask, 1, axis=0)
    turned = [
        np.flip(np.transpose(m, axes), [n for n in range(3) if flips >> n & 1])
        for m in (mask, other)
    ]
    mm = tuple(spacing[axis] for axis in axes)
    here, there = voxel_surfaces(mask, other, spacing), voxel_surfaces(*turned, mm)
    assert pooled_hd95(there) == pytest.approx(pooled_hd95(here))
    here, there = corner_surfaces(mask, other, spacing), corner_surfaces(*turned, mm)
    assert there.areas_reference.sum() == pytest.approx(here.areas_reference.sum())


def test_far_slabs_are_their_distance_in_mm_apart_by_every_definition():
    one, other = (box((place, 0, 0), (1, 18, 16)) for place in (2, 9))
    mm = (2.5, 1.0, 1.0)
    voxels, corners = voxel_surfaces(one, other, mm), corner_surfaces(one, other, mm)
    assert pooled_hd95(voxels) == directed_hd95(voxels) == pytest.approx(7 * 2.5)
    assert weighted_hd95(corners) == pytest.approx(7 * 2.5)


def test_areas_weigh_distances():
    """19 of 20 mm2 lie at 1 mm: the 95th percentile of the area is there, that of elements not."""
    areas = np.array([19.0, 0.5, 0.5])
    far = np.array([1.0, 30.0, 30.0])
    surfaces = Surfaces(far, np.zeros(1), areas, np.ones(1))
    assert weighted_hd95(surfaces) == 1
    assert directed_hd95(surfaces) == 30
