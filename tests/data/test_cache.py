"""The node's cache: what it gives is the fresh case bit for bit, whatever happens to its disk."""

import hashlib
import logging
import multiprocessing
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from raybrats.brats import MODALITIES
from raybrats.config import DataConfig
from raybrats.data import cache
from raybrats.data.cache import Tally, prepared
from raybrats.data.cohort.case import Case, prepare_case
from raybrats.data.cohort.index import find_cases, verify_case
from raybrats.data.entry import decode, encode
from raybrats.data.prepare import Prepared, Scaling
from raybrats.errors import ChangedObjectError, DataError
from raybrats.phantom.phantom import write_phantoms

pytestmark = pytest.mark.faults
HIT, MISS = Tally(hits=1), Tally(misses=1)
NOT_KEPT = Tally(misses=1, failed=1)
WRITTEN_BY_VERSION_2 = "a021f97e7ab31861469bc9d96f87fff2951a25900420032aa6a3b3ccbfc7bf89"
KEY_OF_VERSION_2 = "0119ec3b0f32c2148e5c7ae00fcf69a8509bdb9fbb972e288ef82c3f2cdede46"

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["raybrats.data.cache", "raybrats.data.scan"])


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    tree = tmp_path_factory.mktemp("tree")
    write_phantoms(str(tree), num_cases=6, shape=(24, 24, 20))
    return [verify_case(case) for case in find_cases(str(tree))]


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    return DataConfig(cache_dir=str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def new_process() -> Callable[[], None]:
    """Makes this process forget all that it remembers of the cache, as each test begins."""

    def forget() -> None:
        cache._process = cache._Process()

    forget()
    return forget


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts an own small disk with these options."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no right to mount a disk: {done.stderr.strip()}")
        return disk

    yield mount
    subprocess.run(["umount", "--lazy", str(disk)], capture_output=True, check=False)


def flat(case: Prepared) -> dict[str, object]:
    """Its fields, and those of its scaling."""
    return {name: value for name, value in vars(case).items() if name != "scaling"} | vars(
        case.scaling
    )


def assert_same(found: Prepared, fresh: Prepared) -> None:
    """Every field, bit for bit, and in the same order in memory."""
    for name, other in flat(fresh).items():
        ours = flat(found)[name]
        if not isinstance(other, np.ndarray):
            assert ours == other, name
            continue
        assert (ours.dtype, ours.shape) == (other.dtype, other.shape), name
        assert ours.tobytes() == other.tobytes(), name
        assert ours.flags.f_contiguous or other.ndim < 3 or name == "image"


def same(found: Prepared, fresh: Prepared) -> bool:
    try:
        assert_same(found, fresh)
    except AssertionError:
        return False
    return True


def look_up(case: Case, config: DataConfig) -> tuple[bool, Tally]:
    """Whether the cache gives the fresh case, and what it tallies; for another process."""
    found, tally = prepared(case, config)
    return same(found, prepare_case(case, config)), tally


def at_once(function: Callable, *calls: tuple) -> list:
    """What the calls return, each in a process of its own, all at the same time."""
    with processes.Pool(len(calls), maxtasksperchild=1) as pool:
        return pool.starmap(function, calls, chunksize=1)


def elsewhere(function: Callable, *arguments: object) -> object:
    """What the function returns in a new process."""
    return at_once(function, arguments)[0]


def entries(config: DataConfig) -> list[Path]:
    return sorted(Path(config.cache_dir).glob("*.safetensors"))


def others(config: DataConfig) -> list[str]:
    """Files that are neither entries nor locks."""
    names = {path.name for path in Path(config.cache_dir).iterdir()}
    return sorted(n for n in names if not n.startswith("lock-") and not n.endswith(".safetensors"))


def varied(config: DataConfig, count: int) -> list[DataConfig]:
    """As many configurations, each with entries of its own."""
    steps = [(0.5, 90 + n / 1000) for n in range(count)]
    return [replace(config, normalisation="percentile", percentiles=step) for step in steps]


# What is kept


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("normalisation", ["zscore", "minmax", "percentile"])
def test_a_hit_is_the_fresh_case_bit_for_bit(cases, config, labelled, normalisation):
    config = replace(config, normalisation=normalisation)
    case = cases[0]
    if not labelled:
        case = verify_case(replace(case, label_uri=None, sizes=(), digests=()))
    made, first = prepared(case, config)
    found, second = prepared(case, config)
    assert (first, second) == (MISS, HIT)
    assert (found.labels is not None) == labelled
    fresh = prepare_case(case, config)
    assert_same(made, fresh)
    assert_same(found, fresh)
    assert elsewhere(look_up, case, config) == (True, HIT)


