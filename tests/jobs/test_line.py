"""The whole line as jobs: S3, MLflow and Ray as real servers, driven as a user drives them."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from mlflow import MlflowClient
from services import S3, RayHead, json_document, run_job, upload_folder

from raybrats.phantom.phantom import write_phantoms

ROOT = Path(__file__).parents[2]
TRIALS = 4 if "RAYBRATS_SOAK" in os.environ else 2
SMALL = (
    "--network.widths 8 16 32 --data.patch_size {patch} --cluster.workers 2 "
    "--cluster.cpus_per_worker 0.5 --validation.max_cases 1 --data.fold 0"
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight cases in the trees of three editions: real ones in a soak, where there are any."""
    folder = tmp_path_factory.mktemp("tree")
    if {"RAYBRATS_SOAK", "RAYBRATS_REAL_CASES"} <= os.environ.keys():
        for edition in ("brats2020", "brats2021", "brats2023"):
            shutil.copytree(Path(os.environ["RAYBRATS_REAL_CASES"], edition), folder / edition)
        return folder
    for seed, (edition, cases) in enumerate((("2020", 1), ("2021", 6), ("2023", 1))):
        out = str(folder / edition)  # a seed of its own: the same phantom twice is a duplicate
        write_phantoms(out, num_cases=cases, shape=(64, 64, 48), edition=edition, seed=seed)
    return folder


class Line:
    """A bucket with the tree, and the verbs as jobs of the cluster."""

    def __init__(self, tree: Path, bucket: str, head: RayHead, mlflow_uri: str) -> None:
        self.tree, self.bucket, self.head, self.mlflow_uri = tree, bucket, head, mlflow_uri
        self.model = f"line-{bucket}"
        self.cohort = f"s3://{bucket}/cohort.parquet"
        self.options = (
            f"--data.cohort {self.cohort} --run.storage_uri s3://{bucket}/runs "
            f"--tracking.uri {mlflow_uri} --tracking.model {self.model} "
        )
        self.patch = "64 64 64" if max(self.shape) > 64 else "32 32 32"

    @property
    def shape(self) -> tuple[int, ...]:
        return nib.load(next(self.tree.rglob("*_t1.nii.gz"))).shape

    def job(self, words: str, timeout_s: float = 560) -> dict[str, Any]:
        outcome = run_job(self.head, f"python jobs/{words} --json", ROOT, timeout_s)
        print(outcome.logs)
        assert outcome.status == "SUCCEEDED", outcome.logs[-3000:]
        return json_document(outcome.logs)


@pytest.fixture(scope="module")
def line(
    tree: Path, new_bucket: Callable[[], str], s3: S3, ray_cluster: RayHead, mlflow_uri: str
) -> Iterator[Line]:
    bucket = new_bucket()
    upload_folder(s3, tree, bucket, "cases")
    return Line(tree, bucket, ray_cluster, mlflow_uri)


@pytest.fixture(scope="module")
def indexed(line: Line) -> dict[str, Any]:
    return line.job(f"index.py s3://{line.bucket}/cases --out {line.cohort}")


@pytest.fixture(scope="module")
def trained(line: Line, indexed: dict[str, Any]) -> dict[str, Any]:
    assert indexed["ok"] == 8
    small = SMALL.format(patch=line.patch)
    length = "--optim.steps 30 --validation.every_steps 30 --run.name one"
    return line.job(f"train.py tiny {line.options} {small} {length}")


pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.mlflow, pytest.mark.slow]


def test_index_finds_three_editions(indexed: dict[str, Any], line: Line) -> None:
    assert indexed["editions"] == {"2020": 1, "2021": 6, "2023": 1}
    assert (indexed["cases"], indexed["ok"], indexed["quarantined"]) == (8, 8, [])
    assert indexed["cohort_uri"] == line.cohort


