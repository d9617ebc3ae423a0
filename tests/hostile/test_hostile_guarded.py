"""A guarded MLflow server whose credentials only the driver has: sweeps and predictions reach it.

Neither is anything stored of them: not with the runs, at the server, by Tune or in Ray's logs.
"""

import base64
import os
from dataclasses import replace
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

import pytest
import ray
from faulty import SOAK
from mlflow import MlflowClient

from raybrats.config import override_all
from raybrats.errors import CheckpointError, TrackingError
from raybrats.predict.predict import predict
from raybrats.runs.sweep import search

pytestmark = [pytest.mark.ray, pytest.mark.mlflow, pytest.mark.slow]
USER, PASSWORD = "somebody", "hushhushhush"
BASIC = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
NAMES = ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")


class Guard(BaseHTTPRequestHandler):
    """Hands on what carries the right credentials; the server's `behind` says where to."""

    protocol_version = "HTTP/1.1"

    def handle_one(self):
        body = self.body()
        if self.headers.get("Authorization") != f"Basic {BASIC}":
            self.server.refused.append(self.path)
            return self.answer(401, [], b"who are you?")
        hop = ("authorization", "host", "connection", "accept-encoding", "transfer-encoding")
        headers = {k: v for k, v in self.headers.items() if k.lower() not in hop}
        link = HTTPConnection(self.server.behind, timeout=60)
        link.request(self.command, self.path, body, headers)
        found = link.getresponse()
        data = found.read()
        kept = [(k, v) for k, v in found.getheaders() if k.lower() == "content-type"]
        self.answer(found.status, kept, data)
        return link.close()

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_one  # noqa: N815

    def body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []  # as the client sends an empty file
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, status, headers, data):
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def guarded(mlflow_uri, monkeypatch):
    """Host and port of a guard in front of the MLflow server, and what it sent away."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Guard) as server:
        server.behind, server.refused = urlsplit(mlflow_uri).netloc, []
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}", server.refused
        server.shutdown()


def holding(folder, *words):
    """Files below a folder that hold one of the words."""
    found = [path for path in Path(folder).rglob("*") if path.is_file()]
    return [str(p) for p in found if any(word.encode() in p.read_bytes() for word in words)]


@pytest.mark.skipif(not SOAK, reason="a sweep more: make soak")
def test_credentials_of_the_driver_reach_trials_and_predictions_and_are_stored_nowhere(
    two_workers, guarded, ray_cluster, mlflow_uri, monkeypatch, tmp_path
):
    assert ray_cluster.address
    place, refused = guarded
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{USER}:{PASSWORD}@{place}")
    changes = {
        "run.name": "guarded",
        "run.storage_uri": str(tmp_path / "runs"),
        "cluster.workers": 1,
        "optim.steps": 4,
        "validation.every_steps": 4,
        "tracking.experiment": "guarded",
        "tracking.model": "guarded",
    }
    config = override_all(replace(two_workers, tracking=type(two_workers.tracking)()), changes)
    sweep = search(config, ["loss.dice_weight=uniform(0.2,0.8)"], 1)
    assert [trial.status for trial in sweep.trials] == ["finished"]
    client = MlflowClient(mlflow_uri)
    assert client.get_metric_history(sweep.best.mlflow_run_id, "val/dice_mean")
    assert not refused

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{place}")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    out = tmp_path / "out"
    made = predict("models:/guarded@champion", config.data.cohort, str(out), fold=0)
    assert made.written == made.cases > 0
    assert not refused

    words = (PASSWORD, BASIC)
    stored = client.download_artifacts(sweep.best.mlflow_run_id, "", str(tmp_path))
    session = ray._private.worker._global_node.get_session_dir_path()
    for folder in (tmp_path, stored, os.path.join(session, "logs")):
        assert holding(folder, *words) == []
    run = client.get_run(sweep.best.mlflow_run_id).data
    assert not any(word in str((run.params, run.tags)) for word in words)

    version = client.get_model_version_by_alias("guarded", "champion").version
    client.set_model_version_tag("guarded", version, "weights_sha256", "0" * 64)
    with pytest.raises(CheckpointError, match="not those that were registered") as said:
        predict("models:/guarded@champion", config.data.cohort, str(tmp_path / "other"), fold=0)
    assert "\n" not in str(said.value), "what a worker meets is told as what the driver meets"


def test_without_credentials_a_prediction_ends_in_one_line(guarded, two_workers, tmp_path):
    place, refused = guarded
    uri, cohort = f"http://{place}", two_workers.data.cohort
    with pytest.raises(TrackingError, match="401") as said:
        predict("models:/guarded@champion", cohort, str(tmp_path), tracking_uri=uri)
    assert refused
    assert "\n" not in str(said.value)