def test_entries_of_version_2_are_found_and_read_as_they_were_written():
    """Digests by the code that first wrote them: a change of either needs another VERSION."""
    made = Prepared(
        image=np.arange(2 * 4 * 3 * 2, dtype=np.int16).reshape(2, 4, 3, 2).transpose(0, 3, 2, 1),
        labels=np.arange(4 * 3 * 2, dtype=np.uint8).reshape(4, 3, 2).T % 4,
        scaling=Scaling(
            gain=np.array([0.5, 0.25], np.float32),
            bias=np.array([-1.5, 2.0], np.float32),
            low=np.array([-7, 0], np.int16),
            high=np.array([30, 32767], np.int16),
            background=np.array([0, -5], np.int16),
        ),
        tumour=np.array([1, 5, 2, 3], np.int32),
        counts=np.array([20, 2, 1, 1], np.int64),
        box=(slice(3, 5), slice(0, 3), slice(2, 6)),
        shape=(9, 8, 7),
    )
    written = b"".join(encode(made))
    assert hashlib.sha256(written).hexdigest() == WRITTEN_BY_VERSION_2
    assert_same(decode(written, verify=True), made)
    uris = tuple(f"s3://bucket/{name}.nii.gz" for name in MODALITIES)
    digests = tuple(str(n) * 64 for n in range(5))
    case = Case("a", "a", "2021", "brats", uris, "s3://bucket/seg.nii.gz", (1, 2, 4))
    case = replace(case, digests=digests, box=(3, 5, 0, 3, 2, 6))
    assert cache._key(case, DataConfig()) == KEY_OF_VERSION_2


def test_a_hit_reads_nothing_of_the_source(cases, config, tmp_path):
    shutil.copytree(Path(cases[0].image_uris[0]).parent, tmp_path / "case")
    uris = [str(tmp_path / "case" / Path(uri).name) for uri in cases[0].image_uris]
    label_uri = str(tmp_path / "case" / Path(cases[0].label_uri).name)
    case = replace(cases[0], image_uris=tuple(uris), label_uri=label_uri)
    fresh, _ = prepared(case, config)
    shutil.rmtree(tmp_path / "case")
    found, tally = prepared(case, config)
    assert tally == HIT
    assert_same(found, fresh)


def test_a_hit_cannot_be_written_to_by_mistake(cases, config):
    prepared(cases[0], config)
    found, _ = prepared(cases[0], config)
    with pytest.raises(ValueError, match="read-only"):
        found.image[0, 0, 0, 0] = 7


def test_tallies_add_up():
    assert Tally(1, 2, 3, 4, 5) + Tally(5, 4, 3, 2, 1) == Tally(6, 6, 6, 6, 6)


def test_all_that_decides_a_case_decides_its_entry(cases, config):
    case = cases[0]
    percentile = replace(config, normalisation="percentile")
    configs = [
        config,
        replace(config, modalities=("t1", "flair")),
        replace(config, modalities=("flair", "t1")),
        replace(config, normalisation="minmax"),
        percentile,
        replace(percentile, percentiles=(1, 99)),
    ]
    asked = [(case, config) for config in configs]
    asked += [(replace(case, label_values=(4, 2, 1)), config)]
    asked += [(replace(case, image_uris=("", *case.image_uris[1:])), config)]
    for n in range(len(case.digests)):
        other = list(case.digests)
        other[n] = "0" * 64
        asked += [(replace(case, digests=tuple(other)), config)]
    assert len({cache._key(*each) for each in asked}) == len(asked)
    for changed in configs:
        made, tally = prepared(case, changed)
        assert tally == MISS
        assert_same(made, prepare_case(case, changed))
    assert [prepared(case, changed)[1] for changed in configs] == [HIT] * len(configs)


def test_what_does_not_change_a_case_does_not_change_its_entry(cases, config, tmp_path):
    prepared(cases[0], config)
    moved = tmp_path / "moved"
    Path(config.cache_dir).rename(moved)
    changes = {"cache_gb": 1.0, "percentiles": (1, 99), "patch_size": (8, 8, 8), "fold": 3}
    changed = replace(config, cache_dir=str(moved), **changes)
    renamed = replace(cases[0], case_id="other", subject="other", fold=4)
    assert prepared(renamed, changed)[1] == HIT


