"""Editions with labels of their own, from their trees to the registry, predictions and scores."""

import json

import nibabel as nib
import numpy as np
import pytest
from faulty import SOAK
from mlflow import MlflowClient

from raybrats.brats import EDITIONS
from raybrats.config import TrainConfig, override_all
from raybrats.data.cohort.index import index
from raybrats.errors import DataError
from raybrats.label_set import label_set_of
from raybrats.phantom.phantom import write_phantoms
from raybrats.predict.evaluate import evaluate
from raybrats.predict.predict import predict
from raybrats.predict.report import Options, write_report
from raybrats.registry import load
from raybrats.runs.run import train

pytestmark = [
    *(pytest.mark.ray, pytest.mark.mlflow, pytest.mark.slow),
    pytest.mark.skipif(not SOAK, reason="a run for each edition: make soak"),
]


@pytest.mark.parametrize("edition", ["PED", "MET", "MEN-RT", "post-op"])
def test_an_edition_goes_through_the_whole_line(two_workers: TrainConfig, tmp_path, edition):
    tree, cohort, out = (str(tmp_path / name) for name in ("tree", "cohort.parquet", "predicted"))
    write_phantoms(tree, num_cases=5, shape=(24, 24, 20), edition=edition)
    index(tree, cohort)
    names = label_set_of(EDITIONS[edition].label_set).region_names
    changes = {
        "data.cohort": cohort,
        "optim.steps": 2,
        "cluster.workers": 1,
        "run.name": edition,
        "run.storage_uri": str(tmp_path / "runs"),
        "tracking.model": edition,
        **({"data.modalities": ["t1ce"]} if edition == "MEN-RT" else {}),
    }
    config = override_all(two_workers, changes)
    result = train(config)
    assert tuple(result.scores) == (*names, "mean")
    assert train(config).scores == result.scores  # the earlier attempt has its labels, too
    server = config.tracking.uri
    (version,) = load.versions(server, edition)
    scores = {key for key in version if key.startswith("dice_")}
    assert scores == {f"dice_{name}" for name in (*names, "mean")}
    uri = f"models:/{edition}@champion"
    assert predict(uri, cohort, out, tracking_uri=server).written == 5
    found = evaluate(out, cohort)
    assert tuple(found.mean) == (*names, "mean")
    (first, *_) = (tmp_path / "predicted").glob("*.nii.gz")
    assert set(np.unique(nib.load(first).dataobj)) <= {0, *EDITIONS[edition].label_values}
    write_report(out, cohort, str(page := tmp_path / "report.html"), Options(tracking_uri=server))
    assert all(f"Dice {name}" in page.read_text() for name in names)
    tags = MlflowClient(server, server).get_model_version(edition, "1").tags
    assert tags["report"] == f"runs:/{result.mlflow_run_id}/reports/report.html"

    # On cases with other labels the model says what it knows, which is not compared with theirs
    others = str(tmp_path / "others")
    write_phantoms(others, num_cases=1, shape=(24, 24, 20), edition="2021")
    assert predict(uri, others, f"{out}-others", tracking_uri=server).written == 1
    origin = json.loads((tmp_path / "predicted-others" / "predictions.json").read_text())
    assert label_set_of(origin["labels"]) == label_set_of(EDITIONS[edition].label_set)
    with pytest.raises(DataError, match="against NCR, ED, ET"):
        evaluate(f"{out}-others", others)
