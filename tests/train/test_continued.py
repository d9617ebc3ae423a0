"""A run that has ended goes on under another name: bit for bit as if it had been longer at once."""

import json
from dataclasses import replace

import pytest
import torch
from faulty import SOAK
from ranks import CASES, CONFIG, CPU, batches, draws, losses, steps, together, train_rank

from raybrats import storage
from raybrats.config import RunConfig, TrainConfig, differences, digest, override_all, to_json
from raybrats.data.cohort.case import Case
from raybrats.errors import CheckpointError, MissingObjectError, UsageError
from raybrats.registry.tracking import Run
from raybrats.runs import record
from raybrats.runs.beginning import beginning, source_of
from raybrats.train import checkpoint, continued, loop, manifest
from raybrats.train.checkpoint import Snapshot
from raybrats.train.learner import new_learner
from raybrats.train.optimizer import learning_rate
from raybrats.train.saver import Saver
from raybrats.train.step import train_step

LENGTH = {"optim.steps": 8, "optim.poly_power": 0.0, "validation.every_steps": 4}
KINDS = {
    "adamw": {},
    "averaged": {"optim.ema_decay": 0.7},
    "sgd": {"optim.name": "sgd", "optim.warmup_steps": 2},
    "fp16": {"optim.precision": "fp16"},
    "two-ranks": {"cluster.workers": 2},
}
SELDOM = ("fp16", "two-ranks")
"""Those that take 6 and 20 s: make soak."""


def written(folder):
    """The bytes of every file of a run's checkpoints."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def same(one, other):
    """Whether two states hold the same numbers, bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def saved(folder, config, count):
    """A run of this process that has ended after so many steps, without a validation."""
    learner, _ = steps(config, count)
    saver = Saver(str(folder))
    saver.save(learner, {"mean": 0.5, "WT": 0.5}, finished=True)
    saver.close()
    return learner


@pytest.fixture
def train(monkeypatch):
    """Trains a run below a folder; one rank alone in this process, which is quicker."""
    monkeypatch.setattr(loop, "LOG_EVERY_STEPS", loop.LOG_EVERY_STEPS)
    threads = torch.get_num_threads()

    def trained(folder, config):
        world = config.cluster.workers
        if world == 1:
            train_rank(0, 1, CASES, folder, config)
        else:
            assert together(world, train_rank, folder, config) == [0] * world

    yield trained
    torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", [name for name in KINDS if SOAK or name not in SELDOM])
def test_four_steps_and_four_more_are_eight(tmp_path, train, kind):
    whole = override_all(CONFIG, {**LENGTH, **KINDS[kind]})
    world, folders = whole.cluster.workers, [tmp_path / name for name in ("whole", "one", "two")]
    for folder in folders:
        folder.mkdir()
    at_once, one, two = folders
    train(at_once, whole)
    train(one, override_all(whole, {"optim.steps": 4}))
    before = written(one)
    more = replace(whole, run=replace(whole.run, continue_from=str(one)))
    uri = continued.begin(more, continued.last_of(str(one)), str(two))
    assert manifest.read(uri)["finished"] is False
    train(two, more)
    expected, found = checkpoint.newest(str(at_once)), checkpoint.newest(str(two))
    assert (found.step, found.finished) == (8, True)
    assert same(found.weights, expected.weights)
    assert same(found.state, expected.state)
    assert found.progress == expected.progress
    assert losses(two) == {step: loss for step, loss in losses(at_once).items() if step >= 4}
    assert seen(two, world) == draws(at_once, world, 8)[4:]
    assert written(one) == before, "the run that has ended stays as it is"


def seen(folder, world):
    """The draws of the steps of a continued run, which begin with the fifth."""
    for rank in range(world):
        lines = (folder / f"history-{rank}").read_text().splitlines()
        assert [int(line.split()[0]) for line in lines] == [4, 5, 6, 7]
        rest = "".join(f"{step} 0\n" for step in range(4))
        (folder / f"history-{rank}").write_text(rest + "\n".join(lines) + "\n")
    return draws(folder, world, 8)[4:]