@pytest.mark.parametrize("why", ["cache_gb", "digests"])
def test_nothing_is_kept_where_it_is_not_asked_for_or_nothing_names_it(cases, config, why):
    case, asked = cases[0], config
    if why == "cache_gb":
        asked = replace(config, cache_gb=0)
    else:
        case = replace(case, digests=())
    for _ in range(2):
        made, tally = prepared(case, asked)
        assert tally == MISS
        assert_same(made, prepare_case(case, config))
    assert not Path(config.cache_dir).exists()


def test_a_source_that_is_bad_is_told_each_time_and_nothing_kept(cases, config):
    swapped = replace(cases[0], image_uris=cases[1].image_uris, sizes=())
    with pytest.raises(ChangedObjectError, match="other bytes than were recorded"):
        prepared(swapped, config)
    for _ in range(2):
        with pytest.raises(DataError, match="unknown label"):
            prepared(replace(cases[0], label_values=(7, 8, 9)), config)
    assert entries(config) == others(config) == []
    assert prepared(cases[0], config)[1] == MISS


# Many processes


def test_processes_that_want_one_case_at_once_read_its_source_once(cases, config):
    results = at_once(look_up, *[(cases[0], config)] * 4)
    assert all(right for right, _ in results)
    assert sum((tally for _, tally in results), Tally()) == Tally(hits=3, misses=1)
    assert len(entries(config)) == 1
    assert others(config) == []


def look_up_all(cases: list[Case], configs: list[DataConfig]) -> tuple[bool, Tally]:
    results = [look_up(case, config) for case in cases for config in configs]
    return all(right for right, _ in results), sum((tally for _, tally in results), Tally())


@pytest.mark.parametrize("room", [None, 2.5])
def test_processes_in_any_order_see_no_torn_entry_even_while_entries_go(cases, config, room):
    if room is not None:
        prepared(cases[0], config)
        config = replace(config, cache_gb=room * entries(config)[0].stat().st_size / 1e9)
    orders = [random.Random(n).sample(cases * 2, 2 * len(cases)) for n in range(4)]
    results = at_once(look_up_all, *[(order, [config]) for order in orders])
    assert all(right for right, _ in results)
    total = sum((tally for _, tally in results), Tally())
    assert total.hits + total.misses == 4 * 2 * len(cases)
    assert (total.damaged, total.failed) == (0, 0)
    if room is None:
        assert (total.misses, total.evicted) == (len(cases), 0)
    else:
        assert total.misses + 1 - total.evicted == len(entries(config)) <= 2
    assert others(config) == []


def make_all(case: Case, configs: list[DataConfig]) -> None:
    for config in configs:
        prepared(case, config)


def kill_while_writing(case: Case, configs: list[DataConfig]) -> bool:
    """Starts a process that fills the folder and kills it; whether that was within a write."""
    writer = processes.Process(target=make_all, args=(case, configs))
    writer.start()
    folder = Path(configs[0].cache_dir)
    while writer.is_alive() and not (folder.exists() and others(configs[0])):
        pass
    writer.kill()
    writer.join()
    return bool(others(configs[0]))


def test_a_process_killed_while_it_writes_leaves_no_entry(tmp_path, cases):
    write_phantoms(str(tmp_path / "tree"), num_cases=1, shape=(64, 64, 64))
    case = verify_case(find_cases(str(tmp_path / "tree"))[0])
    for attempt in range(20):
        config = DataConfig(cache_dir=str(tmp_path / f"cache-{attempt}"))
        configs = varied(config, 20)
        if kill_while_writing(case, configs):
            break
    (aside,) = others(config)
    made = len(entries(config))
    assert made < len(configs)
    assert elsewhere(look_up_all, [case], configs[: made + 1]) == (True, Tally(made, 1))
    assert others(config) == [aside]  # its writer might still be at it
    long_ago = time.time() - cache._STALE_S - 1
    os.utime(Path(config.cache_dir, aside), (long_ago, long_ago))
    assert prepared(cases[0], config)[1] == MISS
    assert others(config) == []


# Disks that are full, or not ours


