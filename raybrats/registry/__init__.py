"""Checkpoint -> MLflow model: the only part that speaks MLflow."""

import os

for _name, _value in {
    # Read by mlflow when it is imported, so they are set before anything here does.
    # With MLflow's defaults one call to a dead server blocks for four minutes (measured: 246 s).
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}.items():
    os.environ.setdefault(_name, _value)
# Links that repeat the URI, credentials included, are not for the terminal.
os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
# Nothing that a registry or a run holds is ever unpickled, whatever the user's environment says.
os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
