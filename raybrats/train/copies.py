"""Copies of a learner's state on the CPU, for those who write it while the training goes on."""

from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor


def copied(state: Any, kept: Any) -> Any:  # noqa: ANN401 - a tree of what an optimiser keeps
    """The same tree with copies of its tensors on the CPU, in the memory of `kept` where it fits.

    Copies from a GPU are under way when this returns.

    Example:
        >>> kept = {"bias": torch.zeros(2)}
        >>> copied({"bias": torch.ones(2), "rate": 0.1}, kept)
        {'bias': tensor([1., 1.]), 'rate': 0.1}
        >>> kept
        {'bias': tensor([1., 1.])}
    """
    if isinstance(state, Tensor):
        if not (isinstance(kept, Tensor) and kept.shape == state.shape):
            kept = torch.empty_like(state, device="cpu", pin_memory=state.is_cuda)
        return kept.copy_(state.detach(), non_blocking=True)
    if isinstance(state, Mapping):
        before = kept if isinstance(kept, Mapping) else {}
        return {name: copied(value, before.get(name)) for name, value in state.items()}
    if isinstance(state, list | tuple):
        before = kept if isinstance(kept, list | tuple) else ()
        pairs = zip_longest(state, before[: len(state)])
        return type(state)(copied(value, old) for value, old in pairs)
    return state
