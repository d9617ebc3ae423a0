"""Facts, curves, scores and overlays -> one HTML page that needs nothing but a browser."""

import base64
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

import jinja2
import matplotlib as mpl
import numpy as np
from contourpy import contour_generator
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from raybrats.data.prepare import Box, bounding_box
from raybrats.label_set import GLIOMA, LabelSet
from raybrats.model.metrics import HD95_ONE_EMPTY_MM, region_mask
from raybrats.predict.summary import OVERALL, means
from raybrats.registry.tracking import Curve

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

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
_AXES = {"sagittal": 0, "coronal": 1, "axial": 2}
_PANELS = (("flair", "axial"), ("t1ce", "axial"), ("flair", "coronal"), ("t1ce", "sagittal"))
_MAX_FRAMES, _MAX_PIXELS, _NUM_GREYS = 40, 1_800_000, 40
"""Limits of the GIF: pure noise takes 6.3 bits a pixel (measured), so it stays under 1.5 MB."""
_CHARTS = {
    "Training loss": (None, ("train/loss",)),
    "Validation Dice": (1, ("val/dice_",)),
    "Learning rate": (None, ("train/lr",)),
    "Patches per second": (None, ("patches_per_s",)),
    "Fraction of time waiting for data": (1, ("data_wait_fraction",)),
}
"""Title of each chart -> upper end of its axis, and how the names of its curves begin."""
_LINE_COLOURS = ("#2f86c9", "#d9591a", "#b8930b", "#888888", "#009e73", "#cc79a7", "#7a5195")
_INK = "#010203"
"""Colour that stands in matplotlib for the page's own text colour."""
_STYLE: "dict[RcKeyType, Any]" = {
    "axes.edgecolor": _INK, "axes.labelcolor": _INK, "text.color": _INK, "xtick.color": _INK,
    "ytick.color": _INK, "grid.color": _INK, "grid.alpha": 0.15, "axes.grid": True,
    "axes.spines.top": False, "axes.spines.right": False, "font.family": "sans-serif",
    "axes.autolimit_mode": "round_numbers", "axes.xmargin": 0, "axes.ymargin": 0, "font.size": 9,
    "svg.fonttype": "none", "svg.hashsalt": "raybrats", "legend.frameon": False,
}  # fmt: skip


@dataclass(frozen=True)
class Overlay:
    """Images and labels of one case, all on canonical (LPS) axes (i, j, k)."""

    case_id: str
    flair: np.ndarray
    t1ce: np.ndarray
    spacing_mm: tuple[float, float, float]
    reference: np.ndarray | None
    """Labels (uint8: 0, 1, 2, ... of the set); None if there are none."""
    prediction: np.ndarray
    """Labels (uint8: 0, 1, 2, ... of the set)."""
    label_set: LabelSet = GLIOMA

    def __post_init__(self) -> None:
        shapes = {a.shape for a in vars(self).values() if isinstance(a, np.ndarray)}
        if len(shapes) > 1 or self.flair.ndim != 3:
            raise ValueError(f"{self.case_id}: volumes must have one shape (i, j, k), got {shapes}")


@dataclass(frozen=True)
class Report:
    """Everything that the page shows; empty parts are left out."""

    title: str
    facts: Mapping[str, str]
    """Name -> value of each line at the head of the page."""
    curves: Mapping[str, Curve]
    """Metrics of the run, as `tracking.curves` gives them."""
    scores: Sequence[Mapping[str, Any]]
    """Rows, as in `Evaluation`."""
    overlays: Sequence[Overlay]
    """Cases that are shown as images; the first one also as an animation."""


@dataclass(frozen=True)
class Panel:
    """One slice as the page draws it; lengths and paths (SVG, by label) in mm."""

    modality: str
    plane: str
    index: int
    size: tuple[float, float]
    image: str
    """Data URI of a PNG."""
    prediction: Mapping[str, str]
    reference: Mapping[str, str]


def render(report: Report) -> str:
    """Self-contained HTML of the page, the same text for the same report.

    Example:
        >>> html = render(Report("phantoms", {"cases": "3"}, curves={}, scores=[], overlays=[]))
        >>> html.startswith("<!DOCTYPE html>"), "<h1>phantoms</h1>" in html
        (True, True)
    """
    loader = jinja2.PackageLoader("raybrats", "predict")
    pages = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    return (
        pages.get_template("page.html.jinja")
        .render(
            report=report,
            regions=tuple(dict.fromkeys(str(row["region"]) for row in report.scores)),
            means=means(report.scores) if report.scores else {},
            cases=_worst_first(report.scores),
            hd95_one_empty=HD95_ONE_EMPTY_MM,
            charts=list(_charts(report.curves)),
            overlays=[
                (overlay, _panels(overlay), _volumes(overlay)) for overlay in report.overlays
            ],
            fly_through=_fly_through(report.overlays[0]) if report.overlays else "",
            colours={n: c for o in report.overlays for n, c in colours_of(o.label_set).items()},
        )
        .lstrip()
    )


