"""A rank's batches through Ray are its draws of the plan, cut as a direct call would cut them."""

import shutil
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from services import S3, RayHead, upload_folder

from raybrats.config import TrainConfig, override
from raybrats.data import cohort, index
from raybrats.data.batch import Batch
from raybrats.data.cohort import Case
from raybrats.data.patch import PatchRule, choose_corner, cut
from raybrats.data.phantom import write_phantoms
from raybrats.data.plan import Plan, generator
from raybrats.data.stream import Share, open_stream
from raybrats.errors import DataError
from raybrats.recipes import tiny

pytestmark = pytest.mark.ray
SIZE = (16, 24, 16)
STEPS = 4


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    write_phantoms(str(root), num_cases=5, shape=(32, 32, 24), edition="2023")
    return root


@pytest.fixture(scope="module")
def cases(tree: Path) -> list[Case]:
    return [cohort.verify_case(case) for case in cohort.find_cases(str(tree))]


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    changed = override(tiny(), "data.patch_size", SIZE)
    return override(changed, "data.modalities", ("t1ce", "flair", "t2"))


def batches(
    config: TrainConfig, cases: Sequence[Case], rank: int, world: int, start: int
) -> list[Batch]:
    return list(open_stream(config, cases, Share(rank, world, start, STEPS, cpus=2.0)))


@pytest.fixture(scope="module")
def alone(ray_cluster: RayHead, config: TrainConfig, cases: list[Case]) -> list[Batch]:
    """The batches of a single rank from the first step."""
    assert ray_cluster.address
    return batches(config, cases, rank=0, world=1, start=0)


def same(first: Batch, second: Batch) -> bool:
    return all(torch.equal(getattr(first, f.name), getattr(second, f.name)) for f in fields(Batch))


def places(batch: Batch, where: slice) -> Batch:
    return Batch(**{name: column[where] for name, column in vars(batch).items()})


def test_one_rank_gets_whole_batches_in_the_order_of_the_plan(alone: list[Batch]):
    assert [batch.draw.tolist() for batch in alone] == [
        list(range(4 * step, 4 * step + 4)) for step in range(STEPS)
    ]
    for batch in alone:
        assert batch.image.shape == (4, 3, *SIZE)
        assert batch.labels.shape == (4, *SIZE)
        assert batch.gain.shape == batch.bias.shape == batch.background.shape == (4, 3)
        assert (batch.image.dtype, batch.labels.dtype) == (torch.int16, torch.uint8)
        assert (batch.gain.dtype, batch.bias.dtype) == (torch.float32, torch.float32)


def test_the_patches_are_those_of_a_direct_cut(
    alone: list[Batch], config: TrainConfig, cases: list[Case]
):
    plan = Plan(len(cases), config.optim.global_batch, config.run.seed)
    rule = PatchRule(SIZE, config.data.foreground_share)
    tumours = 0
    for batch in alone:
        for place, draw in enumerate(batch.draw.tolist()):
            case = cases[plan.case_of(draw)]
            prepared = cohort.prepare_case(case, ("t1ce", "flair", "t2"), "zscore")
            corner = choose_corner(prepared.labels, rule, generator(config.run.seed, draw, 0))
            image, labels = cut(prepared, corner, SIZE)
            assert torch.equal(batch.image[place], torch.from_numpy(image))
            assert torch.equal(batch.labels[place], torch.from_numpy(labels))
            assert batch.gain[place].tolist() == prepared.gain.tolist()
            assert batch.bias[place].tolist() == prepared.bias.tolist()
            assert batch.background[place].tolist() == [0, 0, 0]
            tumours += bool(labels.any())
    assert tumours > 4 * STEPS / 2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_of_two_resumed_in_the_middle_gets_its_half(
    alone: list[Batch], config: TrainConfig, cases: list[Case], rank: int
):
    mine = batches(config, cases, rank=rank, world=2, start=2)
    assert len(mine) == STEPS - 2
    for batch, whole in zip(mine, alone[2:], strict=True):
        assert same(batch, places(whole, slice(rank, None, 2)))


def test_a_file_changed_since_indexing_ends_the_stream_by_name(
    ray_cluster: RayHead, config: TrainConfig, tree: Path, tmp_path: Path
):
    assert ray_cluster.address
    copy = Path(shutil.copytree(tree, tmp_path / "tree"))
    moved = [cohort.verify_case(case) for case in cohort.find_cases(str(copy))]
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
    found = index.index(str(copy), str(out))
    assert [case.case_id for case in found] == [case.case_id for case in cases]
    assert [case.status for case in found] == ["ok", "ok", "bad", "ok", "ok"]
    assert victim.name in found[2].reason
    for ours, theirs in zip(found, cases, strict=True):
        if ours.status == "ok":
            assert (ours.digests, ours.box, ours.mean) == (theirs.digests, theirs.box, theirs.mean)
        assert ours.fold == theirs.fold
    assert index.load(str(out)) == cohort.read_cohort(str(out)) == found
    assert [case.sizes for case in index.load(str(copy), verify=False)] == [()] * 5


@pytest.mark.s3
def test_a_tree_in_a_bucket_is_indexed_where_it_lies(
    ray_cluster: RayHead, s3: S3, bucket: str, tree: Path, cases: list[Case]
):
    assert ray_cluster.address
    uri = upload_folder(s3, tree, bucket, "BraTS2023")
    found = index.index(uri, f"s3://{bucket}/cohort.parquet")
    assert all(image.startswith(f"{uri}/") for case in found for image in case.image_uris)
    assert [case.digests for case in found] == [case.digests for case in cases]
    assert {case.status for case in found} == {"ok"}
    assert index.load(f"s3://{bucket}/cohort.parquet") == found


def test_no_cohort_and_no_case_are_told_before_any_task(tmp_path: Path):
    with pytest.raises(DataError, match=r"data\.cohort is empty"):
        index.load("")
    with pytest.raises(DataError, match="no BraTS case found in 0 files"):
        index.index(str(tmp_path))