def test_the_rate_is_that_of_the_new_schedule_at_the_step(tmp_path):
    changes = {"optim.steps": 20, "optim.lr": 0.02, "optim.schedule": "cosine"}
    ended, longer = override_all(CONFIG, {"optim.steps": 4}), override_all(CONFIG, changes)
    saved(tmp_path / "one", ended, 4)
    uri = continued.begin(longer, continued.last_of(str(tmp_path / "one")), str(tmp_path / "two"))
    found, learner = checkpoint.read(uri), new_learner(longer, CPU)
    learner.restore(found.weights, found.state, found.progress)
    given = batches(longer, CASES, (0, 1, 4))
    for step in range(4, 6):
        train_step(learner, next(given))
        rate = learner.optimizer.param_groups[0]["lr"]
        assert rate == learning_rate(longer.optim, step) != learning_rate(ended.optim, step - 1)


def test_a_run_that_lost_its_patience_has_it_again(tmp_path):
    config = override_all(CONFIG, {"validation.patience": 2, "validation.every_steps": 2})
    learner, _ = steps(config, 6)
    for mean in (0.5, 0.4, 0.3):
        learner.add_validation(mean)
    learner.cached = {"cache/hits": 7.0}
    saver = Saver(str(tmp_path / "one"))
    saver.save(learner, {"mean": 0.3}, finished=True)
    saver.close()
    longer = override_all(config, {"optim.steps": 30})
    uri = continued.begin(longer, continued.last_of(str(tmp_path / "one")), str(tmp_path / "two"))
    found, again = checkpoint.read(uri), new_learner(longer, CPU)
    again.restore(found.weights, found.state, found.progress)
    assert (again.step, again.validated_at, again.best) == (6, 6, 0.5)
    assert (again.validations_since_best, again.cached) == (0, {})


def test_a_run_goes_on_more_than_once_and_from_any_checkpoint(tmp_path):
    saved(tmp_path / "one", override_all(CONFIG, {"optim.steps": 4}), 4)
    configs = [override_all(CONFIG, {"optim.steps": count}) for count in (6, 8)]
    source = checkpoint.best(str(tmp_path / "one")).uri
    for name, config in zip(("two", "three"), configs, strict=True):
        config = replace(config, run=replace(config.run, continue_from=source))
        source = continued.begin(config, continued.last_of(source), str(tmp_path / name))
    found = checkpoint.newest(str(tmp_path / "three"))
    assert (found.step, found.config_digest) == (4, digest(config))
    assert same(found.weights, checkpoint.newest(str(tmp_path / "one")).weights)
    assert checkpoint.best(str(tmp_path / "three")).metrics == {"mean": 0.5, "WT": 0.5}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optim.steps": 4}, r"^optim\.steps must be > 4, the step of .*step-00000004, got 4"),
        ({"loss.dice_weight": 0.5, "run.seed": 3}, r"another loss\.dice_weight, run\.seed; only"),
        ({"optim.weight_decay": 0.0}, r"another optim\.weight_decay; only optim\.steps, optim\.lr"),
        ({"optim.global_batch": 4}, r"another optim\.global_batch"),
        ({"network.widths": [4, 8, 8, 8]}, r"another network\.widths"),
        ({"prediction.overlap": 0.1}, r"another prediction\.overlap"),
        ({"data.cohort": "s3://elsewhere"}, r"another data\.cohort"),
    ],
)
def test_what_is_not_the_same_run_is_refused_by_field(tmp_path, changes, said):
    saved(tmp_path / "one", override_all(CONFIG, {"optim.steps": 4}), 4)
    config = override_all(CONFIG, {"optim.steps": 20, **changes})
    with pytest.raises(UsageError, match=said) as refusal:
        continued.begin(config, continued.last_of(str(tmp_path / "one")), str(tmp_path / "two"))
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "two").exists()


