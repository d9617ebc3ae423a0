"""A case as the page embeds it: every voxel where it was, small enough, and steady."""

import base64
import gzip
import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from raybrats.label_set import ED, ET, GLIOMA, NCR, LabelSet
from raybrats.phantom.phantom import make_phantom
from raybrats.predict.page.slices import Shown, colours_of, embedded, region_volumes

SHAPE = (48, 40, 36)


@pytest.fixture(scope="module")
def shown():
    image, labels = make_phantom(0, shape=SHAPE)
    images = {"flair": image[0], "t1ce": image[2]}
    return Shown("a", images, (5.0, 6.0, 4.3), labels, {"m": np.roll(labels, 1, 0)})


def labels_of(packed, shape):
    return np.frombuffer(gzip.decompress(base64.b64decode(packed)), np.uint8).reshape(
        shape, order="F"
    )


def grey_of(uri, found):
    """The volume of a mosaic, read as the page's script reads it."""
    mosaic = np.asarray(
        Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("L")
    )
    (ni, nj, nk), columns = found["shape"], found["columns"]
    tiles = (divmod(k, columns) for k in range(nk))
    return np.stack([mosaic[r * nj : (r + 1) * nj, c * ni : (c + 1) * ni].T for r, c in tiles], 2)


def test_labels_come_back_voxel_by_voxel(shown):
    found = embedded(shown)
    box = tuple(slice(s, s + n) for s, n in zip(found["start"], found["shape"], strict=True))
    assert (labels_of(found["reference"], found["shape"]) == shown.reference[box]).all()
    ours = labels_of(found["models"][0]["labels"], found["shape"])
    assert (ours == shown.predictions["m"][box]).all()
    assert (ours > 0).sum() == (shown.predictions["m"] > 0).sum()  # nothing is cropped away


def test_images_come_back_within_what_webp_loses(shown):
    found = embedded(shown)
    box = tuple(slice(s, s + n) for s, n in zip(found["start"], found["shape"], strict=True))
    for name, image in shown.images.items():
        grey = grey_of(found["images"][name], found)
        low, high = np.percentile(image[image > 0], (0.5, 99.8))
        wanted = np.clip((image[box] - low) / (high - low), 0, 1) * 255
        assert np.abs(grey - wanted).mean() < 6


def test_the_first_slices_are_those_of_the_largest_cross_section(shown):
    found, labels = embedded(shown), shown.reference > 0
    for axis, index in enumerate(found["at"]):
        area = labels.sum(axis=tuple(a for a in range(3) if a != axis))
        assert area[found["start"][axis] + index] == area.max()


def test_a_volume_beyond_the_limit_is_thinned_out():
    noise = np.random.default_rng(0).integers(1, 999, (200, 200, 180)).astype(np.int16)
    noise[0] = 0
    labels = np.full(noise.shape, ED, np.uint8)
    found = embedded(Shown("noise", {"t1": noise}, (1.0, 1.0, 1.0), None, {"m": labels}))
    assert found["step"] == 2
    assert found["shape"] == [100, 100, 90]
    assert found["spacing"] == [2.0, 2.0, 2.0]
    assert labels_of(found["models"][0]["labels"], found["shape"]).all()
    assert len(found["images"]["t1"]) < 1.5e6  # noise is the worst that can come


@pytest.mark.parametrize("empty", ["reference", "prediction", "no reference", "image", "all"])
def test_a_case_with_nothing_to_see(shown, empty):
    nothing = np.zeros(SHAPE, np.uint8)
    bare = {
        "reference": replace(shown, reference=nothing),
        "prediction": replace(shown, predictions={"m": nothing}),
        "no reference": replace(shown, reference=None),
        "image": replace(shown, images={"flair": nothing}),
        "all": replace(
            shown, images={"t2": nothing}, reference=nothing, predictions={"m": nothing}
        ),
    }[empty]
    found = embedded(bare)
    assert (found["reference"] is None) == (empty == "no reference")
    assert all(0 <= at < n for at, n in zip(found["at"], found["shape"], strict=True))
    assert grey_of(next(iter(found["images"].values())), found).shape == tuple(found["shape"])


def test_inner_labels_are_outlined_over_outer_ones(shown):
    assert embedded(shown)["order"] == [ED, NCR, ET]


def test_the_same_case_is_the_same_text(shown):
    assert embedded(shown) == embedded(shown)


def test_volumes_of_regions(shown):
    cm3 = 5.0 * 6.0 * 4.3 / 1000
    found = region_volumes(shown)["ET"]
    assert found["reference"] == pytest.approx(cm3 * (shown.reference == 3).sum())
    assert found["m"] == pytest.approx(cm3 * (shown.predictions["m"] == 3).sum())


def test_volumes_of_another_shape_are_refused(shown):
    with pytest.raises(ValueError, match=r"a: .*one shape"):
        replace(shown, reference=shown.reference[1:])


def test_labels_have_colours_of_their_own():
    assert len({*colours_of(GLIOMA).values()}) == 3
    assert len({*colours_of(LabelSet(("a", "b", "ET"), ())).values()}) == 3
