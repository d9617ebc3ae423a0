"""Bytes at a URI: the same on disk and on S3, and every failure in one line without a secret."""

import errno
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from itertools import pairwise, repeat
from pathlib import Path

import pytest
from fault_proxy import (
    Fault,
    FaultProxy,
    fault_proxy,
    flip,
    hang,
    refusal,
    reset,
    shorten,
    stall,
    trickle,
    truncate,
)
from faulty import SOAK
from services import S3

from raybrats import filesystem, storage
from raybrats.errors import ChangedObjectError, MissingObjectError, StorageError, UsageError

BLOB = os.urandom(300_000)
BUSY = refusal(503, "SlowDown")
MORE_FAULTS = (hang, stall, truncate, reset)


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place to write below."""
    if request.param == "local":
        return str(tmp_path / "root")
    return f"s3://{request.getfixturevalue('bucket')}/some/root"


@pytest.fixture
def fresh_clients() -> Iterator[None]:
    """Clients made inside the test see its environment and are forgotten after it."""
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()
    yield
    S3FileSystem.clear_instance_cache()


def test_what_is_written_is_read_listed_and_deleted(place: str):
    small, blob = storage.join(place, "a", "small.txt"), storage.join(place, "a/b/blob.bin")
    assert not storage.exists(small)
    assert storage.list_objects(place) == {}
    storage.write_bytes(small, b"old")
    storage.write_bytes(small, b"hello")
    storage.write_bytes(blob, BLOB)
    storage.write_bytes(storage.join(place, "empty"), b"")
    assert storage.read_bytes(small) == b"hello"
    assert storage.read_bytes(blob, size=len(BLOB), digest=storage.digest_of(BLOB)) == BLOB
    assert storage.read_bytes(storage.join(place, "empty")) == b""
    assert list(storage.list_objects(place).items()) == [
        (blob, len(BLOB)),
        (small, 5),
        (storage.join(place, "empty"), 0),
    ]
    assert storage.list_objects(storage.join(place, "a/b")) == {blob: len(BLOB)}
    assert storage.exists(small)
    assert storage.exists(storage.join(place, "a"))
    storage.delete(small)
    assert not storage.exists(small)
    assert storage.exists(blob)
    storage.delete(storage.join(place, "a"))
    assert list(storage.list_objects(place)) == [storage.join(place, "empty")]


def test_names_may_hold_spaces_and_letters_of_any_script(place: str):
    uri = storage.join(place, "Fall 1 (Müller) 東/t1 [x]*?.nii.gz")
    storage.write_bytes(uri, b"voxels")
    assert storage.read_bytes(uri) == b"voxels"
    assert storage.list_objects(place) == {uri: 6}
    assert storage.exists(uri)


def test_what_is_there_is_not_created_again(place: str):
    uri = storage.join(place, "deep", "lease")
    assert storage.create(uri, b"mine")
    assert not storage.create(uri, b"yours")
    assert storage.read_bytes(uri) == b"mine"
    assert list(storage.list_objects(place)) == [uri]
    storage.delete(uri)
    assert storage.create(uri, b"yours")


def create_at_once(uri: str, count: int) -> list[bytes]:
    """The data of those of so many concurrent creators who were told that they have it."""
    start, made = threading.Barrier(count), []

    def create(data: bytes) -> None:
        start.wait()
        if storage.create(uri, data):
            made.append(data)

    threads = [threading.Thread(target=create, args=(b"of %d" % n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return made


def test_of_many_who_create_at_once_one_does(place: str):
    for turn in range(4):
        uri = storage.join(place, str(turn))
        assert create_at_once(uri, 8) == [storage.read_bytes(uri)]
    assert len(storage.list_objects(place)) == 4


@pytest.mark.s3
@pytest.mark.usefixtures("fresh_clients")
def test_one_creates_also_where_the_server_ignores_the_condition(
    bucket: str, monkeypatch: pytest.MonkeyPatch
):
    from s3fs import S3FileSystem

    dropped, pipe = [], S3FileSystem._pipe_file

    async def unconditional(self, path, data, mode="overwrite", **options):
        dropped.append(mode)
        return await pipe(self, path, data, **options)

    # neither Ceph nor moto ignores the condition, so it is not sent to them
    monkeypatch.setattr(S3FileSystem, "_pipe_file", unconditional)
    uri = f"s3://{bucket}/lease"
    assert create_at_once(uri, 8) == [storage.read_bytes(uri)]
    assert dropped.count("create") > 2
    assert not storage.create(uri, b"late")


def test_without_hard_links_one_creates_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    refused = []

    def link(*_: object) -> None:
        refused.append(1)
        raise PermissionError(errno.EPERM, "Operation not permitted")  # as exFAT does

    monkeypatch.setattr(os, "link", link)
    uri = str(tmp_path / "lease")
    assert create_at_once(uri, 8) == [storage.read_bytes(uri)]
    assert len(refused) == 8
    assert [p.name for p in tmp_path.iterdir()] == ["lease"]


def test_a_folder_is_renamed_whole(place: str):
    old, new = storage.join(place, "step-1"), storage.join(place, "quarantine/step-1")
    files = {"MANIFEST.json": b"{}", "deep/weights": BLOB}
    storage.write_bytes(storage.join(place, "quarantine", "step-0", "x"), b"kept")
    for name, data in files.items():
        storage.write_bytes(storage.join(old, name), data)
    storage.rename(old, new)
    assert storage.list_objects(old) == {}
    found = storage.list_objects(new)
    assert found == {storage.join(new, name): len(data) for name, data in files.items()}
    assert all(storage.read_bytes(storage.join(new, n)) == data for n, data in files.items())
    assert storage.read_bytes(storage.join(place, "quarantine", "step-0", "x")) == b"kept"


def test_other_bytes_than_recorded_are_refused(place: str):
    uri = storage.join(place, "blob")
    storage.write_bytes(uri, BLOB)
    with pytest.raises(ChangedObjectError, match=f"^{uri}: 300000 bytes where 299999"):
        storage.read_bytes(uri, size=299_999)
    storage.write_bytes(uri, bytes([BLOB[0] ^ 1]) + BLOB[1:])
    with pytest.raises(ChangedObjectError, match=f"^{uri}: other bytes than were recorded"):
        storage.read_bytes(uri, size=len(BLOB), digest=storage.digest_of(BLOB))


def test_what_is_missing_is_said_to_be_missing(place: str):
    uri = storage.join(place, "nothing.nii.gz")
    with pytest.raises(MissingObjectError, match=f"^{uri}: does not exist$"):
        storage.read_bytes(uri)
    with pytest.raises(MissingObjectError, match=f"^{uri}: does not exist$"):
        storage.delete(uri)
    assert storage.list_objects(uri) == {}
    storage.write_bytes(storage.join(place, "file"), b"x")
    with pytest.raises(MissingObjectError):
        storage.read_bytes(storage.join(place, "file", "below"))


@pytest.mark.s3
@pytest.mark.usefixtures("s3")
def test_a_missing_bucket_is_said_to_be_missing():
    uri = "s3://raybrats-has-no-such-bucket/cases"
    for action in (storage.read_bytes, storage.list_objects, lambda u: storage.write_bytes(u, b"")):
        with pytest.raises(MissingObjectError, match=f"^{uri}: does not exist$"):
            action(uri)
    assert not storage.exists(uri)


def test_a_folder_is_not_read_as_a_file(tmp_path: Path):
    with pytest.raises(StorageError, match=f"^{tmp_path}: is a folder; expected a regular file$"):
        storage.read_bytes(str(tmp_path))


def test_a_folder_that_cannot_be_made_is_an_error_that_leaves_nothing(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(StorageError, match="cannot be written"):
        storage.write_bytes(str(tmp_path / "file" / "below"), b"y")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="is a folder"):
        storage.write_bytes(str(tmp_path / "folder"), b"y")
    with pytest.raises(StorageError, match="cannot be created"):
        storage.create(str(tmp_path / "file" / "below"), b"y")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_readers_see_the_old_bytes_or_the_new_ones(tmp_path: Path):
    uri = str(tmp_path / "state")
    blobs = [bytes([n]) * 200_000 for n in range(20)]
    storage.write_bytes(uri, blobs[0])
    writer = threading.Thread(target=lambda: [storage.write_bytes(uri, blob) for blob in blobs])
    writer.start()
    while writer.is_alive():
        assert storage.read_bytes(uri) in blobs
    writer.join()
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_uris_are_joined_and_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("runs/") == storage.absolute(f"file://{tmp_path}/runs")
    assert storage.absolute("runs") == str(tmp_path / "runs")
    assert storage.absolute("s3://bucket/runs/") == "s3://bucket/runs"
    assert storage.join("s3://bucket/runs/", "/a/", "b") == "s3://bucket/runs/a/b"
    assert storage.name("s3://bucket/runs/a.nii.gz") == "a.nii.gz"
    storage.write_bytes("runs/x", b"1")
    assert storage.read_bytes(f"file://{tmp_path}/runs/x") == b"1"
    assert list(storage.list_objects("runs")) == [str(tmp_path / "runs" / "x")]


def test_a_scheme_that_nobody_knows_is_refused_at_once():
    with pytest.raises(UsageError, match=r"^'nosuch://bucket/x': expected a local path or s3://"):
        storage.read_bytes("nosuch://bucket/x")
    with pytest.raises(MissingObjectError, match=r"^http//:x: does not exist$"):
        storage.read_bytes("http//:x")


@pytest.mark.s3
@pytest.mark.usefixtures("fresh_clients")
@pytest.mark.parametrize(
    ("variable", "value"),
    [("AWS_SECRET_ACCESS_KEY", "wrong-but-secret"), ("AWS_ACCESS_KEY_ID", "nobody-known-here")],
)
def test_a_wrong_key_is_refused_in_one_line(
    s3: S3, bucket: str, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
):
    if s3.kind == "moto":
        pytest.skip("moto does not check signatures")
    uri = f"s3://{bucket}/x"
    storage.write_bytes(uri, b"x")
    monkeypatch.setenv(variable, value)
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    for action in (storage.read_bytes, storage.list_objects, lambda u: storage.write_bytes(u, b"")):
        with pytest.raises(StorageError) as caught:
            action(uri)
        assert str(caught.value) == (
            f"{uri}: access refused; check AWS_ACCESS_KEY_ID and its permissions"
        )
        assert secret not in str(caught.value)


@pytest.fixture
def dead_end() -> Iterator[tuple[str, list[int]]]:
    """An endpoint that hangs up on every caller, and how often it was called.

    Its port holds the digits 403, which are no refusal.
    """
    calls: list[int] = []
    with closing(socket.socket()) as server:
        for port in (p for p in range(20_000, 32_000) if "403" in str(p)):
            with suppress(OSError):
                server.bind(("127.0.0.1", port))
                break
        server.listen()

        def hang_up() -> None:
            with suppress(OSError):
                while True:
                    caller, _ = server.accept()
                    calls.append(1)
                    caller.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", calls
        server.shutdown(socket.SHUT_RDWR)
    thread.join()


@pytest.mark.s3
@pytest.mark.usefixtures("fresh_clients")
def test_a_dead_endpoint_is_given_up_after_a_few_tries(
    s3: S3, dead_end: tuple[str, list[int]], monkeypatch: pytest.MonkeyPatch
):
    endpoint, calls = dead_end
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(StorageError, match=r"^s3://cases/x: out of reach after 6 tries") as caught:
        storage.read_bytes("s3://cases/x")
    assert 6 <= len(calls) <= 12
    assert s3.secret_key not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def blob_uri(bucket: str) -> str:
    """A blob on the server."""
    uri = f"s3://{bucket}/case/t1.nii.gz"
    storage.write_bytes(uri, BLOB)
    return uri


@pytest.fixture
def proxy(
    s3: S3, blob_uri: str, fresh_clients: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FaultProxy]:
    """The way to the blob."""
    assert blob_uri
    assert fresh_clients is None
    with fault_proxy(s3.endpoint) as way:
        monkeypatch.setenv("AWS_ENDPOINT_URL", way.endpoint)
        yield way


@pytest.fixture
def impatient(
    proxy: FaultProxy, blob_uri: str, monkeypatch: pytest.MonkeyPatch
) -> Callable[[float], float]:
    """Gives up a silence after 1 s, and all after so many; what a read of the blob has then.

    Not for tests of what succeeds in the end: a loaded server may well take its seconds.
    """
    monkeypatch.setitem(filesystem.S3_OPTIONS["config_kwargs"], "read_timeout", 1)
    assert storage.exists(blob_uri)  # makes the client, which may take a busy machine seconds
    proxy.inject([])

    def give_up_after(seconds: float) -> float:
        monkeypatch.setattr(filesystem, "DEADLINE_S", seconds)
        return seconds + len(BLOB) / filesystem.SLOW_LINE

    return give_up_after


def read_blob(uri: str) -> bytes:
    return storage.read_bytes(uri, size=len(BLOB), digest=storage.digest_of(BLOB))


@pytest.mark.s3
@pytest.mark.faults
@pytest.mark.parametrize(
    "faults", [[BUSY, BUSY], [refusal(500, "InternalError")], [truncate], [reset]]
)
def test_a_fault_that_passes_costs_a_request_and_no_more(
    proxy: FaultProxy, blob_uri: str, faults: list[Fault]
):
    proxy.inject(faults)
    assert read_blob(blob_uri) == BLOB
    assert [(r.method, r.fault) for r in proxy.seen] == [("GET", f) for f in [*faults, None]]


@pytest.mark.s3
@pytest.mark.faults
@pytest.mark.parametrize("fault", [hang, trickle, *([stall] if SOAK else [])])
def test_a_read_that_gets_nowhere_is_ended_and_tried_again(
    proxy: FaultProxy, blob_uri: str, impatient: Callable[[float], float], fault: Fault
):
    limit_s = impatient(24.0)  # half of it is left for the try that succeeds
    proxy.inject([fault])
    assert read_blob(blob_uri) == BLOB
    first, second, *_ = proxy.seen
    assert [request.fault for request in proxy.seen if request.fault] == [fault]
    assert first.fault == fault
    assert second.at - first.at < limit_s


@pytest.mark.s3
@pytest.mark.faults
@pytest.mark.parametrize("fault", [BUSY, trickle, *(MORE_FAULTS if SOAK else ())])
def test_a_fault_that_stays_is_given_up_within_the_deadline(
    proxy: FaultProxy, blob_uri: str, impatient: Callable[[float], float], fault: Fault
):
    # a trickle takes half of it, and a busy machine some of the rest
    limit_s = impatient(12.0 if fault is trickle else 5.0)
    proxy.inject(repeat(fault))
    started = time.monotonic()
    with pytest.raises(StorageError, match=f"^{blob_uri}: out of reach after ") as caught:
        read_blob(blob_uri)
    assert time.monotonic() - started < limit_s + 5, "the rest is the machine's"
    tries = int(re.findall(r"after (\d) tries", str(caught.value))[0])
    assert tries >= 2
    seen = [request.fault for request in proxy.seen]
    assert seen in ([fault] * tries, [fault] * (tries - 1))  # the deadline may cut the last short
    assert "\n" not in str(caught.value)


@pytest.mark.s3
@pytest.mark.faults
@pytest.mark.parametrize("fault", [hang, BUSY])
def test_a_write_that_gets_nowhere_is_given_up_within_the_deadline(
    proxy: FaultProxy, blob_uri: str, impatient: Callable[[float], float], fault: Fault
):
    impatient(3.0)
    proxy.inject(repeat(fault))
    started = time.monotonic()
    with pytest.raises(StorageError, match=f"^{blob_uri}: out of reach after "):
        storage.write_bytes(blob_uri, b"new")
    assert time.monotonic() - started < 3 + 5, "the rest is the machine's"
    assert {(request.method, request.fault) for request in proxy.seen} == {("PUT", fault)}


@pytest.mark.s3
@pytest.mark.faults
def test_tries_lie_ever_further_apart_and_readers_do_not_keep_step(
    proxy: FaultProxy, blob_uri: str
):
    waits = []
    for _ in range(5):
        proxy.inject([BUSY, BUSY])
        assert read_blob(blob_uri) == BLOB
        waits.append([after.at - before.at for before, after in pairwise(proxy.seen)])
    assert min(first for first, _ in waits) > 0.1
    seconds = [second for _, second in waits]
    assert min(seconds) > 0.2
    assert max(seconds) - min(seconds) > 0.01


@pytest.mark.s3
@pytest.mark.faults
@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        (refusal(400, "ExpiredToken"), StorageError, "the credentials have expired; renew them"),
        (refusal(403, "ExpiredToken"), StorageError, "the credentials have expired; renew them"),
        (refusal(403, "AccessDenied"), StorageError, "access refused; check AWS_ACCESS_KEY_ID"),
        (
            refusal(403, "RequestTimeTooSkewed"),
            StorageError,
            "this machine's clock is wrong; set it$",
        ),
        (refusal(404, "NoSuchKey"), MissingObjectError, "does not exist$"),
    ],
)
def test_what_trying_again_cannot_help_is_said_at_once(
    proxy: FaultProxy, blob_uri: str, fault: Fault, kind: type[StorageError], words: str
):
    proxy.inject([fault])
    with pytest.raises(kind, match=f"^{blob_uri}: {words}"):
        read_blob(blob_uri)
    assert [(request.method, request.fault) for request in proxy.seen] == [("GET", fault)]


@pytest.mark.s3
@pytest.mark.faults
@pytest.mark.parametrize(
    ("fault", "words"),
    [(shorten, "150000 bytes where 300000 were"), (flip, "other bytes than were recorded")],
)
def test_bytes_that_were_spoiled_on_the_way_are_not_taken(
    s3: S3, proxy: FaultProxy, blob_uri: str, fault: Fault, words: str
):
    if s3.kind == "moto":  # sends a checksum, by which the client itself sees it
        words = r"out of reach after \d tries \(FlexibleChecksumError"
    proxy.inject(repeat(fault))
    with pytest.raises(StorageError, match=f"^{blob_uri}: {words}"):
        read_blob(blob_uri)
    assert {request.fault for request in proxy.seen} == {fault}


@pytest.mark.s3
@pytest.mark.usefixtures("s3", "fresh_clients")
def test_no_credentials_are_said_to_be_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(StorageError, match="s3://cases/x: no credentials; set AWS_ACCESS_KEY_ID"):
        storage.read_bytes("s3://cases/x")


def test_rays_view_of_a_local_place_is_the_same_place(tmp_path: Path):
    view = storage.for_ray(str(tmp_path))
    with view["storage_filesystem"].open_output_stream(f"{view['storage_path']}/x") as stream:
        stream.write(b"from Ray")
    assert storage.read_bytes(str(tmp_path / "x")) == b"from Ray"


@pytest.mark.s3
def test_rays_view_of_a_bucket_is_the_same_bucket(bucket: str):
    uri = f"s3://{bucket}/ray"
    view = storage.for_ray(uri)
    with view["storage_filesystem"].open_output_stream(f"{view['storage_path']}/x") as stream:
        stream.write(b"from Ray")
    assert storage.read_bytes(f"{uri}/x") == b"from Ray"


@pytest.mark.s3
@pytest.mark.faults
def test_a_create_whose_answer_was_lost_knows_its_own(proxy: FaultProxy, bucket: str):
    proxy.inject([])
    assert storage.create(f"s3://{bucket}/first", b"mine")
    before = [request.method for request in proxy.seen].index("PUT")
    proxy.inject([*repeat(None, before), BUSY])
    assert storage.create(f"s3://{bucket}/second", b"mine")
    assert [r.method for r in proxy.seen if r.fault] == ["PUT"]
    assert storage.read_bytes(f"s3://{bucket}/second") == b"mine"
