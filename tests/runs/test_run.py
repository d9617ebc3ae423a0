"""A training run: which cases it uses, and what it refuses before and after it has started."""

import json
from dataclasses import replace

import pytest
from mlflow import MlflowClient

from raybrats.config import (
    DataConfig,
    RunConfig,
    TrainConfig,
    ValidationConfig,
    override,
    override_all,
    to_json,
)
from raybrats.data.cohort.case import BAD, UNLABELLED, Case
from raybrats.data.cohort.index import with_folds
from raybrats.data.cohort.usable import split, usable
from raybrats.errors import DataError, ResourcesError, UsageError
from raybrats.model.network import build, load_weights
from raybrats.runs.run import train
from raybrats.train import checkpoint


def cohort(num_cases=10, **changed):
    """Cases by number, as an index would list them; `changed` are fields of single ones."""
    cases = [
        Case(f"case-{n}", f"case-{n}", "2020", "folders", (), None, (1, 2, 4))
        for n in range(num_cases)
    ]
    cases = with_folds(cases)
    return [replace(case, **changed.get(case.case_id.replace("-", "_"), {})) for case in cases]


def config(**data):
    return TrainConfig(data=DataConfig(cohort="cohort.parquet", **data))


BROKEN = {"status": BAD, "reason": "case-3: truncated"}


@pytest.mark.parametrize("fold", range(5))
def test_a_fold_is_held_out_and_nothing_is_lost(fold):
    train_cases, held_out = split(config(fold=fold), cohort())
    assert {c.fold for c in held_out} == {fold}
    assert sorted(c.case_id for c in train_cases + held_out) == [c.case_id for c in cohort()]


def test_fold_minus_one_has_all_cases_on_both_sides():
    assert split(config(fold=-1), cohort()) == (cohort(), cohort())


def test_no_more_cases_are_held_out_than_asked_for():
    limited = replace(config(fold=0), validation=ValidationConfig(max_cases=1))
    everything = split(config(fold=0), cohort())
    assert split(limited, cohort()) == (everything[0], everything[1][:1])


def test_good_cases_are_all_usable():
    assert usable(config(), cohort()) == cohort()


def test_a_bad_case_stops_training_and_is_named():
    with pytest.raises(DataError, match=r"1 of 10 .*case-3.*truncated.*max_bad_fraction"):
        usable(config(), cohort(case_3=BROKEN))


def test_a_bad_case_is_left_out_where_that_is_accepted(caplog):
    cases = cohort(case_3=BROKEN)
    found = usable(config(max_bad_fraction=0.1), cases)
    assert [c.case_id for c in found] == [c.case_id for c in cases if c.case_id != "case-3"]
    assert "case-3" in caplog.text
    with pytest.raises(DataError, match="2 of 10"):
        usable(config(max_bad_fraction=0.1), cohort(case_3=BROKEN, case_4=BROKEN))


def test_of_many_bad_cases_three_are_named():
    many = {f"case_{n}": {"status": BAD, "reason": "truncated"} for n in range(5)}
    with pytest.raises(DataError, match="and 2 more"):
        usable(config(), cohort(**many))


def test_a_case_without_labels_counts_as_bad_beside_labelled_ones():
    with pytest.raises(DataError, match=r"case-2 \(no label file"):
        usable(config(), cohort(case_2={"status": UNLABELLED}))


def test_a_cohort_without_any_labels_cannot_be_trained_on():
    unlabelled = {f"case_{n}": {"status": UNLABELLED} for n in range(10)}
    with pytest.raises(DataError, match="labels"):
        usable(config(), cohort(**unlabelled))


@pytest.mark.parametrize(("fold", "side"), [(0, "training"), (3, "validation")])
def test_a_fold_that_leaves_a_side_empty_is_refused(fold, side):
    with pytest.raises(DataError, match=f"no case for {side}.*1 subjects"):
        usable(config(fold=fold), cohort(num_cases=1))
    assert usable(config(fold=-1), cohort(num_cases=1)) == cohort(num_cases=1)


