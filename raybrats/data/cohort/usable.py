"""Which cases of a cohort a run can use, and on which side of its split they are."""

import logging
import re
from collections.abc import Sequence
from dataclasses import replace

from raybrats.brats import MODALITIES
from raybrats.config import TrainConfig
from raybrats.data.cohort.case import BAD, INCOMPLETE, OK, UNLABELLED, Case
from raybrats.errors import DataError

_LOG = logging.getLogger(__name__)


def usable(config: TrainConfig, cases: Sequence[Case]) -> list[Case]:
    """The cases that training can use.

    Raises:
        DataError: more are bad than `data.max_bad_fraction`, or a side of the split is empty.
    """
    lenient = config.augment.drop_modality > 0
    cases = with_modalities(cases, config.data.modalities)
    bad = left_out(config, cases)
    if len(bad) > config.data.max_bad_fraction * len(cases):
        named_ones = "; ".join(f"{c.case_id} ({c.reason})" for c in bad[:3])
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise DataError(
            f"{len(bad)} of {len(cases)} cases cannot be used: {named_ones}{more}; "
            "repair them, or leave them out with data.max_bad_fraction"
        )
    if bad:
        _LOG.warning("left out: %s", ", ".join(c.case_id for c in bad))
    good = trainable(cases, allow_incomplete=lenient)
    if not good:
        raise DataError(f"{config.data.cohort}: no case has labels; training needs them")
    for side, chosen in zip(("training", "validation"), split(config, good), strict=True):
        if not chosen:
            subjects = len({c.subject for c in good})
            raise DataError(
                f"data.fold {config.data.fold} leaves no case for {side}: the cohort has "
                f"{subjects} subjects; choose another fold, or -1 for all cases on both sides"
            )
    return good


def left_out(config: TrainConfig, cases: Sequence[Case]) -> list[Case]:
    """The cases that a run cannot use, each with its reason."""
    lenient = config.augment.drop_modality > 0
    cases = with_modalities(cases, config.data.modalities)
    return quarantined(cases, allow_incomplete=lenient)


def split(config: TrainConfig, cases: Sequence[Case]) -> tuple[list[Case], list[Case]]:
    """Training and held-out cases of the fold; fold -1 has all of them on both sides."""
    if config.data.fold == -1:
        return list(cases), _first(config, cases)
    held_out = [case for case in cases if case.fold == config.data.fold]
    return [case for case in cases if case.fold != config.data.fold], _first(config, held_out)


_HANDED_OUT = re.compile(r"imagests/|validation", re.IGNORECASE)


def with_modalities(cases: Sequence[Case], modalities: Sequence[str]) -> list[Case]:
    """The cases as a run sees them that takes only some modalities.

    An incomplete case is whole if it lacks none of these, and bad if it lacks all of them.
    """
    return [
        _with_modalities(case, set(modalities)) if case.status == INCOMPLETE else case
        for case in cases
    ]


def _with_modalities(case: Case, chosen: set[str]) -> Case:
    lacking = {m for m, spread in zip(MODALITIES, case.deviation, strict=False) if spread == 0}
    lacking |= set(case.missing)
    if chosen <= lacking:
        return replace(case, status=BAD)
    whole = OK if case.label_uri else UNLABELLED
    return case if chosen & lacking else replace(case, status=whole, reason="")


def quarantined(cases: Sequence[Case], *, allow_incomplete: bool = False) -> list[Case]:
    """Cases that training cannot use; unlabelled ones only where labels are to be expected.

    That is beside labelled ones, but not in the folders in which the editions hand out their
    validation and test cases (imagesTs, ...ValidationData).
    """
    labelled = bool(trainable(cases, allow_incomplete=True))
    bad = [c for c in cases if c.status == BAD]
    if not allow_incomplete:
        hint = "; augment.drop_modality takes such cases"
        bad += [replace(c, reason=c.reason + hint) for c in cases if c.status == INCOMPLETE]
    told = {case.case_id for case in bad}
    unlabelled = [
        replace(case, reason="no label file")
        for case in cases
        if case.status in (UNLABELLED, INCOMPLETE)
        and case.label_uri is None
        and case.case_id not in told
        and not any(map(_HANDED_OUT.search, case.image_uris))
    ]
    return bad + (unlabelled if labelled else [])


def trainable(cases: Sequence[Case], *, allow_incomplete: bool = False) -> list[Case]:
    """Cases with labels in which nothing is wrong."""

    def fits(case: Case) -> bool:
        return case.status == OK or (
            allow_incomplete and case.status == INCOMPLETE and case.label_uri is not None
        )

    return [case for case in cases if fits(case)]


def _first(config: TrainConfig, cases: Sequence[Case]) -> list[Case]:
    limit = config.validation.max_cases
    return list(cases[:limit] if limit else cases)
