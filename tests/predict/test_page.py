"""The report: one file that needs nothing else, true to its numbers, whatever part is absent."""

import base64
import gzip
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from raybrats.label_set import ED, GLIOMA, NCR, TREATED
from raybrats.phantom.phantom import make_phantom
from raybrats.predict.evaluate import evaluation_of
from raybrats.predict.page.page import Report, render
from raybrats.predict.page.slices import Shown
from raybrats.predict.summary import SCORES
from raybrats.registry.tracking import Curve

HOSTILE = 'case <b>7</b> & "co" </script><script>alert(1)</script>'
SHAPE = (48, 40, 36)
NIIVUE_SHA256 = "47b896b77ec4a5be3ef1949c33ad393b6f45629921f326c279000bcf51bdb4af"
"""Of `dist/niivue.umd.js` in the package that npm serves as `@niivue/niivue` 0.69.0."""


@pytest.fixture(scope="module")
def shown():
    image, labels = make_phantom(0, shape=SHAPE)
    images, spacing_mm = {"flair": image[0], "t1ce": image[2]}, (5.0, 6.0, 4.3)
    predictions = {HOSTILE: np.roll(labels, 1, 0)}
    return Shown(HOSTILE, images, spacing_mm, labels, predictions, role="worst")


def evaluation(scores, regions=GLIOMA.region_names):
    rows = [
        {"case_id": case_id, "region": region, **dict.fromkeys(SCORES, value)}
        for case_id, value in scores.items()
        for region in regions
    ]
    return evaluation_of("brats2023", rows, [])


@pytest.fixture(scope="module")
def full(shown):
    steps = tuple(range(1, 201))
    names = ("train/loss", "val/dice_WT", "val/dice_mean")
    return Report(
        title=HOSTILE,
        facts={"Recipe": "tiny", HOSTILE: HOSTILE},
        curves={name: Curve(steps, tuple(1 / s for s in steps)) for name in names},
        evaluations={HOSTILE: evaluation({HOSTILE: 0.25, "good": 0.75})},
        cases=[shown, replace(shown, case_id="second")],
    )


@pytest.fixture(scope="module")
def html(full):
    return render(full)


