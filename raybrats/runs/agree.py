"""Ranks that come to one decision: rank 0 says, all check."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed

from raybrats.errors import RaybratsError
from raybrats.train.ranks import world_size

T = TypeVar("T")


def agree(choose: Callable[[], T], check: Callable[[T], object]) -> T:
    """What rank 0 chooses, once every rank has checked it; a collective.

    Args:
        choose: is called on rank 0; what it returns is pickled.
        check: is called with the choice on every rank.

    Raises:
        RaybratsError: the choice or one rank's check failed with it; on all ranks alike.

    Example:
        >>> agree(lambda: "step-00000150", lambda name: None)
        'step-00000150'
    """
    several = world_size() > 1
    chosen: list[tuple[list[T], RaybratsError | None]] = [([], None)]
    if not several or torch.distributed.get_rank() == 0:
        chosen = [_tried(choose)]
    if several:
        torch.distributed.broadcast_object_list(chosen, src=0)
    ((choice, error),) = chosen
    if error is not None:
        raise error
    errors: list[RaybratsError | None] = [_tried(lambda: check(choice[0]))[1]]
    if several:
        mine, errors = errors[0], [None] * world_size()
        torch.distributed.all_gather_object(errors, mine)
    for error in filter(None, errors):
        raise error
    return choice[0]


def _tried(action: Callable[[], T]) -> tuple[list[T], RaybratsError | None]:
    """What an action returns, in a list, or its error."""
    try:
        return [action()], None
    except RaybratsError as error:
        return [], error
