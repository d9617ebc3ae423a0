"""What all sections of a run share: unknown keys are errors, and values are checked by rules."""

from typing import Any, ClassVar

from raybrats.errors import UsageError, holds_credentials, redacted


class Section:
    """Base of every section: unknown keys are errors when a run is read from JSON."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}


def require(holds: bool, name: str, rule: str, value: object) -> None:
    """Refuses a value that breaks a rule.

    Raises:
        UsageError: it does not hold; with the field's name, the rule and the value.

    Example:
        >>> require(2 < 1, "optim.steps", "< 1", 2)
        Traceback (most recent call last):
        raybrats.errors.UsageError: optim.steps must be < 1, got 2
    """
    if not holds:
        raise UsageError(f"{name} must be {rule}, got {value!r}")


def require_no_secret(name: str, uri: str) -> None:
    """Refuses a URI with credentials, without repeating them.

    Raises:
        UsageError: it holds some.

    Example:
        >>> require_no_secret("tracking.uri", "https://user:word@host")
        Traceback (most recent call last):
        raybrats.errors.UsageError: tracking.uri must be a URI without credentials (they would ...
    """
    rule = "a URI without credentials (they would be stored with the run; use the environment)"
    shown = redacted(uri)
    if shown == uri:  # what is not seen at once, such as %70assword=, is not shown at all
        shown = f"{uri.partition('://')[0]}://***"
    require(not holds_credentials(uri), name, rule, shown)