@pytest.fixture(scope="module")
def six_steps(two_workers):
    changes = {
        "optim.steps": 6,
        "validation.every_steps": 3,
        "run.name": "six",
        "tracking.experiment": "run",
        "tracking.model": "six-steps",
    }
    return override_all(two_workers, changes)


@pytest.fixture(scope="module")
def result(six_steps):
    return train(six_steps)


@pytest.mark.ray
@pytest.mark.mlflow
def test_two_workers_train_one_network(six_steps, result):
    assert result.steps == 6
    assert set(result.scores) == {"WT", "TC", "ET", "mean"}
    assert all(0 <= score <= 1 for score in result.scores.values())
    assert (result.model.name, result.model.version) == ("six-steps", "1")
    assert result.model.alias == "champion"
    assert [w.step for w in checkpoint.written(result.run_uri)] == [3, 6]
    found = checkpoint.newest(result.run_uri)
    load_weights(build(six_steps.network, 4), found.weights)


@pytest.mark.ray
@pytest.mark.mlflow
def test_the_run_is_told_to_mlflow_once(six_steps, result):
    client = MlflowClient(six_steps.tracking.uri)
    experiment = client.get_experiment_by_name("run").experiment_id
    (run,) = client.search_runs([experiment])
    assert (run.info.run_id, run.info.status) == (result.mlflow_run_id, "FINISHED")
    assert run.data.params["optim.steps"] == "6"
    history = client.get_metric_history(result.mlflow_run_id, "val/dice_mean")
    assert [m.step for m in history] == [3, 6]
    best = checkpoint.best(result.run_uri)
    assert max(m.value for m in history) == pytest.approx(best.metrics["mean"])
    assert result.scores == {name: best.metrics[name] for name in ("WT", "TC", "ET", "mean")}


@pytest.mark.ray
@pytest.mark.mlflow
@pytest.mark.parametrize(
    ("field", "value"), [("loss.dice_weight", 0.3), ("run.seed", 7), ("optim.steps", 8)]
)
def test_another_configuration_under_the_same_name_is_refused(six_steps, result, field, value):
    before = checkpoint.newest(result.run_uri).files
    with pytest.raises(UsageError, match=f"another {field};"):
        train(override(six_steps, field, value))
    assert checkpoint.newest(result.run_uri).files == before


@pytest.mark.ray
@pytest.mark.mlflow
def test_a_run_that_must_not_be_resumed_is_refused(six_steps, result):
    with pytest.raises(UsageError, match=r"run\.resume is never"):
        train(override(six_steps, "run.resume", "never"))
    assert result.steps == 6


@pytest.mark.ray
@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("cluster.cpus_per_worker", 64.0, "cluster has 4 CPUs; lower cluster.workers"),
        ("cluster.device", "gpu", "cluster has 0 GPUs"),
    ],
)
def test_more_than_the_cluster_has_is_refused(six_steps, field, value, said):
    asked = override(override(six_steps, "run.name", "large"), field, value)
    with pytest.raises(ResourcesError, match=said):
        train(asked)


def test_a_run_whose_checkpoints_are_gone_does_not_start_afresh_where_it_must_resume(tmp_path):
    (tmp_path / "bare").mkdir()
    run = RunConfig(name="bare", storage_uri=str(tmp_path), resume="must")
    config = json.loads(to_json(TrainConfig(run=run)))
    left = {"mlflow_run_id": "", "digest": "", "cohort": "", "config": config}
    (tmp_path / "bare" / "run.json").write_text(json.dumps(left))
    with pytest.raises(UsageError, match="has no checkpoint"):
        train(TrainConfig(run=run))


def test_a_run_that_must_exist_is_refused_before_anything_starts(tmp_path):
    run = RunConfig(name="nothing", storage_uri=str(tmp_path), resume="must")
    with pytest.raises(UsageError, match=r"run\.resume is must"):
        train(TrainConfig(run=run))
