"""One patient through a model: by any kind of input, in the files' own grid, without Ray."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel import orientations
from niftis import LPS, canonical, nifti, zipped

from raybrats import storage
from raybrats.brats import MODALITIES
from raybrats.config import (
    AugmentConfig,
    DataConfig,
    NetworkConfig,
    RunConfig,
    TrackingConfig,
    TrainConfig,
)
from raybrats.errors import (
    CheckpointError,
    DataError,
    GridError,
    MissingObjectError,
    StorageError,
    UsageError,
)
from raybrats.model.inference import segment
from raybrats.model.network import build, trained_network, weights_of
from raybrats.phantom.phantom import make_phantom, write_phantoms
from raybrats.predict.patient import MAX_BORDER_FRACTION, MAX_BRAIN_LITRES
from raybrats.predict.segment import Segmenter, load
from raybrats.predict.target import check_target
from raybrats.registry import load as loading
from raybrats.registry import register as registering
from raybrats.registry import tracking
from raybrats.train import checkpoint
from raybrats.train.checkpoint import Snapshot

SHAPE = (28, 24, 20)
CONFIG = TrainConfig(
    recipe="tiny",
    data=DataConfig(patch_size=(16, 16, 16)),
    network=NetworkConfig(widths=(4, 8, 8), deep_supervision=1),
)
DROPPING = replace(CONFIG, augment=AugmentConfig(drop_modality=0.5))


def weights(seed):
    torch.manual_seed(seed)
    return weights_of(build(CONFIG.network, 4))


def written(run_uri, step, mean=None, config=CONFIG):
    metrics = {} if mean is None else {"mean": mean}
    return checkpoint.write(run_uri, config, Snapshot(step, weights(step), {}, metrics=metrics))


@pytest.fixture(scope="module")
def run_uri(tmp_path_factory):
    """A run whose second checkpoint is its best."""
    uri = str(tmp_path_factory.mktemp("runs") / "one")
    for step, mean in ((1, 0.3), (2, 0.9), (3, 0.5)):
        written(uri, step, mean)
    return uri


@pytest.fixture(scope="module")
def model(run_uri):
    return load(run_uri)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of one phantom, as the archive of BraTS 2020 unpacks it."""
    tree = tmp_path_factory.mktemp("tree")
    (case_id,) = write_phantoms(str(tree), num_cases=1, shape=SHAPE)
    (found,) = tree.rglob(case_id)
    return found


@pytest.fixture(scope="module")
def image():
    return make_phantom(0, shape=SHAPE)[0]


@pytest.fixture(scope="module")
def expected(image):
    """Labels that the network of the best checkpoint itself gives."""
    labels = segment(trained_network(CONFIG, weights(2)), CONFIG, image.astype(np.float32))
    assert len(np.unique(labels)) > 1, "or nothing is tested"
    return labels


def paths(folder):
    return [next(Path(folder).glob(f"*_{modality}.nii.gz")) for modality in MODALITIES]


def put(folder, image, affine=LPS, **others):
    """The modalities of a case as .nii.gz files of any name; some of them otherwise."""
    files = {}
    for modality, volume in zip(MODALITIES, image, strict=True):
        voxels, place = others.get(modality, (volume, affine))
        files[modality] = folder / f"Serie{len(files)}.nii.gz"
        files[modality].write_bytes(zipped(nifti(np.asarray(voxels), place)))
    return files


def test_all_kinds_of_input_give_the_same_labels(model, folder, image, expected):
    four = paths(folder)
    others = dict(zip(("T2F", "t1n", "T1gd", "t2"), map(str, four), strict=True))
    named = dict(reversed(others.items()))  # by any edition's names, in any order
    found = [model.segment(case) for case in (four, named, folder, str(folder), image)]
    for segmentation in found:
        np.testing.assert_array_equal(segmentation.labels, expected)
        assert segmentation.labels.dtype == np.uint8
    assert {s.case_id for s in found} == {"BraTS20_Training_001", "array"}
    assert found[0].model == model.name


