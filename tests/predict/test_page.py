"""The report: one file that needs nothing else, true to its voxels, whatever part is absent."""

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageSequence

from raybrats.label_set import ED, ET, GLIOMA, NCR, TREATED, LabelSet
from raybrats.phantom.phantom import make_phantom
from raybrats.predict import page as page
from raybrats.predict.page import Overlay, Report, render
from raybrats.predict.summary import SCORES
from raybrats.registry.tracking import Curve

HOSTILE = 'case <b>7</b> & "co" <script>'
SHAPE = (48, 40, 36)


@pytest.fixture(scope="module")
def overlay():
    image, labels = make_phantom(0, shape=SHAPE)
    return Overlay(HOSTILE, image[0], image[2], (5.0, 6.0, 4.3), labels, np.roll(labels, 1, 0))


@pytest.fixture(scope="module")
def full(overlay):
    steps = tuple(range(1, 201))
    names = ("train/loss", "train/lr", "val/dice_WT", "val/dice_mean", "patches_per_s")
    rows = [
        {"case_id": case_id, "region": region, **dict.fromkeys(SCORES, value)}
        for case_id, value in ((HOSTILE, 0.25), ("good", 0.75))
        for region in GLIOMA.region_names
    ]
    return Report(
        title=HOSTILE,
        facts={"Recipe": "tiny", HOSTILE: HOSTILE},
        curves={name: Curve(steps, tuple(1 / s for s in steps)) for name in names},
        scores=rows,
        overlays=[overlay, replace(overlay, case_id="second")],
    )


@pytest.fixture(scope="module")
def html(full):
    return render(full)


class Reader(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.links = [], "", []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for name, v in attrs if name in ("src", "href", "xlink:href", "srcset")]

    def handle_data(self, data):
        self.text += data


def gif(html):
    (data,) = re.findall(r'"data:image/gif;base64,([^"]+)"', html)
    return base64.b64decode(data)


def test_nothing_is_loaded_from_outside(html):
    without_images = re.sub(r";base64,[\w+/=]*", "", html)
    assert not re.search(r"https?:|url\((?!#)|@import|//\w", without_images)
    assert all(link.startswith(("data:image/", "#")) for link in Reader(html).links)


def test_text_is_escaped_and_shown(html):
    reader = Reader(html)
    assert reader.text.count(HOSTILE) >= 5  # title, heading, fact, table, overlay
    assert not {"script", "link", "iframe"} & set(reader.tags)
    assert "<b>7" not in html


def test_means_and_worst_case_first(html):
    text = Reader(html).text
    assert "0.500" in text
    assert html.index("0.250</td>") < html.index("0.750</td>")


def test_same_report_same_page(full, html):
    assert render(full) == html


def test_fly_through_moves_and_shows_the_labels(html):
    movie = Image.open(io.BytesIO(gif(html)))
    assert 1 < movie.n_frames <= 40
    frames = [frame.convert("RGB").getcolors(10**6) for frame in ImageSequence.Iterator(movie)]
    shown = {colour for colours in frames for _, colour in colours}
    colours = page.colours_of(GLIOMA)
    wanted = [tuple(bytes.fromhex(colours[name][1:])) for name in GLIOMA.names]
    assert shown.issuperset(wanted)


def test_another_label_set_has_its_own_regions_colours_and_words(full, overlay):
    labels = overlay.prediction.copy()
    labels[labels == NCR] = 4
    rows = [{**full.scores[0], "region": region} for region in TREATED.region_names]
    treated = replace(overlay, prediction=labels, reference=None, label_set=TREATED)
    text = Reader(render(replace(full, scores=rows, overlays=[treated]))).text
    for words in (
        "Resection cavity (RC)",
        "RC, resection cavity",
        "SNFH, surrounding FLAIR",
        "Dice RC",
    ):
        assert words in text
    assert "necrotic core" not in text
    others = page.colours_of(LabelSet(("a", "b", "ET"), ()))
    assert len({*others.values()}) == 3


def test_fly_through_of_pure_noise_is_under_its_limit():
    noise = np.random.default_rng(0).integers(0, 999, (160, 160, 90))
    labels = np.full(noise.shape, ED, np.uint8)
    movie = page._fly_through(Overlay("noise", noise, noise, (1, 1, 1), None, labels))
    assert len(movie) * 3 / 4 < 1.5e6


