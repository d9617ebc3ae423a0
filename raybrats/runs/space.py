"""What a sweep searches: samplers by dotted field, from words or as they are."""

import ast
import re
from collections.abc import Mapping, Sequence

from ray import tune
from ray.tune.search.sample import Categorical, Domain

from raybrats.config import TrainConfig, override
from raybrats.errors import UsageError

_SAMPLERS = {
    "uniform": tune.uniform,
    "loguniform": tune.loguniform,
    "quniform": tune.quniform,
    "randint": tune.randint,
    "choice": tune.choice,
}
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
    words = wanted if isinstance(wanted, Mapping) else dict(_parsed(word) for word in wanted)
    for path, domain in words.items():
        if not isinstance(domain, Domain):
            raise UsageError(f"space: {path} is {domain!r}, not a sampler such as tune.uniform")
        if path.startswith(_FIXED):
            raise UsageError(f"--space {path!r}: {path} is the same for all trials")
        for sample in _samples(path, domain):
            override(config, path, sample)
    if not words:
        raise UsageError('give at least one --space, e.g. "loss.dice_weight=uniform(0.2,0.8)"')
    return dict(words)


def _parsed(word: str) -> tuple[str, Domain]:
    """The field and the sampler of a word; its arguments are literals, so no code runs."""
    match = re.fullmatch(r"\s*([\w.]+)\s*=\s*(\w+)\((.*)\)\s*", word, re.DOTALL)
    if not match or match[2] not in _SAMPLERS:
        kinds = ", ".join(_SAMPLERS)
        raise UsageError(f"--space {word!r}: expected FIELD=KIND(...), KIND one of {kinds}")
    try:
        return match[1], _SAMPLERS[match[2]](*ast.literal_eval(f"({match[3]},)"))
    except (SyntaxError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"--space {word!r}: {error}") from None


def _samples(path: str, domain: Domain) -> list[object]:
    """All that a choice has, one of any other kind."""
    try:
        samples = list(domain.categories) if isinstance(domain, Categorical) else [domain.sample()]
    except (TypeError, ValueError) as error:
        raise UsageError(f"--space {path!r}: {error}") from None
    if not samples:
        raise UsageError(f"--space {path!r}: nothing to choose from")
    return samples
