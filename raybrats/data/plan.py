"""Which draw belongs to which step and rank: a pure function of the seed.

The draws of a run are numbered 0, 1, 2, ...; draw g belongs to step g // global_batch. A case that
is opened serves one draw in each of `patches_per_case` steps that follow each other, so no step has
two draws of one case, unless there are fewer cases than draws in a step. Rank r of W takes places
r, r + W, ... of each step, so a run resumed at any step with any W that divides the global batch
sees the very same draws.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class Visit:
    """One opening of a case."""

    case: int
    """Index of the case."""
    draws: tuple[int, ...]
    """Draws that the visit serves, one a step."""
    ordinal: int
    """Number of the case's draws before these, in the whole run."""


@dataclass(frozen=True)
class Plan:
    """The order of the data of a whole run.

    Example:
        >>> plan = Plan(num_cases=3, global_batch=2, seed=0)
        >>> [[v.draws for v in step] for step in plan.visits(rank=1, world=2, start=0, stop=3)]
        [[(1,)], [(3,)], [(5,)]]
        >>> plan.cases(step=0)
        (2, 0)
    """

    num_cases: int
    global_batch: int
    """Draws of a step, over all ranks."""
    seed: int
    patches_per_case: int = 1
    """Draws that one opening of a case serves."""

    def visits(
        self, *, rank: int, world: int, start: int, stop: int
    ) -> Iterator[tuple[Visit, ...]]:
        """The visits of one rank for the steps start..stop, each tuple filling whole steps.

        A tuple fills `patches_per_case` steps, or fewer where start or stop lies between.
        """
        first = start
        while first < stop:
            window = first // self.patches_per_case
            last = min((window + 1) * self.patches_per_case, stop)
            places = range(rank, self.global_batch, world)
            yield tuple(self._visit(window, place, range(first, last)) for place in places)
            first = last

    def cases(self, step: int) -> tuple[int, ...]:
        """The cases of one step, over all ranks."""
        (window,) = self.visits(rank=0, world=1, start=step, stop=step + 1)
        return tuple(visit.case for visit in window)

    def _visit(self, window: int, place: int, steps: range) -> Visit:
        epoch, index = divmod(window * self.global_batch + place, self.num_cases)
        case = int(_order(self.num_cases, self.global_batch, self.seed, epoch)[index])
        ordinal = epoch * self.patches_per_case + steps[0] % self.patches_per_case
        return Visit(case, tuple(step * self.global_batch + place for step in steps), ordinal)


def generator(seed: int, draw: int, purpose: int) -> np.random.Generator:
    """Random numbers that belong to one draw; `purpose` keeps its uses independent.

    Example:
        >>> generator(1, 42, 0).random() == generator(1, 42, 0).random()
        True
    """
    return np.random.default_rng((seed, draw, purpose))


@lru_cache(maxsize=4)
def _order(num_cases: int, batch: int, seed: int, epoch: int) -> np.ndarray:
    """The cases of an epoch, such that a step which begins in the epoch before holds none twice.

    So an order follows from that of the epoch before, back to the last one that began with a step.
    """
    order = np.empty(0, np.int64)
    since = epoch - epoch % (batch // math.gcd(num_cases, batch))
    for number in range(since, epoch + 1):
        begun = number * num_cases % batch
        shuffled = np.random.default_rng((seed, number)).permutation(num_cases)
        if begun and num_cases >= batch:
            # the rest of the step that has begun goes to cases that it does not hold yet
            taken = np.isin(shuffled, order[num_cases - begun :])
            first = np.flatnonzero(~taken)[: batch - begun]
            shuffled = np.concatenate([shuffled[first], np.delete(shuffled, first)])
        order = shuffled
    return order
