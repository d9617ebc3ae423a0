"""Which draw belongs to which step and rank: a pure function of the seed.

The draws of a run are numbered 0, 1, 2, ...; draw g belongs to step g // global_batch and to the
case that its epoch's permutation puts there. Rank r of W takes places r, r + W, ... of each step,
so a run resumed at any step with any W that divides the global batch sees the very same draws.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class Plan:
    """The order of the data of a whole run."""

    num_cases: int
    global_batch: int
    """Draws a step, over all ranks."""
    seed: int

    def case_of(self, draw: int) -> int:
        """Index of the case that a draw is cut from; every epoch visits each case once."""
        epoch, place = divmod(draw, self.num_cases)
        return int(_permutation(self.num_cases, self.seed, epoch)[place])

    def draws(self, *, rank: int, world: int, start: int, stop: int) -> Iterator[int]:
        """The draws of one rank for the steps start..stop, in order."""
        for step in range(start, stop):
            first = step * self.global_batch
            yield from range(first + rank, first + self.global_batch, world)


def generator(seed: int, draw: int, purpose: int) -> np.random.Generator:
    """Random numbers that belong to one draw; `purpose` keeps its uses independent."""
    return np.random.default_rng((seed, draw, purpose))


@lru_cache(maxsize=4)
def _permutation(num_cases: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(num_cases)
