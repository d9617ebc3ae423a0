"""Which prediction meets which reference, and by the rules of which year."""

import shutil

import pytest

from raybrats.brats import EDITIONS
from raybrats.data.cohort.index import find_cases
from raybrats.data.cohort.rows import write_cohort
from raybrats.errors import DataError, UsageError
from raybrats.phantom.phantom import write_phantoms
from raybrats.predict.label_file import LabelFile, label_files
from raybrats.predict.pairs import match, read_references, rules_for


def references_of(*case_ids, edition=""):
    files = [LabelFile(case_id, f"{case_id}.nii.gz", edition=edition) for case_id in case_ids]
    return [(file, file) for file in files]


@pytest.mark.parametrize(
    ("case_id", "rules"),
    [
        ("BraTS19_TCIA10_1", "brats2020"),
        ("BraTS20_Training_001", "brats2020"),
        ("BraTS2021_00000", "brats2020"),
        ("BraTS-GLI-00001-000", "brats2023"),
        ("BraTS-GLI-00001-100", "brats2023"),
        ("BraTS-SSA-00001-000", "brats2023"),
        ("BraTS-MET-00001-000", "brats2023"),
        ("BraTS-PED-00001-000", "brats2023"),
        ("BraTS-MEN-00001-000", "brats2023"),
        ("BraTS-MEN-RT-0001-1", "brats2023"),
        ("BRATS_001", "brats2026"),
        ("patient7", "brats2026"),
    ],
)
def test_rules_are_those_of_the_year(case_id, rules):
    assert rules_for(references_of(case_id)) == rules
    assert rules_for(references_of(case_id), "brats2023") == "brats2023"


def test_an_edition_that_is_told_tells_the_rules():
    assert rules_for(references_of("patient7", edition="2021")) == "brats2020"
    assert rules_for(references_of("BraTS2021_00000", edition="nnunet")) == "brats2020"
    assert {name: EDITIONS[name].rules for name in ("2021", "PED", "msd")} == {
        **{"2021": "brats2020", "PED": "brats2023", "msd": "brats2026"}
    }


def test_years_with_several_rules_are_not_mixed_unless_told():
    mixed = references_of("BraTS2021_00000", "BraTS-GLI-00001-000", "BraTS20_Training_001")
    with pytest.raises(UsageError, match=r"several years .*brats2020.*brats2023.*--rules"):
        rules_for(mixed)
    assert rules_for(mixed, "brats2020") == "brats2020"
    assert rules_for(references_of("BraTS2021_00000", "BraTS20_Training_001")) == "brats2020"


def test_rules_of_no_year_are_refused():
    with pytest.raises(UsageError, match="'brats1999': there are brats2020, brats2023, brats2026"):
        rules_for(references_of("BraTS2021_00000"), "brats1999")


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """A tree of twelve cases, its cohort file, and a folder with a prediction of each."""
    folder = tmp_path_factory.mktemp("cases")
    write_phantoms(str(folder / "tree"), num_cases=12, shape=(16, 16, 16), edition="2021")
    found = find_cases(str(folder / "tree"))
    write_cohort(found, str(folder / "cohort.parquet"))
    (folder / "predictions").mkdir()
    for case in found:
        shutil.copy(case.label_uri, folder / "predictions" / f"{case.case_id}.nii.gz")
    return folder, found


@pytest.mark.parametrize("references", ["tree", "cohort.parquet"])
@pytest.mark.parametrize("fold", [0, 3])
def test_a_fold_is_scored_alone(cases, references, fold):
    folder, found = cases
    predictions = str(folder / "predictions")
    predicted = label_files(predictions, None, kind="predictions")
    wanted = [case.case_id for case in found if case.fold == fold]
    known = read_references(str(folder / references), fold=fold)
    matched = match(predictions, predicted, known)
    assert [ours.case_id for ours, _ in matched.pairs] == wanted
    assert matched.missing == ()
    one = match(predictions, {wanted[0]: predicted[wanted[0]]}, known)
    assert one.missing == tuple(wanted[1:])
    with pytest.raises(DataError, match=f"no labels for the cases of fold {fold}"):
        match(predictions, {i: predicted[i] for i in predicted if i not in wanted}, known)


def test_a_fold_needs_a_cohort_that_has_it(cases):
    folder, _ = cases
    with pytest.raises(UsageError, match=r"--fold 0: .*no fold; give the cohort file"):
        read_references(str(folder / "predictions"), fold=0)
    with pytest.raises(UsageError, match=r"--fold 9: .*has cases of 0, 1, 2, 3, 4"):
        read_references(str(folder / "cohort.parquet"), fold=9)
