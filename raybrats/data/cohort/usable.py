"""Which cases of a cohort a run can use, and on which side of its split they are."""

import logging
import re
from collections.abc import Sequence
from dataclasses import replace

from raybrats.brats import MODALITIES
from raybrats.config import TrainConfig
from raybrats.data.cohort.case import BAD, INCOMPLETE, OK, UNLABELLED, Case
from raybrats.errors import DataError
from raybrats.label_set import LabelSet, as_text

_LOG = logging.getLogger(__name__)
_HANDED_OUT = re.compile(r"imagests/|validation", re.IGNORECASE)
"""Folders in which the editions hand out cases without labels: imagesTs, ...ValidationData."""


def usable(config: TrainConfig, cases: Sequence[Case]) -> list[Case]:
    """The cases that training can use.

    Raises:
        DataError: more are bad than `data.max_bad_fraction`, or a side of the split is empty.

    Example:
        >>> from raybrats.recipes import tiny
        >>> cases = [Case(f"a{n}", f"a{n}", "2020", "brats", (), "seg", (), fold=n) for n in (0, 1)]
        >>> [case.case_id for case in usable(tiny(), cases)]
        ['a0', 'a1']
    """
    cases = with_modalities(cases, config.data.modalities)
    bad = left_out(config, cases)
    if len(bad) > config.data.max_bad_fraction * len(cases):
        first = "; ".join(f"{c.case_id} ({c.reason})" for c in bad[:3])
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise DataError(
            f"{len(bad)} of {len(cases)} cases cannot be used: {first}{more}; "
            "repair them, or leave them out with data.max_bad_fraction"
        )
    if bad:
        _LOG.warning("left out: %s", ", ".join(c.case_id for c in bad))
    good = trainable(cases, allow_incomplete=config.augment.drop_modality > 0)
    if not good:
        raise DataError(f"{config.data.cohort}: no case has labels; training needs them")
    good = _labelled_enough(config, good)
    for side, chosen in zip(("training", "validation"), split(config, good), strict=True):
        if not chosen:
            subjects = len({c.subject for c in good})
            raise DataError(
                f"data.fold {config.data.fold} leaves no case for {side}: the cohort has "
                f"{subjects} subjects; choose another fold, or -1 for all cases on both sides"
            )
    return good


def with_labels(config: TrainConfig, cases: Sequence[Case]) -> TrainConfig:
    """The run with the label set of its cases, where it names none.

    Raises:
        DataError: the cases have several, or another one than the run names.

    Example:
        >>> from raybrats.recipes import tiny
        >>> case = Case("a", "a", "MEN-RT", "brats", (), "gtv", (1,), label_set="gtv")
        >>> with_labels(tiny(), [case]).labels.names
        ('GTV',)
    """
    first: dict[LabelSet, Case] = {}
    for case in cases:
        first.setdefault(case.labels, case)
    if config.data.labels:
        strange = [case for labels, case in first.items() if labels != config.labels]
        named = f"data.labels has {', '.join(config.labels.names)}"
    else:
        strange = list(first.values())[1:]
        named = ", ".join(f"{each.case_id} has {_names(each)}" for each in [*first.values()][:1])
    if strange:
        raise DataError(
            f"{config.data.cohort}: {named}, but {strange[0].case_id} {_names(strange[0])}; train "
            "on cases of one label set"
        )
    chosen = as_text(next(iter(first), config.labels))
    return replace(config, data=replace(config.data, labels=chosen))


def _names(case: Case) -> str:
    return ", ".join(case.labels.names)


def _labelled_enough(config: TrainConfig, cases: Sequence[Case]) -> list[Case]:
    """The cases of whose foreground box at least `data.min_labelled_fraction` is labelled."""
    least = config.data.min_labelled_fraction
    few = [case for case in cases if case.labelled_fraction < least]
    if few:
        names = ", ".join(case.case_id for case in few)
        words = "left out, for less than %g of their voxels are labelled (%d of %d): %s"
        _LOG.warning(words, least, len(few), len(cases), names)
    return [case for case in cases if case.labelled_fraction >= least]


