"""F4, F7, F8, F10, F11: checkpoints damaged, cut in their upload, or without room on the disk."""

import io
import os
import random
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fault_proxy import FaultProxy, fault_proxy, refusal
from ranks import CASES, CONFIG, CPU, batches, steps, together
from s3fs import S3FileSystem
from services import S3

from raybrats import filesystem, storage
from raybrats.errors import CheckpointError, DivergedError, StorageError
from raybrats.train import checkpoint, manifest
from raybrats.train.checkpoint import Snapshot
from raybrats.train.learner import new_learner
from raybrats.train.manifest import MANIFEST
from raybrats.train.saver import TRIES, Saver
from raybrats.train.step import train_step

pytestmark = pytest.mark.faults
NUM_FLIPS = 200


@pytest.fixture(scope="module")
def learner():
    return steps(CONFIG, 2)[0]


def save(run_uri, learner, step, **facts):
    progress = learner.progress() | {"step": step}
    snapshot = Snapshot(step, learner.weights(), learner.state(), progress, **facts)
    return checkpoint.write(run_uri, learner.config, snapshot)


def test_every_flipped_bit_of_a_checkpoint_is_caught(tmp_path, learner):
    """F7: 200 of 200, over all its files; a plain torch.load takes nearly all of them."""
    uri, dice, caught, taken = save(str(tmp_path), learner, 2), random.Random(4), 0, 0
    names = (checkpoint.WEIGHTS, checkpoint.STATE, checkpoint.CONFIG, MANIFEST)
    whole = {name: storage.read_bytes(storage.join(uri, name)) for name in names}
    for _ in range(NUM_FLIPS):
        name = dice.choices(names, [len(whole[n]) for n in names])[0]
        data, place = bytearray(whole[name]), dice.randrange(len(whole[name]))
        data[place] ^= 1 << dice.randrange(8)
        storage.write_bytes(storage.join(uri, name), bytes(data))
        try:
            checkpoint.read(uri)
        except CheckpointError:
            caught += 1
        storage.write_bytes(storage.join(uri, name), whole[name])
        taken += _torch_takes(whole[checkpoint.STATE], dice)
    assert caught == NUM_FLIPS
    assert taken > NUM_FLIPS / 2, "the peer is the reason for a manifest"
    assert checkpoint.read(uri).step == 2


