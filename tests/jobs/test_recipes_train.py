"""Every recipe by name, made small: it trains, goes on, is registered, predicts and is scored."""

import pytest
import torch
from faulty import SOAK
from mlflow import MlflowClient
from safetensors import torch as safetensors

from raybrats.config import override_all
from raybrats.data.cohort.index import index
from raybrats.phantom.phantom import write_phantoms
from raybrats.predict.evaluate import evaluate
from raybrats.predict.predict import predict
from raybrats.recipes import RECIPES, recipe
from raybrats.runs.run import train
from raybrats.train import checkpoint

pytestmark = [
    *(pytest.mark.ray, pytest.mark.mlflow, pytest.mark.slow),
    pytest.mark.skipif(not SOAK, reason="a run for each recipe: make soak"),
]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory, ray_cluster):
    assert ray_cluster.address
    folder = tmp_path_factory.mktemp("recipes")
    for edition in ("2020", "post-op"):
        tree = str(folder / edition)
        write_phantoms(tree, num_cases=6, shape=(48, 48, 40), edition=edition)
        index(tree, str(folder / f"{edition}.parquet"))
    return folder / "2020.parquet"


def small(name, cohort, mlflow_uri):
    made = recipe(name)
    patch = {"slices": [32, 32, 1]}.get(made.data.sampling, [32, 32, 32])
    changes = {
        "data.cohort": str(cohort),
        "data.patch_size": patch,
        "network.widths": [8, 16, 32],
        "optim.steps": 4,
        "optim.precision": "fp32",
        "optim.global_batch": 2,
        "validation.every_steps": 2,
        "validation.max_cases": 1,
        "cluster.workers": 1,
        "cluster.device": "cpu",
        "run.name": name,
        "run.storage_uri": str(cohort.parent / "runs"),
        "tracking.uri": mlflow_uri,
        "tracking.model": name,
    }
    return override_all(made, changes)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_goes_through_the_whole_line(name, cohort, mlflow_uri):
    cohort = cohort.with_stem("post-op") if name == "post-op" else cohort
    config = small(name, cohort, mlflow_uri)
    result = train(config)
    assert (result.steps, result.model.alias) == (4, "champion")
    again = train(config)
    assert (again.mlflow_run_id, again.scores) == (result.mlflow_run_id, result.scores)
    assert again.model == result.model
    out = str(cohort.parent / "predictions" / name)
    uri = f"models:/{name}@champion"
    predicted = predict(uri, str(cohort), out, fold=config.data.fold, tracking_uri=mlflow_uri)
    assert predicted.written == predicted.cases > 0
    assert predicted.failed == ()
    scores = evaluate(out, str(cohort))
    assert tuple(scores.mean) == (*config.labels.region_names, "mean")


def test_a_run_begins_where_another_has_ended(cohort, mlflow_uri):
    """So slow a step changes nothing that can be seen."""
    source = train(override_all(small("tiny", cohort, mlflow_uri), {"run.name": "source"}))
    uri = f"models:/tiny/{source.model.version}"
    changes = {"network.init_from": uri, "optim.lr": 1e-12, "run.name": "begun", "run.seed": 9}
    config = override_all(small("tiny", cohort, mlflow_uri), changes)
    begun = train(override_all(config, {"optim.weight_decay": 0.0}))
    first, last = checkpoint.best(source.run_uri), checkpoint.newest(begun.run_uri)
    before = safetensors.load(first.files[checkpoint.WEIGHTS])
    assert before.keys() == last.weights.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(last.weights[name], tensor, rtol=0, atol=1e-6)
    tags = MlflowClient(mlflow_uri).get_run(begun.mlflow_run_id).data.tags
    assert tags["raybrats.init_from"] == uri
