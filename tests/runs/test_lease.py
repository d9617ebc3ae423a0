"""The name of a run belongs to one driver: held, refused, taken over, lost; on disk and on S3."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from raybrats import storage
from raybrats.errors import StorageError, UsageError
from raybrats.runs import lease

DRIVER = """
import socket, sys
from raybrats.runs import lease

lease.RENEW_S = 0.5
if sys.argv[2]:
    socket.gethostname = lambda: sys.argv[2]
with lease.held(sys.argv[1], lambda words: print("lost:", words, flush=True)):
    print("held", flush=True)
    sys.stdin.readline()
print("ended", flush=True)
"""


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def run_uri(request, tmp_path):
    if request.param == "local":
        return str(tmp_path / "run")
    return f"s3://{request.getfixturevalue('bucket')}/runs/one"


@pytest.fixture
def on_disk(tmp_path):
    """For what does not depend on the store."""
    return str(tmp_path / "run")


@pytest.fixture(autouse=True)
def _short_times(monkeypatch):
    monkeypatch.setattr(lease, "RENEW_S", 0.1)
    monkeypatch.setattr(lease, "EXPIRY_S", 0.4)
    monkeypatch.setattr(storage, "WRITE_RACE_S", 0.4)


def place_of(run_uri):
    return storage.join(run_uri, lease.NAME)


def stored(run_uri):
    return lease._parse(storage.read_bytes(place_of(run_uri)))


def eventually(condition, patience_s=60.0):
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def never(words):
    pytest.fail(f"lost: {words}")


@contextmanager
def driver(run_uri, host=""):
    """A process that holds the run until it is told to end."""
    command = [sys.executable, "-c", DRIVER, run_uri, host]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, **pipes) as process:
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def leave(run_uri, **facts):
    """A lease that nobody renews; by default of a process of this host that has ended."""
    with subprocess.Popen(["true"]) as ended:
        pass
    left = replace(lease._own(), token="of the dead", **{"pid": ended.pid, **facts})
    storage.write_bytes(place_of(run_uri), left.data)
    return left


def refused(run_uri):
    """The words of the refusal."""
    with pytest.raises(UsageError) as caught, lease.held(run_uri, never):
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_run_is_held_renewed_and_released(run_uri):
    for _ in range(2):
        with lease.held(run_uri, never):
            assert stored(run_uri).renewals == 0
            eventually(lambda: stored(run_uri).renewals >= 3)
        assert not storage.exists(place_of(run_uri))
    with pytest.raises(ZeroDivisionError), lease.held(run_uri, never):
        _ = 1 / 0
    assert not storage.exists(place_of(run_uri))
    assert not [thread for thread in threading.enumerate() if thread.name == "lease"]


def test_a_second_driver_of_this_process_is_refused(run_uri):
    with lease.held(run_uri, never):
        words, mine = refused(run_uri), stored(run_uri)
        assert f"process {mine.pid} on {mine.host} since {mine.since}" in words
        assert run_uri in words
        assert "choose another run.name, or wait for its end" in words
        eventually(lambda: stored(run_uri).renewals > mine.renewals)
        assert stored(run_uri).token == mine.token
    with lease.held(run_uri, never):
        pass


def test_a_driver_refuses_others_until_it_is_killed(run_uri, caplog, monkeypatch):
    monkeypatch.setattr(lease, "EXPIRY_S", 10.0)
    with driver(run_uri) as process:
        assert f"process {process.pid} on {socket.gethostname()} since 2" in refused(run_uri)
        process.kill()
        eventually(lambda: lease._stat(process.pid)[0] == "Z")  # nobody has asked for its end yet
        with lease.held(run_uri, never):
            assert stored(run_uri).pid != process.pid
    assert not storage.exists(place_of(run_uri))
    assert "waiting up to" not in caplog.text


def test_a_driver_whose_pid_is_used_again_is_dead(on_disk):
    mine = lease._own()
    leave(on_disk, pid=mine.pid, started=mine.started - 1)
    with lease.held(on_disk, never):
        assert stored(on_disk).started == mine.started


def test_a_dead_driver_elsewhere_is_taken_over_once_watched(run_uri, caplog):
    left = leave(run_uri, host="far")
    start = time.monotonic()
    with lease.held(run_uri, never):
        assert time.monotonic() - start >= lease.EXPIRY_S
        assert stored(run_uri).token != left.token
    assert caplog.messages[0].startswith(
        f"waiting up to 0.4 s for process {left.pid} on far since {left.since}, "
        f"who holds {run_uri}, to show life"
    )


@pytest.mark.parametrize("elsewhere", [{"boot": "x"}, {"pid_namespace": "p"}, {"started": None}])
def test_a_pid_says_nothing_elsewhere(on_disk, monkeypatch, elsewhere):
    monkeypatch.setattr(lease, "EXPIRY_S", 0.01)
    mine, asked = lease._own(), []
    monkeypatch.setattr(lease, "_lives", lambda *facts: asked.append(facts))
    assert lease._dead(place_of(on_disk), leave(on_disk, **elsewhere).data, mine)
    assert not asked
    assert lease._dead(place_of(on_disk), leave(on_disk).data, mine)
    assert asked


def test_a_living_driver_elsewhere_refuses_others(on_disk, caplog, monkeypatch):
    monkeypatch.setattr(lease, "EXPIRY_S", 10.0)
    with driver(on_disk, host="far") as process:
        start = time.monotonic()
        assert f"process {process.pid} on far since" in refused(on_disk)
        assert time.monotonic() - start < 5
        assert "waiting up to 10 s" in caplog.text
        process.communicate("\n")
        assert process.returncode == 0
    assert not storage.exists(place_of(on_disk))


def test_a_driver_that_ends_while_it_is_watched_leaves_the_run(on_disk, caplog):
    leave(on_disk, host="far")
    ends = threading.Timer(0.1, lambda: storage.delete(place_of(on_disk)))
    ends.start()
    with lease.held(on_disk, never):
        assert stored(on_disk).host == socket.gethostname()
    assert "waiting" in caplog.text
    ends.join()


@pytest.mark.parametrize("damage", [b"", b"\xff\x00{"], ids=["empty", "garbage"])
def test_a_damaged_lease_is_of_one_who_does_not_renew(on_disk, caplog, damage):
    storage.write_bytes(place_of(on_disk), damage)
    with lease.held(on_disk, never):
        assert stored(on_disk).host == socket.gethostname()
    assert "for someone whose lease is damaged" in caplog.text


@pytest.mark.parametrize(
    ("field", "value"),
    [("pid", -1), ("pid", 2**40), ("pid", "1"), ("host", "\x1b[2J"), ("since", 1)],
)
def test_what_no_driver_writes_is_no_lease(field, value):
    known = json.loads(lease._own().data)
    assert lease._parse(json.dumps(known).encode())
    assert lease._parse(json.dumps({**known, field: value}).encode()) is None


def at_once(run_uri, count, hold):
    """What became of so many drivers that start at once: "has it", or words."""
    start, came_to = threading.Barrier(count), []
    done = threading.Event()

    def drive():
        start.wait()
        try:
            with lease.held(run_uri, never):
                came_to.append("has it")
                assert done.wait(60)
        except UsageError as error:
            came_to.append(str(error))

    threads = [threading.Thread(target=drive, name=f"driver {n}") for n in range(count)]
    for thread in threads:
        thread.start()
    eventually(lambda: len(came_to) == count)
    hold()
    done.set()
    for thread in threads:
        thread.join()
    return came_to


def test_of_many_who_start_at_once_one_has_it(run_uri):
    for _ in range(2):
        came_to = at_once(run_uri, 8, lambda: time.sleep(2 * lease.RENEW_S))
        assert came_to.count("has it") == 1
        assert not storage.exists(place_of(run_uri))


def test_of_many_who_take_over_at_once_one_has_it(run_uri, monkeypatch):
    # of S3 on a busy machine a write may take long; one that is too late is another test
    monkeypatch.setattr(storage, "WRITE_RACE_S", 4.0 if storage.is_remote(run_uri) else 0.5)
    together, write, written = threading.Barrier(5), storage.write_bytes, []

    def write_with_others(uri, data):
        if threading.current_thread().name.startswith("driver"):
            turn = together.wait(60)  # all of them have seen the dead one before any writes
            time.sleep(turn * 0.03)  # so that each could read its own
            written.append(data)
        write(uri, data)

    monkeypatch.setattr(storage, "write_bytes", write_with_others)
    for times in (1, 2):
        leave(run_uri)
        came_to = at_once(run_uri, 5, lambda: time.sleep(2 * lease.RENEW_S))
        assert len(written) == 5 * times
        assert came_to.count("has it") == 1
        assert not storage.exists(place_of(run_uri))


def test_one_who_writes_too_late_does_not_have_it_too(on_disk, monkeypatch, caplog):
    """It looks, is stopped, and writes over one who has taken the run over and begun."""
    monkeypatch.setattr(lease, "RENEW_S", 0.6)  # longer than WRITE_RACE_S, as in earnest
    monkeypatch.setattr(lease, "EXPIRY_S", 2.0)
    leave(on_disk)
    write, looked, begun, lost = storage.write_bytes, threading.Event(), threading.Event(), []
    outcome = []

    def slow_write(uri, data):
        if threading.current_thread().name == "slow" and not looked.is_set():
            looked.set()
            assert begun.wait(60)
        write(uri, data)

    def slow():
        try:
            with lease.held(on_disk, never):
                outcome.append("alone" if lost else "beside another")
        except UsageError:
            outcome.append("refused")

    monkeypatch.setattr(storage, "write_bytes", slow_write)
    thread = threading.Thread(target=slow, name="slow")
    thread.start()
    assert looked.wait(60)
    with lease.held(on_disk, lost.append):
        begun.set()
        thread.join()
        assert outcome == (["alone"] if lost else ["refused"])
    assert "was slow to write" in caplog.text


def test_a_driver_that_was_stopped_for_long_has_lost_the_run(on_disk):
    with driver(on_disk, host="far") as process:
        eventually(lambda: stored(on_disk).renewals)  # so it is not about to write
        process.send_signal(signal.SIGSTOP)
        eventually(lambda: lease._stat(process.pid)[0] == "T")
        with lease.held(on_disk, never):
            mine = stored(on_disk)
            process.send_signal(signal.SIGCONT)
            words = process.stdout.readline()
            assert words == (
                f"lost: {on_disk} has been taken over by "
                f"process {mine.pid} on {mine.host} since {mine.since}\n"
            )
            time.sleep(0.6)
            rest, _ = process.communicate("\n")
            assert rest == "ended\n"  # told once
            assert stored(on_disk).token == mine.token


def test_a_loss_is_told_once_and_the_other_keeps_the_lease(run_uri):
    lost = []
    with lease.held(run_uri, lost.append):
        other = leave(run_uri, host="far")
        eventually(lambda: lost)
        time.sleep(3 * lease.RENEW_S)
    assert len(lost) == 1
    assert "process" in lost[0]
    assert stored(run_uri) == other


def test_a_driver_that_is_stopped_while_it_looks_looks_again(on_disk, monkeypatch):
    read, stopped, lost = storage.read_bytes, threading.Event(), []
    goes_on = threading.Event()

    def slow_read(uri):
        data = read(uri)
        if threading.current_thread().name == "lease" and not stopped.is_set():
            stopped.set()
            assert goes_on.wait(60)
        return data

    with lease.held(on_disk, lost.append):
        monkeypatch.setattr(storage, "read_bytes", slow_read)
        assert stopped.wait(60)
        time.sleep(1.1 * lease.RENEW_S)
        other = leave(on_disk, host="far")
        goes_on.set()
        eventually(lambda: lost)
    assert stored(on_disk) == other


def test_a_store_that_fails_a_while_is_no_loss(on_disk, monkeypatch):
    read, failed = storage.read_bytes, []

    def failing(uri):
        if len(failed) < 3 and threading.current_thread().name == "lease":
            failed.append(uri)
            raise StorageError(f"{uri}: out of reach")
        return read(uri)

    with lease.held(on_disk, never):
        monkeypatch.setattr(storage, "read_bytes", failing)
        eventually(lambda: len(failed) == 3)
        eventually(lambda: stored(on_disk).renewals > 3)
    assert not storage.exists(place_of(on_disk))


def test_a_name_that_is_no_file_is_an_error(run_uri):
    storage.write_bytes(storage.join(place_of(run_uri), "below"), b"x")
    with (
        pytest.raises(StorageError, match=r"is a folder|is there a folder"),
        lease.held(run_uri, never),
    ):
        pass


def test_a_lease_that_was_removed_by_hand_is_put_back(on_disk):
    with lease.held(on_disk, never):
        token = stored(on_disk).token
        storage.delete(place_of(on_disk))
        eventually(lambda: storage.exists(place_of(on_disk)))
        assert stored(on_disk).token == token
    assert not storage.exists(place_of(on_disk))


def test_a_renewal_that_is_under_way_at_the_end_is_waited_for(on_disk, monkeypatch):
    write, under_way = storage.write_bytes, threading.Event()

    def slow_write(uri, data):
        under_way.set()
        time.sleep(5 * lease.RENEW_S)
        write(uri, data)

    monkeypatch.setattr(storage, "write_bytes", slow_write)
    with lease.held(on_disk, never):
        assert under_way.wait(60)
    assert not storage.exists(place_of(on_disk))
