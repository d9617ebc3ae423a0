"""What is told of an MLflow server: no credentials, and one line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowException

from raybrats.errors import TrackingError
from raybrats.registry import server

WORDS = st.text("abcXYZ019.-_%:", min_size=1, max_size=12)


@given(user=WORDS, secret=st.text("hush!@#$:", min_size=6, max_size=12), rest=WORDS)
def test_redacted_hides_what_stands_before_the_host(user, secret, rest):
    shown = server.redacted(f"see http://{user}:{secret}@host:5000/{rest} and s3://bucket/x@y")
    assert shown == f"see http://***@host:5000/{rest} and s3://bucket/x@y"


@pytest.mark.parametrize("text", ["s3://bucket/cohort.parquet", "/data/a@b", "models:/name@alias"])
def test_redacted_leaves_the_rest_alone(text):
    assert server.redacted(text) == text


def test_what_mlflow_raises_becomes_one_line_about_the_server():
    with (
        pytest.raises(TrackingError) as refusal,
        server.tracking_errors("http://me:hush@host"),
    ):
        raise MlflowException("no such run\nin a table\nof http://me:hush@host")
    assert str(refusal.value) == "MLflow at http://***@host: no such run"


def test_an_error_of_our_own_passes_as_it_is():
    with pytest.raises(KeyError), server.tracking_errors("http://host"):
        raise KeyError("mean")
