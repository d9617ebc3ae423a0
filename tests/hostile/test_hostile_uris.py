"""What may stand where a path or a URI stands: local paths and s3://, and nothing that fetches."""

import gzip
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from niftis import zipped

import raybrats as rb
from raybrats import storage
from raybrats.arguments import read_config
from raybrats.cli import phantom, segment
from raybrats.data.cohort import dataset_json, source
from raybrats.data.cohort.case import Case
from raybrats.data.cohort.index import find_cases
from raybrats.data.cohort.rows import read_cohort, write_cohort
from raybrats.errors import DataError, RaybratsError, StorageError, UsageError
from raybrats.predict.target import check_target

FOREIGN = [
    "http://{there}/cohort.parquet",
    "https://{there}/cohort.parquet",
    "http:/{there}/cohort.parquet",
    "HTTP://{there}/cohort.parquet",
    "simplecache::http://{there}/cohort.parquet",
    "filecache::s3://bucket/cohort.parquet",
    "reference://::http://{there}/cohort.parquet",
    "zip://cohort.parquet::http://{there}/a.zip",
    "zip::/tmp/a.zip",
    "s3://bucket/a::http://{there}/cohort.parquet",
    "file:///tmp/a::http://{there}/cohort.parquet",
    "/tmp/a::http://{there}/cohort.parquet",
    "dir::/tmp",
    "memory://cohort.parquet",
    "github://me:it@main/cohort.parquet",
    "gs://bucket/cohort.parquet",
    "S3://bucket/cohort.parquet",
    "s3://",
    "s3:///cohort.parquet",
    "s3:/bucket/cohort.parquet",
    "file:/tmp/cohort.parquet",
    "file://server/cohort.parquet",
    "file://file:///tmp/cohort.parquet",
    "models:/raybrats@champion",
    "a\0b",
]
EMPTY = ["", " ", "\n"]
ROW = Case("a", "a", "2023", "brats", ("/a.nii",) * 4, "/seg.nii", (1, 2, 3))
SECRET = "zq7x:$6$wQxZt.5kX:Jq0Vv:Kp9:w7w:::"


