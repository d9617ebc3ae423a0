"""Label sets: what the masks of an edition tell apart, and the regions that are made of it."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from raybrats.errors import UsageError

MAX_LABELS = 64
"""Labels of a set at most: each is one pass over the rows of a mask that hold any."""
_NAME = re.compile(r"[\w .-]{1,40}", re.ASCII)
"""What MLflow takes in the name of a metric."""


@dataclass(frozen=True)
class Region:
    """Labels that are learnt and scored together."""

    name: str
    labels: tuple[int, ...]
    """Labels that it is made of."""
    painted: int
    """Label that its voxels become where only regions are known."""


@dataclass(frozen=True)
class LabelSet:
    """Labels by name, and regions of them.

    Example:
        >>> [region.name for region in GLIOMA.regions]
        ['WT', 'TC', 'ET']
    """

    names: tuple[str, ...]
    """Names of the labels 1, 2, ...; 0 is the background."""
    regions: tuple[Region, ...]
    """In the order in which they are painted, so that inner ones come after outer ones; it is also
    the order of the region axis everywhere."""

    @property
    def region_names(self) -> tuple[str, ...]:
        """Names of the regions, in their order."""
        return tuple(region.name for region in self.regions)


NCR, ED, ET = 1, 2, 3
"""Labels of glioma before surgery: necrotic core, oedema, enhancing tumour (BraTS 2023's values).
"""
GLIOMA = LabelSet(
    ("NCR", "ED", "ET"),
    (
        Region("WT", (NCR, ED, ET), painted=ED),
        Region("TC", (NCR, ET), painted=NCR),
        Region("ET", (ET,), painted=ET),
    ),
)
"""Nested regions: whole tumour, tumour core, enhancing tumour (Menze et al. 2015)."""
TREATED = LabelSet(
    ("NETC", "SNFH", "ET", "RC"),
    (
        Region("WT", (1, 2, 3), painted=2),
        Region("TC", (1, 3), painted=1),
        Region("ET", (3,), painted=3),
        Region("RC", (4,), painted=4),
    ),
)
"""Gliomas and metastases after treatment, with the resection cavity (BraTS 2024 and later)."""
PAEDIATRIC = LabelSet(
    ("ET", "NET", "CC", "ED"),
    (
        Region("WT", (1, 2, 3, 4), painted=4),
        Region("TC", (1, 2, 3), painted=2),
        Region("CC", (3,), painted=3),
        Region("ET", (1,), painted=1),
    ),
)
"""Enhancing, non-enhancing and cystic component, oedema (BraTS-PED of 2024 and later)."""
GTV = LabelSet(("GTV",), (Region("GTV", (1,), painted=1),))
"""The gross tumour volume of radiotherapy (BraTS-MEN-RT)."""

LABEL_SETS: Mapping[str, LabelSet] = MappingProxyType(
    {"glioma": GLIOMA, "treated": TREATED, "paediatric": PAEDIATRIC, "gtv": GTV}
)


@lru_cache(maxsize=64)
def label_set_of(text: str) -> LabelSet:
    """The label set of this name, or the one that `as_text` wrote; empty: that of glioma.

    Raises:
        UsageError: there is none of the name, or its labels and regions do not fit together.

    Example:
        >>> label_set_of("").names, label_set_of(as_text(GTV)) == GTV
        (('NCR', 'ED', 'ET'), True)
        >>> label_set_of('{"labels": ["liver", "lesion"]}').region_names
        ('liver', 'lesion')
    """
    if text in LABEL_SETS or not text:
        return LABEL_SETS[text or "glioma"]
    names = ", ".join(LABEL_SETS)
    try:
        found = json.loads(text)
        return made(found["labels"], found.get("regions"), found.get("regions_class_order"))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        why = f": {error}" if isinstance(error, UsageError) else ""
        form = 'JSON like {"labels": ["liver", "lesion"], "regions": {"organ": [1, 2]}, ...}'
        shown = text if len(text) < 80 else f"{text[:80]}..."
        raise UsageError(f"no label set {shown!r}{why}; there are {names}, or {form}") from None


def as_text(labels: LabelSet) -> str:
    """The label set's name, or all of it as JSON with nnU-Net's words.

    Example:
        >>> as_text(GLIOMA), as_text(LabelSet(("a",), (Region("a", (1,), 1),)))
        ('glioma', '{"labels": ["a"], "regions": {"a": [1]}, "regions_class_order": [1]}')
    """
    for name, known in LABEL_SETS.items():
        if known == labels:
            return name
    document = {
        "labels": labels.names,
        "regions": {region.name: region.labels for region in labels.regions},
        "regions_class_order": [region.painted for region in labels.regions],
    }
    return json.dumps(document)


def made(
    names: Sequence[str],
    regions: Mapping[str, Sequence[int]] | None = None,
    order: Sequence[int] | None = None,
) -> LabelSet:
    """A set of these labels; without regions each label is one.

    Args:
        names: of the labels 1, 2, ...
        regions: labels of each region, by its name.
        order: label that each region is painted as (nnU-Net's `regions_class_order`).

    Raises:
        UsageError: they do not fit together; none of them is repeated.

    Example:
        >>> made(["organ", "lesion"], {"all": [1, 2], "lesion": [2]}, [1, 2]).regions[0]
        Region(name='all', labels=(1, 2), painted=1)
    """
    regions = regions or {name: [number] for number, name in enumerate(names, 1)}
    order = order or [labels[0] for labels in regions.values() if len(labels) == 1]
    _require(isinstance(names, list), "a list of labels")
    _require(0 < len(names) <= MAX_LABELS, f"1 to {MAX_LABELS} labels")
    _require(len(set(names)) == len(names), "labels of different names")
    for name in (*names, *regions):
        sound = isinstance(name, str) and _NAME.fullmatch(name) and name not in ("mean", "")
        _require(bool(sound), "names of letters, digits, blanks, '_', '-' and '.', none 'mean'")
    _require(len(order) == len(regions), "one label of regions_class_order a region")
    parts = [
        Region(name, tuple(map(_label, labels)), _label(painted))
        for (name, labels), painted in zip(regions.items(), order, strict=True)
    ]
    for region in parts:
        inside = set(region.labels) <= set(range(1, len(names) + 1))
        _require(inside, f"regions of the labels 1 to {len(names)}")
        _require(region.painted in region.labels, "regions painted as one of their own labels")
    return LabelSet(tuple(names), tuple(parts))


def _label(value: Any) -> int:  # noqa: ANN401 - whatever the JSON holds
    _require(isinstance(value, int) and not isinstance(value, bool), "labels that are numbers")
    return value


def _require(holds: bool, rule: str) -> None:
    if not holds:
        raise UsageError(f"expected {rule}")
