"""The BraTS conventions: modalities, labels, regions, and how each edition names and numbers them.

Sources: the editions' own file trees and papers (Menze et al. 2015, Bakas et al. 2018, Baid et
al. 2021, Adewole et al. 2023) and, for `msd`, dataset.json of the Decathlon's Task01.
"""

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