def test_training_lowers_the_loss(trained: dict[str, Any], line: Line) -> None:
    assert trained["steps"] == 30
    assert set(trained["scores"]) == {"WT", "TC", "ET", "mean"}
    assert trained["model"] == {"name": line.model, "version": "1", "alias": "champion"}
    client = MlflowClient(line.mlflow_uri)
    losses = client.get_metric_history(trained["mlflow_run_id"], "train/loss")
    assert [m.step for m in losses] == [10, 20, 30]
    assert losses[-1].value < losses[0].value
    assert client.get_run(trained["mlflow_run_id"]).info.status == "FINISHED"


@pytest.mark.skipif("RAYBRATS_SOAK" not in os.environ, reason="a job more: make soak")
def test_a_finished_run_is_resumed_without_another_step(
    trained: dict[str, Any], line: Line
) -> None:
    length = "--optim.steps 30 --validation.every_steps 30 --run.name one"
    small = SMALL.format(patch=line.patch)
    again = line.job(f"train.py tiny {line.options} {small} {length}")
    assert again["mlflow_run_id"] == trained["mlflow_run_id"]
    assert again["scores"] == trained["scores"]
    assert again["model"] == trained["model"], "the same weights are registered once"


def test_sweep_has_its_trials_and_registers_the_best(trained: dict[str, Any], line: Line) -> None:
    sizes = "[[32,32,32],[48,48,48]]" if line.patch == "64 64 64" else "[[16,16,16],[32,32,32]]"
    sweep = line.job(
        f"tune.py tiny {line.options} {SMALL.format(patch=line.patch)} --trials {TRIALS} "
        "--cluster.workers 1 "
        "--optim.steps 8 --validation.every_steps 4 --run.name sweep "
        '--space "loss.dice_weight=uniform(0.2,0.8)" '
        f'--space "data.patch_size=choice({sizes})"'
    )
    scores = [trial["score"] for trial in sweep["trials"]]
    assert len(sweep["trials"]) == TRIALS
    assert {trial["status"] for trial in sweep["trials"]} <= {"finished", "pruned"}
    assert sweep["best"]["score"] == max(scores)
    assert int(sweep["model"]["version"]) > int(trained["model"]["version"])
    client = MlflowClient(line.mlflow_uri)
    parents = {
        client.get_run(trial["mlflow_run_id"]).data.tags["mlflow.parentRunId"]
        for trial in sweep["trials"]
    }
    assert len(parents) == 1


@pytest.mark.usefixtures("trained")
def test_champion_segments_a_case_in_its_own_grid(line: Line, s3: S3, tmp_path: Path) -> None:
    out = f"s3://{line.bucket}/predictions"
    words = f"predict.py models:/{line.model}@champion {line.cohort} --out {out} --fold 0"
    predicted = line.job(f"{words} --tracking-uri {line.mlflow_uri}")
    assert predicted["written"] == predicted["cases"] > 0
    assert predicted["failed"] == []
    again = line.job(f"{words} --tracking-uri {line.mlflow_uri}")
    assert (again["written"], again["skipped"]) == (0, predicted["cases"])
    keys = [
        o["Key"]
        for o in s3.client().list_objects(Bucket=line.bucket, Prefix="predictions")["Contents"]
    ]
    volumes = [key for key in keys if key.endswith(".nii.gz")]
    assert len(volumes) == predicted["cases"]
    for key in volumes:
        s3.client().download_file(line.bucket, key, str(tmp_path / "p.nii.gz"))
        prediction = nib.load(tmp_path / "p.nii.gz")
        reference = nib.load(_label_file(line.tree, Path(key).name.removesuffix(".nii.gz")))
        assert prediction.shape == reference.shape
        assert np.allclose(prediction.affine, reference.affine)
    scores = line.job(f"evaluate.py {out} {line.cohort}")
    assert len(scores["cases"]) == 3 * predicted["cases"]
    assert set(scores["mean"]) == {"WT", "TC", "ET", "mean"}


def _label_file(tree: Path, case_id: str) -> Path:
    return next(path for path in tree.rglob(f"{case_id}?seg.nii.gz"))