def colours_of(labels: LabelSet) -> dict[str, str]:
    """Name -> colour of each label, in the order of their values.

    Example:
        >>> colours_of(LabelSet(("liver", "ET"), ()))
        {'liver': '#56b4e9', 'ET': '#ff5a1f'}
    """
    others = cycle(_OTHER_COLOURS)
    return {name: _COLOURS.get(name) or next(others) for name in labels.names}


def _worst_first(scores: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Case id -> rows by region and their mean Dice, in the order of that mean."""
    cases: dict[str, dict[str, Any]] = {}
    for row in scores:
        cases.setdefault(str(row["case_id"]), {})[str(row["region"])] = row
    for rows in cases.values():
        rows[OVERALL] = means([*rows.values()])[OVERALL]

    def order(case: tuple[str, dict[str, Any]]) -> tuple[float, str]:
        dice = case[1][OVERALL]["dice"]
        return 1.0 if dice is None else dice, case[0]  # there was nothing to find

    return dict(sorted(cases.items(), key=order))


def _charts(curves: Mapping[str, Curve]) -> Iterator[tuple[str, Markup]]:
    """Title and inline SVG of each chart that has something to show."""
    for title, (top, names) in _CHARTS.items():
        given = {name: curves[name] for name in curves if name.startswith(names)}
        lines = {name: np.array([c.steps, c.values], float) for name, c in given.items()}
        lines = {name: line[:, np.isfinite(line[1])] for name, line in lines.items()}
        if lines := {name: line for name, line in lines.items() if line.size}:
            yield title, _chart(title, top, lines)


@mpl.rc_context(_STYLE)
def _chart(title: str, top: float | None, lines: Mapping[str, np.ndarray]) -> Markup:
    """Inline SVG of lines (steps and values, point) by the name of their metric."""
    size = (5.3, 2.9) if title in ("Training loss", "Validation Dice") else (3.5, 1.8)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot(xlabel="step")
    for colour, (name, (steps, values)) in zip(_LINE_COLOURS, lines.items(), strict=False):
        label = f"{name.rpartition('_')[2]} {values[-1]:.3f}"
        if title == "Training loss":
            axes.plot(steps, values, color=colour, lw=0.6, alpha=0.4)
            weights = np.ones(len(values) // 50 * 2 + 1)
            values = np.convolve(values, weights, "same")  # a running mean, shorter at the ends
            values /= np.convolve(np.ones_like(values), weights, "same")
        marker = "o" if len(values) < 40 else None
        axes.plot(steps, values, color=colour, lw=1.4, marker=marker, ms=3, label=label)
    axes.set_ylim(min(0, axes.get_ylim()[0]), top)
    if len(lines) > 1:
        axes.legend(loc="lower right", title="last value", ncols=2)
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue().replace(_INK, "currentColor")
    svg = re.sub(r"^.*?(?=<svg)|<(metadata|style).*?</\1>", "", svg, flags=re.DOTALL)
    return Markup(re.sub(r' xmlns(:\w+)?="[^"]*"| id="\w+_\d+"', "", svg))


def _panels(overlay: Overlay) -> list[Panel]:
    """Slices through the largest cross-sections of the tumour."""
    box, chosen = _head_box(overlay), _largest_slices(overlay)
    panels = []
    for modality, plane in _PANELS:
        axis = _AXES[plane]
        index = chosen[axis] - box[axis].start
        spacing_mm = [mm for n, mm in enumerate(overlay.spacing_mm) if n != axis]
        image = _as_displayed(_grey(getattr(overlay, modality)[box]), axis, index)
        paths = []
        for labels in (overlay.prediction, overlay.reference):
            shown = image * 0 if labels is None else _as_displayed(labels[box], axis, index)
            known = enumerate(overlay.label_set.names, 1)
            paths.append({name: _svg_path(shown == n, spacing_mm) for n, name in known})
        width, height = np.multiply(image.shape[::-1], spacing_mm).tolist()
        uri = _data_uri(Image.fromarray(image))
        panels.append(Panel(modality, plane, chosen[axis], (width, height), uri, *paths))
    return panels


def _head_box(overlay: Overlay) -> Box:
    """Box around what differs from the background, with a margin of 3 voxels."""
    mask = (overlay.flair != overlay.flair.flat[0]) | (overlay.t1ce != overlay.t1ce.flat[0])
    for labels in (overlay.prediction, overlay.reference):
        mask |= labels is not None and labels > 0
    box = bounding_box(mask if mask.any() else ~mask)
    i, j, k = (slice(max(s.start - 3, 0), s.stop + 3) for s in box)
    return i, j, k


def _largest_slices(overlay: Overlay) -> list[int]:
    """Slice of each axis with most tumour: the reference's, else the prediction's, else midway."""
    for labels in (overlay.reference, overlay.prediction):
        if labels is not None and labels.any():
            return [int((labels > 0).sum(axis=a).argmax()) for a in ((1, 2), (0, 2), (0, 1))]
    return [(s.start + s.stop) // 2 for s in _head_box(overlay)]


def _grey(voxels: np.ndarray) -> np.ndarray:
    """8-bit grey between the 0.5th and 99.8th percentile of what is not background."""
    head = voxels != voxels.flat[0]
    low, high = np.percentile(voxels[head], (0.5, 99.8)) if head.any() else (0, 1)
    scaled = (voxels.astype(np.float32) - low) / max(high - low, 1e-6)
    return (np.clip(scaled, 0, 1) * head * 255).astype(np.uint8)


def _as_displayed(volume: np.ndarray, axis: int, index: int) -> np.ndarray:
    """Slice of a volume as it is displayed: rows downwards, in radiological convention."""
    return volume.take(index, axis).T[:: 1 if axis == 2 else -1]


def _outlines(mask: np.ndarray, scale: Sequence[float]) -> list[np.ndarray]:
    """Closed lines (point, xy) from the corner, halfway between the voxels inside and outside."""
    lines = contour_generator(z=np.pad(mask, 1).astype(np.float32)).lines(0.5)
    return [(np.asarray(line) - 0.5) * scale for line in lines]


def _svg_path(mask: np.ndarray, spacing_mm: Sequence[float]) -> str:
    """Outlines of a mask as the `d` of one SVG path, in mm."""
    lines = [[f"{x:.1f},{y:.1f}" for x, y in line] for line in _outlines(mask, spacing_mm)]
    return "".join(f"M{'L'.join(points)}Z" for points in lines)


def _volumes(overlay: Overlay) -> dict[str, list[float]]:
    """Region -> cm3 in the prediction and, where there is one, in the reference."""
    cm3 = math.prod(overlay.spacing_mm) / 1000
    both = [labels for labels in (overlay.prediction, overlay.reference) if labels is not None]
    return {
        region.name: [cm3 * int(region_mask(labels, region).sum()) for labels in both]
        for region in overlay.label_set.regions
    }


def _fly_through(overlay: Overlay) -> str:
    """Axial FLAIR slices through the predicted tumour, outlined, as an animated GIF."""
    box = _head_box(overlay)
    labels = overlay.prediction[box]
    greys = (_grey(overlay.flair[box]) * (_NUM_GREYS / 256)).astype(np.uint8)
    found = np.flatnonzero(labels.any(axis=(0, 1)) | (not labels.any()))
    first, last = max(found[0] - 3, 0), min(found[-1] + 3, labels.shape[2] - 1)
    chosen = np.linspace(first, last, max(2, min(_MAX_FRAMES, last - first + 1))).astype(int)
    width, height = np.multiply(labels.shape[:2], overlay.spacing_mm[:2])
    scale = min(math.sqrt(_MAX_PIXELS / len(chosen) / width / height), 2.5)
    size = round(width * scale), round(height * scale)
    colours = [*colours_of(overlay.label_set).values()]
    return _data_uri(*(_frame(greys[..., k].T, labels[..., k].T, size, colours) for k in chosen))


def _frame(
    grey: np.ndarray, labels: np.ndarray, size: tuple[int, int], colours: Sequence[str]
) -> Image.Image:
    """One palette image: greys first, then the colours of the labels."""
    smooth = Image.fromarray(grey).resize(size, Image.Resampling.BILINEAR)
    frame = Image.frombytes("P", size, smooth.tobytes())
    ramp = np.linspace(0, 255, _NUM_GREYS).astype(int).repeat(3).tolist()
    frame.putpalette(ramp + [n for colour in colours for n in bytes.fromhex(colour[1:])])
    pen, zoom = ImageDraw.Draw(frame), np.divide(size, labels.shape[::-1]).tolist()
    for n in range(len(colours)):
        for line in _outlines(labels == n + 1, zoom):
            pen.line(line.ravel().tolist(), fill=_NUM_GREYS + n)
    return frame


def _data_uri(first: Image.Image, *others: Image.Image) -> str:
    """One image as PNG, several as an animated GIF."""
    data, kind = io.BytesIO(), "gif" if others else "png"
    movie = {"save_all": True, "append_images": others, "duration": 120, "loop": 0}
    first.save(data, kind, **movie if others else {"optimize": True})
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"
