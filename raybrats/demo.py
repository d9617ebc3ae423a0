"""The whole line on phantoms, with local files, SQLite MLflow and a local Ray: minutes, no GPU."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from raybrats import cluster, storage
from raybrats.config import override_all
from raybrats.data.cohort import index
from raybrats.errors import UsageError
from raybrats.phantom.phantom import write_phantoms
from raybrats.predict.evaluate import evaluate
from raybrats.predict.predict import predict
from raybrats.predict.report import Options, write_report
from raybrats.recipes import tiny
from raybrats.runs.run import train

SHAPE = (64, 64, 48)
NUM_CASES = 12


def run_demo(out: str, changes: Mapping[str, object] | None = None) -> dict[str, Any]:
    """Phantoms, index, train, register, predict the held-out fold, evaluate, report.

    Everything lies below `out`; run again, it trains and registers once more.

    Args:
        out: local folder.
        changes: fields of the recipe that are other than `tiny`'s, by dotted path.

    Raises:
        UsageError: `out` is not a local folder.
        RaybratsError: a kind for each other cause.

    Example:
        >>> run_demo("demo")["evaluate"]["mean"]["WT"]["dice"]  # doctest: +SKIP
        0.93
    """
    if storage.is_remote(out):
        raise UsageError(f"--out {out}: the demo writes to a local folder")
    out = storage.absolute(out)
    phantoms, cohort_uri = storage.join(out, "phantoms"), storage.join(out, "cohort.parquet")
    runs_uri = storage.join(out, "runs")
    # Its own server even where MLFLOW_TRACKING_URI names one: a demo registers nothing elsewhere.
    tracking_uri = f"sqlite:///{runs_uri}/mlflow.db"
    places = {"data.cohort": cohort_uri, "run.storage_uri": runs_uri, "tracking.uri": tracking_uri}
    config = override_all(tiny(), {**places, **(changes or {})})
    write_phantoms(phantoms, num_cases=NUM_CASES, shape=SHAPE, edition="2020", seed=config.run.seed)
    cluster.connect()
    found = index.summary(index.index(phantoms, cohort_uri))
    result = train(config)
    assert result.model is not None, "the demo registers its model"
    predictions = storage.join(result.run_uri, "predictions")
    predicted = predict(
        f"models:/{result.model.name}@{result.model.alias}",
        cohort_uri,
        predictions,
        fold=config.data.fold,
        tracking_uri=tracking_uri,
    )
    evaluation = evaluate(predictions, cohort_uri)
    report = write_report(
        predictions,
        cohort_uri,
        storage.join(out, "report.html"),
        Options(run=result.mlflow_run_id, tracking_uri=tracking_uri),
        evaluation,
    )
    return {
        "index": found,
        "train": asdict(result),
        "predict": asdict(predicted),
        "predictions": predictions,
        "evaluate": evaluation.document(),
        "report": report,
    }
