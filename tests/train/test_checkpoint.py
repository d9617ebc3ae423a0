"""Checkpoints on a local path and on S3: what is written, found, trusted, kept and quarantined."""

import io
import json
import os

import pytest
import torch

from raybrats import storage
from raybrats.config import NetworkConfig, TrainConfig, digest, from_json
from raybrats.errors import CheckpointError
from raybrats.model.network import build, weights_of
from raybrats.train import checkpoint, manifest
from raybrats.train.checkpoint import Snapshot
from raybrats.train.manifest import MANIFEST

FILES = (checkpoint.WEIGHTS, checkpoint.STATE, checkpoint.CONFIG, MANIFEST)
CONFIG = TrainConfig(network=NetworkConfig(widths=(4, 4, 4)))


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def run_uri(request, tmp_path):
    if request.param == "local":
        return str(tmp_path / "run")
    return f"s3://{request.getfixturevalue('bucket')}/runs/one"


def write(run_uri, step, mean=0.5):
    torch.manual_seed(step)
    snapshot = Snapshot(
        step=step,
        weights=weights_of(build(CONFIG.network, 4)),
        state={"torch_rng": torch.get_rng_state(), "optimizer": {"lr": 0.1, "steps": [step]}},
        metrics={} if mean is None else {"mean": mean, "WT": mean},
        world=3,
        mlflow_run_id="abc",
    )
    return checkpoint.write(run_uri, CONFIG, snapshot)


def change(uri, name, how):
    place = storage.join(uri, name)
    storage.write_bytes(place, how(storage.read_bytes(place)))


def flipped(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]


