"""The BraTS conventions: modalities, labels, regions, and how each edition names and numbers them.

Sources: the editions' own file trees and papers (Menze et al. 2015, Bakas et al. 2018, Baid et
al. 2021, Adewole et al. 2023) and, for `msd`, dataset.json of the Decathlon's Task01.
"""

import re
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Modality = Literal["flair", "t1", "t1ce", "t2"]
Region = Literal["WT", "TC", "ET"]

MODALITIES: tuple[Modality, ...] = ("flair", "t1", "t1ce", "t2")
"""Order of the modality axis everywhere."""

NCR, ED, ET = 1, 2, 3
"""Labels inside raybrats (those of BraTS 2023): necrotic core, oedema, enhancing tumour."""

LABEL_NAMES = ("NCR", "ED", "ET")
"""Names of the labels, in the order of their values."""

REGIONS: tuple[Region, ...] = ("WT", "TC", "ET")
"""Nested evaluation regions, outermost first; order of the region axis everywhere."""

REGION_LABELS = MappingProxyType({"WT": (NCR, ED, ET), "TC": (NCR, ET), "ET": (ET,)})
"""Labels that make up each region."""


@dataclass(frozen=True)
class Edition:
    """How one BraTS edition names its files and numbers its labels."""

    name: str
    suffixes: tuple[str, str, str, str]
    """File name endings of the modalities, in the order of `MODALITIES`."""
    separator: str
    """What stands between the case id and the ending."""
    label_values: tuple[int, int, int]
    """Values of NCR, ED and ET in the label files."""
    case_id: str
    """Pattern of the case ids, with `{:d}` fields for a running number."""


_UNDERSCORE = ("flair", "t1", "t1ce", "t2")

EDITIONS = MappingProxyType(
    {
        "2020": Edition("2020", _UNDERSCORE, "_", (1, 2, 4), "BraTS20_Training_{:03d}"),
        "2021": Edition("2021", _UNDERSCORE, "_", (1, 2, 4), "BraTS2021_{:05d}"),
        "2023": Edition(
            "2023", ("t2f", "t1n", "t1c", "t2w"), "-", (1, 2, 3), "BraTS-GLI-{:05d}-000"
        ),
        # One 4-D file a case; its last axis is FLAIR, T1w, T1gd, T2w: the order of MODALITIES.
        "msd": Edition("msd", ("", "", "", ""), "", (2, 1, 3), "BRATS_{:03d}"),
    }
)

UNKNOWN = "unknown"
"""Edition of an id whose beginning says nothing."""

_PREFIXES = (
    (r"brats(17|18|19|20)_", "2020"),
    (r"brats2021_", "2021"),
    (r"brats-gli-\d+-0\d\d(?!\d)", "2023"),
    (r"brats-gli-\d+-[1-9]\d\d(?!\d)", "post-operative GLI"),
    (r"brats-(ssa|goat)-", "2023"),
    (r"brats-ped-", "PED"),
    (r"brats-met-", "MET"),
    (r"brats-men-rt-", "MEN-RT"),
    (r"brats-men-", "MEN"),
)
"""How the ids of an edition begin, in any case of letters. The third number of a GLI id is the time
point: from 100 on it is after surgery (2024 and later), where label 4 is the resection cavity."""


def edition_of(case_id: str) -> str:
    """The edition that an id is of, by its beginning: one of `EDITIONS`, or one known by name only.

    Example:
        >>> [edition_of(name) for name in ("BraTS19_TCIA10_1", "BraTS-PED-00001-000", "patient7")]
        ['2020', 'PED', 'unknown']
    """
    for prefix, edition in _PREFIXES:
        if re.match(prefix, case_id, re.IGNORECASE | re.ASCII):
            return edition
    return UNKNOWN


def label_values(edition: str) -> tuple[int, ...]:
    """Values of NCR, ED and ET in an edition's label files; none where they are not known here.

    Example:
        >>> label_values("2021"), label_values("PED")
        ((1, 2, 4), ())
    """
    return EDITIONS[edition].label_values if edition in EDITIONS else ()


def why_no_labels(edition: str) -> str:
    """Why the labels of an edition that is not in `EDITIONS` are not read, and what to do.

    Example:
        >>> why_no_labels("PED").partition(";")[0]
        'the labels of BraTS PED are not supported yet'
    """
    if edition == UNKNOWN:
        names = ", ".join(EDITIONS)
        return (
            f"its id begins as no edition's; `raybrats index --edition` says whose labels ({names})"
        )
    return (
        f"the labels of BraTS {edition} are not supported yet; map them to 1 NCR, 2 ED, 3 ET and "
        "say --edition 2023, or leave it out"
    )
