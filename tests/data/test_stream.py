"""A rank's batches through Ray are its draws of the plan, cut as a direct call would cut them."""

import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest
import ray
import torch
from fault_proxy import FaultProxy, fault_proxy
from faulty import SOAK
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from ray.util.state import list_tasks
from services import S3, RayHead, ray_node, upload_folder

from raybrats.config import TrainConfig, override, override_all
from raybrats.data import stream
from raybrats.data.batch import Batch
from raybrats.data.cache import Tally
from raybrats.data.cohort.case import Case, prepare_case
from raybrats.data.cohort.index import find_cases, index, load, verify_case
from raybrats.data.cohort.rows import read_cohort
from raybrats.data.patch import PatchRule, draw_patch, volume_size
from raybrats.data.plan import Plan
from raybrats.data.stream import Assignment, Stream
from raybrats.errors import DataError, UsageError
from raybrats.phantom.phantom import write_phantoms
from raybrats.recipes import tiny

pytestmark = pytest.mark.ray
SIZE = (16, 24, 16)
STEPS = 4
CPUS = 2.0  # four tasks: Ray keeps as many idle workers as the cluster has CPUs, and ends others


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    write_phantoms(str(root), num_cases=5, shape=(32, 32, 24), edition="2023")
    return root


@pytest.fixture(scope="module")
def cases(tree: Path) -> list[Case]:
    return [verify_case(case) for case in find_cases(str(tree))]


def config_in(folder: Path) -> TrainConfig:
    changes = {
        "data.patch_size": SIZE,
        "data.modalities": ("t1ce", "flair", "t2"),
        "data.cache_dir": str(folder / "cache"),
    }
    return override_all(tiny(), changes)


@pytest.fixture
def config(ray_cluster: RayHead, tmp_path: Path) -> TrainConfig:
    """Batches of four, kept in a cache of this test's own, which is empty."""
    assert ray_cluster.address
    return config_in(tmp_path)


def batches(
    config: TrainConfig, cases: Sequence[Case], rank: int, world: int, start: int
) -> list[Batch]:
    return list(Stream(config, cases, Assignment(rank, world, start, STEPS, CPUS, near=True)))


@pytest.fixture(scope="module")
def alone(
    ray_cluster: RayHead, cases: list[Case], tmp_path_factory: pytest.TempPathFactory
) -> list[Batch]:
    """The batches of a single rank from the first step."""
    assert ray_cluster.address
    return batches(config_in(tmp_path_factory.mktemp("alone")), cases, rank=0, world=1, start=0)


def same(first: Batch, second: Batch) -> bool:
    ours, theirs = ({**vars(batch), **vars(batch.scaling)} for batch in (first, second))
    return all(torch.equal(ours[name], theirs[name]) for name in ours if name != "scaling")


def all_same(first: Sequence[Batch], second: Sequence[Batch]) -> bool:
    return len(first) == len(second) and all(map(same, first, second))


def places(batch: Batch, where: slice) -> Batch:
    scaling = batch.scaling.map(lambda numbers: numbers[where])
    return Batch(batch.image[where], batch.labels[where], scaling, batch.draw[where])


def test_one_rank_gets_whole_batches_in_the_order_of_the_plan(alone: list[Batch]):
    assert [batch.draw.tolist() for batch in alone] == [
        list(range(4 * step, 4 * step + 4)) for step in range(STEPS)
    ]
    for batch in alone:
        assert batch.image.shape == (4, 3, *SIZE)
        assert batch.labels.shape == (4, *SIZE)
        assert (batch.image.dtype, batch.labels.dtype) == (torch.int16, torch.uint8)
        assert batch.image.stride()[2] == batch.labels.stride()[1] == 1
        assert set(vars(batch.scaling.map(lambda numbers: numbers.shape)).values()) == {(4, 3)}
        types = batch.scaling.map(lambda numbers: numbers.dtype)
        assert types.gain == types.bias == torch.float32
        assert types.low == types.high == types.background == torch.int16


