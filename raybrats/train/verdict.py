"""Whether a step had a finite gradient: what the device has said, on its way to the host."""

from typing import NamedTuple

import torch
from torch import Tensor


class Verdict(NamedTuple):
    """What the host has not read yet."""

    finite: Tensor
    """Bool, in memory of the host."""
    arrived: torch.cuda.Event | None
    """Event after which it is there, where a GPU says it."""


def sent(finite: Tensor) -> Verdict:
    """A verdict (a bool on any device) that is under way when this returns.

    Example:
        >>> read(sent(torch.tensor(True)))
        True
    """
    if not finite.is_cuda:
        return Verdict(finite, None)
    there = torch.empty_like(finite, device="cpu", pin_memory=True)
    there.copy_(finite, non_blocking=True)
    return Verdict(there, torch.cuda.current_stream(finite.device).record_event())


def read(verdict: Verdict) -> bool:
    """The verdict, once it has arrived.

    Example:
        >>> read(sent(torch.isfinite(torch.tensor(torch.inf))))
        False
    """
    if verdict.arrived is not None:
        verdict.arrived.synchronize()
    return bool(verdict.finite)