@pytest.mark.parametrize(
    "absent",
    [
        {"curves": {}},
        {"scores": []},
        {"overlays": []},
        {"facts": {}},
        {"curves": {}, "scores": [], "overlays": [], "facts": {}},
    ],
    ids=lambda absent: "+".join(absent),
)
def test_an_absent_part_is_left_out(full, absent):
    html = render(replace(full, **absent))
    headings = {"curves": "<h2>Training", "scores": "<th>Case", "overlays": "<h2>Cases"}
    for part, heading in headings.items():
        assert (heading in html) == (part not in absent)
    assert "nan" not in Reader(html).text


@pytest.mark.parametrize("empty", ["reference", "prediction", "both", "no reference", "image"])
def test_an_overlay_with_nothing_to_see(overlay, empty):
    nothing = np.zeros(SHAPE, np.uint8)
    bare = {
        "reference": replace(overlay, reference=nothing),
        "prediction": replace(overlay, prediction=nothing),
        "both": replace(overlay, reference=nothing, prediction=nothing),
        "no reference": replace(overlay, reference=None),
        "image": replace(overlay, flair=nothing, t1ce=nothing),
    }[empty]
    html = render(Report("x", {}, {}, [], [bare]))
    assert ("The prediction is empty" in html) == (empty in ("prediction", "both"))
    assert ("No reference." in html) == (empty == "no reference")
    assert ('class="reference"' in html) == (empty in ("prediction", "image"))
    assert Image.open(io.BytesIO(gif(html))).n_frames >= 1


def test_values_that_are_not_numbers_are_left_out(full):
    curves = {"train/loss": Curve((1, 2, 3), (1.0, float("nan"), 0.5))}
    curves["val/dice_WT"] = Curve((1,), (float("nan"),))
    rows = [{**row, "hd95_mm": float("nan")} for row in full.scores]
    html = render(replace(full, curves=curves, scores=rows))
    assert "Training loss" in html
    assert "Validation Dice" not in html
    assert "nan" not in Reader(html).text


def test_volumes_of_another_shape_are_refused(overlay):
    with pytest.raises(ValueError, match=r"case <b>7.*one shape"):
        replace(overlay, prediction=overlay.prediction[1:])


def test_slices_are_shown_in_radiological_convention():
    left, posterior, superior = np.meshgrid(*map(np.arange, (4, 5, 6)), indexing="ij")
    axial, coronal, sagittal = (
        [page._as_displayed(v, axis, 1) for v in (left, posterior, superior)] for axis in (2, 1, 0)
    )
    assert axial[0].shape == (5, 4)
    assert (np.diff(axial[0], axis=1) == 1).all()  # the patient's left on the right
    assert (np.diff(axial[1], axis=0) == 1).all()  # anterior up
    assert (np.diff(coronal[0], axis=1) == 1).all()
    assert (np.diff(coronal[2], axis=0) == -1).all()  # superior up
    assert (np.diff(sagittal[1], axis=1) == 1).all()  # anterior on the left
    assert (np.diff(sagittal[2], axis=0) == -1).all()


def test_panels_lie_on_the_largest_cross_section(overlay):
    labels = overlay.reference > 0
    for panel in page._panels(overlay):
        axis = {"sagittal": 0, "coronal": 1, "axial": 2}[panel.plane]
        area = labels.take(panel.index, axis).sum()
        assert area == max(labels.take(n, axis).sum() for n in range(SHAPE[axis]))


@pytest.mark.parametrize("label", [NCR, ED, ET])
def test_outlines_hold_exactly_the_voxels_of_the_label(overlay, label):
    volume = overlay.reference == label
    mask = volume[..., volume.sum(axis=(0, 1)).argmax()].T
    zoom = np.array([20, 30])  # pixels of a voxel along x and y
    filled = np.zeros(mask.shape * zoom[::-1], bool)
    for line in page._outlines(mask, zoom):
        canvas = Image.new("1", filled.shape[::-1])
        ImageDraw.Draw(canvas).polygon(line.ravel().tolist(), fill=1)
        filled ^= np.array(canvas)
    assert mask.any()
    assert (filled[zoom[1] // 2 :: zoom[1], zoom[0] // 2 :: zoom[0]] == mask).all()
