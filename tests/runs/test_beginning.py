"""A run that goes on from one that has ended, on the cluster: the same weights, and it says so."""

from dataclasses import replace

import pytest
import torch
from faulty import SOAK
from mlflow import MlflowClient

from raybrats.config import override_all
from raybrats.errors import UsageError
from raybrats.runs.run import train
from raybrats.train import checkpoint

pytestmark = [
    *(pytest.mark.ray, pytest.mark.mlflow, pytest.mark.slow),
    pytest.mark.skipif(not SOAK, reason="four runs more; without Ray it is tested: make soak"),
]


@pytest.fixture(scope="module")
def longer(two_workers):
    """Eight steps at one rate, validated after four."""
    changes = {
        "optim.steps": 8,
        "optim.poly_power": 0.0,
        "validation.every_steps": 4,
        "validation.max_cases": 1,
        "tracking.experiment": "continued",
        "tracking.model": "continued",
    }
    return override_all(two_workers, changes)


@pytest.fixture(scope="module")
def ended(longer):
    return train(override_all(longer, {"optim.steps": 4, "run.name": "ended"}))


@pytest.fixture(scope="module")
def more(longer, ended):
    run = replace(longer.run, name="more", continue_from=ended.run_uri)
    return replace(longer, run=run)


def test_a_run_that_has_ended_goes_on_as_if_it_had_been_longer_at_once(longer, ended, more):
    at_once = train(override_all(longer, {"run.name": "at-once"}))
    result = train(more)
    assert (result.steps, result.restarts) == (8, 0)
    expected, found = checkpoint.newest(at_once.run_uri), checkpoint.newest(result.run_uri)
    assert found.weights.keys() == expected.weights.keys()
    for name, tensor in expected.weights.items():
        assert torch.equal(found.weights[name], tensor), name
    client = MlflowClient(more.tracking.uri)
    tags = client.get_run(result.mlflow_run_id).data.tags
    source = f"{ended.run_uri}/checkpoints/step-00000004"
    assert tags["raybrats.continue_from"] == source
    history = client.get_metric_history(result.mlflow_run_id, "val/dice_mean")
    assert [metric.step for metric in history] == [8]
    assert train(more).mlflow_run_id == result.mlflow_run_id


def test_another_source_under_the_same_name_is_refused(more):
    train(more)
    elsewhere = replace(more, run=replace(more.run, continue_from=""))
    with pytest.raises(UsageError, match=r"another run\.continue_from; choose another run\.name"):
        train(elsewhere)