@pytest.mark.parametrize(
    ("sampling", "size"),
    [("random", SIZE), ("grid", SIZE), ("slices", (16, 24, 1)), ("volume", SIZE)],
)
def test_the_patches_are_those_of_a_direct_cut(
    config: TrainConfig, cases: list[Case], sampling: str, size: tuple[int, int, int]
):
    config = override_all(config, {"data.sampling": sampling, "data.patch_size": size})
    if sampling == "volume":
        size = volume_size([case.box for case in cases], config.network.stride)
    plan = Plan(len(cases), config.optim.global_batch, config.run.seed)
    visits = [v for w in plan.visits(rank=0, world=1, start=0, stop=STEPS) for v in w]
    rule, tumours = PatchRule(config.data, size, config.run.seed, config.classes), 0
    streamed = batches(config, cases, rank=0, world=1, start=0)
    rows = [places(batch, slice(place, place + 1)) for batch in streamed for place in range(4)]
    for row, visit in zip(rows, visits, strict=True):
        prepared = prepare_case(cases[visit.case], config.data)
        (draw,) = visit.draws
        image, labels = draw_patch(
            prepared, rule, draw=draw, case=visit.case, ordinal=visit.ordinal
        )
        assert row.draw.tolist() == [draw]
        assert torch.equal(row.image[0], torch.from_numpy(image))
        assert torch.equal(row.labels[0], torch.from_numpy(labels))
        assert row.image.shape[2:] == size
        numbers = row.scaling.map(lambda each: each[0].tolist())
        assert numbers == prepared.scaling.map(lambda each: each.tolist())
        tumours += bool(labels.any())
    assert tumours > len(rows) / 4


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_of_two_resumed_in_the_middle_gets_its_half(
    alone: list[Batch], config: TrainConfig, cases: list[Case], rank: int
):
    mine = batches(config, cases, rank=rank, world=2, start=2)
    assert all_same(mine, [places(whole, slice(rank, None, 2)) for whole in alone[2:]])


def test_a_run_resumed_among_the_patches_of_one_visit_goes_on_bit_for_bit(
    config: TrainConfig, cases: list[Case]
):
    config = override(config, "data.patches_per_case", 3)
    whole = list(Stream(config, cases, Assignment(0, 1, 0, 7, CPUS)))
    assert [batch.draw.tolist() for batch in whole] == [
        list(range(4 * step, 4 * step + 4)) for step in range(7)
    ]
    assert all_same(list(Stream(config, cases, Assignment(0, 1, 4, 7, CPUS))), whole[4:])
    for rank in (0, 1):
        half = [places(batch, slice(rank, None, 2)) for batch in whole[4:]]
        assert all_same(list(Stream(config, cases, Assignment(rank, 2, 4, 7, CPUS))), half)


def test_no_stop_and_no_change_of_workers_loses_repeats_or_moves_a_draw(
    config: TrainConfig, cases: list[Case]
):
    size, steps = {"data.patch_size": (8, 8, 8), "optim.global_batch": 12}, 24
    config = override_all(config, size)
    stops = sorted(random.Random(1).sample(range(1, steps), 20))
    seen: list[int] = []
    with ThreadPoolExecutor(4) as workers:
        for segment, (start, stop) in enumerate(pairwise([0, *stops, steps])):
            world = 1 + segment % 4
            assignments = [Assignment(r, world, start, stop, CPUS / world) for r in range(world)]
            streams = workers.map(lambda mine: list(Stream(config, cases, mine)), assignments)
            for of_one_step in zip(*streams, strict=True):
                seen += torch.stack([batch.draw for batch in of_one_step], dim=1).ravel().tolist()
    missing = set(range(12 * steps)) - set(seen)
    duplicate = [draw for draw, count in Counter(seen).items() if count > 1]
    out_of_order = [after for before, after in pairwise(seen) if after < before]
    assert len(missing) == 0
    assert len(duplicate) == 0
    assert len(out_of_order) == 0


def test_a_draw_is_the_same_patch_without_a_cache_and_from_a_cold_and_a_warm_one(
    alone: list[Batch], config: TrainConfig, cases: list[Case]
):
    mine = Assignment(0, 1, 0, STEPS, CPUS)
    without = Stream(override(config, "data.cache_gb", 0.0), cases, mine)
    cold, warm = Stream(config, cases, mine), Stream(config, cases, mine)
    for tried in (without, cold, warm):
        assert all_same(list(tried), alone)
    assert without.tally == Tally(misses=16)
    assert cold.tally == Tally(misses=5, hits=11)
    assert warm.tally == Tally(hits=16)


