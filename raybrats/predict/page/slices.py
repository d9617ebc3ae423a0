"""One case -> its volumes as the page embeds them: pictures of slices, labels, volumes."""

import base64
import gzip
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
from PIL import Image

from raybrats.data.prepare import Box, bounding_box
from raybrats.label_set import GLIOMA, LabelSet
from raybrats.model.regions import region_mask

_BLUE, _VERMILION, _YELLOW, _GREEN = "#56b4e9", "#ff5a1f", "#f0e442", "#00c78f"
"""Okabe & Ito 2008, vermilion and green brightened."""
_COLOURS = {
    **dict.fromkeys(("ED", "SNFH"), _BLUE),
    **dict.fromkeys(("ET", "GTV"), _VERMILION),
    **dict.fromkeys(("NCR", "NETC", "NET"), _YELLOW),  # it is dark
    **dict.fromkeys(("RC", "CC"), _GREEN),
}
"""Colour of the labels that the editions have."""
_OTHER_COLOURS = (_BLUE, _YELLOW, _VERMILION, _GREEN, "#cc79a7", "#e69f00")
"""Colours of any others, in turn."""
_QUALITY = 50
"""Of WebP: a head of 137 x 173 x 135 voxels takes 0.2 MB a modality (measured), 1.2 MB as gzip."""
_MAX_VOXELS = 4_000_000
"""Voxels of an embedded volume; one that has more is thinned out. A head has 3.2 million at 1 mm.
"""


@dataclass(frozen=True)
class Shown:
    """Images and labels of one case, all on canonical (LPS) axes (i, j, k)."""

    case_id: str
    images: Mapping[str, np.ndarray]
    """Modality -> voxels; those that the case has."""
    spacing_mm: tuple[float, float, float]
    reference: np.ndarray | None
    """Labels (uint8: 0, 1, 2, ... of the set); None if there are none."""
    predictions: Mapping[str, np.ndarray]
    """Model -> its labels (uint8); the first is the model that the page is about."""
    label_set: LabelSet = GLIOMA
    role: str = ""
    """Why it is shown, such as `worst`."""

    def __post_init__(self) -> None:
        shapes = {array.shape for array in (*self.images.values(), *self.labels.values())}
        if len(shapes) != 1 or len(next(iter(shapes))) != 3:
            raise ValueError(f"{self.case_id}: volumes must have one shape (i, j, k), got {shapes}")

    @property
    def labels(self) -> dict[str, np.ndarray]:
        """Labels by model, and under `reference` those of the reference."""
        told = {} if self.reference is None else {"reference": self.reference}
        return {**self.predictions, **told}


def colours_of(labels: LabelSet) -> dict[str, str]:
    """Name -> colour of each label, in the order of their values.

    Example:
        >>> colours_of(LabelSet(("liver", "ET"), ()))
        {'liver': '#56b4e9', 'ET': '#ff5a1f'}
    """
    others = cycle(_OTHER_COLOURS)
    return {name: _COLOURS.get(name) or next(others) for name in labels.names}


