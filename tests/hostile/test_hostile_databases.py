"""Databases that are dead, missing or none: exit 6 in one line and soon; a look-up makes none."""

import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raybrats.config import RunConfig, TrainConfig
from raybrats.errors import TrackingError
from raybrats.registry import database, load, tracking

RAYBRATS = str(Path(sys.executable).with_name("raybrats"))
LOOK_UPS = {
    "models": lambda uri: load.versions(uri, "raybrats"),
    "predict": lambda uri: load.resolve("models:/raybrats@champion", uri),
    "report": lambda uri: load.run_id_of("models:/raybrats/1", uri),
    "curves": lambda uri: tracking.curves(tracking.Run(uri, "0" * 32)),
    "parameters": lambda uri: tracking.logged_parameters(tracking.Run(uri, "0" * 32)),
    "resume": lambda uri: tracking.resume(tracking.Run(uri, "0" * 32)),
}
look_ups = pytest.mark.parametrize("look_up", LOOK_UPS.values(), ids=LOOK_UPS)


@look_ups
def test_a_look_up_creates_no_database(look_up, tmp_path):
    place = tmp_path / "runs" / "mlflow.db"
    with pytest.raises(TrackingError, match=f"^{place}: there is no such database"):
        look_up(f"sqlite:///{place}")
    assert list(tmp_path.iterdir()) == []


@look_ups
def test_a_look_up_fills_no_database(look_up, tmp_path):
    place = tmp_path / "other.db"
    with sqlite3.connect(place) as other:
        other.execute("create table cases (id)")
    before = place.read_bytes()
    with pytest.raises(TrackingError, match="without MLflow's tables"):
        look_up(f"sqlite:///{place}")
    assert place.read_bytes() == before


DEAD = {
    "dead": "postgresql://me:hush@127.0.0.1:1/mlflow",
    "unresolvable": "postgresql://me:hush@nowhere.invalid/mlflow",
    "no driver": "mysql+nodriver://me:hush@127.0.0.1:1/mlflow",
    "no pymysql": "mysql+pymysql://me:hush@127.0.0.1:1/mlflow",
    "two drivers": "mysql+a+b://me:hush@127.0.0.1:1/mlflow",
    "no port": "postgresql://me:hush@127.0.0.1:port/mlflow",
    "unknown": "foo://me:hush@127.0.0.1:1/mlflow",
}


@pytest.mark.parametrize("uri", DEAD.values(), ids=DEAD)
@pytest.mark.parametrize("verb", [LOOK_UPS["models"], LOOK_UPS["predict"]])
def test_a_dead_database_is_an_error_in_one_line_and_soon(uri, verb, capfd, caplog):
    began = time.monotonic()
    with pytest.raises(TrackingError) as said:
        verb(uri)
    assert time.monotonic() - began < 15
    assert "\n" not in str(said.value)
    assert "hush" not in str(said.value)
    assert (capfd.readouterr(), caplog.records) == (("", ""), [])


def test_a_run_at_a_dead_database_ends_before_it_begins(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", DEAD["dead"])
    began = time.monotonic()
    with pytest.raises(TrackingError, match=r"tracking\.uri") as said:
        tracking.start(TrainConfig(run=RunConfig(name="one", storage_uri=str(tmp_path))))
    assert time.monotonic() - began < 15
    assert "hush" not in str(said.value)


@pytest.mark.parametrize("data", [b"not a database", b"SQLite format 3\0" + bytes(500)])
def test_a_file_that_is_no_database_is_an_error_in_one_line(data, tmp_path):
    (tmp_path / "mlflow.db").write_bytes(data)
    began = time.monotonic()
    with pytest.raises(TrackingError, match="MLflow at sqlite") as said:
        load.versions(f"sqlite:///{tmp_path}/mlflow.db", "raybrats")
    assert time.monotonic() - began < 15
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o640), (0o077, 0o600), (0, 0o660)])
def test_the_database_of_local_runs_is_not_the_worlds_to_read(mask, mode, tmp_path):
    before = os.umask(mask)
    try:
        database.check(f"sqlite:///{tmp_path}/mlflow.db", create=True)
    finally:
        os.umask(before)
    assert (tmp_path / "mlflow.db").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("uri", [DEAD["dead"], DEAD["no driver"], ""])
def test_the_command_says_so_in_one_line_with_its_code(uri, tmp_path):
    done = subprocess.run(
        [RAYBRATS, "models", "raybrats", *(("--tracking-uri", uri) if uri else ())],
        env={k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 6, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "hush" not in done.stderr
    assert list(tmp_path.iterdir()) == []
