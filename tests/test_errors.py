"""Errors that travel: between processes, and out of what libraries wrap around them."""

import pickle

import pytest
from ray.exceptions import RayTaskError

from raybrats import errors
from raybrats.errors import CheckpointError, DataError, RaybratsError, StorageError, cause_of

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type)]
KINDS = [kind for kind in KINDS if issubclass(kind, RaybratsError)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_arrives_as_it_was(kind):
    arrived = pickle.loads(pickle.dumps(kind("case 7: truncated; fetch it again")))  # noqa: S301
    assert (type(arrived), str(arrived)) == (kind, "case 7: truncated; fetch it again")
    assert arrived.exit_code == kind.exit_code


def test_what_ray_wraps_comes_out_with_its_own_words():
    wrapped = RayTaskError("decode", "Traceback ...", StorageError("s3://b/c: out of reach"))
    for error in (wrapped, wrapped.as_instanceof_cause()):
        cause = cause_of(error)
        assert (type(cause), str(cause)) == (StorageError, "s3://b/c: out of reach")


def test_an_error_that_explains_another_is_its_own():
    error = CheckpointError("damaged")
    error.__cause__ = StorageError("shorter")
    assert cause_of(error) is error


def test_what_no_user_can_act_on_has_no_cause():
    error = RuntimeError("a bug")
    error.__cause__ = ValueError("another")
    error.__cause__.__cause__ = error
    assert cause_of(error) is None
    assert cause_of(None) is None
    error.__cause__.__cause__ = DataError("case 7")
    assert str(cause_of(error)) == "case 7"
