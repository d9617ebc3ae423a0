"""Files beside a run that somebody else has written: one line, its kind of error, no traceback."""

import json
import logging
import os
import random
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from raybrats import storage
from raybrats.config import TrainConfig, to_json
from raybrats.errors import CheckpointError, DataError
from raybrats.predict import origin
from raybrats.registry import spool
from raybrats.registry.spool import Row
from raybrats.runs import lease, record
from raybrats.train import checkpoint, manifest
from raybrats.train.checkpoint import Snapshot
from raybrats.train.learner import new_learner

GARBAGE = {
    "nothing": b"",
    "random": random.Random(0).randbytes(2000),
    "not utf-8": b'{"model": "\xff\xfe"}',
    "deep": b"[" * 200_000,
    "deep object": b'{"config":' * 100_000,
    "a list": b"[1, 2]",
    "null": b"null",
    "huge number": b'{"model": 1' + b"0" * 5000 + b"}",
    "wrong kinds": b'{"model": [], "digest": 1, "config": 2, "cohort": null, "mlflow_run_id": {}}',
    "a surrogate": b'{"model": "\\ud800", "token": "\\ud800"}',
}
garbage = pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE)


def one_line(error):
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@garbage
def test_a_damaged_record_of_a_run_is_a_checkpoint_error_in_one_line(data, tmp_path):
    (tmp_path / record.NAME).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"run\.json is damaged; choose") as said:
        record.read(str(tmp_path))
    one_line(said)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"data": 3, "run": {"seed": 1}},
        {"data": {}, "run": {}},
        {"data": {}, "run": {"seed": 1}, "optim": "fast"},
    ],
)
def test_a_record_whose_configuration_is_none_is_damaged(config, tmp_path):
    facts = {"mlflow_run_id": "", "digest": "", "cohort": "", "config": config}
    (tmp_path / record.NAME).write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match="damaged"):
        record.earlier(TrainConfig(), str(tmp_path))


def test_a_record_that_a_run_wrote_is_none_of_these(tmp_path):
    config = json.loads(to_json(TrainConfig()))
    facts = {"mlflow_run_id": "", "digest": "1", "cohort": "2", "config": config}
    (tmp_path / record.NAME).write_text(json.dumps(facts))
    assert asdict(record.read(str(tmp_path))) == facts


@garbage
def test_a_damaged_lease_is_taken_over(data, tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "EXPIRY_S", 0.2)
    (tmp_path / lease.NAME).write_bytes(data)
    with lease.held(str(tmp_path), print):
        pass


def test_a_lease_says_no_more_than_fits_a_line(tmp_path):
    with lease.held(str(tmp_path), print):
        facts = json.loads((tmp_path / lease.NAME).read_text())
    assert lease._parse(json.dumps(facts).encode())
    assert lease._parse(json.dumps({**facts, "host": "h" * 10_000}).encode()) is None


@garbage
def test_damaged_metrics_cost_one_line_together(data, tmp_path, caplog):
    uri, good = str(tmp_path / "metrics.jsonl"), Row("train/loss", 0.5, 1, 2)
    spool.write(uri, [good])
    storage.write_bytes(uri, storage.read_bytes(uri) + (data or b"x") + b"\n{}\n[]\n")
    with caplog.at_level(logging.WARNING):
        assert spool.read(uri) == [good]
    (line,) = [r.getMessage() for r in caplog.records]
    assert line.startswith(f"{uri}: line 2 is damaged and left out")
    assert "\n" not in line


@pytest.mark.parametrize(
    "change",
    [
        {"key": "../loss"},
        {"key": "/loss"},
        {"key": "a//b"},
        {"key": "."},
        {"key": ""},
        {"key": "k" * 251},
        {"timestamp": 2**63},
        {"timestamp": -1},
        {"step": 10**30},
    ],
)
def test_a_metric_that_mlflow_refuses_does_not_keep_the_others(change, tmp_path, caplog):
    uri, good = str(tmp_path / "metrics.jsonl"), Row("train/loss", 0.5, 1, 2)
    lines = [asdict(good), {**asdict(good), **change}]
    storage.write_bytes(uri, "\n".join(map(json.dumps, lines)).encode())
    assert spool.read(uri) == [good]
    assert "line 2 is damaged" in caplog.text


@garbage
def test_a_damaged_record_of_predictions_is_a_data_error_in_one_line(data, tmp_path):
    (tmp_path / "predictions.json").write_bytes(data)
    with pytest.raises(DataError, match=r"predictions\.json is damaged.*choose another") as said:
        origin.read(str(tmp_path))
    one_line(said)


