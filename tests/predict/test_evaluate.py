"""Predictions against references: file names, label values, and what does not fit."""

import csv
import json
import shutil
from dataclasses import asdict

import nibabel as nib
import numpy as np
import pytest

from raybrats import cli
from raybrats.data.cohort.index import find_cases
from raybrats.data.cohort.rows import write_cohort
from raybrats.errors import DataError, UsageError
from raybrats.label_set import GLIOMA
from raybrats.model.metrics import score_case
from raybrats.phantom.phantom import write_phantoms
from raybrats.predict.compare import compare
from raybrats.predict.evaluate import evaluate, score_pair
from raybrats.predict.label_file import LabelFile, told_by
from raybrats.predict.ranking import paired
from raybrats.predict.summary import SCORES, means

SHAPE = (12, 10, 8)
TOLD = (1, 2, 4)


def labels(seed=0, values=(1, 2, 3)):
    """Nested blocks of NCR, ED and ET, placed by seed."""
    found = np.zeros(SHAPE, np.uint8)
    i, j, k = np.random.default_rng(seed).integers(0, 3, 3)
    found[i : i + 8, j : j + 7, k : k + 5] = values[1]
    found[i + 1 : i + 6, j + 1 : j + 5, k + 1 : k + 4] = values[0]
    found[i + 2 : i + 4, j + 2 : j + 4, k + 1 : k + 3] = values[2]
    return found


def save(path, array, spacing=(1.0, 1.0, 1.0)):
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])  # LPS, as BraTS is
    nib.save(nib.Nifti1Image(array, affine), path)
    return str(path)


def file(path, array, values=(1, 2, 3), **where):
    return LabelFile("one", save(path, array, **where), values)


def rows(ours, theirs, spacing_mm=(1.0, 1.0, 1.0), case_id="one", rules="brats2020"):
    scores = score_case(ours, theirs, spacing_mm, GLIOMA, rules)
    return tuple({"case_id": case_id, **asdict(score)} for score in scores)


def scored(pair, rules="brats2020"):
    return score_pair(tuple(pair), rules).rows


def test_a_pair_is_scored_in_millimetres(tmp_path):
    spacing = (1.0, 2.0, 3.0)
    pair = [file(tmp_path / f"{n}.nii.gz", labels(n), (1, 2, 3), spacing=spacing) for n in range(2)]
    assert scored(pair) == rows(labels(0), labels(1), spacing)


@pytest.mark.parametrize("ours", [(1, 2, 3), (1, 2, 4)])
@pytest.mark.parametrize("theirs", [(1, 2, 3), (1, 2, 4)])
def test_each_file_has_the_values_that_it_is_told_to_have(tmp_path, ours, theirs):
    pair = (
        file(tmp_path / "p.nii.gz", labels(0, ours), ours),
        file(tmp_path / "r.nii.gz", labels(1, theirs), theirs),
    )
    assert scored(pair) == rows(labels(0), labels(1))


@pytest.mark.parametrize(
    ("case_id", "values"),
    [("BraTS20_Training_001", (1, 2, 4)), ("brats-gli-00001-000", (1, 2, 3)), ("one", None)],
)
def test_the_values_of_plain_files_come_from_their_ids_alone(tmp_path, case_id, values):
    written = values or (1, 2, 3)
    pair = tuple(
        LabelFile(case_id, save(tmp_path / f"{n}.nii.gz", labels(n, written))) for n in range(2)
    )
    if values is None:
        with pytest.raises(DataError, match=r"0\.nii\.gz: .*--edition"):
            scored(pair)
        return
    assert scored(pair) == rows(labels(0), labels(1), case_id=case_id)


@pytest.mark.parametrize(
    ("case_id", "edition", "regions"),
    [
        ("BraTS-MET-00001-000", "MET", ["WT", "TC", "ET", "RC"]),
        ("BraTS-MEN-00001-000", "MEN", ["WT", "TC", "ET"]),
        ("BraTS-GLI-00001-100", "post-op", ["WT", "TC", "ET", "RC"]),
        ("BraTS-PED-00001-000", "PED", ["WT", "TC", "CC", "ET"]),
    ],
)
def test_regions_are_those_of_the_edition(tmp_path, case_id, edition, regions):
    place = save(tmp_path / "p.nii.gz", labels())
    plain, told = LabelFile(case_id, place), LabelFile(case_id, place, *told_by(edition))
    if edition == "PED":  # whose ids are those of two releases
        with pytest.raises(DataError, match=r"p\.nii\.gz: BraTS-PED ids .*--edition 2023"):
            scored((plain, plain))
    else:
        assert scored((plain, plain)) == scored((told, told))
    for pair in ((plain, told), (told, plain)):
        assert [row["region"] for row in scored(pair)] == regions