@pytest.fixture(scope="module")
def there() -> Iterator[str]:
    """Host and port of a server to which nobody may have spoken."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.0)
        yield "{}:{}".format(*server.getsockname())
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("uri", FOREIGN + EMPTY)
def test_other_places_than_paths_and_s3_are_refused_before_any_read(there, uri):
    uri = uri.format(there=there)
    actions: list[Callable[[str], object]] = [
        storage.absolute,
        storage.exists,
        storage.read_bytes,
        storage.list_objects,
        storage.delete,
        storage.for_ray,
        lambda u: storage.write_bytes(u, b"x"),
        lambda u: storage.create(u, b"x"),
        lambda u: storage.verify(u, size=1, digest=""),
        find_cases,
        source.read,
        check_target,
    ]
    for action in actions:
        with pytest.raises(UsageError) as refusal:
            action(uri)
        assert "\n" not in str(refusal.value)
        assert refusal.value.exit_code == 2


@pytest.mark.parametrize("uri", [*EMPTY, "http://127.0.0.1:1/x", "a\0b"])
def test_every_verb_refuses_them_before_it_starts_ray(tmp_path, monkeypatch, uri):
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")  # which would be exit 7
    (tmp_path / "folder").mkdir()
    there = str(tmp_path / "folder")
    calls: list[Callable[[], object]] = [
        lambda: rb.index(uri),
        lambda: rb.index(there, uri),
        lambda: rb.predict("models:/a/1", uri, there),
        lambda: rb.predict("models:/a/1", there, uri),
        lambda: rb.evaluate(uri, there),
        lambda: rb.evaluate(there, uri),
        lambda: rb.report(uri, there),
        lambda: rb.report(there, uri),
        lambda: rb.report(there, there, uri),
        lambda: rb.load(uri),
        lambda: phantom([uri]),
        lambda: segment(["models:/a/1", "--flair", uri, "--t1", "a.nii"]),
        lambda: segment(["models:/a/1", "--flair", "a.nii", "--out", uri]),
        lambda: storage.write_bytes(storage.join(uri, "x"), b""),
    ]
    monkeypatch.chdir(tmp_path)
    for number, call in enumerate(calls):
        with pytest.raises(UsageError):
            call()
        assert [p.name for p in tmp_path.rglob("*")] == ["folder"], number


def test_a_password_in_a_uri_that_is_refused_is_not_repeated():
    with pytest.raises(UsageError) as refusal:
        storage.read_bytes("https://me:hunter2@host/cohort.parquet")
    assert "hunter2" not in str(refusal.value)


@pytest.mark.parametrize("name", ["a:b.nii", "12:30/x", "x/a::b", "mem:x", "100%", "~", "s3:x"])
def test_a_path_may_hold_colons_and_is_a_path(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    storage.write_bytes(name, b"voxels")
    assert (tmp_path / name).read_bytes() == b"voxels"
    assert storage.read_bytes(str(tmp_path / name)) == b"voxels"
    assert list(storage.list_objects(".")) == [str(tmp_path / name)]


@pytest.mark.parametrize(
    "uri",
    [
        *FOREIGN[:-1],
        "a.nii",
        "../a.nii",
        "file:///etc/passwd",
        "simplecache::/etc/passwd",
        "/a\n.nii",
        "/a\x1b.nii",
        " ",
    ],
)
@pytest.mark.parametrize("field", ["image", "label"])
def test_the_rows_of_a_cohort_name_absolute_paths_and_s3_alone(tmp_path, there, uri, field):
    uri = uri.format(there=there)
    images = (uri, *ROW.image_uris[1:]) if field == "image" else ROW.image_uris
    case = replace(ROW, image_uris=images, label_uri=uri if field == "label" else ROW.label_uri)
    cohort = str(tmp_path / "cohort.parquet")
    write_cohort([case], cohort)
    with pytest.raises(
        DataError, match=r"case a names .* repair the rows, or make it anew by"
    ) as e:
        read_cohort(cohort)
    assert str(e.value).isprintable()


@pytest.mark.parametrize(
    "changes",
    [
        {"label_uri": ""},
        {"label_values": (1, 2)},
        {"label_values": (1, 2, 300)},
        {"label_values": None},
        {"image_uris": None},
        {"image_uris": (None,) * 4},
        {"case_id": None},
        {"status": None},
        {"case_id": "x" * 300},
        {"case_id": "\x9b"},
    ],
)
def test_rows_that_lack_or_stretch_a_value_are_refused_in_one_line(tmp_path, changes):
    cohort = str(tmp_path / "cohort.parquet")
    write_cohort([replace(ROW, **changes)], cohort)
    with pytest.raises(DataError, match="raybrats index"):
        read_cohort(cohort)


@pytest.mark.parametrize("what", ["rows", "values"])
def test_a_cohort_of_a_few_bytes_that_claims_to_be_large_is_refused(tmp_path, what):
    cohort = str(tmp_path / "cohort.parquet")
    write_cohort([ROW], cohort)
    row = pq.read_table(cohort)
    if what == "rows":
        table = pa.concat_tables([row] * 1024)
        table = pa.concat_tables([table.combine_chunks()] * 1024).combine_chunks()
    else:
        many, column = 17_000_000, row.schema.get_field_index("sizes")
        zeros = pa.array(np.zeros(many, np.int64), row.schema[column].type.value_type)
        values = pa.ListArray.from_arrays(pa.array([0, many], pa.int32()), zeros)
        table = row.set_column(column, "sizes", values)
    pq.write_table(table, cohort)
    with pytest.raises(DataError, match="more than 1000000 cases"):
        read_cohort(cohort)


def test_rows_on_s3_and_rows_without_labels_or_a_modality_are_taken(tmp_path):
    cohort = str(tmp_path / "cohort.parquet")
    cases = [
        ROW,
        replace(ROW, case_id="b", subject="b", image_uris=("s3://b/a::b.nii", "", "", "")),
        replace(ROW, case_id="c", subject="c", label_uri=None, label_values=()),
    ]
    write_cohort(cases, cohort)
    assert read_cohort(cohort) == cases


# No bytes of a file in an error


def errors_of(path: Path) -> Iterator[RaybratsError]:
    """What every reader says of a file, or of its bytes in other clothes, that is not for it."""
    for read in (
        lambda p: source.read(p).volume(),
        dataset_json.read,
        read_cohort,
        read_config,
    ):
        with pytest.raises(RaybratsError) as refusal:
            read(str(path))
        yield refusal.value


@pytest.mark.parametrize(
    "wrap",
    [
        str.encode,
        lambda text: zipped(text.encode() * 20),
        lambda text: gzip.compress(b"x" * 600) + text.encode(),
        lambda text: (348).to_bytes(4, "little") + text.encode() * 20,
        lambda text: f'"{text}"'.encode(),
        lambda text: f'{{"channel_names": "{text}", "labels": {{}}}}'.encode(),
        lambda text: f'{{"channel_names": {{"{text}": "t1"}}, "labels": {{"a": "b"}}}}'.encode(),
        lambda text: f'{{"channel_names": {{"0": "{text}"}}, "labels": {{"a": 1}}}}'.encode(),
        lambda text: f'{{"mlflow_run_id": "{text}", "config": "{text}"}}'.encode(),
        lambda text: f'{{"optim": {{"steps": "{text}"}}}}'.encode(),
    ],
)
def test_no_bytes_of_a_file_stand_in_an_error(tmp_path, wrap):
    path = tmp_path / "shadow"
    path.write_bytes(wrap(SECRET))
    for error in errors_of(path):
        words = str(error)
        assert not any(SECRET[n : n + 4] in words for n in range(len(SECRET) - 3)), words
        assert "\n" not in words


def test_labels_of_a_dataset_json_are_not_repeated(tmp_path):
    channels = '{"0": "flair", "1": "t1", "2": "t1ce", "3": "t2"}'
    for labels in (f'{{"{SECRET}": 1, "b": 1}}', f'{{"edema": "{SECRET}"}}', f'{{"{SECRET}": []}}'):
        (tmp_path / "dataset.json").write_text(
            f'{{"channel_names": {channels}, "labels": {labels}}}'
        )
        with pytest.raises(DataError) as refusal:
            dataset_json.read(str(tmp_path / "dataset.json"))
        assert "zq7x" not in str(refusal.value)


def test_a_cohort_whose_columns_have_other_types_does_not_repeat_them(tmp_path):
    write_cohort([ROW], str(tmp_path / "cohort.parquet"))
    table = pq.read_table(tmp_path / "cohort.parquet")
    column = table.schema.get_field_index("fold")
    pq.write_table(table.set_column(column, "fold", [[SECRET]]), tmp_path / "cohort.parquet")
    with pytest.raises(DataError, match="not a cohort file") as refusal:
        read_cohort(str(tmp_path / "cohort.parquet"))
    assert "zq7x" not in str(refusal.value)


# Outputs


def make_device(path: Path) -> None:
    try:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 3))  # as /dev/null
    except PermissionError:
        pytest.skip("only root makes devices")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("make", [os.mkfifo, make_device, os.mkdir])
def test_outputs_replace_regular_files_only(tmp_path, make, link):
    place = tmp_path / "place"
    make(place)
    out = tmp_path / "link" if link else place
    if link:
        out.symlink_to(place)
    before = place.stat()
    (tmp_path / "tree").mkdir()
    for write in (
        lambda: storage.write_bytes(str(out), b"x"),
        lambda: storage.create(str(out), b"x"),
        lambda: storage.read_bytes(str(out)),
        lambda: rb.index(str(tmp_path / "tree"), str(out)),  # before a case is looked for
    ):
        with pytest.raises(StorageError, match=f"^{out}: is a |^{place}: is a "):
            write()
    after = place.stat()
    assert (after.st_mode, after.st_ino) == (before.st_mode, before.st_ino)
    assert {p.name for p in tmp_path.iterdir()} == {"place", "tree", *(["link"] if link else [])}


def test_a_link_to_a_file_stays_and_the_file_is_replaced(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    storage.write_bytes(str(tmp_path / "link"), b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"new"


def test_links_in_a_circle_are_a_usage_error(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises((UsageError, StorageError)):
        storage.read_bytes(str(tmp_path / "a"))
