"""The bytes of a checkpoint's files -> tensors, state, configuration; whoever wrote the bytes.

That a file is the one that its manifest names says nothing about what is in it.
"""

import io
import pickle
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from raybrats.config import TrainConfig, from_json
from raybrats.errors import CheckpointError, UsageError, first_line


def tensors(data: bytes, uri: str) -> dict[str, Tensor]:
    """The tensors of a `weights.safetensors`, by name.

    Raises:
        CheckpointError: it is no such file; the line names the URI given.

    Example:
        >>> tensors(safetensors.save({"bias": torch.ones(2)}), "weights.safetensors")
        {'bias': tensor([1., 1.])}
    """
    try:
        return safetensors.load(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{uri}: not a file of weights ({first_line(error)})") from error


def state(data: bytes, uri: str) -> dict[str, Any]:
    """The optimiser and random state of a `state.pt`; only tensors and plain values are unpickled.

    Raises:
        CheckpointError: there is more in the file, or it is damaged; the line names the URI given.

    Example:
        >>> state(b"", "runs/one/checkpoints/step-00000150/state.pt")
        Traceback (most recent call last):
        raybrats.errors.CheckpointError: runs/...state.pt: not the state of a run (EOFError...
    """
    try:
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{uri}: more than tensors and plain values") from error
    except Exception as error:  # of bytes that are no such file, torch raises anything
        raise CheckpointError(f"{uri}: not the state of a run ({first_line(error)})") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{uri}: not the state of a run ({type(found).__name__})")
    return found


def config(data: bytes, uri: str) -> TrainConfig:
    """The run of a `config.json`.

    Raises:
        CheckpointError: it is damaged, or this version of raybrats does not know such a one; the
            line names the URI given.

    Example:
        >>> config(b'{"recipe": "mine"}', "config.json").recipe
        'mine'
    """
    try:
        return from_json(data)
    except UsageError as error:
        raise CheckpointError(f"{uri}: of another version of raybrats ({error})") from error
