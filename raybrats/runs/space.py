"""What a sweep searches: samplers by dotted field, from words or as they are."""

import ast
import math
import re
from collections.abc import Mapping, Sequence

from ray import tune
from ray.tune.search.sample import Categorical, Domain, Float, Integer, Quantized

from raybrats.config import TrainConfig, override
from raybrats.errors import UsageError


def _choice(*given: object) -> Domain:
    """One of several arguments, or of those that one list or tuple holds."""
    several = len(given) != 1 or not isinstance(given[0], list | tuple)
    return tune.choice(list(given) if several else list(given[0]))


_SAMPLERS = {
    "uniform": tune.uniform,
    "loguniform": tune.loguniform,
    "quniform": tune.quniform,
    "randint": tune.randint,
    "choice": _choice,
}
_NO_SAMPLE = (ValueError, ArithmeticError, RecursionError, MemoryError)
"""Exceptions of Python's and NumPy's where there is nothing to draw, or words are too many."""
_FIXED = ("cluster.", "run.", "tracking.", "data.cohort", "data.fold", "optim.steps", "validation.")
"""Fields that decide where trials run and how they are compared."""


def space_of(
    wanted: Mapping[str, Domain] | Sequence[str], config: TrainConfig
) -> dict[str, Domain]:
    """Samplers by dotted field, each checked against its field.

    Args:
        wanted: samplers by dotted field, or words like "loss.dice_weight=uniform(0.2, 0.8)".
        config: the run whose fields they change.

    Raises:
        UsageError: a word that is not understood, or a sample that does not fit its field.

    Example:
        >>> from raybrats.recipes import tiny
        >>> [*space_of(["optim.lr=loguniform(1e-4, 1e-2)"], tiny())]
        ['optim.lr']
        >>> space_of({"optim.lr": tune.uniform(-2.0, -1.0)}, tiny())
        Traceback (most recent call last):
        ...
        raybrats.errors.UsageError: ...
    """
    parsed = [*wanted.items()] if isinstance(wanted, Mapping) else [_parsed(w) for w in wanted]
    words = dict(parsed)
    if len(words) < len(parsed):
        twice = next(path for path in words if [p for p, _ in parsed].count(path) > 1)
        raise UsageError(f"--space {twice!r}: given twice; give all that it may be at once")
    for path, domain in parsed:
        if not isinstance(domain, Domain):
            raise UsageError(f"space: {path} is {domain!r}, not a sampler such as tune.uniform")
        if path.startswith(_FIXED):
            raise UsageError(f"--space {path!r}: {path} is the same for all trials")
        for sample in _samples(path, domain):
            override(config, path, sample)
    if not words:
        raise UsageError('give at least one --space, e.g. "loss.dice_weight=uniform(0.2,0.8)"')
    return words


def _parsed(word: str) -> tuple[str, Domain]:
    """The field and the sampler of a word; its arguments are literals, so no code runs."""
    match = re.fullmatch(r"\s*([\w.]+)\s*=\s*(\w+)\((.*)\)\s*", word, re.DOTALL)
    if not match or match[2] not in _SAMPLERS:
        kinds = ", ".join(_SAMPLERS)
        raise UsageError(f"--space {word!r}: expected FIELD=KIND(...), KIND one of {kinds}")
    arguments = f"({match[3]},)" if match[3].strip() else "()"
    try:
        return match[1], _SAMPLERS[match[2]](*ast.literal_eval(arguments))
    except ZeroDivisionError:
        raise UsageError(f"--space {word!r}: the step must be above 0") from None
    except (SyntaxError, TypeError, AttributeError, *_NO_SAMPLE) as error:
        raise UsageError(f"--space {word!r}: {str(error) or 'too much of it'}") from None


def _samples(path: str, domain: Domain) -> list[object]:
    """All that a choice has; of any other kind the ends, as far as they are drawn, and another.

    Raises:
        UsageError: there is nothing to draw from.
    """
    ends = _ends(path, domain) if isinstance(domain, Float | Integer) else []
    try:
        samples = (
            list(domain.categories) if isinstance(domain, Categorical) else [*ends, domain.sample()]
        )
    except (TypeError, *_NO_SAMPLE) as error:
        raise UsageError(f"--space {path!r}: {error}") from None
    if not samples:
        raise UsageError(f"--space {path!r}: nothing to choose from")
    return samples


def _ends(path: str, domain: Float | Integer) -> list[float]:
    """The least and the most that is drawn, or nearly so.

    Raises:
        UsageError: NumPy would draw from it all the same, or the wrong way round.
    """
    lower, upper = domain.lower, domain.upper
    if (lower, upper) == (-math.inf, math.inf):  # a normal distribution has none
        return []
    try:
        rises = math.isfinite(lower) and math.isfinite(upper) and lower < upper
    except TypeError as error:
        raise UsageError(f"--space {path!r}: {error}") from None
    if not rises:
        raise UsageError(f"--space {path!r}: no range from {lower} to {upper}; the lower end first")
    sampler = domain.get_sampler()
    if isinstance(sampler, Quantized) and not sampler.q > 0:
        raise UsageError(f"--space {path!r}: the step must be above 0, got {sampler.q}")
    if isinstance(domain, Integer):
        return [lower, upper - 1]
    if isinstance(sampler, Quantized):
        return [lower, upper]
    return [math.nextafter(lower, upper), math.nextafter(upper, lower)]
