"""Thresholds and least sizes, fitted on folds other than those that they are scored on."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import cc3d
import numpy as np
import torch

from raybrats.config import PredictionConfig, TrainConfig
from raybrats.errors import UsageError
from raybrats.model import decision
from raybrats.model.regions import region_dice, region_sizes

CANDIDATES: Mapping[str, tuple[float, ...]] = {
    "threshold": (0.5, *(n / 20 for n in range(1, 20) if n != 10)),
    "smallest_voxels": (0, 50, 100, 150, 200, 250, 500),
    "replace_below_voxels": (0, 50, 100, 200, 300, 500, 1000),
}
"""Values that a rule may have for a region, the one that is off first. The published ones are among
them: components of 250, 150, 100 voxels (BraTS 2023), 200 of ET (BraTS 2020)."""
_RULES = tuple(CANDIDATES)


@dataclass(frozen=True)
class OutOfFold:
    """What was said of a case by a model, or several, that did not train on its fold."""

    case_id: str
    subject: str
    fold: int
    """Fold of the case."""
    held_out: int
    """Fold that the model did not train on."""
    probabilities: np.ndarray
    """Of the regions, (region, i, j, k)."""
    reference: np.ndarray
    """Labels of the label set, uint8 (i, j, k)."""


@dataclass(frozen=True)
class Fitted:
    """Rules of a decision, and what they gained."""

    prediction: PredictionConfig
    """The run's section with the rules that gained, fitted on all folds; the others are off."""
    gain: dict[str, float]
    """Dice of each region with the rules less that without, and their mean under `mean`, over cases
    each of which had rules that were fitted on the other folds; 0 where nothing gained."""


@dataclass(frozen=True)
class _Curves:
    """Dice of a case by the candidates of each rule, (region, candidate)."""

    fold: int
    dice: dict[str, np.ndarray]


def fit_decision(config: TrainConfig, cases: Callable[[], Iterable[OutOfFold]]) -> Fitted:
    """The thresholds, components and least sizes of regions that raise the Dice on unseen folds.

    For every fold they are fitted on the others, each by itself, and scored on that one. A rule is
    kept for a region if its mean Dice over all folds is then above that without. Those that are
    kept are scored together, by the code that models decide with, and given up unless the mean
    region Dice is above that without. Which rules to keep is chosen by the same scores, so the gain
    is no underestimate.

    Args:
        config: the run, of which the prediction's other fields stay as they are.
        cases: iterates over the cases, one in memory at a time; called twice.

    Raises:
        UsageError: the run's target is labels, there are fewer than two folds, a case is there
            twice, a subject in two folds, or a case was seen in training by its model.

    Example:
        >>> from raybrats.recipes import tiny
        >>> reference = np.zeros((8, 8, 8), np.uint8)
        >>> reference[2:6, 2:6, 2:6] = 3
        >>> said = np.repeat((0.4 * (reference > 0))[None], 3, axis=0)  # too low, but in place
        >>> cases = [OutOfFold(f"{n}", f"{n}", n % 2, n % 2, said, reference) for n in range(4)]
        >>> found = fit_decision(tiny(), lambda: cases)
        >>> found.prediction.threshold, found.gain["mean"]
        ((0.05, 0.05, 0.05), 1.0)
    """
    if config.loss.target == "labels":
        raise UsageError("rules are fitted for loss.target regions; a softmax has no thresholds")
    off = replace(config.prediction, **dict.fromkeys(_RULES, ()))
    plain = replace(config, prediction=off)
    curves = [_curves(plain, case) for case in _checked(cases())]
    folds = {case.fold for case in curves}
    if len(folds) < 2:
        raise UsageError(
            f"cases of {len(folds)} fold; rules are fitted on one and scored on another"
        )
    kept = {rule: _kept(rule, curves) for rule in _RULES}
    by_fold = {f: _section(off, [c for c in curves if c.fold != f], kept) for f in folds}
    gains = np.mean([_gain(plain, by_fold[case.fold], case) for case in cases()], axis=0)
    names = (*config.labels.region_names, "mean")
    if not gains.mean() > 0:
        return Fitted(off, dict.fromkeys(names, 0.0))
    values = (*gains.tolist(), float(gains.mean()))
    return Fitted(_section(off, curves, kept), dict(zip(names, values, strict=True)))


