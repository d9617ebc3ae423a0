"""Folders, trees and cohorts -> label files by case id, and what their values mean."""

from dataclasses import dataclass, replace

from raybrats import storage
from raybrats.brats import EDITIONS, edition_of, label_set_name, label_values
from raybrats.data.cohort import index, layout, rows
from raybrats.data.cohort.case import Case
from raybrats.errors import DataError, MissingObjectError
from raybrats.predict import origin

LabelValues = tuple[int, ...]
"""Values of the labels in a label file; empty where they are not known."""
NO_FOLD = -1
"""Fold of a case that is in none."""


@dataclass(frozen=True)
class LabelFile:
    """One label file, and its label values where a cohort or the caller knows them."""

    case_id: str
    uri: str
    """Where it lies; empty where a case is known, but has no labels."""
    values: LabelValues = ()
    label_set: str = ""
    """What they are, as in a cohort."""
    edition: str = ""
    """Edition of its case; empty: that of its id."""
    fold: int = NO_FOLD


def case_edition(file: LabelFile) -> str:
    """The edition of a file's case: as a cohort or the caller knows it, else by its id.

    Example:
        >>> case_edition(LabelFile("BraTS2021_00000", "a.nii", edition="nnunet"))
        '2021'
    """
    return file.edition if file.edition in EDITIONS else edition_of(file.case_id)


def with_own(file: LabelFile) -> LabelFile:
    """The file with the labels of its id's edition, unless it has some or its id tells none.

    Example:
        >>> with_own(LabelFile("BraTS2021_00000", "a.nii")).values
        (1, 2, 4)
    """
    edition = edition_of(file.case_id)
    if file.values or edition not in EDITIONS or EDITIONS[edition].proof:
        return file
    return replace(file, values=label_values(edition), label_set=label_set_name(edition))


def label_files(uri: str, edition: str | None, kind: str) -> dict[str, LabelFile]:
    """Label files by case id, from a cohort file, a tree of cases, or a folder of label files.

    Args:
        uri: where they are.
        edition: label convention of all of them; as each is known where not given.
        kind: predictions or references, for both may lie in one folder.

    Raises:
        DataError: there is no label file, or a case has two.

    Example:
        >>> from raybrats.phantom.phantom import write_phantoms
        >>> ids = write_phantoms("cases", num_cases=1, shape=(24, 24, 20), edition="2021")
        >>> [file.values for file in label_files("cases", None, kind="references").values()]
        [(1, 2, 4)]
    """
    if uri.endswith(".parquet"):
        cases = rows.read_cohort(uri)
    else:
        plain = _plain_files(uri, edition, kind)
        if plain:
            return plain
        cases = index.find_cases(uri)
    found = {case.case_id: _file_of(case, edition) for case in cases}
    if not any(file.uri for file in found.values()):
        raise DataError(f"{uri}: no label file")
    return found


def _file_of(case: Case, edition: str | None) -> LabelFile:
    """The label file of a case in a cohort."""
    values, label_set = told_by(edition) or (case.label_values, case.label_set)
    where, whose = case.label_uri or "", edition or case.edition
    return LabelFile(case.case_id, where, values, label_set, whose, case.fold)


def _plain_files(uri: str, edition: str | None, kind: str) -> dict[str, LabelFile]:
    """Label files of a folder that holds nothing else; both kinds may lie side by side."""
    storage.require(uri)
    objects = storage.list_objects(uri)
    files = [u for u in objects if layout.is_volume(u)]
    labels = [u for u in files if not layout.is_modality(u)]
    if len(labels) < len(files) or any(storage.name(u) == "dataset.json" for u in objects):
        return {}
    marked = [u for u in labels if layout.is_reference(u)]
    if 0 < len(marked) < len(labels):
        labels = marked if kind == "references" else [u for u in labels if u not in set(marked)]
    found: dict[str, LabelFile] = {}
    told = told_by(edition) or ((), _recorded(uri) if kind == "predictions" else "")
    for u in labels:
        file = LabelFile(layout.case_id_of(u), u, *told, edition=edition or "")
        if file.case_id in found:
            two = f"{found[file.case_id].uri} and {file.uri}"
            raise DataError(f"{two} are both of case {file.case_id}; leave one")
        found[file.case_id] = file
    return found


def _recorded(uri: str) -> str:
    """The label set of the model whose predictions lie there; empty where nothing says it."""
    try:
        return origin.read(uri).labels
    except MissingObjectError:
        return ""


def told_by(edition: str | None) -> tuple[LabelValues, str] | None:
    """Values and name of the labels of an edition; None if none is named.

    Example:
        >>> told_by("2021"), told_by(None)
        (((1, 2, 4), 'glioma'), None)
    """
    return (label_values(edition), label_set_name(edition)) if edition else None