def test_a_checkpoint_a_run_and_a_version_are_the_same_model(run_uri, image, expected, tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    config = replace(
        CONFIG,
        run=RunConfig(name="one", storage_uri=str(tmp_path)),
        tracking=TrackingConfig(uri=uri, model="same"),
    )
    run, best = tracking.start(config), checkpoint.best(run_uri)
    registering.register(run, config, best.files, dict.fromkeys(("mean", "WT"), 0.9), "cases")
    step = checkpoint.place(run_uri, 2)
    models = [load("models:/same@champion", uri), load(f"{step}/"), load(run_uri)]
    assert [m.name for m in models] == ["models:/same/1", step, step]
    for model in models:
        assert model.modalities == MODALITIES
        np.testing.assert_array_equal(model.segment(image).labels, expected)


def test_a_run_without_validations_means_its_newest_checkpoint_that_is_sound(tmp_path):
    uri = str(tmp_path / "run")
    for step in (1, 2, 3):
        written(uri, step)
    damaged = storage.join(checkpoint.place(uri, 3), checkpoint.WEIGHTS)
    storage.write_bytes(damaged, storage.read_bytes(damaged)[:-1])
    assert load(uri).name == checkpoint.place(uri, 2)
    assert storage.exists(damaged), "reading moves nothing"


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(MissingObjectError, match=r"nowhere.* expected models:/NAME@ALIAS"):
        load(str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="no checkpoint that can be loaded"):
        load(str(tmp_path))
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="manifest"):
        load(f"{tmp_path}/checkpoints/step-00000001")
    with pytest.raises(UsageError, match="models:/NAME@ALIAS"):
        load("models:/name", f"sqlite:///{tmp_path}/mlflow.db")


AXES = [("R", "A", "S"), ("P", "I", "R"), ("A", "S", "L"), ("L", "P", "S")]


@pytest.mark.parametrize("codes", AXES, ids="".join)
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_what_is_saved_lies_voxel_by_voxel_on_the_first_file(
    codes, ending, model, image, expected, tmp_path
):
    turn = orientations.ornt_transform(
        orientations.axcodes2ornt(("L", "P", "S")), orientations.axcodes2ornt(codes)
    )
    affine = LPS @ orientations.inv_ornt_aff(turn, SHAPE)
    turned = orientations.apply_orientation(image[0], turn)
    files = put(tmp_path, image, flair=(turned, affine))  # the others stay LPS
    found = model.segment(files)
    saved = nib.load(found.save(tmp_path / f"labels{ending}"))
    np.testing.assert_array_equal(saved.affine, affine)
    np.testing.assert_array_equal(np.asarray(saved.dataobj), found.labels)
    assert saved.shape == turned.shape == found.grid.shape
    np.testing.assert_array_equal(canonical(saved), expected)
    as_array = model.segment(
        np.stack([orientations.apply_orientation(volume, turn) for volume in image]), affine=affine
    )
    np.testing.assert_array_equal(as_array.labels, found.labels)


def test_label_values_and_volumes_are_those_of_the_labels(model, image, tmp_path):
    affine = np.diag([-2.0, -1.0, 0.5, 1.0])
    found = model.segment(image, affine=affine)
    saved = np.asarray(nib.load(found.save(tmp_path / "a.nii.gz", (1, 2, 4))).dataobj)
    np.testing.assert_array_equal(saved == 4, found.labels == 3)
    np.testing.assert_array_equal(saved[saved < 4], found.labels[found.labels < 3])
    assert found.volumes_mm3 == {
        "WT": float((found.labels > 0).sum()),
        "TC": float(np.isin(found.labels, (1, 3)).sum()),
        "ET": float((found.labels == 3).sum()),
    }
    assert f"WT      {round(found.volumes_mm3['WT']):10}" in str(found)


