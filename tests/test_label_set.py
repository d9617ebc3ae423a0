"""Label sets: their text, what becomes of regions, and a line from masks to scores for each."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raybrats.brats import EDITIONS
from raybrats.config import DataConfig, LossConfig, TrainConfig
from raybrats.data.cohort.case import Case, prepare_case
from raybrats.data.cohort.index import find_cases, verify_case
from raybrats.data.cohort.rows import read_cohort, write_cohort
from raybrats.data.cohort.usable import with_labels
from raybrats.errors import DataError, UsageError
from raybrats.label_set import GLIOMA, LABEL_SETS, LabelSet, Region, as_text, label_set_of
from raybrats.model.decision import decoded, labels_of
from raybrats.model.loss import SegmentationLoss, label_masks, region_masks
from raybrats.model.network import num_outputs
from raybrats.model.regions import region_dice, region_sizes
from raybrats.phantom.phantom import write_phantoms

NAMES = st.text("abcXYZ 019_.-", min_size=1, max_size=8).filter(lambda name: name != "mean")


@st.composite
def label_sets(draw):
    names = draw(st.lists(NAMES, min_size=1, max_size=6, unique=True))
    numbers = st.sampled_from(range(1, len(names) + 1))
    regions = []
    for name in draw(st.lists(NAMES, min_size=1, max_size=5, unique=True)):
        labels = draw(st.lists(numbers, min_size=1, max_size=4, unique=True))
        regions.append(Region(name, tuple(labels), painted=draw(st.sampled_from(labels))))
    return LabelSet(tuple(names), tuple(regions))


@given(label_sets())
def test_a_set_is_what_its_text_says(known):
    assert label_set_of(as_text(known)) == known


@pytest.mark.parametrize(
    "text",
    [
        *("nonsense", "{", "[]", "{}", '{"labels": []}', '{"labels": "abc"}', '{"labels": [1]}'),
        *('{"labels": ["a", "a"]}', '{"labels": ["mean"]}', '{"labels": ["a\\nb"]}'),
        '{"labels": ["a"], "regions": {"b": [2]}, "regions_class_order": [2]}',
        '{"labels": ["a", "b"], "regions": {"c": [1]}, "regions_class_order": [2]}',
        '{"labels": ["a"], "regions": {"b": [1]}, "regions_class_order": [1, 1]}',
        '{"labels": ["a"], "regions": {"b": [true]}, "regions_class_order": [1]}',
        json.dumps({"labels": [f"l{n}" for n in range(65)]}),
        "[" * 10_000,
    ],
)
def test_what_is_no_set_is_refused_in_one_line(text):
    with pytest.raises(UsageError) as refusal:
        label_set_of(text)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 400
    with pytest.raises(UsageError):
        DataConfig(labels=text)


@pytest.mark.parametrize("known", LABEL_SETS.values(), ids=LABEL_SETS)
def test_regions_become_the_labels_that_they_were_made_of(known):
    labels = torch.randint(0, 1 + len(known.names), (2, 5, 4, 3))
    assert torch.equal(labels_of(region_masks(labels, known) > 0, known), labels.to(torch.uint8))


@pytest.mark.parametrize("target", ["regions", "labels"])
@pytest.mark.parametrize("name", LABEL_SETS)
def test_a_sure_network_that_is_right_has_no_loss_and_scores_1(name, target):
    config = TrainConfig(data=DataConfig(labels=name), loss=LossConfig(target=target))
    labels = torch.randint(0, 1 + len(config.labels.names), (2, 8, 8, 8))
    masks = region_masks if target == "regions" else label_masks
    logits = 100 * (2 * masks(labels, config.labels) - 1)
    assert logits.shape[1] == num_outputs(config)
    assert SegmentationLoss(config.loss, config.labels)([logits], labels) < 1e-4
    assert SegmentationLoss(config.loss, config.labels)([-logits], labels) > 0.5
    found = region_sizes(decoded(config, logits), labels, config.labels)
    assert region_dice(found) == [1.0] * len(config.labels.regions)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> dict[str, Case]:
    """A verified phantom of each edition."""
    tree = tmp_path_factory.mktemp("drawn")
    for edition in EDITIONS:
        write_phantoms(str(tree / edition), num_cases=1, shape=(24, 24, 20), edition=edition)
    return {edition: verify_case(find_cases(str(tree / edition))[0]) for edition in EDITIONS}


@pytest.mark.parametrize("edition", EDITIONS)
def test_every_label_of_an_edition_comes_through_to_the_patches(drawn, edition):
    case, data = drawn[edition], DataConfig(cache_gb=0)
    prepared = prepare_case(case, data)
    assert case.labels == label_set_of(EDITIONS[edition].label_set)
    assert tuple(prepared.counts[1:].tolist()) == case.label_counts
    assert min(case.label_counts) > 0
    flat = prepared.labels.T.ravel()[prepared.tumour]
    assert flat.tolist() == np.repeat(range(1, len(prepared.counts)), prepared.counts[1:]).tolist()


def test_a_run_learns_what_its_cohort_tells_apart(drawn):
    for case in drawn.values():
        assert with_labels(TrainConfig(), [case]).labels == case.labels
    whole = TrainConfig(data=DataConfig(labels="glioma"))
    alike = [drawn[edition] for edition in ("2020", "2021", "2023", "msd", "MEN")]
    assert with_labels(TrainConfig(), alike) == with_labels(whole, alike) == whole
    for config in (TrainConfig(), whole):
        with pytest.raises(DataError, match=r"NCR, ED, ET, but BraTS-PED-\S+ ET, NET, CC, ED"):
            with_labels(config, [*alike, drawn["PED"]])


def test_cohorts_keep_the_set_and_older_ones_are_of_glioma(drawn, tmp_path):
    import pyarrow.parquet as pq

    place = str(tmp_path / "cohort.parquet")
    cases = [case for case in drawn.values() if case.label_values]
    write_cohort(cases, place)
    assert read_cohort(place) == cases
    old = [drawn[edition] for edition in ("2020", "2023")]
    write_cohort(old, place)
    pq.write_table(pq.read_table(place).drop_columns("label_set"), place)
    assert [case.labels for case in read_cohort(place)] == [GLIOMA] * 2


def test_labels_that_do_not_fit_their_set_are_refused(drawn, tmp_path):
    from dataclasses import replace

    place, case = str(tmp_path / "cohort.parquet"), drawn["PED"]
    for wrong in ({"label_values": (1, 2)}, {"label_counts": (1,)}, {"label_set": "nonsense"}):
        write_cohort([replace(case, **wrong)], place)
        with pytest.raises(DataError, match=r"cohort\.parquet: case BraTS-PED-"):
            read_cohort(place)