def test_a_run_does_not_go_on_under_its_own_name(tmp_path):
    saved(tmp_path / "one", override_all(CONFIG, {"optim.steps": 4}), 4)
    source = continued.last_of(str(tmp_path / "one"))
    with pytest.raises(UsageError, match=r"is of this run; choose a new run\.name"):
        continued.begin(CONFIG, source, str(tmp_path / "one"))


def test_what_is_no_ended_run_is_refused_and_left_as_it_is(tmp_path):
    uri = str(tmp_path / "open")
    with pytest.raises(MissingObjectError, match="open"):
        continued.last_of(uri)
    checkpoint.write(uri, CONFIG, Snapshot(4, {"bias": torch.ones(2)}, {}))
    with pytest.raises(UsageError, match=r"has not ended \(step 4\): --run\.name open goes on"):
        continued.last_of(uri)
    assert continued.last_of(manifest.place(uri, 4)).step == 4
    storage.delete(manifest.place(uri, 4))
    (tmp_path / "open" / "checkpoints").mkdir(parents=True, exist_ok=True)
    with pytest.raises((CheckpointError, MissingObjectError)):
        continued.last_of(uri)


@pytest.mark.parametrize("name", [manifest.WEIGHTS, manifest.STATE, manifest.CONFIG])
def test_a_damaged_end_is_told_and_not_put_aside(tmp_path, name):
    uri = str(tmp_path / "one")
    saved(tmp_path / "one", CONFIG, 4)
    (place,) = (tmp_path / "one").rglob(name)
    place.write_bytes(place.read_bytes()[:-1])
    before = written(tmp_path / "one")
    with pytest.raises(CheckpointError, match="damaged checkpoint"):
        continued.last_of(uri)
    assert written(tmp_path / "one") == before


def test_a_registered_model_has_no_state_to_go_on_with():
    with pytest.raises(UsageError, match=r"^run\.continue_from must be .*network\.init_from"):
        RunConfig(continue_from="models:/raybrats@champion")
    with pytest.raises(UsageError, match="credentials"):
        RunConfig(continue_from="s3://me:hush@bucket/runs/one")


def cases(count):
    return [Case(f"case-{n}", f"case-{n}", "2020", "folders", (), None, ()) for n in range(count)]


def test_a_new_run_says_what_it_goes_on_from_and_has_the_same_cases(tmp_path, caplog):
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    ended = override_all(CONFIG, {"optim.steps": 4})
    saved(tmp_path / "one", ended, 4)
    run = RunConfig(name="two", storage_uri=str(tmp_path), continue_from=one)
    longer = replace(CONFIG, run=replace(run, save_every_steps=CONFIG.run.save_every_steps))
    source = source_of(longer, two)
    assert beginning(longer, two, cases(5), source) == {"raybrats.continue_from": source.uri}
    assert "no record beside it" in caplog.text
    storage.delete(manifest.place(two, 4))
    record._write(ended, one, Run("", ""), cases(5))
    with pytest.raises(UsageError, match="was trained on another cohort"):
        beginning(longer, two, cases(6), source)
    assert not manifest.written(two)
    assert beginning(longer, two, cases(5), source) == {"raybrats.continue_from": source.uri}
    assert [found.step for found in manifest.written(two)] == [4]
    assert source_of(CONFIG, two) is None


def test_a_record_of_before_there_was_such_a_field_is_read(tmp_path):
    tree = json.loads(to_json(TrainConfig()))
    del tree["run"]["continue_from"]
    left = {"mlflow_run_id": "", "digest": "", "cohort": "", "config": tree}
    (tmp_path / "run.json").write_text(json.dumps(left))
    known = record.read(str(tmp_path))
    assert differences(known.config, json.loads(to_json(TrainConfig()))) == []