@pytest.mark.parametrize("cause", ["limit", "disk"])
def test_a_full_disk_costs_one_warning_and_no_case(cases, config, cause, request):
    if cause == "disk":
        disk = request.getfixturevalue("mounted")("size=24k")
        config = replace(config, cache_dir=str(disk / "cache"))
    right, tallies, warnings, left, later, rested = elsewhere(fill, cases[:4], config, cause)
    assert right
    assert tallies == [NOT_KEPT] * 4
    assert len(warnings) == 1
    assert "cases are not cached on this node: " in warnings[0]
    assert all(name.startswith("lock-") for name in left)
    assert later == NOT_KEPT  # it rests, though there is room again
    assert rested == [MISS, HIT]


def fill(cases: list[Case], config: DataConfig, cause: str) -> tuple:
    """Looks cases up while entries cannot be written; then when they can, and after the rest."""
    warnings: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger(cache.__name__).addHandler(listener)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if cause == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, unlimited[1]))
    results = [look_up(case, config) for case in cases]
    left = sorted(os.listdir(config.cache_dir))
    if cause == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    else:
        disk = str(Path(config.cache_dir).parent)
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
    _, later = look_up(cases[0], config)
    cache._process.resting_until -= cache._REST_S
    rested = [look_up(cases[0], config)[1] for _ in range(2)]
    right = all(right for right, _ in results)
    return right, [tally for _, tally in results], warnings, left, later, rested


def owned_by_another(folder: Path) -> Path:
    folder.mkdir()
    if os.getuid():
        return Path("/")
    os.chown(folder, 12345, 12345)
    return folder


def a_file(folder: Path) -> Path:
    folder.write_text("not a folder")
    return folder


def below_a_file(folder: Path) -> Path:
    return a_file(folder) / "cache"


def a_broken_link(folder: Path) -> Path:
    folder.symlink_to("nowhere")
    return folder


def beyond_writing(_: Path) -> Path:
    return Path("/proc/raybrats")


WRONG = (owned_by_another, a_file, below_a_file, a_broken_link, beyond_writing)


@pytest.mark.parametrize("wrong", WRONG)
def test_a_folder_that_cannot_be_used_costs_one_warning_and_no_case(cases, tmp_path, caplog, wrong):
    folder = wrong(tmp_path / "cache")
    config = DataConfig(cache_dir=str(folder))
    for case in cases[:3]:
        made, tally = prepared(case, config)
        assert tally == NOT_KEPT
        assert_same(made, prepare_case(case, config))
    (record,) = caplog.records
    assert str(folder) in record.getMessage()
    if wrong is owned_by_another:
        assert f"{folder} belongs to another user; set data.cache_dir" in record.getMessage()
        assert not [path for path in folder.iterdir() if path.name.startswith("lock-")]


def test_a_disk_that_cannot_be_written_still_gives_what_it_has(cases, mounted):
    disk = mounted("size=4m")
    config = DataConfig(cache_dir=str(disk))
    prepared(cases[0], config)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert prepared(cases[0], config)[1] == HIT
    made, tally = prepared(cases[1], config)
    assert tally == NOT_KEPT
    assert_same(made, prepare_case(cases[1], config))


def test_the_folder_and_its_entries_are_readable_by_their_owner_alone(cases, config):
    mask = os.umask(0)
    try:
        prepared(cases[0], config)
    finally:
        os.umask(mask)
    assert Path(config.cache_dir).stat().st_mode & 0o777 == 0o700
    assert entries(config)[0].stat().st_mode & 0o777 == 0o600