DAMAGE = {"truncated": lambda d: d[: len(d) // 2], "emptied": lambda _: b"", "flipped": flipped}


def quarantined(run_uri):
    place = storage.join(run_uri, "checkpoints", "quarantine")
    return sorted({uri.rpartition("/")[0].removeprefix(f"{place}/") for uri in objects(place)})


def objects(uri):
    return storage.list_objects(uri)


def test_what_is_written_is_read(run_uri):
    uri = write(run_uri, 1250, mean=0.25)
    assert uri == f"{run_uri}/checkpoints/step-00001250"
    found = checkpoint.read(uri)
    assert (found.uri, found.step) == (uri, 1250)
    assert found.metrics == {"mean": 0.25, "WT": 0.25}
    torch.manual_seed(1250)
    expected = weights_of(build(CONFIG.network, 4))
    assert found.weights.keys() == expected.keys()
    assert all(torch.equal(found.weights[name], tensor) for name, tensor in expected.items())
    assert torch.equal(found.state["torch_rng"], torch.get_rng_state())
    assert found.state["optimizer"] == {"lr": 0.1, "steps": [1250]}
    assert from_json(found.files[checkpoint.CONFIG].decode()) == CONFIG


def test_the_manifest_names_size_and_digest_of_every_file(run_uri):
    uri = write(run_uri, 3)
    said = json.loads(storage.read_bytes(storage.join(uri, MANIFEST)))
    assert {storage.name(name) for name in objects(uri)} == set(FILES)
    for name, facts in said["files"].items():
        data = storage.read_bytes(storage.join(uri, name))
        assert facts == {"size": len(data), "digest": storage.digest_of(data)}
    assert said["draws"] == 3 * CONFIG.optim.global_batch
    assert said["config_digest"] == digest(CONFIG)
    assert (said["world"], said["mlflow_run_id"], said["finished"]) == (3, "abc", False)


def test_a_run_without_checkpoints_has_no_newest(run_uri):
    assert checkpoint.newest(run_uri) is None
    assert checkpoint.written(run_uri) == []
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoint.best(run_uri)


def test_newest_goes_by_step_and_best_by_score(run_uri):
    for step, mean in ((200, 0.7), (1000, 0.6), (30, 0.1)):
        write(run_uri, step, mean)
    assert [w.step for w in checkpoint.written(run_uri)] == [30, 200, 1000]
    assert checkpoint.newest(run_uri).step == 1000
    assert checkpoint.best(run_uri).step == 200


def test_of_equal_scores_the_later_is_best(run_uri):
    for step in (1, 3, 2):
        write(run_uri, step)
    assert checkpoint.best(run_uri).step == 3


def test_the_best_is_one_that_was_validated(run_uri):
    write(run_uri, 1, mean=None)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoint.best(run_uri)
    write(run_uri, 2, mean=0.0)
    write(run_uri, 3, mean=None)
    assert checkpoint.best(run_uri).step == 2
    assert checkpoint.newest(run_uri).step == 3


def test_prune_keeps_the_two_newest_that_verified_the_best_and_what_is_newer(run_uri):
    means = ((1, 0.2), (2, 0.9), (3, 0.3), (4, 0.4), (5, 0.5), (6, 0.1))
    uris = [write(run_uri, step, mean) for step, mean in means]
    storage.delete(storage.join(uris[0], MANIFEST))
    storage.delete(storage.join(uris[5], MANIFEST))
    for verified in ([], uris[3:4]):
        manifest.prune(run_uri, verified)
        assert folders(run_uri) == {1, 2, 3, 4, 5, 6}, "fewer than two are known to be good"
    for _ in range(2):
        manifest.prune(run_uri, uris[2:5])
        assert [w.step for w in checkpoint.written(run_uri)] == [2, 4, 5]
        assert folders(run_uri) == {2, 4, 5, 6}, "an old orphan goes, a newer one may be in work"
    assert checkpoint.best(run_uri).step == 2


def folders(run_uri):
    found = {uri.rpartition("/")[0] for uri in objects(storage.join(run_uri, "checkpoints"))}
    return {int(folder.rpartition("-")[2]) for folder in found}


def test_a_checkpoint_without_a_manifest_was_never_finished(run_uri):
    write(run_uri, 1)
    storage.delete(storage.join(write(run_uri, 2), MANIFEST))
    assert [w.step for w in checkpoint.written(run_uri)] == [1]
    assert checkpoint.newest(run_uri).step == 1
    with pytest.raises(CheckpointError, match="manifest"):
        checkpoint.read(storage.join(run_uri, "checkpoints", "step-00000002"))


def test_a_run_cut_in_its_first_upload_starts_afresh(run_uri):
    storage.delete(storage.join(write(run_uri, 1), MANIFEST))
    assert checkpoint.newest(run_uri) is None
    write(run_uri, 1)
    assert checkpoint.newest(run_uri).step == 1


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_newest_is_quarantined_for_the_one_before(run_uri, name, how):
    write(run_uri, 1)
    bad = write(run_uri, 2)
    change(bad, name, how)
    kept = {storage.name(uri): size for uri, size in objects(bad).items()}
    found = checkpoint.newest(run_uri)
    assert found.step == 1
    assert quarantined(run_uri) == ["step-00000002"]
    place = storage.join(run_uri, "checkpoints", "quarantine", "step-00000002")
    assert found.rejected == (place,)
    assert {storage.name(uri): size for uri, size in objects(place).items()} == kept
    assert [w.step for w in checkpoint.written(run_uri)] == [1]
    assert checkpoint.newest(run_uri).step == 1


@pytest.mark.parametrize("name", FILES[:3])
def test_a_file_that_is_gone_makes_a_checkpoint_bad(run_uri, name):
    write(run_uri, 1)
    storage.delete(storage.join(write(run_uri, 2), name))
    assert checkpoint.newest(run_uri).step == 1
    assert quarantined(run_uri) == ["step-00000002"]


def test_every_bit_of_the_manifest_counts(tmp_path):
    uri = write(str(tmp_path), 1)
    whole = storage.read_bytes(storage.join(uri, MANIFEST))
    for place in range(len(whole)):
        change(uri, MANIFEST, lambda _: _flip_at(whole, place))  # noqa: B023
        with pytest.raises(CheckpointError):
            checkpoint.read(uri)


def _flip_at(data, place):
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.mark.parametrize("name", [checkpoint.WEIGHTS, MANIFEST])
def test_a_run_whose_checkpoints_are_all_bad_never_starts_afresh(run_uri, name):
    for step in (1, 2):
        change(write(run_uri, step), name, flipped)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="quarantine"):
            checkpoint.newest(run_uri)
    assert quarantined(run_uri) == ["step-00000001", "step-00000002"]


def test_a_step_that_is_bad_three_times_is_kept_three_times(run_uri):
    write(run_uri, 1)
    for times in range(1, 4):
        change(write(run_uri, 2), checkpoint.STATE, flipped)
        assert checkpoint.newest(run_uri).step == 1
        folders = quarantined(run_uri)
        assert len(folders) == times
        assert all(len(objects(f"{run_uri}/checkpoints/quarantine/{f}")) == 4 for f in folders)


def test_a_damaged_best_gives_way_to_the_next(run_uri):
    change(write(run_uri, 1, mean=0.9), checkpoint.WEIGHTS, flipped)
    uri = write(run_uri, 2, mean=0.1)
    assert checkpoint.best(run_uri).step == 2
    change(uri, checkpoint.WEIGHTS, flipped)
    with pytest.raises(CheckpointError, match="no checkpoint that verifies"):
        checkpoint.best(run_uri)


@pytest.fixture
def files_read(monkeypatch):
    """Names of the files of which storage is asked for the bytes."""
    names, read_bytes = [], storage.read_bytes

    def noted(uri, **expected):
        names.append(storage.name(uri))
        return read_bytes(uri, **expected)

    monkeypatch.setattr(storage, "read_bytes", noted)
    return names


def test_scores_are_read_from_manifests_alone(run_uri, files_read):
    for step, mean in ((1, 0.3), (2, 0.9), (3, 0.9), (4, 0.1), (5, None)):
        uri = write(run_uri, step, mean)
        storage.delete(storage.join(uri, checkpoint.STATE))
        for name in (checkpoint.WEIGHTS, checkpoint.CONFIG):
            change(uri, name, DAMAGE["emptied"])
    files_read.clear()
    found = checkpoint.best_written(run_uri)
    assert (found.step, found.metrics) == (3, {"mean": 0.9, "WT": 0.9})
    assert set(files_read) == {MANIFEST}
    with pytest.raises(CheckpointError, match="verifies"):
        checkpoint.best(run_uri)


def test_without_a_validation_there_is_no_best(run_uri):
    write(run_uri, 1, mean=None)
    for nothing in (run_uri, storage.join(run_uri, "none")):
        with pytest.raises(CheckpointError, match="no checkpoint with a validation"):
            checkpoint.best_written(nothing)


def test_a_network_is_read_without_the_optimiser(run_uri, files_read):
    uri = write(run_uri, 7, mean=0.5)
    storage.delete(storage.join(uri, checkpoint.STATE))
    files_read.clear()
    for found in (checkpoint.read_network(uri), checkpoint.best(run_uri)):
        assert (found.uri, found.step, found.metrics["mean"]) == (uri, 7, 0.5)
        assert found.config == CONFIG
        torch.manual_seed(7)
        expected = weights_of(build(CONFIG.network, 4))
        assert found.weights.keys() == expected.keys()
        assert all(torch.equal(found.weights[name], tensor) for name, tensor in expected.items())
    assert set(files_read) == {MANIFEST, checkpoint.WEIGHTS, checkpoint.CONFIG}
    with pytest.raises(CheckpointError, match=r"state\.pt"):
        checkpoint.read(uri)


@pytest.mark.parametrize("name", [checkpoint.WEIGHTS, checkpoint.CONFIG, MANIFEST])
@pytest.mark.parametrize("how", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_network_is_refused(tmp_path, name, how):
    uri = write(str(tmp_path), 1)
    change(uri, name, how)
    with pytest.raises(CheckpointError):
        checkpoint.read_network(uri)


def test_a_configuration_of_another_version_is_refused_in_words(tmp_path):
    uri = write(str(tmp_path), 1)
    data = storage.read_bytes(storage.join(uri, checkpoint.CONFIG)).replace(b"seed", b"salt")
    storage.write_bytes(storage.join(uri, checkpoint.CONFIG), data)
    facts = manifest.read(uri)
    facts["files"][checkpoint.CONFIG] = {"size": len(data), "digest": storage.digest_of(data)}
    manifest.write(uri, facts)
    with pytest.raises(CheckpointError, match=r"config\.json: of another version .*run\.salt"):
        _ = checkpoint.read_network(uri).config


class _Touch:
    """Unpickled, it runs a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_state_that_would_run_code_is_refused(run_uri, tmp_path):
    trace = tmp_path / "trace"
    uri = checkpoint.write(
        run_uri, CONFIG, Snapshot(step=1, weights={}, state={"optimizer": _Touch(trace)})
    )
    found = checkpoint.read(uri)
    with pytest.raises(CheckpointError, match=r"state\.pt"):
        _ = found.state
    assert not trace.exists()
    torch.load(io.BytesIO(found.files[checkpoint.STATE]), weights_only=False)
    assert trace.exists(), "the payload is a live one"
