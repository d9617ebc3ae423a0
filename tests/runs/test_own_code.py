"""Networks and losses of a user's own on the cluster: they travel, or one line says why not."""

import pytest
from faulty import SOAK

from raybrats.config import override_all
from raybrats.errors import UsageError
from raybrats.model.network import load_weights, network_of
from raybrats.recipes import tiny
from raybrats.runs.run import train
from raybrats.runs.worker import _import
from raybrats.train import checkpoint

OWN = {
    "network.name": "own_code:levels",
    "network.deep_supervision": 0,
    "loss.name": "own_code:squared_error",
    "loss.target": "labels",
    "optim.steps": 4,
    "validation.every_steps": 2,
    "validation.max_cases": 1,
    "tracking.experiment": "own",
    "tracking.model": "",
}


@pytest.mark.parametrize("field", ["network.name", "loss.name"])
def test_a_worker_that_lacks_the_code_says_how_it_comes_there(field):
    _import(override_all(tiny(), {field: OWN[field]}))
    with pytest.raises(
        UsageError, match=r"No module named 'far_away'; .*ray job submit"
    ) as refusal:
        _import(override_all(tiny(), {field: "far_away:made"}))
    assert "\n" not in str(refusal.value)


@pytest.mark.ray
@pytest.mark.mlflow
@pytest.mark.skipif(not SOAK, reason="two runs more: make soak")
def test_two_workers_train_a_network_and_a_loss_of_the_users_own(two_workers):
    config = override_all(two_workers, {**OWN, "run.name": "own"})
    result = train(config)
    assert (result.steps, result.model) == (4, None)
    found = checkpoint.newest(result.run_uri)
    load_weights(network_of(config), found.weights)
    assert train(config).scores == result.scores


@pytest.mark.ray
@pytest.mark.mlflow
def test_code_that_only_the_driver_has_ends_a_run_by_one_line(two_workers, tmp_path, monkeypatch):
    """Its working directory is not one that the workers know of."""
    (tmp_path / "only_here.py").write_text("from own_code import *\n")
    monkeypatch.chdir(tmp_path)
    changes = {"network.name": "only_here:levels", "run.name": "only-here"}
    with pytest.raises(UsageError, match=r"No module named 'only_here'; .*ray job submit"):
        train(override_all(two_workers, {**OWN, **changes}))
