"""F1, F7, F9 and F20 through Ray: workers die in every way, and the run ends as if none had."""

import json
import time
from pathlib import Path

import pytest
import torch
from faulty import SOAK, Fault, Story
from mlflow import MlflowClient

from raybrats import storage
from raybrats.config import override_all
from raybrats.errors import CheckpointError, RaybratsError
from raybrats.runs import launch
from raybrats.runs.run import train
from raybrats.train import checkpoint

pytestmark = [pytest.mark.faults, pytest.mark.ray, pytest.mark.mlflow, pytest.mark.slow]
OTHER_FAULTS = (
    Fault("os._exit", rank=1, step=3),
    Fault("SIGSEGV", rank=1, step=8),
    Fault("GIL", rank=1, step=10),  # costs a minute: a time-out, and Ray's own until it gives up
)
FAULTS = sorted(
    [
        Fault("SIGKILL", rank=0, step=6),
        Fault("raise", rank=1, step=12),
        *(OTHER_FAULTS if SOAK else ()),
    ],
    key=lambda fault: fault.step,
)


@pytest.fixture(scope="module")
def whole(untold):
    """The same run without a fault of its workers."""
    return checkpoint.newest(untold.run_uri)


@pytest.fixture(scope="module")
def broken(base, tmp_path_factory):
    """What is left of a run whose workers die once more than it may start again."""
    story = Story(tmp_path_factory.mktemp("story"), tuple(FAULTS))
    failures = {"run.name": "broken", "cluster.max_failures": len(FAULTS) - 1}
    config = override_all(base, failures)
    began = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "work", story.worker())
        with pytest.raises(RaybratsError) as said:
            train(config)
    return story, config, str(said.value), time.monotonic() - began


def test_every_death_is_one_restart_from_the_newest_checkpoint(broken):
    story, config, _, seconds = broken
    assert len(story.fired()) == len(FAULTS), "each happened, once"
    attempts = story.attempts()
    assert [world for world, _, _ in attempts] == [2] * len(FAULTS)
    for fault, (_, first, _) in zip(FAULTS, attempts[1:], strict=False):
        assert fault.step - 1 <= first <= fault.step + 1, "one step is done again, or two"
    redone = len(story.steps()) - len(set(story.steps()))
    print(f"{len(FAULTS)} faults, {redone} steps done again, {seconds:.0f} s")
    for at, (_, _, again) in zip(story.fired().values(), attempts[1:], strict=False):
        print(f"{again - at:.1f} s from the fault to the next step")
    assert redone <= 2 * len(FAULTS)
    assert [w.step for w in checkpoint.written(f"{config.run.storage_uri}/broken")]


def test_the_last_words_name_the_root_and_how_to_go_on(broken):
    """F20: rank 1 raised; what rank 0 then died of is not the news."""
    _, _, said, _ = broken
    assert "worker 1" in said
    assert "this rank has had enough" in said
    assert "gloo" not in said.lower()
    assert "of 14" in said
    assert "--run.name broken resumes it" in said
    assert "\n" not in said


def test_started_again_it_ends_with_the_very_weights(base, whole, broken):
    """F7 and F9 on top: the newest checkpoint has lost bytes, and Ray's own index too."""
    _, config, _, _ = broken
    run_uri = f"{config.run.storage_uri}/{config.run.name}"
    newest = checkpoint.written(run_uri)[-1]
    place = storage.join(newest.uri, checkpoint.WEIGHTS)
    storage.write_bytes(place, storage.read_bytes(place)[:100])
    indices = list(Path(run_uri, "ray").rglob("checkpoint_manager_snapshot.json"))
    for index in indices:
        index.write_text("{")
    result = train(config)
    found = checkpoint.newest(run_uri)
    last = base.optim.steps
    assert (found.step, found.finished, result.restarts) == (last, True, 0)
    assert storage.exists(storage.join(run_uri, "checkpoints", "quarantine", Path(newest.uri).name))
    assert found.weights.keys() == whole.weights.keys()
    assert all(torch.equal(tensor, whole.weights[n]) for n, tensor in found.weights.items())
    assert found.metrics["mean"] == whole.metrics["mean"]
    assert json.loads(storage.read_bytes(f"{run_uri}/run.json"))["mlflow_run_id"]
    client = MlflowClient(base.tracking.uri)
    experiment = client.get_experiment_by_name("faults").experiment_id
    (run,) = client.search_runs([experiment], "tags.mlflow.runName = 'broken'")
    for name, steps in (("train/loss", [10, last]), ("val/dice_mean", [last // 2, last])):
        history = client.get_metric_history(run.info.run_id, name)
        assert [m.step for m in history] == steps, "each step once, over all attempts"
    counts = [client.get_metric_history(run.info.run_id, f"cache/{n}") for n in ("hits", "misses")]
    before, after = (sum(m.value for m in metrics) for metrics in zip(*counts, strict=True))
    assert after > before > 0, "cases opened are counted on, not anew"
    assert run.info.status == "FINISHED"


def test_a_run_without_a_good_checkpoint_does_not_start_afresh(broken):
    """F8, through Ray: exit 3, without a restart."""
    _, config, _, _ = broken
    run_uri = f"{config.run.storage_uri}/{config.run.name}"
    for written in checkpoint.written(run_uri):
        storage.write_bytes(storage.join(written.uri, checkpoint.STATE), b"")
    before = storage.list_objects(run_uri)
    with pytest.raises(CheckpointError, match="no checkpoint") as said:
        train(config)
    assert said.value.exit_code == 3
    assert len(storage.list_objects(run_uri)) >= len(before), "nothing is lost"
