"""Learning curves of several seeds: kept as lines of JSON, as means with intervals, and drawn."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import measure
from matplotlib.figure import Figure
from scipy import stats

from raybrats.label_set import GLIOMA

CONFIDENCE = 0.95
COLOURS = ("tab:blue", "tab:orange")


@dataclass
class Curve:
    """What one run gave."""

    side: str
    seed: int
    settings: dict[str, Any]
    loss: list[tuple[int, float]] = field(default_factory=list)
    """Step, and mean training loss of the steps since the one before."""
    dice: list[tuple[int, list[float]]] = field(default_factory=list)
    """Step, and Dice of each region, the mean over the held-out cases."""
    step_s: float = 0.0
    """Median of the seconds that a step and its batch took."""

    def points(self) -> dict[str, dict[int, float]]:
        """What is drawn: by step the loss, and the mean Dice of the regions."""
        return {
            "loss": dict(self.loss),
            "Dice": {step: statistics.fmean(regions) for step, regions in self.dice},
        }


def kept(path: Path, settings: Mapping[str, Any]) -> list[Curve]:
    """The runs in a file that had these settings."""
    lines = path.read_text().splitlines() if path.exists() else []
    curves = [Curve(**json.loads(line)) for line in lines]
    return [curve for curve in curves if curve.settings == settings]


def keep(path: Path, curve: Curve) -> None:
    """Appends a run to a file."""
    with path.open("a") as file:
        file.write(json.dumps(asdict(curve)) + "\n")


def gathered(curves: Iterable[Curve], kind: str) -> dict[int, list[float]]:
    """By step, the values of all seeds."""
    found: dict[int, list[float]] = {}
    for curve in curves:
        for step, value in curve.points()[kind].items():
            found.setdefault(step, []).append(value)
    return found


def half(values: Sequence[float]) -> float:
    """Half of the interval about their mean in which the mean of all seeds lies (Student)."""
    if len(values) < 2:
        return math.nan
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
    return float(quantile * statistics.stdev(values) / math.sqrt(len(values)))


def apart(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """The difference of the means, and half of its interval (Welch)."""
    difference = statistics.fmean(ours) - statistics.fmean(theirs)
    if min(len(ours), len(theirs)) < 2:
        return difference, math.nan
    low, high = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(CONFIDENCE)
    return difference, float(high - low) / 2


def between(curve: Curve) -> Curve:
    """The same with the losses averaged from validation to validation."""
    ends, first, loss = [step for step, _ in curve.dice], 0, []
    for end in ends:
        loss.append((end, statistics.fmean(v for step, v in curve.loss if first < step <= end)))
        first = end
    return Curve(curve.side, curve.seed, curve.settings, loss, curve.dice, curve.step_s)


def table(sides: Mapping[str, Sequence[Curve]]) -> str:
    """A row a validation: both sides' loss and Dice, and their difference where there are two."""
    rows: dict[str, dict[str, str]] = {}
    for kind in ("loss", "Dice"):
        found = {side: gathered(map(between, curves), kind) for side, curves in sides.items()}
        for step in sorted({step for values in found.values() for step in values}):
            row = rows.setdefault(str(step), {})
            there = {side: values[step] for side, values in found.items() if step in values}
            for side, values in there.items():
                row[f"{side} {kind}"] = _told(statistics.fmean(values), half(values))
            if len(there) == 2:
                row[f"{kind} apart"] = _told(*apart(*there.values()))
    columns = dict.fromkeys(column for row in rows.values() for column in row)
    filled = {step: {c: row.get(c, "") for c in columns} for step, row in rows.items()}
    return measure.table("step", filled)


def at_the_end(sides: Mapping[str, Sequence[Curve]]) -> str:
    """A row a side: each region's Dice at the last step, and what a step took."""
    rows = {}
    for side, curves in sides.items():
        columns = list(zip(*(curve.dice[-1][1] for curve in curves), strict=True))
        regions = {
            region: _told(statistics.fmean(values), half(values))
            for region, values in zip(GLIOMA.region_names, columns, strict=True)
        }
        seconds = statistics.median(curve.step_s for curve in curves)
        rows[side] = {"seeds": str(len(curves)), **regions, "s a step": f"{seconds:.3f}"}
    return measure.table("at the end", rows)


def verdict(ours: Sequence[Curve], theirs: Sequence[Curve]) -> str:
    """Whether our last Dice reaches theirs less the interval, and our loss is within it."""
    dice, width = apart(*(list(gathered(side, "Dice").values())[-1] for side in (ours, theirs)))
    losses = [gathered(map(between, side), "loss") for side in (ours, theirs)]
    steps = [step for step in losses[0] if step in losses[1]]
    inside = [abs(d) <= h for d, h in (apart(losses[0][s], losses[1][s]) for s in steps)]
    if math.isnan(width):
        return f"Dice at the end {dice:+.3f}: one seed gives no interval"
    return (
        f"Dice at the end {dice:+.3f} ± {width:.3f}: {'kept' if dice >= -width else 'MISSED'}; "
        f"loss within the interval at {sum(inside)} of {len(inside)} validations"
    )


def draw(sides: Mapping[str, Sequence[Curve]], title: str) -> Figure:
    """Training loss to the left, held-out Dice to the right: every seed, the mean, its interval."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axis, kind in zip(figure.subplots(1, 2), ("loss", "Dice"), strict=True):
        seen = [v for runs in sides.values() for c in runs for v in c.points()[kind].values()]
        # the intervals of few seeds reach far beyond
        axis.set_ylim(0.9 * min(seen) if kind == "loss" else 0, 1.1 * max(seen))
        for (side, curves), colour in zip(sides.items(), COLOURS, strict=False):
            for curve in curves:
                points = curve.points()[kind]
                axis.plot(list(points), list(points.values()), color=colour, alpha=0.25, lw=0.8)
            found = gathered(curves, kind)
            means, halves = map(statistics.fmean, found.values()), map(half, found.values())
            ends = [(m, m - h, m + h) for m, h in zip(means, halves, strict=True)]
            mean, low, high = zip(*ends, strict=True)
            axis.fill_between(list(found), low, high, color=colour, alpha=0.2, lw=0)
            label = f"{side}, {len(curves)} seeds" if len(curves) > 1 else f"{side}, one seed"
            axis.plot(list(found), mean, ".-", color=colour, lw=1.8, label=label)
        axis.set_xlim(left=0)
        axis.set_xlabel("step")
        axis.set_ylabel("training loss" if kind == "loss" else "mean Dice of held-out cases")
        axis.grid(alpha=0.3)
    axis.legend(loc="upper left")
    figure.suptitle(title, fontsize=9)
    return figure


def _told(value: float, width: float) -> str:
    return f"{value:.3f}" if math.isnan(width) else f"{value:.3f}±{width:.3f}"