def test_labels_of_two_sets_are_not_compared(tmp_path):
    place = save(tmp_path / "p.nii.gz", labels())
    pair = LabelFile("a", place, *told_by("2023")), LabelFile("a", place, *told_by("PED"))
    with pytest.raises(DataError, match=r"labels NCR, ED, ET against ET, NET, CC, ED; .*--edition"):
        scored(pair)


def test_a_value_that_the_edition_lacks_is_named(tmp_path):
    pair = (
        file(tmp_path / "p.nii.gz", labels(values=(1, 2, 3)), TOLD),
        file(tmp_path / "r.nii.gz", labels(values=TOLD), TOLD),
    )
    with pytest.raises(DataError, match=r"p\.nii\.gz.*3"):
        scored(pair)


def test_a_prediction_in_another_orientation_is_the_same_prediction(tmp_path):
    plain = labels(1)
    turned = nib.Nifti1Image(plain, np.diag([-1.0, -1.0, 1.0, 1.0])).as_reoriented(
        np.array([[2, 1], [0, -1], [1, -1]])
    )
    nib.save(turned, tmp_path / "turned.nii.gz")
    pair = (
        LabelFile("one", str(tmp_path / "turned.nii.gz"), (1, 2, 3)),
        file(tmp_path / "r.nii.gz", plain),
    )
    assert all(row["dice"] == 1 and row["hd95_mm"] == 0 for row in scored(pair))


def test_other_shapes_are_refused(tmp_path):
    pair = (
        file(tmp_path / "p.nii.gz", labels()[:-1]),
        file(tmp_path / "r.nii.gz", labels()),
    )
    with pytest.raises(DataError, match=r"one: .*shape") as refusal:
        scored(pair)
    assert "differs in shape from the others: (12, 10, 8) and (11, 10, 8)" in str(refusal.value)


@pytest.fixture
def folders(tmp_path, ray_cluster):
    """Predictions and references of cases 0 and 1."""
    assert ray_cluster.address
    for n in range(2):
        save(tmp_path / "predictions" / f"BraTS-GLI-0000{n}-000.nii.gz", labels(n))
        save(tmp_path / "references" / f"BraTS-GLI-0000{n}-000.nii.gz", labels(n + 2))
    return tmp_path / "predictions", tmp_path / "references"


def expected(*seeds):
    return tuple(
        row
        for n in seeds
        for row in rows(
            labels(n), labels(n + 2), case_id=f"BraTS-GLI-0000{n}-000", rules="brats2023"
        )
    )


@pytest.mark.ray
def test_every_case_is_scored_by_its_id(folders):
    found = evaluate(*map(str, folders))
    assert found.rows == expected(0, 1)
    assert found.mean == means(expected(0, 1))
    assert found.missing == ()


@pytest.mark.ray
@pytest.mark.parametrize("ending", [".nii.gz", "_seg.nii.gz", "-seg.nii.gz", ".nii"])
@pytest.mark.parametrize("ours", [".nii.gz", "_prediction.nii.gz", "_pred.nii.gz"])
def test_files_are_known_by_the_case_id_in_their_name(tmp_path, ray_cluster, ours, ending):
    assert ray_cluster.address
    save(tmp_path / "predictions" / f"BraTS-GLI-00000-000{ours}", labels(0))
    save(tmp_path / "references" / f"BraTS-GLI-00000-000{ending}", labels(2))
    found = evaluate(str(tmp_path / "predictions"), str(tmp_path / "references"))
    assert found.rows == expected(0)


@pytest.mark.ray
def test_both_kinds_may_lie_in_one_folder(folders):
    predictions, references = folders
    for path in references.iterdir():
        shutil.copy(path, predictions / path.name.replace(".nii", "_seg.nii"))
    found = evaluate(str(predictions), str(predictions))
    assert found.rows == expected(0, 1)