def left_out(config: TrainConfig, cases: Sequence[Case]) -> list[Case]:
    """The cases that a run cannot use, each with its reason.

    Example:
        >>> from raybrats.recipes import tiny
        >>> bad = Case("a", "a", "2020", "brats", (), "seg", (), status=BAD, reason="damaged gzip")
        >>> [case.reason for case in left_out(tiny(), [bad])]
        ['damaged gzip']
    """
    cases = with_modalities(cases, config.data.modalities)
    return quarantined(cases, allow_incomplete=config.augment.drop_modality > 0)


def split(config: TrainConfig, cases: Sequence[Case]) -> tuple[list[Case], list[Case]]:
    """Training and held-out cases of the fold; fold -1 has all of them on both sides.

    Example:
        >>> from raybrats.recipes import tiny
        >>> cases = [Case(f"a{n}", f"a{n}", "2020", "brats", (), "seg", (), fold=n) for n in (0, 1)]
        >>> training, held_out = split(tiny(), cases)
        >>> [case.case_id for case in training], [case.case_id for case in held_out]
        (['a1'], ['a0'])
    """
    fold, limit = config.data.fold, config.validation.max_cases or None  # 0: all of them
    if fold == -1:
        return list(cases), list(cases[:limit])
    held_out = [case for case in cases if case.fold == fold]
    return [case for case in cases if case.fold != fold], held_out[:limit]


def with_modalities(cases: Sequence[Case], modalities: Sequence[str]) -> list[Case]:
    """The cases as a run that takes only some modalities sees them.

    An incomplete case is whole if it lacks none of these, and bad if it lacks all of them.

    Example:
        >>> uris = ("flair.nii", "t1.nii", "", "t2.nii")
        >>> case = Case("a", "a", "2020", "brats", uris, "seg.nii", (), status=INCOMPLETE)
        >>> [c.status for names in (("flair",), ("t1ce",)) for c in with_modalities([case], names)]
        ['ok', 'bad']
    """
    chosen, seen = set(modalities), []
    for case in cases:
        constant = [m for m, spread in zip(MODALITIES, case.deviation, strict=False) if spread == 0]
        lacking = {*case.missing, *constant}
        if case.status == INCOMPLETE and chosen <= lacking:
            case = replace(case, status=BAD)
        elif case.status == INCOMPLETE and not chosen & lacking:
            case = replace(case, status=OK if case.label_uri else UNLABELLED, reason="")
        seen.append(case)
    return seen


def quarantined(cases: Sequence[Case], *, allow_incomplete: bool = False) -> list[Case]:
    """The cases that training cannot use; unlabelled ones only where labels are to be expected.

    That is beside labelled ones, but not in the folders in which the editions hand out their
    validation and test cases.

    Example:
        >>> whole = Case("a", "a", "2020", "brats", ("a/flair.nii",), "a/seg.nii", ())
        >>> bare = Case("b", "b", "2020", "brats", ("b/flair.nii",), None, (), status=UNLABELLED)
        >>> [(case.case_id, case.reason) for case in quarantined([whole, bare])]
        [('b', 'no label file')]
    """
    bad = [c for c in cases if c.status == BAD]
    if not allow_incomplete:
        hint = "; augment.drop_modality takes such cases"
        bad += [replace(c, reason=c.reason + hint) for c in cases if c.status == INCOMPLETE]
    if not trainable(cases, allow_incomplete=True):
        return bad
    listed = {case.case_id for case in bad}
    unlabelled = [
        replace(case, reason="no label file")
        for case in cases
        if case.status in (UNLABELLED, INCOMPLETE)
        and case.label_uri is None
        and case.case_id not in listed
        and not any(map(_HANDED_OUT.search, case.image_uris))
    ]
    return bad + unlabelled


def trainable(cases: Sequence[Case], *, allow_incomplete: bool = False) -> list[Case]:
    """The cases with labels in which nothing is wrong.

    Example:
        >>> bare = Case("b", "b", "2020", "brats", ("b/flair.nii",), None, (), status=UNLABELLED)
        >>> trainable([bare])
        []
    """

    def fits(case: Case) -> bool:
        return case.status == OK or (
            allow_incomplete and case.status == INCOMPLETE and case.label_uri is not None
        )

    return [case for case in cases if fits(case)]
