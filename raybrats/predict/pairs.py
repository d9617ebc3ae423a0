"""Predictions and references -> pairs of label files, and the rules by which they are scored."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from raybrats.brats import RULES, Rules, edition_of, rules_of, why_no_labels
from raybrats.errors import DataError, UsageError
from raybrats.label_set import label_set_of
from raybrats.predict.label_file import NO_FOLD, LabelFile, case_edition, label_files, with_own

Pair = tuple[LabelFile, LabelFile]
"""A prediction and its reference."""


@dataclass(frozen=True)
class References:
    """The label files of all cases that a tree, a cohort or a folder knows."""

    uri: str
    files: Mapping[str, LabelFile]
    fold: int | None = None
    """Cross-validation fold whose cases are scored; all where there is none."""

    @property
    def wanted(self) -> dict[str, LabelFile]:
        """Those of the fold, by case id."""
        return {i: f for i, f in self.files.items() if self.fold in (None, f.fold)}


@dataclass(frozen=True)
class Matched:
    """Predictions with their references, and what has no partner."""

    pairs: tuple[Pair, ...]
    """In the order of the case ids."""
    missing: tuple[str, ...]
    """Case ids of references without a prediction."""
    unlabelled: tuple[str, ...]
    """Case ids of predictions whose cases the references know without labels."""


def read_references(
    uri: str, edition: str | None = None, *, fold: int | None = None, skip_unknown: bool = False
) -> References:
    """The references of a cohort file, a tree of cases, or a folder of label files.

    Args:
        uri: where they are.
        edition: label convention of all of them.
        fold: the only one of which cases are scored.
        skip_unknown: take cases with labels of an edition that is not supported for unlabelled.

    Raises:
        DataError: there is no label file.
        UsageError: the files are in no folds, or none of them is in this one.

    Example:
        >>> read_references("cohort.parquet", fold=0).wanted  # doctest: +SKIP
    """
    files = label_files(uri, edition, kind="references")
    if skip_unknown:
        files = {i: f if with_own(f).values else replace(f, uri="") for i, f in files.items()}
    found = References(uri, files, fold)
    folds = sorted({file.fold for file in files.values()})
    if fold is not None and folds == [NO_FOLD]:
        why = "label files alone are in no fold; give the cohort file or the tree of the cases"
        raise UsageError(f"--fold {fold}: {uri}: {why}")
    if not found.wanted:
        raise UsageError(f"--fold {fold}: {uri} has cases of {', '.join(map(str, folds))}")
    return found


def match(predictions: str, predicted: Mapping[str, LabelFile], references: References) -> Matched:
    """Every prediction with the reference of the same case id.

    Args:
        predictions: where they are.
        predicted: the same by case id, as `label_files` gives them.
        references: all there are.

    Raises:
        DataError: a prediction has no reference, or none has one.

    Example:
        >>> file = LabelFile("a", "out/a.nii", values=(1, 2, 4))
        >>> match("out", {"a": file}, References("ref", {"a": file})).missing
        ()
    """
    if alone := sorted(predicted.keys() - references.files.keys()):
        raise DataError(f"no reference for {', '.join(alone[:5])} in {references.uri}")
    wanted = references.wanted
    ours = {i: predicted[i] for i in sorted(wanted.keys() & predicted.keys()) if predicted[i].uri}
    pairs = tuple(with_values((file, wanted[i])) for i, file in ours.items() if wanted[i].uri)
    if not pairs:
        which = "" if references.fold is None else f" of fold {references.fold}"
        raise DataError(f"{references.uri}: no labels for the cases{which} of {predictions}")
    return Matched(
        pairs,
        missing=tuple(sorted(i for i, file in wanted.items() if file.uri and i not in ours)),
        unlabelled=tuple(i for i in ours if not wanted[i].uri),
    )


def rules_for(pairs: Sequence[Pair], rules: str | None = None) -> Rules:
    """The rules of evaluation that are asked for, else those of the references' years.

    Raises:
        UsageError: there are no such rules, or the references are of years that differ in theirs.

    Example:
        >>> file = LabelFile("BraTS2021_00000", "a.nii")
        >>> rules_for([(file, file)]), rules_for([(file, file)], "brats2026")
        ('brats2020', 'brats2026')
    """
    if rules is not None:
        return check_rules(rules)
    example = {rules_of(case_edition(theirs)): theirs for _, theirs in pairs}
    if len(example) > 1:
        each = ", ".join(f"{f.case_id} {name}" for name, f in sorted(example.items()))
        raise UsageError(f"references of several years ({each}); say by --rules which holds")
    (found,) = example
    return found


def check_rules(rules: str) -> Rules:
    """The rules of evaluation of this name.

    Raises:
        UsageError: there are none.

    Example:
        >>> check_rules("brats2023")
        'brats2023'
    """
    for known in RULES:
        if rules == known:
            return known
    raise UsageError(f"--rules {rules!r}: there are {', '.join(RULES)}")


def with_values(pair: Pair) -> Pair:
    """The pair with the label values of both: its own, its partner's, or those of its id's edition.

    Raises:
        DataError: nothing tells them, or the labels of one are not those of the other.

    Example:
        >>> ours, theirs = LabelFile("a", "out/a.nii"), LabelFile("a", "/ref/a.nii", (1, 2, 4))
        >>> [file.values for file in with_values((ours, theirs))]
        [(1, 2, 4), (1, 2, 4)]
    """
    ours, theirs = (_like(a, b) for a, b in (pair, pair[::-1]))
    for file in (ours, theirs):
        if not file.values:
            raise DataError(f"{file.uri}: {why_no_labels(edition_of(file.case_id))}")
    told = [label_set_of(file.label_set) for file in (ours, theirs)]
    if told[0] != told[1]:
        words = " against ".join(", ".join(labels.names) for labels in told)
        raise DataError(f"{ours.uri} and {theirs.uri}: labels {words}; say whose by --edition")
    return ours, theirs


def _like(file: LabelFile, partner: LabelFile) -> LabelFile:
    """The file with its own labels, else its partner's, else those of its id's edition."""
    if file.values or not partner.values:
        return with_own(file)
    known = label_set_of(file.label_set or partner.label_set)
    if known != label_set_of(partner.label_set):  # as `predict` has written them then
        return replace(file, values=tuple(range(1, len(known.names) + 1)))
    return replace(file, values=partner.values, label_set=partner.label_set)
