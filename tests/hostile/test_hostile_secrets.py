"""Credentials: refused where they would be stored, shown nowhere, handed on without being kept."""

import os
import pickle
import subprocess
import sys
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raybrats.config import DataConfig, RunConfig, TrackingConfig, TrainConfig
from raybrats.errors import TrackingError, UsageError, holds_credentials, redacted
from raybrats.registry import load, tracking
from raybrats.registry.tracking import Run

RAYBRATS = str(Path(sys.executable).with_name("raybrats"))
WITH = [
    "http://me:hush@mlflow:5000",
    "http://me:hu/hush@mlflow:5000",
    "http://me:hush/hush@mlflow:5000/path",
    "https://me:h@hush@mlflow",
    "https://me:%40hush%2F@mlflow",
    "https://hush@mlflow",
    "https://hush/hush@mlflow",
    "https://:hush@mlflow",
    "https://me:?hush@mlflow",
    "https://me:#hush@mlflow",
    "postgresql://me:a/b:hush@db/mlflow",
    "postgresql+psycopg://me:hush/@db/mlflow",
    "postgresql://db/mlflow?user=me&password=hush",
    "postgresql:///mlflow?host=db&PASSWORD=hush",
    "mysql+pymysql://db/x?charset=utf8&ssl_key=hush&passwd=hush/a&b=hush",
    "http://mlflow:5000/?token=hush",
    "http://mlflow:5000/a?b=c;access_token=hush",
    "http://mlflow:5000/#api-key=hush",
    "databricks://hush:hush@databricks",
]
WITHOUT = [
    "",
    "http://mlflow:5000",
    "https://mlflow/path?workspace=one",
    "postgresql://db:5432/mlflow?sslmode=require",
    "sqlite:////home/me/runs@home/mlflow.db",
    "sqlite:///runs/a:b@c/mlflow.db",
]


@pytest.mark.parametrize("uri", WITH)
def test_a_uri_with_credentials_is_refused_and_never_shown(uri):
    assert holds_credentials(uri)
    for text in (uri, f"MLflow at {uri}: no answer", f"('{uri}', 5)", f'"{uri}"'):
        assert "hush" not in redacted(text)
    for section, field in ((TrackingConfig, "uri"), (DataConfig, "cohort")):
        with pytest.raises(UsageError, match="without credentials") as refused:
            section(**{field: uri})
        assert "hush" not in str(refused.value)


@pytest.mark.parametrize("uri", WITHOUT)
def test_a_uri_without_credentials_is_taken_and_shown_as_it_is(uri):
    assert TrackingConfig(uri=uri).uri == uri
    assert redacted(f"MLflow at {uri}: no answer") == f"MLflow at {uri}: no answer"


def test_an_encoded_name_in_the_query_hides_nothing():
    uri = "postgresql://db/mlflow?%70assword=hush"
    with pytest.raises(UsageError, match="without credentials") as refused:
        TrackingConfig(uri=uri)
    assert "hush" not in str(refused.value)


@given(secret=st.text(st.characters(min_codepoint=33, exclude_characters="\"'"), min_size=1))
def test_no_password_is_shown_whatever_it_holds(secret):
    """Marked at both ends, so that what is looked for is no part of the rest."""
    for uri in (
        f"http://me:hush{secret}hush@mlflow:5000",
        f"postgresql://me:hush{secret}hush@db/x",
        f"s3://key:hush{secret}hush@bucket/runs",
        f"http://mlflow/?password=hush{secret}hush",
    ):
        if not any(map(str.isspace, secret)):
            assert "hush" not in redacted(f"see {uri} there")
            assert holds_credentials(uri)


def test_what_a_worker_gets_shows_no_credentials(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hush")
    run = Run("http://me:hush@mlflow:5000", "0" * 32)
    assert "hush" not in f"{run!r} {run}"
    sent = pickle.loads(pickle.dumps(run))  # noqa: S301 - our own
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    sent.enter()
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "hush"
    assert sent == run


def test_a_trial_logs_where_its_sweep_does_whatever_its_own_environment_says(tmp_path, monkeypatch):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    config = TrainConfig(run=RunConfig(name="one", storage_uri=str(tmp_path)))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    parent = tracking.start(config)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/elsewhere.db")
    trial = tracking.start(replace(config, run=replace(config.run, name="two")), parent=parent)
    assert trial.uri == uri
    assert not (tmp_path / "elsewhere.db").exists()


@pytest.fixture
def guarded():
    """A server that lets nobody in, and repeats what it was given."""

    class Guard(BaseHTTPRequestHandler):
        def do_GET(self):
            body = f"You are not {self.headers['Authorization']}\nat {self.path}".encode()
            self.send_response(401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815 - as the library calls it

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Guard) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_server_that_lets_nobody_in_is_one_line(guarded, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hush")
    with pytest.raises(TrackingError, match="401") as said:
        load.versions(f"http://{guarded}", "raybrats")
    assert "\n" not in str(said.value)


TELLS = """
import sys
from raybrats.registry import tracking
from raybrats.registry.tracking import Run
from mlflow.tracking._tracking_service.client import TrackingServiceClient
from mlflow import MlflowClient
from raybrats.recipes import tiny
from raybrats.config import override
run = tracking.start(override(tiny(), "run.name", "one"))
tracking.finish(run)
"""


@pytest.mark.mlflow
def test_mlflow_tells_no_links_on_the_terminal(tmp_path, mlflow_uri):
    """The user's own setting does not bring them back."""
    done = subprocess.run(
        [sys.executable, "-c", TELLS],
        env={
            **os.environ,
            "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "false",
            "MLFLOW_TRACKING_URI": mlflow_uri.replace("://", "://me:hush@"),
        },
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "hush" not in done.stderr


TOKEN = """
import os
from pathlib import Path
from raybrats import cluster
os.umask(0)
cluster._make_token()
"""


@pytest.mark.parametrize("kept", [False, True])
def test_rays_token_is_its_owners_alone_from_the_first_moment(kept, tmp_path):
    place = tmp_path / ".ray" / "auth_token"
    if kept:
        place.parent.mkdir()
        place.write_text("mine")
    names = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE")
    env = {k: v for k, v in os.environ.items() if k not in names} | {"HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", TOKEN], env=env, check=True)
    if kept:
        assert place.read_text() == "mine"
        return
    assert place.stat().st_mode & 0o777 == 0o600
    assert len(place.read_text()) == 64
    assert [path.name for path in place.parent.iterdir()] == ["auth_token"]


@pytest.mark.parametrize(
    "variable",
    [("RAY_AUTH_TOKEN", "x"), ("RAY_AUTH_TOKEN_PATH", "y"), ("RAY_AUTH_MODE", "disabled")],
)
def test_no_token_is_made_where_the_user_has_said_which(variable, tmp_path):
    names = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE")
    env = {k: v for k, v in os.environ.items() if k not in names} | {"HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", TOKEN], env=env | dict([variable]), check=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "text",
    [
        *(part * 99_999 for part in ("a", "?pass", "sql://", "x=?key")),
        *("= " * 9_999, "://" + ":" * 4000),
    ],
)
def test_words_that_a_server_chose_are_looked_through_in_no_time(text):
    assert len(redacted(text)) <= len(text)
