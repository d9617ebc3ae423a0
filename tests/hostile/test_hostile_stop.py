"""A cluster that does not answer, mistakes that need none, and signals while a verb is at work."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from faulty import SOAK
from services import free_ports

from raybrats import cli, cluster
from raybrats.errors import ResourcesError
from raybrats.phantom.phantom import write_phantoms

RAYBRATS = Path(sys.executable).with_name("raybrats")
DEAD = f"127.0.0.1:{free_ports(1)[0]}"


def started(words, **environment):
    return subprocess.Popen(
        [str(RAYBRATS), *words.split()],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(process, timeout_s=240):
    """Exit code, stdout and the lines on stderr; nothing is left behind."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err.splitlines()


@contextmanager
def server(first_words=b""):
    """Accepts connections, and says this much on each."""
    held = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def accept():
            with suppress(OSError):
                while True:
                    link, _ = listening.accept()
                    held.append(link)
                    link.sendall(first_words)

        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)
        for link in held:
            link.close()


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Cases large enough that opening one takes a while."""
    folder = tmp_path_factory.mktemp("stop") / "tree"
    write_phantoms(str(folder), num_cases=1, shape=(112, 112, 96), edition="2021")
    (case,) = folder.iterdir()
    for number in range(1, 60):
        name = f"BraTS2021_{number:05d}"
        (folder / name).mkdir()
        for file in case.iterdir():
            os.link(file, folder / name / file.name.replace(case.name, name))
    return folder


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("nonsense", "no address such as"),
        ("http://127.0.0.1:8265", "no address such as"),
        ("127.0.0.1:99999", "no address such as"),
        ("127.0.0.1:0", "no address such as"),
        (DEAD, "Connection refused"),
        (f"ray://{DEAD}", "Connection refused"),
        ("no-such-host.invalid:6379", "correct or unset RAY_ADDRESS"),
        (f"{'x' * 80}.org:6379", "correct or unset RAY_ADDRESS"),
    ],
)
def test_a_cluster_that_is_not_there_is_known_soon(address, said, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", address)
    begun_s = time.monotonic()
    with pytest.raises(ResourcesError, match=said) as caught:
        cluster.checked_address()
    assert time.monotonic() - begun_s < 25
    assert str(caught.value).startswith(f"Ray cluster {address}: ")


@pytest.mark.parametrize(
    ("words", "said"),
    [(b"HTTP/1.1 400 Bad Request\r\n\r\n", "not Ray"), (b"\0\0", "not Ray"), (b"", "no answer")],
)
def test_what_answers_but_is_not_ray_is_told_as_that(words, said, monkeypatch):
    begun_s = time.monotonic()
    with server(words) as address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ResourcesError, match=said):
            cluster.checked_address()
    assert time.monotonic() - begun_s < 25


@pytest.mark.ray
def test_a_cluster_that_is_there_is_found(ray_cluster, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster.address)
    assert cluster.checked_address() == ray_cluster.address


def test_without_a_cluster_the_code_says_so(tree, tmp_path):
    code, out, err = ended(started(f"index {tree} --out {tmp_path}/c.parquet", RAY_ADDRESS=DEAD))
    assert (code, out, len(err)) == (7, "", 1), err
    assert err[0].startswith(f"raybrats: Ray cluster {DEAD}: Connection refused")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, *([signal.SIGINT] if SOAK else [])])
def test_waiting_for_a_cluster_can_be_interrupted(number, tree, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        words = f"index {tree} --out {tmp_path}/c.parquet"
        process = started(words, RAY_ADDRESS=address)
        listening.settimeout(200)
        link, _ = listening.accept()
        process.send_signal(number)
        begun_s = time.monotonic()
        code, out, err = ended(process)
        link.close()
    assert time.monotonic() - begun_s < 9, "before the answer is given up"
    assert (code, out, len(err)) == (130, "", 1), err
    assert err[0].startswith("raybrats: interrupted; ")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("predict nobody {tree}", 2),
        ("predict models:/nobody@champion {tree} --tracking-uri http://{dead}", 6),
        ("evaluate {tree} {tree} --edition 1999", 2),
        ("evaluate {tmp}/none {tree}", 6),
        ("evaluate {tree} {tmp}/none", 6),
        ("report {tmp}/none {tree} --out {tmp}/x.html", 5),
        ("index {tmp}/none --out {tmp}/c.parquet", 6),
        ("train tiny --data.cohort {tmp}/none.parquet --run.storage_uri {tmp}/runs", 6),
        ("train tiny --data.cohort {tmp}/none --run.storage_uri {tmp}/runs", 6),
        ("tune tiny --data.cohort {tmp}/none --run.storage_uri {tmp}/runs --trials 0", 2),
        ("tune tiny --data.cohort {tree} --space optim.lr=uniform(5,1)", 2),
    ],
)
def test_what_is_wrong_without_ray_is_told_without_ray(
    words, code, tree, tmp_path, monkeypatch, capfd
):
    def never(**_):
        raise AssertionError("Ray was started")

    monkeypatch.setattr(cluster, "connect", never)
    got = cli.main(words.format(tree=tree, tmp=tmp_path, dead=DEAD).split())
    out, err = capfd.readouterr()
    assert (got, out, err.count("\n")) == (code, "", 1), err


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("verb", "number"),
    [("index", signal.SIGTERM), *([("evaluate", signal.SIGINT)] if SOAK else [])],
)
def test_a_verb_at_work_is_interrupted_in_one_line(verb, number, tree, ray_cluster, tmp_path):
    words = {
        "index": f"index {tree} --out {tmp_path}/c.parquet",
        "evaluate": f"evaluate {tree} {tree} --edition 2021",
    }
    process = started(words[verb], **ray_cluster.environment)
    first = process.stderr.readline()
    assert first.startswith(("indexing: ", "evaluating: ")), first  # it is at work
    begun_s = time.monotonic()
    process.send_signal(number)
    code, out, err = ended(process)
    assert time.monotonic() - begun_s < 20
    err = [line for line in err if not line.startswith(("indexing: ", "evaluating: "))]
    assert (code, out, len(err)) == (130, "", 1), err
    assert err[0].startswith("raybrats: interrupted; ")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not SOAK, reason="a cluster of its own: make soak")
@pytest.mark.slow
def test_sigterm_to_the_whole_group_ends_a_run_with_a_checkpoint(tmp_path):
    """As at the end of a time limit: the processes of the Ray that was started here get it too."""
    process = started(f"demo --out {tmp_path}", RAY_ADDRESS="local")
    for line in process.stderr:
        if re.match(r"training .*: [1-9]", line):
            break
    os.killpg(process.pid, signal.SIGTERM)
    code, out, err = ended(process)
    err = [line for line in err if not line.startswith("training ")]
    assert (code, out, len(err)) == (130, "", 1), err
    assert err[0].startswith("raybrats: interrupted; ")
    assert list(tmp_path.glob("runs/*/checkpoints/step-*"))