def test_cases_damaged_in_the_cache_are_made_anew_in_the_middle_of_a_run(
    alone: list[Batch], config: TrainConfig, cases: list[Case], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stream, "VISITS_AT_ONCE", 1)  # nothing is read ahead of a step
    running = Stream(config, cases, Assignment(0, 1, 0, STEPS, CPUS))
    steps = iter(running)
    before = [next(steps), next(steps)]
    assert running.tally == Tally(misses=5, hits=3)
    for entry in Path(config.data.cache_dir).glob("*.safetensors"):
        data = bytearray(entry.read_bytes())
        data[-1] ^= 1
        entry.write_bytes(data)
    assert all_same([*before, *steps], alone)
    assert running.tally == Tally(misses=10, hits=6, damaged=5)


def tasks_of_streams() -> Counter[str]:
    """How many tasks that open cases Ray knows, by state."""
    which = [("name", "=", "FlatMap(PatchTask)")]
    found = list_tasks(filters=which, limit=10_000, raise_on_missing_output=False)
    return Counter(task.state for task in found)


def test_closing_a_stream_early_ends_its_tasks(config: TrainConfig, cases: list[Case]):
    steps, known = 150, tasks_of_streams().total()
    batches = iter(Stream(config, cases, Assignment(0, 1, 0, steps, CPUS)))
    assert next(batches).draw.tolist() == [0, 1, 2, 3]
    batches.close()
    ended, deadline = {"FINISHED", "FAILED"}, time.monotonic() + 30
    time.sleep(2)  # Ray hears of its tasks once a second
    while not (left := tasks_of_streams()).keys() <= ended and time.monotonic() < deadline:
        time.sleep(0.5)
    assert left.keys() <= ended
    assert left.total() - known < 4 * steps
    time.sleep(2)
    assert tasks_of_streams() == left
    resumed = iter(Stream(config, cases, Assignment(0, 1, 1, steps, CPUS)))
    assert next(resumed).draw.tolist() == [4, 5, 6, 7]
    resumed.close()


@pytest.mark.skipif(not SOAK, reason="a node more: make soak")
@pytest.mark.parametrize("busy", [False, True])
def test_tasks_stay_on_the_node_of_their_rank_while_it_has_cpus(
    config: TrainConfig, cases: list[Case], ray_cluster: RayHead, tmp_path: Path, busy: bool
):
    """Where others have taken them all, tasks run elsewhere instead of waiting."""
    with ray_node(ray_cluster, tmp_path, num_cpus=2) as node:
        there = NodeAffinitySchedulingStrategy(node.node_id, soft=False)

        @ray.remote(scheduling_strategy=there, num_cpus=0)
        def read(steps: int) -> list[list[int]]:
            mine = Assignment(0, 1, 0, steps, CPUS, near=True)
            return [batch.draw.tolist() for batch in Stream(config, cases, mine)]

        @ray.remote(scheduling_strategy=there, num_cpus=2)
        class Other:
            def is_there(self) -> bool:
                return True

        other = Other.remote() if busy else None
        assert other is None or ray.get(other.is_there.remote())
        before = nodes_of_tasks()
        assert len(ray.get(read.remote(60))) == 60
        time.sleep(2)  # Ray hears of its tasks once a second
        used = nodes_of_tasks() - before
        assert used.total() > 10
        assert (node.node_id in used, len(used)) == (not busy, 1)


def nodes_of_tasks() -> Counter[str]:
    """On how many tasks that open cases each node has worked."""
    which = [("name", "=", "FlatMap(PatchTask)")]
    found = list_tasks(filters=which, limit=10_000, raise_on_missing_output=False)
    return Counter(task.node_id for task in found if task.node_id)


def test_a_thread_runs_ahead_hands_over_what_is_raised_and_closes():
    made, closed_by = [], []

    def numbers(stop: int) -> Generator[int]:
        try:
            for number in range(stop):
                made.append(number)
                yield number
            raise DataError("the end")
        finally:
            closed_by.append(threading.current_thread())

    ahead = stream.in_a_thread(numbers(100), 3)
    assert (next(ahead), next(ahead)) == (0, 1)
    until = time.monotonic() + 10
    while len(made) < 5 and time.monotonic() < until:
        time.sleep(0.01)
    assert made == [0, 1, 2, 3, 4]
    ahead.close()
    while not closed_by and time.monotonic() < until:
        time.sleep(0.01)
    assert closed_by != [threading.main_thread()]
    with pytest.raises(DataError, match="the end"):
        list(stream.in_a_thread(numbers(5), 2))


