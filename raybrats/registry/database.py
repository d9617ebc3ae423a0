"""A tracking URI that names a database: whether it is there and answers, before MLflow tries.

MLflow itself tries ten times within two minutes, with five lines each, and makes what is missing.
"""

import logging
import os
import re
from pathlib import Path

import sqlalchemy.exc
from sqlalchemy.engine import URL, make_url
from sqlalchemy.pool import NullPool

from raybrats.errors import TrackingError, redacted

MODE = 0o660
"""Mode of a new SQLite file, less what the umask takes: others have no business with the runs."""
_KINDS = re.compile(r"(sqlite|postgresql|mysql|mssql)(\+\w+)?:", re.ASCII)
_TABLE = "registered_models"
# What its retries say comes once more as the error in which they end.
logging.getLogger("mlflow.store.db.utils").setLevel(logging.ERROR)


def is_database(uri: str) -> bool:
    """Whether a tracking URI names a database rather than a server.

    Example:
        >>> is_database("postgresql+psycopg://db/mlflow"), is_database("http://mlflow:5000")
        (True, False)
    """
    return _KINDS.match(uri) is not None


def check(uri: str, *, create: bool) -> None:
    """Opens a database once, as MLflow will.

    Args:
        uri: of the database.
        create: whether a missing SQLite file is made, which others cannot read, and a database
            without MLflow's tables will do.

    Raises:
        TrackingError: there is no such file, or it is not MLflow's; the driver is not installed.
        SQLAlchemyError: it does not answer, or is none.

    Example:
        >>> check("sqlite:///runs/mlflow.db", create=False)
        Traceback (most recent call last):
        raybrats.errors.TrackingError: runs/mlflow.db: there is no such database; ...
    """
    try:
        url = make_url(uri)
    except ValueError as error:  # its words repeat a part of the URI
        raise TrackingError(f"MLflow at {redacted(uri)}: not the URI of a database") from error
    _require_file(url, create=create)
    try:
        engine = sqlalchemy.create_engine(url, poolclass=NullPool)
    except ImportError as error:
        words = f"{url.drivername} needs the package {error.name}, which is not installed"
        raise TrackingError(f"MLflow at {redacted(uri)}: {words}") from error
    with engine.connect() as connection:
        if not sqlalchemy.inspect(connection).has_table(_TABLE) and not create:
            raise TrackingError(f"MLflow at {redacted(uri)}: a database without MLflow's tables")


def _require_file(url: URL, *, create: bool) -> None:
    """Makes sure that the file of an SQLite database is there.

    Raises:
        TrackingError: it is not, and is not to be made, or cannot be.
    """
    name = url.database or ""
    if url.get_backend_name() != "sqlite" or name in ("", ":memory:") or name.startswith("file:"):
        return
    if not create and not Path(name).exists():
        advice = "set tracking.uri, --tracking-uri or MLFLOW_TRACKING_URI to one that there is"
        raise TrackingError(f"{name}: there is no such database; {advice}")
    try:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(name, os.O_RDONLY | os.O_CREAT, MODE))  # SQLite takes an empty file
    except OSError as error:
        raise TrackingError(f"{name}: cannot be opened: {error.strerror}") from error