class Reader(HTMLParser):
    """Tags with their attributes, the text that is seen, and the scripts."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.scripts, self._inside = [], "", [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside = tag
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag):
        self._inside = "" if tag == self._inside else self._inside

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif not self._inside:
            self.text += data

    def of(self, tag):
        return [attrs for found, attrs in self.tags if found == tag]

    def scripts_with(self, **attrs):
        return [script for found, script in self.scripts if found == attrs]


def hash_of(script):
    return f"'sha256-{base64.b64encode(hashlib.sha256(script).digest()).decode()}'"


def unpacked(script):
    return gzip.decompress(base64.b64decode(script))


def test_nothing_is_loaded_from_outside(html, full):
    for page in (html, render(replace(full, viewer=True))):
        plain = re.sub(r";base64,[\w+/=]*|>[\w+/=]{999,}<", "", page)
        assert not re.search(r"https?:|url\((?!#)|@import|[\"'(]//", plain)
        for _, attrs in Reader(page).tags:
            links = [attrs[n] for n in ("src", "href", "xlink:href", "srcset") if n in attrs]
            assert all(link.startswith(("data:image/", "#")) for link in links)


def test_the_policy_lets_through_its_own_scripts_and_nothing_else(html, full):
    for page, packed in ((html, 0), (render(replace(full, viewer=True)), 1)):
        reader = Reader(page)
        (policy,) = (a["content"] for a in reader.of("meta") if "http-equiv" in a)
        rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
        assert rules["default-src"] == "'none'"
        bundles = reader.scripts_with(type="application/octet-stream", id="niivue")
        scripts = [s.encode() for s in reader.scripts_with()] + [unpacked(s) for s in bundles]
        assert len(scripts) == 1 + packed
        assert rules["script-src"].split() == [hash_of(script) for script in scripts]


def test_the_viewer_is_the_one_of_npm(html, full):
    page = render(replace(full, viewer=True))
    reader = Reader(page)
    (bundle,) = reader.scripts_with(type="application/octet-stream", id="niivue")
    assert hashlib.sha256(unpacked(bundle)).hexdigest() == NIIVUE_SHA256
    assert "Copyright (c) 2021, Niivue" in reader.text
    assert len(page) - len(html) < 1.2e6


def test_text_is_escaped_and_shown(html):
    reader = Reader(html)
    assert reader.text.count(HOSTILE) >= 5  # title, heading, fact, table, case
    assert "<b>7" not in html
    assert "</script><script>" not in html
    (script,) = reader.scripts_with()
    assert "alert" not in script
    assert (
        json.loads(reader.scripts_with(type="application/json")[0])["models"][0]["name"] == HOSTILE
    )


def test_means_and_worst_case_first(html):
    assert "0.500" in Reader(html).text
    assert html.index(">0.250</td>") < html.index(">0.750</td>")


def test_same_report_same_page(full, html):
    assert render(full) == html


def test_cells_hold_what_they_are_sorted_and_filtered_by(full):
    rows = [{**row, "nsd": None} for row in full.evaluations[HOSTILE].rows]
    rows[0] |= {"nsd": 0.125, "dice": None}
    scored = evaluation_of("brats2023", rows, [])
    reader = Reader(render(replace(full, evaluations={"m": scored})))
    cells = [a for a in reader.of("td") if "data-score" in a]
    assert {a["data-value"] for a in cells if a["data-score"] == "nsd"} == {"0.125", ""}
    assert [a["data-value"] for a in cells if a["data-score"] == "dice"][:4] == ["", *["0.25"] * 3]
    assert [a["data-dice"] for a in reader.of("tr") if "data-dice" in a] == ["0.250", "0.750"]
    labelled = {a.get("id") for a in reader.of("input") + reader.of("select")}
    assert {"filter-case", "filter-dice", "score"} <= labelled


def test_two_models_are_compared_over_the_cases_that_both_have(full, shown):
    other = evaluation({HOSTILE: 0.5, "elsewhere": 0.1})
    two = {**shown.predictions, "other": shown.reference}
    page = render(
        replace(
            full,
            evaluations={**full.evaluations, "other": other},
            cases=[replace(shown, predictions=two)],
        )
    )
    text = " ".join(Reader(page).text.split())
    assert "Against other" in text
    assert "Dice WT 0.500 0.300 1 -0.250 -0.250 to -0.250" in re.sub(
        r"\s+", " ", re.sub("<[^>]*>", " ", page)
    )
    assert 'data-value="-0.25">-0.250</td>' in page
    assert len(Reader(page).of("canvas")) == 6


def test_another_label_set_has_its_own_regions_colours_and_words(full, shown):
    labels = shown.reference.copy()
    labels[labels == NCR] = 4
    treated = replace(shown, predictions={"m": labels}, reference=None, label_set=TREATED)
    scored = evaluation({"a": 0.5}, TREATED.region_names)
    text = Reader(render(replace(full, evaluations={"m": scored}, cases=[treated]))).text
    for words in ("Resection cavity (RC)", "RC, resection cavity", "SNFH, surrounding FLAIR"):
        assert words in text
    assert "Dice RC" in text
    assert "necrotic core" not in text


@pytest.mark.parametrize(
    "absent",
    [
        {"curves": {}},
        {"evaluations": {}},
        {"cases": []},
        {"facts": {}},
        {"curves": {}, "evaluations": {}, "cases": [], "facts": {}},
    ],
    ids=lambda absent: "+".join(absent),
)
def test_an_absent_part_is_left_out(full, absent):
    html = render(replace(full, **absent))
    headings = {"curves": "<h2>Training", "evaluations": "<h3>Case by", "cases": "<h2>Cases"}
    for part, heading in headings.items():
        assert (heading in html) == (part not in absent)
    assert "nan" not in Reader(html).text


def test_values_that_are_not_numbers_are_left_out(full):
    curves = {"train/loss": Curve((1, 2, 3), (1.0, float("nan"), 0.5))}
    curves["val/dice_WT"] = Curve((1,), (float("nan"),))
    rows = [{**row, "hd95_mm": None} for row in full.evaluations[HOSTILE].rows]
    scored = evaluation_of("brats2023", rows, [])
    html = render(replace(full, curves=curves, evaluations={"m": scored}))
    assert "Training loss" in html
    assert "Validation Dice" not in html
    assert "Lesion HD95" in Reader(html).text
    assert not [a for a in Reader(html).of("option") if a.get("value") == "hd95_mm"]
    assert "nan" not in Reader(html).text


def test_the_model_s_own_expectations_are_set_against_its_scores(full):
    quality = [
        {"case_id": i, "region": "WT", "expected_dice": e, "agreement": None, "look": i == "good"}
        for i, e in ((HOSTILE, 0.3), ("good", 0.7), ("unscored", 0.5), ("good", None))
    ]
    html = render(replace(full, quality=quality))
    assert "Calibration" in html
    assert "Cases marked to be looked at: 1." in Reader(html).text
    assert "Calibration" not in render(replace(full, quality=quality[2:3]))


def test_volumes_of_cases_are_told(html, shown):
    cm3 = (shown.reference > 0).sum() * np.prod(shown.spacing_mm) / 1000
    assert f"(reference {cm3:.1f})" in html


def test_confusion_counts_the_voxels_of_the_shown_cases(html, shown):
    ours, due = shown.predictions[HOSTILE], shown.reference
    both = 2 * int(((ours == ED) & (due == ED)).sum())  # two cases, one like the other
    share = 100 * both / (2 * (due == ED).sum())
    assert f"{both:,} ({share:.1f} %)".replace(",", "\u202f") in html