def test_a_gpu_has_a_second_of_patches_ready_if_they_fit(config: TrainConfig, cases: list[Case]):
    """128 patches of 58 KB a second in batches of four, and room for ten of them."""
    patch_bytes = 16 * 24 * 16 * (2 * 3 + 1)
    fast = Assignment(0, 1, 0, 1, CPUS, patches_per_s=128.0)
    small = replace(fast, store_bytes=10.5 * 4 * patch_bytes)
    slow = Assignment(0, 1, 0, 1, CPUS)
    assert [Stream(config, cases, it).batches_ahead() for it in (fast, small, slow)] == [32, 10, 2]
    asked = override(config, "data.prefetch_batches", 5)
    assert Stream(asked, cases, fast).batches_ahead() == 5


@dataclass(frozen=True)
class Uploaded:
    """A cohort of six cases in a bucket, and the proxy through which it is to be read."""

    cases: list[Case]
    sizes: dict[str, int]
    """Bytes of each object, by the path of its URL."""
    proxy: FaultProxy


@pytest.fixture(scope="module")
def uploaded(
    ray_cluster: RayHead, s3: S3, new_bucket, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Uploaded]:
    assert ray_cluster.address
    root, bucket = tmp_path_factory.mktemp("uploaded"), new_bucket()
    write_phantoms(str(root), num_cases=6, shape=(32, 32, 24), edition="2021")
    uri = upload_folder(s3, root, bucket, "cases")
    found = [verify_case(case) for case in find_cases(uri)]
    uris = [(*case.image_uris, case.label_uri) for case in found]
    sizes = {
        uri.removeprefix("s3:/"): size
        for case, of_case in zip(found, uris, strict=True)
        for uri, size in zip(of_case, case.sizes, strict=True)
    }
    with fault_proxy(s3.endpoint) as proxy:
        yield Uploaded(found, sizes, proxy)


@ray.remote(num_cpus=0)
def drained(config: TrainConfig, cases: list[Case], mine: Assignment) -> tuple[Tally, list[int]]:
    """As a worker of a run would: the stream's tally and its draws."""
    stream = Stream(config, cases, mine)
    draws = [draw for batch in stream for draw in batch.draw.tolist()]
    return stream.tally, draws


def drained_at_once(
    uploaded: Uploaded, config: TrainConfig, assignments: list[Assignment]
) -> tuple[Tally, list[int]]:
    """Streams side by side, each in a process of its own, whose requests are counted."""
    uploaded.proxy.inject([])
    variables = {"AWS_ENDPOINT_URL": uploaded.proxy.endpoint}
    each = drained.options(runtime_env={"env_vars": variables})  # its tasks inherit it
    found = ray.get(
        [each.remote(config, uploaded.cases, mine) for mine in assignments], timeout=300
    )
    return sum((tally for tally, _ in found), Tally()), sorted(
        d for _, draws in found for d in draws
    )


def wanted(uploaded: Uploaded, config: TrainConfig) -> dict[str, int]:
    """Bytes of each object that a run needs: of its modalities, and the labels."""
    ends = tuple(f"_{kind}.nii.gz" for kind in (*config.data.modalities, "seg"))
    found = {path: size for path, size in uploaded.sizes.items() if path.endswith(ends)}
    assert len(found) == len(uploaded.cases) * len(ends)
    return found


def objects_read(uploaded: Uploaded) -> tuple[Counter[tuple[str, str]], int]:
    """The requests that came by, and the bytes that were answered."""
    seen = uploaded.proxy.seen
    return Counter((r.method, r.path) for r in seen), sum(r.num_bytes for r in seen)