def embedded(shown: Shown) -> dict[str, Any]:
    """What the page's script reads of a case: fit for JSON, cropped to the head, 8 bits a voxel.

    Images are mosaics of axial slices as WebP, `columns` a row; labels are gzipped, i runs fastest.

    Example:
        >>> head = np.zeros((8, 9, 10)); head[2:6, 2:6, 2:6] = 1
        >>> nothing = np.zeros(head.shape, np.uint8)
        >>> found = embedded(Shown("a", {"t1": head}, (1.0, 1.0, 1.0), None, {"m": nothing}))
        >>> found["start"], found["shape"], found["at"]
        ([0, 0, 0], [8, 8, 8], [4, 4, 4])
    """
    box = _head_box(shown)
    head = next(iter(shown.images.values()))[box]
    step = math.ceil((head.size / _MAX_VOXELS) ** (1 / 3))
    thin = tuple(slice(s.start, s.stop, step) for s in box)
    shape = [math.ceil(n / step) for n in head.shape]
    columns = math.ceil(math.sqrt(shape[2] * shape[1] / shape[0]))
    chosen = zip(_largest_slices(shown), box, strict=True)
    return {
        "start": [s.start for s in box],
        "step": step,
        "shape": shape,
        "spacing": [step * mm for mm in shown.spacing_mm],
        "at": [(index - s.start) // step for index, s in chosen],
        "columns": columns,
        "images": {name: _picture(_grey(v[thin]), columns) for name, v in shown.images.items()},
        "models": [{"name": n, "labels": _packed(v[thin])} for n, v in shown.predictions.items()],
        "reference": None if shown.reference is None else _packed(shown.reference[thin]),
        "colours": list(colours_of(shown.label_set).items()),
        "order": _outer_first(shown.label_set),
    }


def region_volumes(shown: Shown) -> dict[str, dict[str, float]]:
    """Region -> model, or `reference`, -> cm3.

    Example:
        >>> labels = np.full((10, 10, 10), 2, np.uint8)
        >>> region_volumes(Shown("a", {"t1": labels}, (1.0, 1.0, 1.0), None, {"m": labels}))["WT"]
        {'m': 1.0}
    """
    cm3 = math.prod(shown.spacing_mm) / 1000
    return {
        region.name: {
            name: cm3 * int(region_mask(labels, region).sum())
            for name, labels in shown.labels.items()
        }
        for region in shown.label_set.regions
    }


def _head_box(shown: Shown) -> Box:
    """Box of what is not background in any image or label, and 2 voxels about it."""
    images = [image != image.flat[0] for image in shown.images.values()]
    mask = np.any([*images, *(labels > 0 for labels in shown.labels.values())], axis=0)
    box = bounding_box(mask if mask.any() else ~mask)
    i, j, k = (slice(max(s.start - 2, 0), s.stop + 2) for s in box)
    return i, j, k


def _largest_slices(shown: Shown) -> list[int]:
    """Slice of each axis with most tumour: the reference's, else a prediction's, else midway."""
    for labels in (shown.reference, *shown.predictions.values()):
        if labels is not None and labels.any():
            return [int((labels > 0).sum(axis=a).argmax()) for a in ((1, 2), (0, 2), (0, 1))]
    middle = zip(_head_box(shown), next(iter(shown.images.values())).shape, strict=True)
    return [(s.start + min(s.stop, n)) // 2 for s, n in middle]


def _outer_first(labels: LabelSet) -> list[int]:
    """Labels in the order in which they are outlined: those that most regions hold come last."""
    depth = {
        label: sum(label in region.labels for region in labels.regions)
        for label in range(1, len(labels.names) + 1)
    }
    return sorted(depth, key=depth.__getitem__)


def _grey(voxels: np.ndarray) -> np.ndarray:
    """8-bit grey between the 0.5th and 99.8th percentile of what is not background."""
    head = voxels != voxels.flat[0]
    low, high = np.percentile(voxels[head], (0.5, 99.8)) if head.any() else (0, 1)
    scaled = (voxels.astype(np.float32) - low) / max(high - low, 1e-6)
    return (np.clip(scaled, 0, 1) * head * 255).astype(np.uint8)


def _picture(grey: np.ndarray, columns: int) -> str:
    """Data URI of a WebP with the axial slices in rows, k = 0 at the upper left."""
    width, height, depth = grey.shape
    mosaic = np.zeros((math.ceil(depth / columns), columns, height, width), np.uint8)
    mosaic.reshape(-1, height, width)[:depth] = grey.T
    rows = mosaic.swapaxes(1, 2).reshape(-1, columns * width)
    data = io.BytesIO()
    Image.fromarray(rows).save(data, "webp", quality=_QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"


def _packed(labels: np.ndarray) -> str:
    """Base64 of the gzipped labels, i fastest; the same text for the same labels."""
    data = gzip.compress(np.asarray(labels, np.uint8).tobytes(order="F"), mtime=0)
    return base64.b64encode(data).decode()
