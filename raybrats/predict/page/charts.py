"""Curves, agreement of volumes, calibration, risk -> charts as inline SVG in the page's colours."""

import io
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from raybrats.predict.agreement import Agreement
from raybrats.registry.tracking import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.typing import RcKeyType

_CURVES = {
    "Training loss": (None, ("train/loss",)),
    "Validation Dice": (1, ("val/dice_",)),
    "Learning rate": (None, ("train/lr",)),
    "Patches per second": (None, ("patches_per_s",)),
    "Fraction of time waiting for data": (1, ("data_wait_fraction",)),
}
"""Title of each chart -> upper end of its axis, and how the names of its curves begin."""
_COLOURS = ("#2f86c9", "#d9591a", "#b8930b", "#888888", "#009e73", "#cc79a7", "#7a5195")
_INK = "#010203"
"""Colour that stands in matplotlib for the page's own text colour."""
_LARGE, _SMALL = (5.3, 2.9), (3.5, 2.3)
"""Inches."""
_STYLE: "dict[RcKeyType, Any]" = {
    "axes.edgecolor": _INK, "axes.labelcolor": _INK, "text.color": _INK, "xtick.color": _INK,
    "ytick.color": _INK, "grid.color": _INK, "grid.alpha": 0.15, "axes.grid": True,
    "axes.spines.top": False, "axes.spines.right": False, "font.family": "sans-serif",
    "axes.autolimit_mode": "round_numbers", "axes.xmargin": 0, "axes.ymargin": 0, "font.size": 9,
    "svg.fonttype": "none", "svg.hashsalt": "raybrats", "legend.frameon": False,
}  # fmt: skip


def training_charts(curves: Mapping[str, Curve]) -> Iterator[tuple[str, Markup]]:
    """Title and inline SVG of each chart of a run that has something to show.

    Example:
        >>> [title for title, svg in training_charts({"train/lr": Curve((1, 2), (0.1, 0.05))})]
        ['Learning rate']
    """
    for title, (top, names) in _CURVES.items():
        given = {name: curves[name] for name in curves if name.startswith(names)}
        lines = {name: np.array([c.steps, c.values], float) for name, c in given.items()}
        lines = {name: line[:, np.isfinite(line[1])] for name, line in lines.items()}
        if lines := {name: line for name, line in lines.items() if line.size}:
            yield title, _curves(title, top, lines)


@mpl.rc_context(_STYLE)
def _curves(title: str, top: float | None, lines: Mapping[str, np.ndarray]) -> Markup:
    """Lines (steps and values, point) by the name of their metric."""
    size = _LARGE if title in ("Training loss", "Validation Dice") else (3.5, 1.8)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot(xlabel="step")
    for colour, (name, (steps, values)) in zip(_COLOURS, lines.items(), strict=False):
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
    return _svg(figure)


@mpl.rc_context(_STYLE)
def agreement_chart(found: Agreement) -> Markup:
    """Bland-Altman chart of one region: difference of the volumes over their mean, in cm3.

    Example:
        >>> svg = agreement_chart(Agreement(np.array([4.0, 6.0]), np.array([1.0, -1.0])))
        >>> svg.startswith("<svg"), "mean of both" in svg
        (True, True)
    """
    figure, axes = _small(xlabel="mean of both (cm³)", ylabel="predicted less reference (cm³)")
    axes.scatter(found.mean, found.difference, s=14, color=_COLOURS[0], alpha=0.7, linewidths=0)
    axes.axhline(found.bias, color=_COLOURS[1], lw=1.4)
    for limit in found.limits or ():
        axes.axhline(limit, color=_COLOURS[1], lw=1, ls="--")
    heights = [*found.difference, *(found.limits or ()), 0]
    room = max(np.ptp(heights), 1e-3) * 0.08
    axes.set_ylim(min(heights) - room, max(heights) + room)
    axes.set_xlim(left=0)
    return _svg(figure)


@mpl.rc_context(_STYLE)
def calibration_chart(pairs: Mapping[str, np.ndarray]) -> Markup:
    """Expected and measured Dice (case, 2) by region, as points.

    Example:
        >>> "expected Dice" in calibration_chart({"WT": np.array([(0.9, 0.85), (0.5, 0.6)])})
        True
    """
    figure, axes = _small(xlabel="expected Dice", ylabel="Dice")
    axes.plot((0, 1), (0, 1), color=_INK, lw=0.8, alpha=0.5)
    for colour, (region, points) in zip(_COLOURS, pairs.items(), strict=False):
        expected, dice = points.T
        axes.scatter(expected, dice, s=14, color=colour, alpha=0.7, linewidths=0, label=region)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.legend(loc="upper left", handletextpad=0)
    return _svg(figure)


@mpl.rc_context(_STYLE)
def risk_chart(lines: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Markup:
    """Mean of 1 - Dice over the fraction of cases kept, the surest first, by region.

    Example:
        >>> "cases kept" in risk_chart({"WT": (np.array([0.5, 1.0]), np.array([0.1, 0.2]))})
        True
    """
    figure, axes = _small(xlabel="fraction of cases kept", ylabel="mean of (1 - Dice)")
    for colour, (region, (kept, risk)) in zip(_COLOURS, lines.items(), strict=False):
        axes.plot(kept, risk, color=colour, lw=1.4, label=region)
    axes.set(xlim=(0, 1), ylim=(0, None))
    axes.legend(loc="lower right")
    return _svg(figure)


def _small(**labels: str) -> "tuple[Figure, Axes]":
    figure = Figure(figsize=_SMALL, layout="constrained")
    return figure, figure.add_subplot(**labels)


def _svg(figure: Figure) -> Markup:
    """The figure as SVG that takes the page's colour of text, without ids that could collide."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue().replace(_INK, "currentColor")
    svg = re.sub(r"^.*?(?=<svg)|<(metadata|style).*?</\1>", "", svg, flags=re.DOTALL)
    return Markup(re.sub(r' xmlns(:\w+)?="[^"]*"| id="\w+_\d+"', "", svg))