@pytest.mark.s3
def test_two_ranks_read_each_object_once_in_the_first_epoch_and_never_again(
    uploaded: Uploaded, config: TrainConfig
):
    config = override(config, "optim.global_batch", 2)
    objects = wanted(uploaded, config)
    once = Counter(("GET", path) for path in objects)
    first = [Assignment(rank, 2, 0, 3, CPUS / 2) for rank in (0, 1)]
    assert drained_at_once(uploaded, config, first) == (Tally(misses=6), list(range(6)))
    assert objects_read(uploaded) == (once, sum(objects.values()))
    second = [Assignment(rank, 2, 3, 6, CPUS / 2) for rank in (0, 1)]
    assert drained_at_once(uploaded, config, second) == (Tally(hits=6), list(range(6, 12)))
    assert objects_read(uploaded) == (Counter(), 0)


@pytest.mark.s3
def test_two_trials_that_want_the_same_cases_at_once_read_each_object_once(
    uploaded: Uploaded, config: TrainConfig
):
    config = override(config, "optim.global_batch", 2)
    assignments = [Assignment(0, 1, 0, 3, CPUS / 2)] * 2
    tally, draws = drained_at_once(uploaded, config, assignments)
    assert (tally, draws) == (Tally(misses=6, hits=6), sorted([*range(6), *range(6)]))
    objects = wanted(uploaded, config)
    once = Counter(("GET", path) for path in objects)
    assert objects_read(uploaded) == (once, sum(objects.values()))


@pytest.mark.s3
def test_without_a_cache_each_visit_reads_its_case_and_nothing_more(
    uploaded: Uploaded, config: TrainConfig
):
    config = override_all(config, {"optim.global_batch": 2, "data.cache_gb": 0.0})
    tally, _ = drained_at_once(uploaded, config, [Assignment(0, 1, 0, 6, CPUS)])
    assert tally == Tally(misses=12)
    objects = wanted(uploaded, config)
    twice = Counter({("GET", path): 2 for path in objects})
    assert objects_read(uploaded) == (twice, 2 * sum(objects.values()))


def test_a_file_changed_since_indexing_ends_the_stream_by_name(
    config: TrainConfig, tree: Path, tmp_path: Path
):
    copy = Path(shutil.copytree(tree, tmp_path / "tree"))
    moved = [verify_case(case) for case in find_cases(str(copy))]
    for file in copy.glob("*/*-t1c.nii.gz"):
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(Exception, match=r"-t1c\.nii\.gz: \d+ bytes where \d+ were recorded"):
        batches(config, moved, rank=0, world=1, start=STEPS - 1)


def test_indexing_a_tree_quarantines_the_truncated_file(
    ray_cluster: RayHead, tree: Path, cases: list[Case], tmp_path: Path
):
    assert ray_cluster.address
    copy = Path(shutil.copytree(tree, tmp_path / "tree"))
    victim = sorted(copy.glob("*/*-t2f.nii.gz"))[2]
    victim.write_bytes(victim.read_bytes()[:1000])
    out = tmp_path / "out" / "cohort.parquet"
    found = index(str(copy), str(out))
    assert [case.case_id for case in found] == [case.case_id for case in cases]
    assert [case.status for case in found] == ["ok", "ok", "bad", "ok", "ok"]
    assert victim.name in found[2].reason
    for ours, theirs in zip(found, cases, strict=True):
        if ours.status == "ok":
            assert (ours.digests, ours.box, ours.mean) == (theirs.digests, theirs.box, theirs.mean)
        assert ours.fold == theirs.fold
    assert load(str(out)) == read_cohort(str(out)) == found
    assert [case.sizes for case in load(str(copy), verify=False)] == [()] * 5


@pytest.mark.s3
def test_a_tree_in_a_bucket_is_indexed_where_it_lies(
    ray_cluster: RayHead, s3: S3, bucket: str, tree: Path, cases: list[Case]
):
    assert ray_cluster.address
    uri = upload_folder(s3, tree, bucket, "BraTS2023")
    found = index(uri, f"s3://{bucket}/cohort.parquet")
    assert all(image.startswith(f"{uri}/") for case in found for image in case.image_uris)
    assert [case.digests for case in found] == [case.digests for case in cases]
    assert {case.status for case in found} == {"ok"}
    assert load(f"s3://{bucket}/cohort.parquet") == found
    assert load(uri) == found, "a run on a tree indexes it first"


def test_no_cohort_and_no_case_are_told_before_any_task(tmp_path: Path):
    with pytest.raises(UsageError, match=r"data\.cohort is empty"):
        load("")
    with pytest.raises(DataError, match="no BraTS case found in 0 files"):
        index(str(tmp_path))