def test_the_default_folder_is_this_users_own_and_no_link(cases, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / f"raybrats-cache-{os.getuid()}"
    target = tmp_path / "target"
    target.mkdir()
    folder.symlink_to(target)
    assert prepared(cases[0], DataConfig())[1] == NOT_KEPT
    assert list(target.iterdir()) == []
    folder.unlink()
    assert [prepared(cases[0], DataConfig())[1] for _ in range(2)] == [MISS, HIT]
    assert folder.stat().st_mode & 0o777 == 0o700
    chosen = tmp_path / "chosen"
    chosen.symlink_to(folder)
    assert prepared(cases[0], DataConfig(cache_dir=str(chosen)))[1] == HIT


# Entries that are damaged


def test_a_flipped_bit_is_found_by_the_next_process(cases, config, new_process):
    case, rng = cases[0], random.Random(7)
    fresh, _ = prepared(case, config)
    (entry,) = entries(config)
    written = entry.read_bytes()
    header = 8 + int.from_bytes(written[:8], "little")
    places = [rng.randrange(8 * header) for _ in range(150)]
    places += [rng.randrange(8 * header, 8 * len(written)) for _ in range(150)]
    total = Tally()
    for place in places:
        spoilt = bytearray(written)
        spoilt[place // 8] ^= 1 << place % 8
        entry.write_bytes(spoilt)
        new_process()
        found, tally = prepared(case, config)
        assert_same(found, fresh)
        total += tally
        again, tally = prepared(case, config)
        assert (tally, same(again, fresh)) == (HIT, True)
    assert total.damaged == total.misses
    assert total.damaged + total.hits == len(places)
    assert total.damaged >= 299  # a blank of the header may become another


def test_a_process_that_knows_an_entry_notices_that_it_was_written_to(cases, config):
    fresh, _ = prepared(cases[0], config)
    assert prepared(cases[0], config)[1] == HIT
    (entry,) = entries(config)
    spoilt = bytearray(entry.read_bytes())
    spoilt[-1] ^= 1
    time.sleep(0.02)  # the clock of files is coarse
    entry.write_bytes(spoilt)
    found, tally = prepared(cases[0], config)
    assert tally == Tally(misses=1, damaged=1)
    assert_same(found, fresh)


def foreign_tensors(entry: Path) -> None:
    save_file({"weight": np.ones(3, np.float32)}, entry, {"weight": "0"})


def of_other_fields(entry: Path) -> None:
    spoilt = entry.read_bytes().replace(b'"background"', b'"foreground"')
    entry.write_bytes(spoilt)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda entry: entry.write_bytes(b""),
    "five bytes": lambda entry: entry.write_bytes(b"12345"),
    "the header alone": lambda entry: os.truncate(entry, 400),
    "half": lambda entry: os.truncate(entry, entry.stat().st_size // 2),
    "one byte lacks": lambda entry: os.truncate(entry, entry.stat().st_size - 1),
    "zeros": lambda entry: entry.write_bytes(bytes(entry.stat().st_size)),
    "text": lambda entry: entry.write_text("<html><body>403 Forbidden</body></html>"),
    "another JSON": lambda entry: entry.write_bytes((2).to_bytes(8, "little") + b"[]"),
    "a JSON text": lambda entry: entry.write_bytes((4).to_bytes(8, "little") + b'"ab"'),
    "other tensors": foreign_tensors,
    "other fields": of_other_fields,
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_file_that_is_no_entry_is_made_anew(cases, config, new_process, name):
    fresh, _ = prepared(cases[0], config)
    (entry,) = entries(config)
    size = entry.stat().st_size
    DAMAGE[name](entry)
    new_process()
    found, tally = prepared(cases[0], config)
    assert tally == Tally(misses=1, damaged=1)
    assert_same(found, fresh)
    assert entry.stat().st_size == size
    assert prepared(cases[0], config)[1] == HIT


def test_processes_that_meet_a_damaged_entry_all_get_the_case(cases, config):
    prepared(cases[0], config)
    (entry,) = entries(config)
    os.truncate(entry, entry.stat().st_size - 1)
    results = at_once(look_up, *[(cases[0], config)] * 4)
    assert all(right for right, _ in results)
    total = sum((tally for _, tally in results), Tally())
    assert total.damaged >= 1
    assert total.hits + total.misses == 4
    assert len(entries(config)) == 1


# Its size


def size_of(cases: list[Case], config: DataConfig) -> int:
    """Bytes of the largest entry."""
    roomy = replace(config, cache_dir=config.cache_dir + "-roomy")
    for case in cases:
        prepared(case, roomy)
    return max(entry.stat().st_size for entry in entries(roomy))


def test_the_entry_unused_for_longest_goes_first(cases, config):
    config = replace(config, cache_gb=3 * size_of(cases, config) / 1e9)
    by_place = {cache._key(case, config): place for place, case in enumerate(cases)}

    def kept() -> list[int]:
        return sorted(by_place[entry.stem] for entry in entries(config))

    def use(place: int) -> Tally:
        time.sleep(0.02)  # the clock of files is coarse
        return prepared(cases[place], config)[1]

    assert [use(place) for place in (0, 1, 2)] == [MISS] * 3
    assert [use(place) for place in (0, 1, 2, 0)] == [HIT] * 4  # disks tell of the first alone
    assert use(3) == Tally(misses=1, evicted=1)
    assert kept() == [0, 2, 3]
    assert [use(place) for place in (0, 3, 2)] == [HIT] * 3
    assert use(4) == Tally(misses=1, evicted=1)
    assert kept() == [2, 3, 4]
    assert use(0) == Tally(misses=1, evicted=1)
    assert kept() == [0, 2, 4]


def test_the_folder_never_holds_more_than_it_may(cases, config):
    limit = 2.5 * size_of(cases, config)
    config = replace(config, cache_gb=limit / 1e9)
    for case in random.Random(0).choices(cases, k=20):
        prepared(case, config)
        assert sum(entry.stat().st_size for entry in entries(config)) <= limit
    assert len(entries(config)) == 2


def test_many_small_entries_hold_to_the_limit_too(tmp_path, config):
    write_phantoms(str(tmp_path / "tree"), num_cases=1, shape=(16, 16, 16))
    case = verify_case(find_cases(str(tmp_path / "tree"))[0])
    configs = varied(config, 126)
    size = size_of([case], configs[0])
    configs = [replace(each, cache_gb=120.5 * size / 1e9) for each in configs]
    make_all(case, configs[:120])
    for each in configs[120:]:
        assert prepared(case, each)[1] == Tally(misses=1, evicted=1)
        assert len(entries(config)) == 120


def test_an_entry_larger_than_the_folder_may_be_is_not_kept(cases, config):
    prepared(cases[0], replace(config, cache_gb=1.0))
    config = replace(config, cache_gb=1e-5)
    for _ in range(2):
        made, tally = prepared(cases[1], config)
        assert tally == MISS
        assert_same(made, prepare_case(cases[1], config))
    assert len(entries(config)) == 1  # nor did it push another out


def test_files_that_are_not_the_caches_are_left_alone(cases, config):
    folder = Path(config.cache_dir)
    folder.mkdir()
    weights = folder / "weights.safetensors"
    weights.write_bytes(b"precious" * 10**5)
    (folder / ("0" * 64 + ".txt")).write_text("notes")
    config = replace(config, cache_gb=1.5 * size_of(cases, config) / 1e9)
    assert [prepared(case, config)[1].evicted for case in cases[:3]] == [0, 1, 1]
    assert weights.exists()
    assert "0" * 64 + ".txt" in others(config)


def hold(case: Case, config: DataConfig, evicted: object, mapped: object) -> bool:
    """Whether a hit stays the case after others have removed its entry."""
    found, tally = prepared(case, config)
    mapped.set()
    evicted.wait(60)
    return tally == HIT and same(found, prepare_case(case, config))


def test_an_entry_that_goes_while_another_process_reads_it_does_no_harm(cases, config):
    config = replace(config, cache_gb=1.5 * size_of(cases, config) / 1e9)
    prepared(cases[0], config)
    with processes.Manager() as manager, processes.Pool(1) as pool:
        evicted, mapped = manager.Event(), manager.Event()
        held = pool.apply_async(hold, (cases[0], config, evicted, mapped))
        assert mapped.wait(60)
        time.sleep(0.02)  # the clock of files is coarse
        assert prepared(cases[1], config)[1] == Tally(misses=1, evicted=1)
        evicted.set()
        assert held.get(60)
    assert prepared(cases[0], config)[1] == Tally(misses=1, evicted=1)


def test_modalities_of_an_entry_come_in_the_order_that_was_asked_for(cases, config):
    chosen = replace(config, modalities=("t2", "flair"))
    whole, _ = prepared(cases[0], config)
    for _ in range(2):
        found, _ = prepared(cases[0], chosen)
        restored = [np.zeros(found.shape, np.int16) for _ in range(2)]
        for place, name in enumerate(chosen.modalities):
            restored[place][found.box] = found.image[place]
            other = np.zeros(found.shape, np.int16)
            other[whole.box] = whole.image[MODALITIES.index(name)]
            assert np.array_equal(restored[place], other)


def test_reading_the_cache_needs_no_compiler(cases, config):
    prepared(cases[0], config)
    script = (
        "import sys\n"
        "from raybrats.config import DataConfig\n"
        "from raybrats.data.cache import prepared\n"
        "from raybrats.data.cohort.rows import read_cohort\n"
        "from raybrats.data.cohort.case import Case\n"
        f"config = DataConfig(cache_dir={config.cache_dir!r})\n"
        f"print(prepared({cases[0]!r}, config)[1].hits, 'numba' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["1", "False"], done.stderr