@pytest.mark.ray
def test_references_without_a_prediction_are_missing(folders):
    predictions, references = folders
    (predictions / "BraTS-GLI-00000-000.nii.gz").unlink()
    found = evaluate(str(predictions), str(references))
    assert found.missing == ("BraTS-GLI-00000-000",)
    assert found.rows == expected(1)


@pytest.mark.ray
def test_the_verb_prints_and_writes_one_document(folders, tmp_path):
    for ending in ("json", "csv"):
        place = str(tmp_path / f"scores.{ending}")
        answer = cli.evaluate([*map(str, folders), "--rules", "brats2020", "--out", place])
    document = json.loads((tmp_path / "scores.json").read_text())
    assert document == json.loads(json.dumps(answer.document))
    assert answer.title.startswith("2 cases by brats2020; of labels: accuracy 0.")
    assert answer.columns == ("mean [95 %]", "WT", "TC", "ET", "mean")
    assert [row[0] for row in answer.rows][:3] == ["dice", "iou", "hd95_mm"]
    assert document["rules"] == "brats2020"
    assert [row["case_id"] for row in document["cases"]] == [
        row["case_id"] for row in expected(0, 1)
    ]
    assert {*document["cases"][0]} == {"case_id", "region", *SCORES}
    with (tmp_path / "scores.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [float(line["dice"]) for line in lines] == [r["dice"] for r in document["cases"]]


@pytest.mark.ray
def test_models_are_compared_on_the_cases_that_all_have(folders, tmp_path):
    predictions, references = folders
    perfect = tmp_path / "perfect"
    shutil.copytree(references, perfect)
    (predictions / "BraTS-GLI-00000-000.nii.gz").unlink()
    ours, theirs = str(predictions), str(perfect)
    found = compare([ours, theirs], str(references), rules="brats2020")
    assert found.cases == ("BraTS-GLI-00001-000",)
    assert found.left_out == {"BraTS-GLI-00000-000": (ours,)}
    assert [standing.model for standing in found.standings] == [theirs, ours]
    assert found.differences[theirs, ours] == paired(found.rows[theirs], found.rows[ours])
    document = json.loads(json.dumps(found.document()))
    assert document["mean"][theirs]["mean"]["dice"] == 1
    assert {row["score"] for row in document["differences"]} >= {"dice", "hd95_mm"}


@pytest.mark.ray
def test_a_prediction_without_a_reference_is_refused(folders):
    predictions, references = folders
    (references / "BraTS-GLI-00001-000.nii.gz").unlink()
    with pytest.raises(DataError, match="no reference for BraTS-GLI-00001-000"):
        evaluate(str(predictions), str(references))


@pytest.mark.ray
def test_two_files_of_one_case_are_refused_by_name(folders):
    predictions, references = folders
    (predictions / "again").mkdir()
    name = "BraTS-GLI-00001-000.nii.gz"
    shutil.copy(predictions / name, predictions / "again" / name)
    with pytest.raises(DataError, match=rf"{name} and .*{name} are both of case"):
        evaluate(str(predictions), str(references))


@pytest.mark.ray
def test_an_edition_says_what_the_values_mean(folders):
    predictions, references = folders
    with pytest.raises(DataError, match=r"BraTS-GLI-\d.*unknown label 3.*1, 2, 4"):
        evaluate(str(predictions), str(references), edition="2020")
    assert evaluate(str(predictions), str(references), edition="2023").rows == expected(0, 1)
    swapped = evaluate(str(predictions), str(references), edition="msd")
    assert swapped.mean["TC"] != means(expected(0, 1))["TC"]
    with pytest.raises(UsageError, match="2020, 2021, 2023, msd"):
        evaluate(str(predictions), str(references), edition="1999")


@pytest.mark.ray
def test_a_failure_on_the_cluster_keeps_its_own_words(folders):
    predictions, references = folders
    save(predictions / "BraTS-GLI-00001-000.nii.gz", labels(1)[:-2])
    with pytest.raises(DataError) as refusal:
        evaluate(str(predictions), str(references))
    one = "BraTS-GLI-00001-000"
    how = "differs in shape from the others: (12, 10, 8) and (10, 10, 8)"
    assert str(refusal.value) == f"{one}: {one}.nii.gz {how}"


@pytest.mark.ray
def test_an_empty_folder_is_refused(folders, tmp_path):
    (tmp_path / "empty").mkdir()
    for pair in ((tmp_path / "empty", folders[1]), (folders[0], tmp_path / "empty")):
        with pytest.raises(DataError, match="empty"):
            evaluate(*map(str, pair))


@pytest.mark.ray
@pytest.mark.parametrize("edition", ["2020", "2023", "msd"])
def test_a_cohort_knows_its_own_values(tmp_path, ray_cluster, edition):
    assert ray_cluster.address
    write_phantoms(str(tmp_path / "tree"), num_cases=2, shape=(20, 20, 16), edition=edition)
    cases = find_cases(str(tmp_path / "tree"))
    write_cohort(cases, str(tmp_path / "cohort.parquet"))
    for case in cases:
        shutil.copy(case.label_uri, tmp_path / f"{case.case_id}_pred.nii.gz")
    (tmp_path / "predictions").mkdir()
    for path in tmp_path.glob("*_pred.nii.gz"):
        path.rename(tmp_path / "predictions" / path.name)
    told = None if edition != "msd" else edition
    for references in ("tree", "cohort.parquet"):
        found = evaluate(str(tmp_path / "predictions"), str(tmp_path / references), told)
        # The rules of no year before 2026 hold for msd, and those score NETC and SNFH too.
        assert len(found.rows) == 2 * (5 if edition == "msd" else 3)
        assert found.mean["mean"]["dice"] == 1
    assert evaluate(str(tmp_path / "tree"), str(tmp_path / "tree")).mean["mean"]["dice"] == 1


@pytest.mark.ray
@pytest.mark.real
def test_real_predictions_score_as_their_files_say(real_cases, ray_cluster, tmp_path):
    assert ray_cluster.address
    for number in (3, 5):
        for path in (real_cases / "segmentations").glob(f"*_00{number}_*"):
            shutil.copy(path, tmp_path)
    found = evaluate(str(tmp_path), str(tmp_path))
    assert len(found.rows) == 6
    for row in found.rows:
        p, r = (
            np.asarray(nib.load(tmp_path / f"{row['case_id']}_{kind}.nii.gz").dataobj).astype(int)
            for kind in ("prediction", "seg")
        )
        inside = {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}[row["region"]]
        p, r = np.isin(p, inside), np.isin(r, inside)
        assert row["dice"] == pytest.approx(2 * (p & r).sum() / (p.sum() + r.sum()), rel=1e-12)
        assert row["iou"] == pytest.approx((p & r).sum() / (p | r).sum(), rel=1e-12)
        assert row["sensitivity"] == pytest.approx((p & r).sum() / r.sum(), rel=1e-12)


def test_plain_predictions_follow_the_convention_of_their_references(tmp_path):
    write_phantoms(str(tmp_path / "tree"), num_cases=2, shape=(24, 24, 20), edition="msd")
    shutil.copytree(tmp_path / "tree/Task01_BrainTumour/labelsTr", tmp_path / "predictions")
    for case in find_cases(str(tmp_path / "tree")):
        ours = LabelFile(case.case_id, f"{tmp_path}/predictions/{case.case_id}.nii.gz")
        theirs = LabelFile(case.case_id, case.label_uri, case.label_values)
        assert case.label_values == (2, 1, 3)
        assert [row["dice"] for row in scored((ours, theirs))] == [1.0, 1.0, 1.0]


def test_a_prediction_that_lies_elsewhere_is_refused(tmp_path):
    reference = file(tmp_path / "r.nii.gz", labels())
    moved = nib.Nifti1Image(labels(), np.diag([-1.0, -1.0, 1.0, 1.0]))
    moved.affine[0, 3] += 5
    nib.save(nib.Nifti1Image(labels(), moved.affine), tmp_path / "p.nii.gz")
    with pytest.raises(DataError, match="lies elsewhere"):
        scored((LabelFile("one", str(tmp_path / "p.nii.gz")), reference))


def test_a_file_without_an_orientation_takes_that_of_its_partner(tmp_path):
    reference = file(tmp_path / "r.nii.gz", labels())
    bare = nib.Nifti1Image(labels(), None)
    bare.header["sform_code"] = bare.header["qform_code"] = 0
    nib.save(bare, tmp_path / "p.nii.gz")
    rows_found = scored((LabelFile("one", str(tmp_path / "p.nii.gz")), reference))
    assert [row["dice"] for row in rows_found] == [1.0, 1.0, 1.0]
