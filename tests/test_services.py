"""The servers of the tests really serve, and really refuse."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from botocore.exceptions import ClientError
from services import S3, RayHead, http_status, json_document, run_job, upload_folder


@pytest.mark.s3
def test_s3_returns_what_was_put(s3: S3, bucket: str, tmp_path: Path):
    from s3fs import S3FileSystem

    (tmp_path / "case").mkdir()
    (tmp_path / "case" / "t1c.nii").write_bytes(b"voxels")
    uri = upload_folder(s3, tmp_path, bucket, "cases")
    assert S3FileSystem().cat_file(f"{uri}/case/t1c.nii") == b"voxels"


@pytest.mark.s3
def test_s3_refuses_a_wrong_secret(s3: S3, bucket: str):
    if s3.kind == "moto":
        pytest.skip("moto does not check signatures")
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        replace(s3, secret_key="wrong").client().list_objects_v2(Bucket=bucket)


@pytest.mark.mlflow
def test_mlflow_keeps_metrics_in_its_store_and_artifacts_in_s3(s3: S3, mlflow_uri: str):
    from mlflow import MlflowClient

    client = MlflowClient(mlflow_uri)
    info = client.create_run(client.create_experiment("services")).info
    run = info.run_id
    client.log_metric(run, "dice", 0.5)
    client.log_text(run, "hello", "notes/hello.txt")
    assert client.get_run(run).data.metrics == {"dice": 0.5}
    # Asked for by its name: a listing ends after a thousand objects, and other tests leave more
    key = str(info.artifact_uri).removeprefix("mlflow-artifacts:") + "/notes/hello.txt"
    stored = s3.client().get_object(Bucket="mlflow", Key=f"mlflow{key}")
    assert stored["Body"].read() == b"hello"


@pytest.mark.mlflow
def test_mlflow_refuses_a_foreign_host(mlflow_uri: str):
    port = int(mlflow_uri.rpartition(":")[2])
    assert http_status(port, "/", {"Host": "example.org"}) == 403
    assert http_status(port, "/") == 200


@pytest.mark.ray
def test_ray_refuses_a_request_without_its_token(ray_cluster: RayHead):
    port = int(ray_cluster.api_url.rpartition(":")[2])
    token = {"Authorization": f"Bearer {ray_cluster.token()}"}
    assert http_status(port, "/api/jobs/") == 401
    assert http_status(port, "/api/jobs/", token) == 200


def seen_by_a_worker() -> tuple[str, dict[str, str]]:
    import raybrats

    return raybrats.__file__, dict(os.environ)


@pytest.mark.ray
def test_ray_workers_reach_s3_and_import_the_checkout(ray_cluster: RayHead, s3: S3):
    import ray

    file, environment = ray.get(ray.remote(seen_by_a_worker).remote())
    assert Path(file).is_relative_to(Path(__file__).parents[1])
    assert s3.environment().items() <= environment.items()
    assert environment["RAY_ADDRESS"] == ray_cluster.address


@pytest.mark.ray
def test_a_job_succeeds_and_its_document_comes_back(ray_cluster: RayHead, tmp_path: Path):
    (tmp_path / "job.py").write_text("import os; print('{\"a\": ' + os.environ['A'] + '}')")
    outcome = run_job(ray_cluster, "python job.py", tmp_path, 120, A="1")
    assert (outcome.status, outcome.exit_code) == ("SUCCEEDED", 0)
    assert json_document(outcome.logs) == {"a": 1}


@pytest.mark.ray
def test_a_failing_job_returns_its_exit_code(ray_cluster: RayHead, tmp_path: Path):
    outcome = run_job(ray_cluster, "echo lost; exit 3", tmp_path, 120)
    assert (outcome.status, outcome.exit_code) == ("FAILED", 3)
    assert "lost" in outcome.logs


@pytest.mark.ray
def test_an_endless_job_is_stopped(ray_cluster: RayHead):
    with pytest.raises(TimeoutError, match=r"(PENDING|RUNNING) after 3 s"):
        run_job(ray_cluster, "sleep 1000", None, 3)


def test_the_last_complete_document_is_read():
    logs = 'x\n{"a": 1}\nINFO {"b": 2}\n{\n  "c": {\n    "d": [1]\n  }\n}\nwarning\n{"cut": \n'
    assert json_document(logs) == {"c": {"d": [1]}}
    with pytest.raises(ValueError, match="no JSON document"):
        json_document("nothing here")