def test_a_missing_modality_is_refused_unless_the_model_knows_that(model, folder, caplog):
    files = dict(zip(MODALITIES, paths(folder), strict=True))
    del files["t1"]
    with pytest.raises(DataError, match=r"no t1 file; complete it, .*drop_modality"):
        model.segment(files)
    knowing = Segmenter(replace(model.model, takes_incomplete=True))
    found = knowing.segment(files)
    assert any("no t1 file: background" in remark for remark in found.remarks)
    assert "no t1 file: background" in caplog.text
    with pytest.raises(UsageError, match="no files"):
        knowing.segment({})


def test_whether_a_modality_may_be_missing_is_in_the_checkpoint(tmp_path):
    uri = written(str(tmp_path / "run"), 1, config=DROPPING)
    assert loading.load(uri, "").takes_incomplete


def padded(volume, width):
    """The same head on a larger grid."""
    affine = LPS.copy()
    affine[:3, 3] = LPS[:3, :3] @ np.full(3, -width)
    return np.pad(volume, width), affine


def test_other_grids_are_refused_or_resampled(model, image, expected, tmp_path):
    moved = padded(image[3], 3)
    files = put(tmp_path, image, t2=moved)
    with pytest.raises(GridError, match=r"Serie3.*resample"):
        model.segment(files)
    found = model.segment(files, resample=True)
    np.testing.assert_array_equal(found.labels, expected)  # shifts by voxels lose nothing
    assert found.grid.shape == SHAPE


def test_a_grid_at_another_resolution_is_resampled_linearly(model, image, tmp_path):
    fine = np.ascontiguousarray(image[1].repeat(2, 0).repeat(2, 1).repeat(2, 2))
    affine = LPS @ np.diag([0.5, 0.5, 0.5, 1])
    affine[:3, 3] = LPS[:3, :3] @ np.full(3, -0.25)
    files = put(tmp_path, image, t1=(fine, affine))
    raw = loading_case(model, files)
    difference = np.abs(raw.image[1] - image[1])
    assert raw.grid.shape == SHAPE
    assert np.median(difference[image[1] > 0]) == 0, "the mean of equal neighbours is their value"


def loading_case(model, files):
    from raybrats.predict.patient import find_case, open_case_for

    return open_case_for(model.model, find_case(files, model.modalities), resample=True)


def test_what_does_not_state_its_orientation_is_not_resampled(model, image, tmp_path):
    plain = nib.Nifti1Image(padded(image[3], 3)[0], None, dtype=np.int16)
    files = put(tmp_path, image)
    files["t2"].write_bytes(zipped(plain.to_bytes()))
    with pytest.raises(GridError, match="t2 cannot be resampled"):
        model.segment(files, resample=True)


@pytest.mark.parametrize(
    ("case", "error", "said"),
    [
        (lambda f: paths(f)[:3], UsageError, "3 paths; expected 4, in the order flair, t1"),
        (lambda f: {"t3": paths(f)[0]}, UsageError, "'t3' is not one of flair"),
        (lambda _: {"t1": "a.nii", "t1n": "b.nii"}, UsageError, "'t1n' is given twice"),
        (lambda f: [paths(f)[0]] * 4, UsageError, "same file stands for two modalities"),
        (lambda f: paths(f)[0], UsageError, "one file; expected a folder"),
        (lambda f: f / "nothing", StorageError, "does not exist"),
        (lambda f: [f / "nothing.nii", *paths(f)[1:]], StorageError, "does not exist"),
        (lambda _: np.zeros((3, 24, 24, 20)), UsageError, "expected \\(flair, t1, t1ce, t2; i"),
        (lambda _: np.zeros((4, 24, 24)), UsageError, "modality, i, j, k"),
        (lambda _: np.zeros((4, 24, 24, 20)), DataError, "array: every voxel is background"),
        (lambda _: np.full((4, 24, 24, 20), np.nan), DataError, "NaN"),
        (lambda _: np.full((4, 24, 24, 20), "a"), UsageError, "expected numbers"),
    ],
)
def test_a_case_that_is_none_is_refused(model, folder, case, error, said):
    with pytest.raises(error, match=said) as caught:
        model.segment(case(folder))
    assert "\n" not in str(caught.value)