def _torch_takes(data, dice):
    """Whether plain torch.load notices nothing of a flipped bit."""
    flipped = bytearray(data)
    flipped[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    try:
        torch.load(io.BytesIO(bytes(flipped)), weights_only=True)
    except Exception:
        return False
    return True


def test_files_that_do_not_belong_to_it_change_nothing(tmp_path, learner):
    uri = save(str(tmp_path), learner, 2)
    storage.write_bytes(storage.join(uri, "rank-1.pt"), b"left by another attempt")
    assert checkpoint.newest(str(tmp_path)).uri == uri


def test_a_run_goes_on_from_the_one_before_a_damaged_one(tmp_path, learner):
    """F7: the steps since are done again, and end with the same weights."""
    whole, _ = steps(CONFIG, 4)
    save(str(tmp_path), learner, 2)
    bad = save(str(tmp_path), steps(CONFIG, 3)[0], 3)
    place = storage.join(bad, checkpoint.STATE)
    storage.write_bytes(place, storage.read_bytes(place)[:-1])
    found = checkpoint.newest(str(tmp_path))
    assert (found.step, len(found.rejected)) == (2, 1), "it was damaged"
    second = new_learner(CONFIG, CPU)
    second.restore(found.weights, found.state, found.progress)
    for batch in list(batches(CONFIG, CASES, (0, 1, 2)))[:2]:
        train_step(second, batch)
    assert all(torch.equal(t, whole.weights()[n]) for n, t in second.weights().items())


def test_a_checkpoint_that_does_not_read_back_is_put_aside_and_nothing_older_goes(
    tmp_path, learner, monkeypatch
):
    """F7, at the time of writing: a disk that keeps other bytes than it was given."""
    saver, fired = Saver(str(tmp_path)), []
    write = storage.write_bytes

    def lossy(uri, data, *mode):
        if learner.step == 3 and uri.endswith(checkpoint.WEIGHTS):
            fired.append(uri)
            data = data[:-8] + b"\0" * 8
        write(uri, data, *mode)

    monkeypatch.setattr(storage, "write_bytes", lossy)
    for step in (1, 2, 3, 4):
        learner.step = step
        saver.save(learner, {})
        saver.wait()
    assert (len(fired), saver.rejected, saver.saved) == (1, 1, 4)
    assert [w.step for w in checkpoint.written(str(tmp_path))] == [2, 4]
    assert (tmp_path / "checkpoints" / "quarantine" / "step-00000003").is_dir()


def test_one_is_in_flight_at_most_and_the_training_does_not_wait_for_it(tmp_path, monkeypatch):
    at_work, most, trained, write = [], [], [], checkpoint.write
    next_step_is_over = threading.Event()

    def slow(*arguments):
        at_work.append(1)
        most.append(len(at_work))
        trained.append(next_step_is_over.wait(60))
        time.sleep(0.3)  # long enough to be met by the next
        uri = write(*arguments)
        at_work.pop()
        return uri

    monkeypatch.setattr(checkpoint, "write", slow)
    learner, saver = steps(CONFIG, 1)[0], Saver(str(tmp_path))
    saver.save(learner, {})
    before = {n: t.clone() for n, t in learner.weights().items()}
    train_step(learner, next(batches(CONFIG, CASES, (0, 1, 1))))
    next_step_is_over.set()
    saver.save(learner, {})
    saver.close()
    assert trained == [True, True], "it waits for the step, not the step for it"
    assert most == [1, 1]
    (first, second) = checkpoint.written(str(tmp_path))
    saved = checkpoint.read(first.uri).weights
    assert all(torch.equal(saved[n], t) for n, t in before.items()), "a copy of its own step"
    assert second.step == 2


def test_what_was_saved_on_a_notice_is_saved_again_with_its_validation(tmp_path, learner):
    """F3 in the middle of the last validation: the end of the run is not lost."""
    saver = Saver(str(tmp_path))
    for metrics, finished in (({}, False), ({}, False), ({"mean": 0.5}, True)):
        saver.save(learner, metrics, finished)
    saver.close()
    (found,) = checkpoint.written(str(tmp_path))
    assert (found.metrics, found.finished) == ({"mean": 0.5}, True)
    assert checkpoint.read(found.uri).progress["step"] == learner.step


def test_a_validation_is_added_without_touching_the_weights(tmp_path, learner):
    """A kill in between leaves the one or the other manifest, and both hold."""
    saver = Saver(str(tmp_path))
    saver.save(learner, {})
    saver.wait()
    uri = checkpoint.written(str(tmp_path))[0].uri
    files = (checkpoint.WEIGHTS, checkpoint.STATE, checkpoint.CONFIG)
    before = [os.stat(f"{uri}/{name}").st_ino for name in files]
    again = Saver(str(tmp_path), resumed=checkpoint.newest(str(tmp_path)))
    learner.validated_at = learner.step
    again.save(learner, {"mean": 0.25}, finished=True)
    assert [os.stat(f"{uri}/{name}").st_ino for name in files] == before
    found = checkpoint.newest(str(tmp_path))
    assert (found.metrics, found.finished) == ({"mean": 0.25}, True)
    assert found.progress["judged_at"] == learner.step
    learner.validated_at = 0


def test_a_validated_checkpoint_that_is_refused_once_is_written_again(
    tmp_path, learner, monkeypatch
):
    """It is the score by which a model is chosen, and no later step has it."""
    saver, fired, write = Saver(str(tmp_path)), [], storage.write_bytes

    def refusing(uri, data, *mode):
        if uri.endswith(checkpoint.STATE) and not fired:
            fired.append(uri)
            raise StorageError("the store is busy")
        write(uri, data, *mode)

    monkeypatch.setattr(storage, "write_bytes", refusing)
    learner.step = 5
    saver.save(learner, {"mean": 0.75})
    saver.wait()
    assert len(fired) == 1
    assert checkpoint.best_written(str(tmp_path)).metrics["mean"] == 0.75


def test_what_cannot_be_pruned_stops_nothing(tmp_path, learner, monkeypatch):
    """As where a role may write, but not delete."""
    saver, refused = Saver(str(tmp_path)), []

    def refuse(*_):
        refused.append(1)
        raise StorageError("access refused")

    monkeypatch.setattr(manifest, "prune", refuse)
    for learner.step in (7, 8):
        saver.save(learner, {})
        saver.wait()
    assert (len(refused), saver.saved) == (2, 8)


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    """F19."""
    learner, saver = steps(CONFIG, 1)[0], Saver(str(tmp_path))
    with torch.no_grad():
        next(iter(learner.bare.parameters()))[0] = torch.inf
    saver.save(learner, {})
    with pytest.raises(DivergedError, match="not finite at step 1"):
        saver.wait()
    assert checkpoint.written(str(tmp_path)) == []


def limited(_: int, __: int, ___: list, run_uri: str, answers: Path) -> None:
    """Saves thrice while files may have 20,000 bytes only, then once more when they may grow."""
    learner, saver = new_learner(CONFIG, CPU), Saver(run_uri)
    saver.save(learner, {})
    saver.wait()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, unlimited[1]))
    said = []
    for learner.step in range(1, TRIES + 1):
        try:
            saver.save(learner, {})
            saver.wait()
            said.append("")
        except StorageError as error:
            said.append(str(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    learner.step = TRIES + 1
    saver.save(learner, {}, finished=True)
    answers.write_text("\n".join([*said, str(saver.saved)]))


def test_a_full_disk_keeps_the_old_one_and_ends_the_run_after_three(tmp_path):
    """F11, by a limit on files."""
    assert together(1, limited, str(tmp_path / "run"), tmp_path / "said") == [0]
    *said, saved = (tmp_path / "said").read_text().splitlines()
    assert said[: TRIES - 1] == [""] * (TRIES - 1), "the next one tries again"
    assert "cannot be written: File too large" in said[-1], "the fault fired"
    assert saved == str(TRIES + 1)
    assert [w.step for w in checkpoint.written(str(tmp_path / "run"))] == [0, TRIES + 1]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(disk)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no right to mount a disk: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], capture_output=True, check=False)