def write(run_uri, step=1):
    return checkpoint.write(
        run_uri,
        TrainConfig(),
        Snapshot(step, {"bias": torch.ones(2)}, {"rate": 1.0}, {"step": step}, {"mean": 0.5}),
    )


PARTS = ("step", "metrics", "finished", "progress", "config_digest", "files")
WRONG = {"missing": ..., "null": None, "text": "7", "list": [1], "deep": {"a": {"b": {}}}}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("part", PARTS)
def test_a_resealed_manifest_without_a_part_is_a_damaged_checkpoint(part, wrong, tmp_path):
    run = str(tmp_path / "one")
    first, second = write(run, 1), write(run, 2)
    facts = {k: v for k, v in manifest.read(second).items() if k != part}
    if wrong is not ...:
        facts[part] = 7 if (part, wrong) == ("config_digest", "7") else wrong
    manifest.write(second, facts)
    with pytest.raises(CheckpointError, match=f"damaged manifest, without '{part}'") as said:
        checkpoint.read(second)
    one_line(said)
    assert {w.uri for w in checkpoint.written(run)} >= {first}
    assert checkpoint.best(run).step == 1 if part in ("step", "metrics", "files") else 2
    found = checkpoint.newest(run)
    assert (found.uri, len(found.rejected)) == (first, 1)


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"weights.safetensors": {"size": 1, "digest": ""}},
        {
            name: {"size": -1, "digest": ""}
            for name in (checkpoint.WEIGHTS, checkpoint.STATE, checkpoint.CONFIG)
        },
        {
            name: {"size": 1, "digest": "", "uri": "s3://elsewhere"}
            for name in (checkpoint.WEIGHTS, checkpoint.STATE, checkpoint.CONFIG)
        },
    ],
)
def test_a_resealed_manifest_of_other_files_is_a_damaged_checkpoint(files, tmp_path):
    uri = write(str(tmp_path))
    manifest.write(uri, manifest.read(uri) | {"files": files})
    for action in (checkpoint.read, checkpoint.read_network, checkpoint.verify):
        with pytest.raises(CheckpointError, match="'files'"):
            action(uri)


@pytest.mark.parametrize("name", [checkpoint.WEIGHTS, checkpoint.STATE, checkpoint.CONFIG])
@garbage
def test_a_resealed_file_of_a_checkpoint_is_a_checkpoint_error(name, data, tmp_path):
    uri = write(str(tmp_path))
    storage.write_bytes(storage.join(uri, name), data)
    facts = manifest.read(uri)
    facts["files"][name] = {"size": len(data), "digest": storage.digest_of(data)}
    manifest.write(uri, facts)
    read = {
        checkpoint.WEIGHTS: lambda: checkpoint.read(uri).weights,
        checkpoint.STATE: lambda: checkpoint.read(uri).state,
        checkpoint.CONFIG: lambda: checkpoint.read_network(uri).config,
    }[name]
    with pytest.raises(CheckpointError, match=name) as said:
        read()
    one_line(said)


def test_a_score_that_is_no_number_is_never_the_best(tmp_path):
    run = str(tmp_path)
    write(run, 1)
    other = write(run, 2)
    manifest.write(other, manifest.read(other) | {"metrics": {"mean": float("nan")}})
    assert checkpoint.best(run).step == 1


def test_progress_without_a_part_is_refused_before_anything_is_restored():
    from raybrats.recipes import tiny

    learner = new_learner(tiny(), torch.device("cpu"))
    learner.step = 7
    with pytest.raises(CheckpointError, match="best is missing"):
        learner.restore(learner.weights(), learner.state(), {"step": 3})
    assert learner.step == 7


@pytest.fixture(params=[(0o022, 0o640), (0o077, 0o600), (0o002, 0o660), (0, 0o660)])
def umask(request):
    mask, mode = request.param
    before = os.umask(mask)
    yield mode
    os.umask(before)


def test_files_of_checkpoints_are_not_the_worlds_to_read(umask, tmp_path):
    uri = write(str(tmp_path / "one"))
    checkpoint.add_validation(str(tmp_path / "one"), Snapshot(1, {}, {}, metrics={"mean": 0.6}))
    modes = {path.name: path.stat().st_mode & 0o777 for path in Path(uri).iterdir()}
    names = (checkpoint.WEIGHTS, checkpoint.STATE, checkpoint.CONFIG, manifest.MANIFEST)
    assert modes == dict.fromkeys(names, umask)