def _checked(cases: Iterable[OutOfFold]) -> Iterable[OutOfFold]:
    """The cases, as long as each is one that its model has not seen.

    Raises:
        UsageError: one is not.
    """
    ids: set[str] = set()
    folds: dict[str, int] = {}
    for case in cases:
        if case.case_id in ids:
            raise UsageError(f"{case.case_id} is there twice; each case counts once")
        if case.held_out != case.fold:
            raise UsageError(
                f"{case.case_id} is of fold {case.fold}, on which its model was trained (it held "
                f"out fold {case.held_out}); rules are fitted on cases that their models never saw"
            )
        if folds.setdefault(case.subject, case.fold) != case.fold:
            where = f"folds {folds[case.subject]} and {case.fold}"
            raise UsageError(f"subject {case.subject} is in {where}; folds are split by subject")
        ids.add(case.case_id)
        yield case


def _curves(plain: TrainConfig, case: OutOfFold) -> _Curves:
    """The case in numbers: the rest of it is let go."""
    labels = _labels(plain, case)
    dice: dict[str, list[list[float]]] = {rule: [] for rule in _RULES}
    for number, region in enumerate(plain.labels.regions):
        due = np.isin(case.reference, region.labels)
        found = np.isin(labels, region.labels)
        parts, both = _parts(found, due)
        size, tp, total = parts.sum(), both.sum(), int(due.sum())
        dice["threshold"].append(_by_threshold(case.probabilities[number], due))
        dice["smallest_voxels"].append(
            [
                _dice(both[parts >= least].sum(), parts[parts >= least].sum(), total)
                for least in CANDIDATES["smallest_voxels"]
            ]
        )
        dice["replace_below_voxels"].append(
            [
                _dice(tp, size, total) if size >= least else _dice(0, 0, total)
                for least in CANDIDATES["replace_below_voxels"]
            ]
        )
    return _Curves(case.fold, {rule: np.array(rows) for rule, rows in dice.items()})


def _labels(config: TrainConfig, case: OutOfFold) -> np.ndarray:
    """Labels (i, j, k) of a case by the rules of a run."""
    said = torch.from_numpy(np.asarray(case.probabilities, np.float32))[None]
    return decision.decided_together(config, said)[0].numpy()


def _by_threshold(probabilities: np.ndarray, due: np.ndarray) -> list[float]:
    """Dice of the voxels above each candidate."""
    cuts = np.sort(CANDIDATES["threshold"])
    likely = probabilities > cuts[0]
    above = np.searchsorted(cuts, probabilities[likely])  # number of cuts below each
    found, both = (
        np.bincount(each, minlength=len(cuts) + 1)[:0:-1].cumsum()[::-1]
        for each in (above, above[due[likely]])
    )
    total = int(due.sum())
    dice = {cut: _dice(b, f, total) for cut, b, f in zip(cuts, both, found, strict=True)}
    return [dice[cut] for cut in CANDIDATES["threshold"]]


def _parts(found: np.ndarray, due: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Voxels of each connected component, and how many of them are right."""
    if not found.any():
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    numbered, count = cc3d.connected_components(found, connectivity=26, return_N=True)
    inside = numbered[found]
    both = np.bincount(inside[due[found]], minlength=count + 1)
    return np.bincount(inside, minlength=count + 1)[1:], both[1:]


def _dice(both: int, found: int, due: int) -> float:
    return 2 * both / (found + due) if found + due else 1.0


def _kept(rule: str, curves: Sequence[_Curves]) -> list[bool]:
    """Whether the rule gains for each region on folds that it was not fitted on."""
    folds = {case.fold for case in curves}
    best = {f: _best(rule, [case for case in curves if case.fold != f]) for f in folds}
    gains = []
    for case in curves:
        dice = case.dice[rule]
        gains.append(dice[np.arange(len(dice)), best[case.fold]] - dice[:, 0])
    return (np.mean(gains, axis=0) > 0).tolist()


def _best(rule: str, curves: Sequence[_Curves]) -> np.ndarray:
    """The place of each region's best candidate; of equals the first, which is off."""
    return np.mean([case.dice[rule] for case in curves], axis=0).argmax(axis=1)


def _section(
    off: PredictionConfig, curves: Sequence[_Curves], kept: Mapping[str, Sequence[bool]]
) -> PredictionConfig:
    """The rules that are kept, fitted on some cases."""
    values = {}
    for rule in _RULES:
        if any(kept[rule]):
            places = _best(rule, curves) * np.array(kept[rule])
            values[rule] = tuple(CANDIDATES[rule][place] for place in places)
    return replace(off, **values)


def _gain(plain: TrainConfig, section: PredictionConfig, case: OutOfFold) -> list[float]:
    """Dice of each region of a case with the rules less that without."""
    reference = torch.from_numpy(np.asarray(case.reference))
    fitted = replace(plain, prediction=section)
    with_rules, without = (
        region_dice(region_sizes(torch.from_numpy(_labels(c, case)), reference, plain.labels))
        for c in (fitted, plain)
    )
    return [ours - before for ours, before in zip(with_rules, without, strict=True)]
