"""The BraTS conventions: modalities, and how each edition names its files and numbers its labels.

Sources: the editions' own file trees and papers (Menze et al. 2015, Bakas et al. 2018, Baid et
al. 2021, Adewole et al. 2023, Kazerooni et al. 2023, LaBella et al. 2023 and 2024, Moawad et al.
2023, de Verdier et al. 2024), the official scorer of 2026 and, for `msd`, dataset.json of the
Decathlon's Task01.
"""

import re
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Modality = Literal["flair", "t1", "t1ce", "t2"]
Rules = Literal["brats2020", "brats2023", "brats2026"]

MODALITIES: tuple[Modality, ...] = ("flair", "t1", "t1ce", "t2")
"""Order of the modality axis everywhere."""
RULES: tuple[Rules, ...] = ("brats2020", "brats2023", "brats2026")
"""Rules of evaluation, each named for the first year that it was in force."""


@dataclass(frozen=True)
class Edition:
    """How one BraTS edition names its files and numbers its labels."""

    name: str
    suffixes: tuple[str, str, str, str]
    """File name endings of the modalities, in the order of `MODALITIES`; empty: it has none."""
    separator: str
    """What stands between the case id and the ending."""
    label_values: tuple[int, ...]
    """Values of the labels of its set in the label files, in their order."""
    case_id: str
    """Pattern of the case ids, with `{:d}` fields for a running number."""
    label_set: str = "glioma"
    """Name of what its masks tell apart, in `raybrats.label_set`."""
    label_suffix: str = "seg"
    """File name ending of the label file."""
    rules: Rules = "brats2023"
    """Rules of evaluation of its years."""
    proof: int = 0
    """A value that no other release has whose ids begin as this one's; 0: none is needed."""


_UNDERSCORE = ("flair", "t1", "t1ce", "t2")
_HYPHEN = ("t2f", "t1n", "t1c", "t2w")

EDITIONS = MappingProxyType(
    {
        edition.name: edition
        for edition in (
            Edition(
                "2020", _UNDERSCORE, "_", (1, 2, 4), "BraTS20_Training_{:03d}", rules="brats2020"
            ),
            Edition("2021", _UNDERSCORE, "_", (1, 2, 4), "BraTS2021_{:05d}", rules="brats2020"),
            Edition("2023", _HYPHEN, "-", (1, 2, 3), "BraTS-GLI-{:05d}-000"),
            # One 4-D file a case; its last axis is FLAIR, T1w, T1gd, T2w: the order of MODALITIES.
            Edition("msd", ("", "", "", ""), "", (2, 1, 3), "BRATS_{:03d}", rules="brats2026"),
            Edition("MEN", _HYPHEN, "-", (1, 2, 3), "BraTS-MEN-{:05d}-000"),
            Edition("post-op", _HYPHEN, "-", (1, 2, 3, 4), "BraTS-GLI-{:05d}-100", "treated"),
            Edition("MET", _HYPHEN, "-", (1, 2, 3, 4), "BraTS-MET-{:05d}-000", "treated"),
            # The release of 2023 has 1 NCR, 2 ED, 3 ET under such ids, and no 4.
            Edition(
                name="PED",
                suffixes=_HYPHEN,
                separator="-",
                label_values=(1, 2, 3, 4),
                case_id="BraTS-PED-{:05d}-000",
                label_set="paediatric",
                proof=4,
            ),
            Edition(
                name="MEN-RT",
                suffixes=("", "", "t1c", ""),
                separator="_",
                label_values=(1,),
                case_id="BraTS-MEN-RT-{:04d}-1",
                label_set="gtv",
                label_suffix="gtv",
            ),
        )
    }
)

UNKNOWN = "unknown"
"""Edition of an id whose beginning says nothing."""

_PREFIXES = (
    (r"brats(17|18|19|20)_", "2020"),
    (r"brats2021_", "2021"),
    (r"brats-gli-\d+-0\d\d(?!\d)", "2023"),
    (r"brats-gli-\d+-[1-9]\d\d(?!\d)", "post-op"),
    (r"brats-(ssa|goat)-", "2023"),
    (r"brats-ped-", "PED"),
    (r"brats-met-", "MET"),
    (r"brats-men-rt-", "MEN-RT"),
    (r"brats-men-", "MEN"),
)
"""How the ids of an edition begin, in any case of letters. The third number of a GLI id is the time
point: from 100 on it is after surgery (2024 and later), where label 4 is the resection cavity."""


def edition_of(case_id: str) -> str:
    """The edition that an id is of, by its beginning: one of `EDITIONS`, or unknown.

    Example:
        >>> [edition_of(name) for name in ("BraTS19_TCIA10_1", "BraTS-PED-00001-000", "patient7")]
        ['2020', 'PED', 'unknown']
    """
    for prefix, edition in _PREFIXES:
        if re.match(prefix, case_id, re.IGNORECASE | re.ASCII):
            return edition
    return UNKNOWN


def label_values(edition: str) -> tuple[int, ...]:
    """Values of the labels of an edition's set in its label files; none where they are not known.

    Example:
        >>> label_values("2021"), label_values("PED"), label_values("unknown")
        ((1, 2, 4), (1, 2, 3, 4), ())
    """
    return EDITIONS[edition].label_values if edition in EDITIONS else ()


def rules_of(edition: str) -> Rules:
    """Rules of evaluation of an edition's years; the newest where it is not known.

    Example:
        >>> rules_of("2021"), rules_of("MET"), rules_of("unknown")
        ('brats2020', 'brats2023', 'brats2026')
    """
    return EDITIONS[edition].rules if edition in EDITIONS else RULES[-1]


def label_set_name(edition: str) -> str:
    """Name of what the masks of an edition tell apart; empty where it is not known.

    Example:
        >>> label_set_name("2021"), label_set_name("MEN-RT"), label_set_name("unknown")
        ('glioma', 'gtv', '')
    """
    return EDITIONS[edition].label_set if edition in EDITIONS else ""


def why_no_labels(edition: str) -> str:
    """Why the labels of a case are not read, whose id tells no edition or two, and what to do.

    Example:
        >>> why_no_labels("PED").partition(":")[0]
        'BraTS-PED ids are those of two releases'
    """
    if edition in EDITIONS and EDITIONS[edition].proof:
        return (
            f"BraTS-{edition} ids are those of two releases: say --edition 2023 for 1 NCR, 2 ED, "
            f"3 ET, or --edition {edition} for what came later"
        )
    names = ", ".join(EDITIONS)
    return f"its id begins as no edition's; `raybrats index --edition` says whose labels ({names})"