def test_a_disk_that_is_full_says_so_and_goes_on_when_there_is_room(small_disk, learner):
    """F11, on a disk of its own."""
    run_uri, filling = str(small_disk / "run"), small_disk / "filling"
    saver = Saver(run_uri)
    learner.step = 1
    saver.save(learner, {})
    saver.wait()
    filling.write_bytes(b"\0" * _free_bytes(small_disk))
    learner.step = 2
    saver.save(learner, {})
    saver.wait()
    assert saver.saved == 1, "the disk was full"
    assert not (small_disk / "run" / "checkpoints" / "step-00000002").exists(), "nor half of it"
    assert checkpoint.newest(run_uri).step == 1
    learner.step = 3
    with pytest.raises(StorageError, match="No space left on device"):
        saver.save(learner, {}, finished=True)
    filling.unlink()
    saver.save(learner, {}, finished=True)
    assert checkpoint.newest(run_uri).step == 3


def _free_bytes(disk: Path) -> int:
    line = subprocess.run(["df", "-B1", "--output=avail", disk], capture_output=True, check=True)
    return int(line.stdout.split()[-1])


@pytest.fixture
def flaky(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with fault_proxy(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        S3FileSystem.clear_instance_cache()
        yield proxy
    S3FileSystem.clear_instance_cache()


def second_put(proxy: FaultProxy, times: int) -> Callable[[], int]:
    """Refuses the PUT of the second file so often; how often it did."""
    left, fired = [times], []
    real = proxy.note

    def note(method: str, path: str, num_bytes: int, at: float):
        fault = real(method, path, num_bytes, at)
        if method == "PUT" and path.endswith(checkpoint.STATE) and left[0]:
            left[0] -= 1
            fired.append(path)
            return refusal(500, "InternalError")
        return fault

    proxy.note = note
    return lambda: len(fired)


@pytest.mark.s3
def test_an_upload_whose_second_file_is_refused_once_is_tried_again(flaky, bucket, learner):
    """F10."""
    fired, learner.step = second_put(flaky, 1), 5
    saver = Saver(f"s3://{bucket}/run")
    saver.save(learner, {}, finished=True)
    assert (fired(), saver.saved) == (1, 5)
    assert checkpoint.newest(f"s3://{bucket}/run").step == 5


@pytest.mark.s3
def test_an_upload_that_is_cut_is_never_listed_and_goes_with_the_next_prune(
    flaky, bucket, learner, monkeypatch
):
    """F10."""
    run_uri = f"s3://{bucket}/run"
    saver, fired = Saver(run_uri), second_put(flaky, 0)
    for learner.step in (1, 2):
        saver.save(learner, {})
        saver.wait()
    fired = second_put(flaky, 100)
    learner.step = 3
    with monkeypatch.context() as impatient:  # for this one only: a busy machine is slow to save
        impatient.setattr(filesystem, "DEADLINE_S", 5.0)
        saver.save(learner, {})
        saver.wait()
    assert fired() >= 2, "it was tried again"
    assert saver.saved == 2
    assert [w.step for w in checkpoint.written(run_uri)] == [1, 2]
    assert checkpoint.newest(run_uri).step == 2
    orphan = storage.join(run_uri, "checkpoints", "step-00000003")
    assert storage.exists(orphan)
    flaky.note = type(flaky).note.__get__(flaky)
    for learner.step in (4, 5):
        saver.save(learner, {})
        saver.wait()
    assert not storage.exists(orphan)
    assert [w.step for w in checkpoint.written(run_uri)] == [4, 5]


def dies_in_its_upload(_: int, __: int, ___: list, run_uri: str) -> None:
    """Saves once; is killed in the middle of the second time, as by the end of a notice."""
    learner, saver, write = new_learner(CONFIG, CPU), Saver(run_uri), storage.write_bytes
    learner.step = 1
    saver.save(learner, {})
    saver.wait()

    def dying(uri: str, data: bytes, *mode: int) -> None:
        if uri.endswith(f"step-00000002/{checkpoint.STATE}"):
            os.kill(os.getpid(), signal.SIGKILL)
        write(uri, data, *mode)

    storage.write_bytes = dying
    learner.step = 2
    saver.save(learner, {})
    saver.wait()


def test_a_notice_shorter_than_the_upload_leaves_the_one_before(tmp_path, learner):
    """F4: rank 0 itself is taken away while it saves."""
    run_uri = str(tmp_path / "run")
    assert together(1, dies_in_its_upload, run_uri) == [-signal.SIGKILL]
    half = tmp_path / "run" / "checkpoints" / "step-00000002"
    assert os.listdir(half) == [checkpoint.WEIGHTS], "it was cut"
    found = checkpoint.newest(run_uri)
    assert (found.step, found.rejected) == (1, ())
    saver = Saver(run_uri, resumed=found)
    for learner.step in (3, 4):
        saver.save(learner, {})
        saver.wait()
    assert not half.exists()


def test_all_checkpoints_damaged_is_an_error_and_no_fresh_start(tmp_path, learner):
    """F8."""
    for step in (1, 2):
        place = storage.join(save(str(tmp_path), learner, step), checkpoint.WEIGHTS)
        storage.write_bytes(place, b"")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"no checkpoint .* verifies.*quarantine") as said:
            checkpoint.newest(str(tmp_path))
        assert said.value.exit_code == 3