def test_a_folder_must_hold_one_case(model, tmp_path):
    write_phantoms(str(tmp_path), num_cases=2, shape=(16, 16, 16))
    with pytest.raises(DataError, match=r"2 cases \(BraTS20_Training_001"):
        model.segment(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no BraTS case"):
        model.segment(tmp_path / "empty")


def test_only_nifti_files_are_written(tmp_path):
    (tmp_path / "folder.nii").mkdir()
    for name in ("labels.txt", "labels", "folder.nii"):
        with pytest.raises(UsageError, match=name):
            check_target(tmp_path / name)


def test_what_is_unlike_brats_is_remarked_on(model, image, caplog):
    assert model.segment(image).remarks == ()
    assert caplog.text == ""
    coarse = model.segment(image, affine=np.diag([-10.0, -10.0, 7.75, 1.0]))
    assert [remark[:11] for remark in coarse.remarks] == ["its voxels "]
    assert "10 x 10 x 7.75 mm" in caplog.text
    assert "skull-stripped, co-registered heads at 1 mm" in caplog.text
    noise = np.random.default_rng(0).normal(100, 5, image.shape)
    assert "skull" in model.segment(image + noise).remarks[0]
    assert "skull" in model.segment(image, affine=np.diag([-12.0, -12.0, 12.0, 1])).remarks[1]


@pytest.mark.real
def test_of_real_heads_those_of_brats_are_not_remarked_on(real_cases, model):
    from raybrats.data.nifti.volume import decode
    from raybrats.predict.patient import RawCase, find_case, open_case_for

    for folder in sorted(real_cases.glob("brats20*/*")):
        raw = open_case_for(model.model, find_case(folder, MODALITIES))
        assert raw.remarks() == (), folder
    for name in ("odd/INT16", "odd/shear", "odd/anatomical", "odd/minimal", "orientations/PIR"):
        (path,) = real_cases.glob(f"{name}.nii*")
        head = decode(path.read_bytes(), path.name)
        raw = RawCase(path.name, head.values[None], head.grid)
        assert any("skull" in remark for remark in raw.remarks()), path
    assert (MAX_BRAIN_LITRES, MAX_BORDER_FRACTION) == (2.0, 0.05)


ALONE = """
import sys
import raybrats as rb
found = rb.load(sys.argv[1]).segment(sys.argv[2])
print(found)
found.save(sys.argv[3])
assert "ray" not in sys.modules
"""


def alone(*words):
    command = [sys.executable, "-c", ALONE, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))


def test_a_checkpoint_segments_a_folder_without_ray(run_uri, folder, expected, tmp_path):
    done = alone(run_uri, folder, tmp_path / "labels.nii.gz")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("BraTS20_Training_001, 28 x 24 x 20 voxels")
    np.testing.assert_array_equal(canonical(nib.load(tmp_path / "labels.nii.gz")), expected)


@pytest.mark.s3
def test_model_case_and_labels_may_lie_in_a_bucket(
    bucket, run_uri, folder, image, expected, tmp_path
):
    for place in (Path(run_uri), folder):
        for file in filter(Path.is_file, place.rglob("*")):
            uri = f"s3://{bucket}/{place.name}/{file.relative_to(place)}"
            storage.write_bytes(uri, file.read_bytes())
    model = load(f"s3://{bucket}/one")
    assert model.name == f"s3://{bucket}/one/checkpoints/step-00000002"
    uris = [f"s3://{bucket}/{folder.name}/{path.name}" for path in paths(folder)]
    for case in (f"s3://{bucket}/{folder.name}", uris):
        found = model.segment(case)
        np.testing.assert_array_equal(found.labels, expected)
    out = found.save(f"s3://{bucket}/labels.nii.gz")
    (tmp_path / "back.nii.gz").write_bytes(storage.read_bytes(out))
    np.testing.assert_array_equal(canonical(nib.load(tmp_path / "back.nii.gz")), expected)
    assert image.shape[1:] == found.grid.shape
