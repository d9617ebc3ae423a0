"""An MLflow server: whether it answers, and what goes wrong with it in one line."""

import threading
from collections.abc import Generator
from concurrent.futures import Future
from contextlib import contextmanager

import boto3.exceptions
import botocore.exceptions
import mlflow
import requests
import sqlalchemy.exc
from mlflow import MlflowClient

from raybrats.errors import TrackingError, redacted
from raybrats.registry import database

_TRANSPORT_ERRORS = (
    mlflow.exceptions.MlflowException,
    requests.RequestException,
    botocore.exceptions.BotoCoreError,
    botocore.exceptions.ClientError,
    boto3.exceptions.Boto3Error,
    sqlalchemy.exc.SQLAlchemyError,
)
"""Exceptions that a call to the server, its artifact store or its database may raise."""

_CONNECT_TIMEOUT_S = 12.0
"""Seconds until a server counts as out of reach. Measured: a dead port is known after 3 s, MLflow's
three tries included; a server that accepts and never answers holds the client for 3 x 30 s."""


def check_reachable(uri: str, *, create: bool = False) -> None:
    """Waits for the first answer of a server or a database, a few seconds at most.

    MLflow's client bounds each read of a socket, not what a call takes in all (name service,
    addresses, tries), so the question is asked in a thread that is left behind if need be.

    Args:
        uri: tracking URI.
        create: whether a missing SQLite file is made; a look-up makes none.

    Raises:
        TrackingError: it is out of reach, or there is none.

    Example:
        >>> check_reachable("sqlite:///mlflow.db", create=True)
    """
    answer: Future[object] = Future()

    def ask() -> None:
        try:
            if database.is_database(uri):
                database.check(uri, create=create)
            else:  # a question that every server can answer quickly
                MlflowClient(uri).get_experiment_by_name("Default")
            answer.set_result(None)
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer.result(_CONNECT_TIMEOUT_S)
        return
    except TimeoutError:
        reason = f"no answer within {_CONNECT_TIMEOUT_S:g} s"
    except mlflow.exceptions.RestException as error:
        if error.get_http_status_code() in (403, 404):  # it answers; some may not see everything
            return
        reason = one_line(error)
    except _TRANSPORT_ERRORS as error:
        reason = one_line(error)
    raise TrackingError(f"MLflow at {redacted(uri)}: start it or correct tracking.uri ({reason})")


@contextmanager
def tracking_errors(uri: str) -> Generator[None]:
    """Turns what MLflow and its transport raise into one line about the server.

    Raises:
        TrackingError: the body raised such an error.

    Example:
        >>> with tracking_errors("http://me:secret@mlflow:5000"):
        ...     raise requests.ConnectionError("refused")
        Traceback (most recent call last):
        raybrats.errors.TrackingError: MLflow at http://***@mlflow:5000: refused
    """
    try:
        yield
    except _TRANSPORT_ERRORS as error:
        raise TrackingError(f"MLflow at {redacted(uri)}: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """First line of what an error says, without credentials, 300 characters at most.

    Example:
        >>> one_line(OSError("http://me:secret@mlflow:5000 refused"))
        'http://***@mlflow:5000 refused'
    """
    return redacted((str(error) or type(error).__name__).splitlines()[0])[:300]
