"""A report in MLflow: with its run and its model's version, and never in the way."""

from pathlib import Path

from mlflow import MlflowClient

from raybrats.registry.server import check_reachable
from raybrats.registry.tracking import Run, log_report


def test_a_report_lies_with_its_run_and_the_version_says_where(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    check_reachable(uri, create=True)
    client = MlflowClient(uri, uri)
    experiment = client.create_experiment("one", artifact_location=str(tmp_path / "artifacts"))
    run_id = client.create_run(experiment).info.run_id
    client.create_registered_model("raybrats")
    client.create_model_version("raybrats", source=str(tmp_path), run_id=run_id)
    log_report(Run(uri, run_id), "models:/raybrats/1", "report.html", "<!DOCTYPE html>é")
    place = client.get_model_version("raybrats", "1").tags["report"]
    assert place == f"runs:/{run_id}/reports/report.html"
    path = client.download_artifacts(run_id, "reports/report.html", str(tmp_path))
    assert Path(path).read_text(encoding="utf-8") == "<!DOCTYPE html>é"


def test_a_server_that_is_not_there_is_a_warning(tmp_path, caplog):
    log_report(Run(f"sqlite:///{tmp_path}/none/x.db", "1"), "models:/raybrats/1", "r.html", "<p>")
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "the report is not in MLflow" in record.getMessage()
    assert not list(tmp_path.iterdir())
