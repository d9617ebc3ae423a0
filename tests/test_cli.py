"""The command line as a user meets it: one line for each mistake, one document for each answer."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from niftis import LPS, nifti
from services import free_ports

from raybrats import storage
from raybrats.arguments import config_of, read_config
from raybrats.brats import MODALITIES
from raybrats.cli import VERBS
from raybrats.config import NetworkConfig, TrainConfig, override_all, to_json
from raybrats.data.cohort.index import index
from raybrats.errors import MissingObjectError, UsageError
from raybrats.model.network import build, weights_of
from raybrats.phantom.phantom import make_phantom, write_phantoms
from raybrats.recipes import RECIPES, tiny
from raybrats.train import checkpoint
from raybrats.train.checkpoint import Snapshot

SHAPE = (24, 24, 20)
RAYBRATS = Path(sys.executable).with_name("raybrats")


def python(*words, cwd=None, **environment):
    done = subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


def raybrats(words, cwd=None, **environment):
    return python(str(RAYBRATS), *words.split(), cwd=cwd, **environment)


def refused(outcome, code, *said):
    """One line on stderr that says so, nothing on stdout, and the exit code of the cause."""
    got, out, err = outcome
    assert (got, out) == (code, ""), err
    (line,) = err.splitlines()
    assert line.startswith("raybrats: ")
    assert all(word in line for word in said), line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("trian tiny", ["'trian'", "did you mean 'train'?"]),
        ("xyz", ["'xyz'", *VERBS]),
        ("train tinny", ["'tinny'", "did you mean 'tiny'?"]),
        ("train xyz", ["'xyz'", *RECIPES]),
        ("train", ["RECIPE", *RECIPES]),
        ("train tiny --loss.dice-wieght 1", ["--loss.dice-wieght", "--loss.dice-weight"]),
        ("train tiny --optim.steps many", ["--optim.steps", "'many'"]),
        ("train tiny --optim.steps 0", ["optim.steps must be >= 1, got 0"]),
        ("train tiny --optim.steps", ["--optim.steps"]),
        ("train tiny --network.name resnet", ["network.name", "resnet", "unet"]),
        ("train tiny --data.patch-size 30 32 32", ["data.patch_size", "multiples of 8", "30"]),
        ("train tiny --cluster.workers 3", ["optim.global_batch", "cluster.workers (3)"]),
        ("tune tiny --trials few", ["--trials", "'few'"]),
        ("train --config", ["--config: expected a file"]),
        ("train tiny --config {tmp}/x.json", ["'tiny' or --config, not both"]),
        ("tune --config {tmp}/x.json tiny", ["'tiny' or --config, not both"]),
        ("segment", ["models:/NAME@ALIAS"]),
        ("segment models:/raybrats@champion", ["--flair, --t1, --t1ce, --t2"]),
        ("segment m --flair a.nii --out labels.png", ["labels.png", ".nii or .nii.gz"]),
        ("segment m --flair a.nii --out a.nii", ["a.nii", "one of the patient's files"]),
        ("segment m --fliar a.nii", ["--fliar", "--flair"]),
        ("index", ["uri"]),
        ("index a --otu b", ["--otu", "--out"]),
        ("predict models:/raybrats@champion", ["ohort"]),
        ("evaluate a b --editon 2020", ["--editon", "--edition"]),
        ("evaluate a b --rules 2020", ["--rules", "brats2020", "brats2023", "brats2026"]),
        ("evaluate a b --out scores.xlsx", ["scores.xlsx", ".json, .csv, .parquet"]),
        ("compare", ["two folders"]),
        ("compare a b", ["two folders of predictions or more, then the references"]),
        ("compare a a b", ["a is given twice"]),
        ("phantom {tmp}/p --edition 1999", ["2020, 2021, 2023, msd", "'1999'"]),
        ("phantom {tmp}/p --shape 8 8 8", ["16 voxels", "8"]),
        ("phantom {tmp}/p --cases 0", ["1", "0"]),
    ],
)
def test_wrong_words_are_refused(words, said, tmp_path):
    refused(raybrats(words.format(tmp=tmp_path)), 2, *said)


def test_no_words_at_all_show_what_there_is():
    code, out, err = raybrats("")
    assert (code, err) == (2, "")
    assert all(f"\n  {verb} " in out for verb in VERBS)


@pytest.mark.parametrize("words", ["--help", "train --help", "train tiny --help", "index -h"])
def test_help_goes_to_stdout_and_loads_neither_torch_nor_ray(words):
    code = (
        "import sys\nfrom raybrats.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit as end: assert not end.code\n"
        "sys.stderr.write(' '.join({'torch', 'ray', 'mlflow', 'numpy'} & set(sys.modules)))"
    )
    got, out, err = python("-c", code, *words.split())
    assert (got, err) == (0, "")
    assert "raybrats" in out


def test_a_mistake_loads_neither_torch_nor_ray():
    code = (
        "import sys\nfrom raybrats.cli import main\nassert main(sys.argv[1:]) == 2\n"
        "assert not {'torch', 'ray', 'mlflow'} & set(sys.modules)"
    )
    got, _, err = python("-c", code, "train", "tiny", "--optim.steps", "many")
    assert got == 0, err


@pytest.mark.parametrize("name", RECIPES)
def test_fields_of_a_recipe_change_alone(name):
    size = (64, 64, 1 if name == "slices" else 64)
    patch = " ".join(map(str, size))
    words = f"{name} --loss.dice-weight 0.7 --data.patch-size {patch} --run.name one"
    plain, changed = config_of("train", [name]), config_of("train", words.split())
    assert plain == RECIPES[name]()
    assert changed.loss.dice_weight == 0.7
    assert changed.data.patch_size == size
    assert (changed.network, changed.optim) == (plain.network, plain.optim)


CHANGED = {"optim.steps": 40, "run.name": "one", "data.modalities": ["t1ce", "flair"]}


def stored(where, folder):
    """The configuration of a run where it is kept: a checkpoint, MLflow, or the run's record."""
    config = override_all(tiny(), CHANGED)
    if where == "checkpoint":
        return f"{checkpoint.write(str(folder / 'run'), config, Snapshot(10, {}, {}))}/config.json"
    record = {
        "mlflow_run_id": "abc",
        "digest": "",
        "cohort": "",
        "config": json.loads(to_json(config)),
    }
    text = json.dumps(record) if where == "run.json" else to_json(config)
    uri = f"s3://{folder}/config.json" if isinstance(folder, str) else str(folder / "any.json")
    storage.write_bytes(uri, text.encode())
    return uri


@pytest.mark.parametrize("where", ["checkpoint", "MLflow", "run.json"])
def test_a_stored_run_is_taken_with_changes_on_top(where, tmp_path):
    uri = stored(where, tmp_path)
    expected = override_all(tiny(), CHANGED)
    assert config_of("train", ["--config", uri]) == expected
    words = ["--optim.steps", "300", f"--config={uri}", "--data.patch_size", "64", "64", "64"]
    again = config_of("tune", words)
    changes = {"optim.steps": 300, "data.patch_size": (64, 64, 64)}
    assert again == override_all(expected, changes)


@pytest.mark.s3
def test_a_stored_run_may_lie_in_a_bucket(bucket):
    assert read_config(stored("MLflow", bucket)) == override_all(tiny(), CHANGED)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"data": {"nope": 1}}', "\x00", "[" * 9999])
def test_a_file_that_is_no_run_is_refused(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError, match=r"config\.json: not the configuration of a run") as caught:
        config_of("train", ["--config", str(tmp_path / "config.json")])
    assert "\n" not in str(caught.value)
    with pytest.raises(MissingObjectError, match=r"other\.json"):
        config_of("train", ["--config", str(tmp_path / "other.json")])


def test_phantom_json_is_the_only_thing_on_stdout(tmp_path):
    words = f"phantom {tmp_path}/tree --cases 2 --shape 16 20 16 --edition 2021 --json"
    code, out, err = raybrats(words)
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert document == {"uri": f"{tmp_path}/tree", "cases": ["BraTS2021_00000", "BraTS2021_00001"]}


@pytest.mark.s3
def test_libraries_that_write_to_stdout_do_not_reach_it(bucket):
    code = (
        "import logging, sys\n"
        "logging.basicConfig(stream=sys.stdout, level=logging.DEBUG)\n"
        "from raybrats.cli import main\nsys.exit(main())"
    )
    words = f"phantom s3://{bucket}/tree --cases 1 --shape 16 16 16 --json"
    got, out, err = python("-c", code, *words.split())
    assert got == 0
    assert json.loads(out)["cases"] == ["BraTS20_Training_001"]
    assert "DEBUG:botocore" in err


def test_debug_shows_where_it_happened():
    code, out, err = raybrats("train tinny --debug")
    assert (code, out) == (1, "")
    assert "Traceback" in err
    assert err.strip().splitlines()[-1].startswith("raybrats.errors.UsageError: ")


def test_a_table_for_people(tmp_path):
    code, out, _ = raybrats(f"phantom {tmp_path}/tree --cases 1 --shape 16 16 16")
    assert code == 0
    assert f"1 cases in {tmp_path}/tree" in out


@pytest.fixture(scope="module")
def places(tmp_path_factory, ray_cluster, s3):
    """Trees of five cases, and their cohort files: sound, with a truncated file, without a mask."""
    assert ray_cluster.address
    assert s3.endpoint
    folder = tmp_path_factory.mktemp("cli")
    write_phantoms(str(folder / "sound"), num_cases=5, shape=SHAPE)
    for name in ("truncated", "maskless"):
        shutil.copytree(folder / "sound", folder / name)
    (t1,) = (folder / "truncated").rglob("*_002_t1.nii.gz")
    t1.write_bytes(t1.read_bytes()[: t1.stat().st_size // 2])
    (mask,) = (folder / "maskless").rglob("*_004_seg.nii.gz")
    mask.unlink()
    for name in ("sound", "truncated", "maskless"):
        index(str(folder / name), str(folder / f"{name}.parquet"))
    (folder / "empty").mkdir()
    shutil.copytree(folder / "sound", folder / "fewer")
    (case,) = (folder / "fewer").rglob("*_004_seg.nii.gz")
    shutil.rmtree(case.parent)
    small = "tiny --network.widths 4 8 8 --data.patch_size 16 16 16 --cluster.device cpu"
    here = f"--run.storage_uri {folder}/runs --tracking.uri sqlite:///{folder}/mlflow.db"
    return {
        "tmp": folder,
        "train": f"train {small} {here} --data.cohort {folder}",
        "dead": f"http://127.0.0.1:{free_ports(1)[0]}",
    }


DESK = """
import json, os, sys, tempfile
from raybrats.cli import main
ends = [os.dup(1), os.dup(2)]
for line in sys.stdin:
    files = [tempfile.TemporaryFile() for _ in ends]
    for n, file in enumerate(files, start=1):
        os.dup2(file.fileno(), n)
    code = main(json.loads(line))
    sys.stdout.flush(), sys.stderr.flush()
    for n, end in enumerate(ends, start=1):
        os.dup2(end, n)
    said = [file.seek(0) or file.read().decode() for file in files]
    print(json.dumps([code, *said]), flush=True)
"""


@contextmanager
def open_desk():
    """A process that runs one command line after the other: imports take seconds."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", DESK], **pipes) as process:

        def run(words):
            process.stdin.write(json.dumps(words.split()) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield run
        process.stdin.close()


@pytest.fixture(scope="module")
def desk(places):
    assert places
    with open_desk() as run:
        yield run


@pytest.fixture(scope="module")
def desk_without_ray():
    with open_desk() as run:
        yield run


@pytest.fixture(scope="module")
def patient(tmp_path_factory):
    """A run with one checkpoint, and a patient: four files under the names that a clinic gave."""
    folder = tmp_path_factory.mktemp("clinic")
    config = TrainConfig(network=NetworkConfig(widths=(4, 8, 8)), data=tiny().data)
    torch.manual_seed(1)
    snapshot = Snapshot(10, weights_of(build(config.network, 4)), {})
    checkpoint.write(str(folder / "run"), config, snapshot)
    image, _ = make_phantom(0, shape=SHAPE)
    for modality, volume in zip(MODALITIES, image, strict=True):
        (folder / f"{modality}.nii").write_bytes(nifti(volume, LPS))
    (folder / "wide.nii").write_bytes(nifti(np.pad(image[3], 2), LPS))
    (folder / "text.nii").write_text("not a volume")
    return folder


FILES = "--flair {0}/flair.nii --t1 {0}/t1.nii --t1ce {0}/t1ce.nii --t2 {0}/t2.nii"


def test_a_patient_is_segmented_from_files_of_any_name(desk_without_ray, patient, tmp_path):
    words = f"segment {patient}/run {FILES.format(patient)} --out {tmp_path}/labels.nii --json"
    code, out, err = desk_without_ray(words)
    assert (code, err) == (0, "")
    document = json.loads(out)
    labels = np.asarray(nib.load(tmp_path / "labels.nii").dataobj)
    assert labels.shape == SHAPE
    assert document == {
        "out": f"{tmp_path}/labels.nii",
        "model": f"{patient}/run/checkpoints/step-00000010",
        "volumes_mm3": {
            "WT": float((labels > 0).sum()),
            "TC": float(np.isin(labels, (1, 3)).sum()),
            "ET": float((labels == 3).sum()),
        },
        "remarks": [],
    }
    wide = words.replace("t2.nii", "wide.nii")
    code, out, err = desk_without_ray(f"{wide} --resample")
    assert (code, err) == (0, ""), "grids that differ are resampled where that is asked for"


def test_what_is_unlike_brats_is_said_in_a_plain_line(desk_without_ray, patient, tmp_path):
    for modality in MODALITIES:
        volume = nib.load(patient / f"{modality}.nii")
        thick = nifti(np.asarray(volume.dataobj), LPS @ np.diag([1, 1, 5, 1]))
        (tmp_path / f"{modality}.nii").write_bytes(thick)
    words = f"segment {patient}/run {FILES.format(tmp_path)} --out {tmp_path}/labels.nii.gz"
    code, out, err = desk_without_ray(words)
    assert code == 0
    (line,) = err.splitlines()
    assert line.startswith("flair: its voxels are 1 x 1 x 5 mm; models of raybrats are trained on")
    assert "labels.nii.gz" in out
    assert "ET" in out


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("{run} --flair {dir}/flair.nii --t1 {dir}/t1.nii", 5, ["no t1ce, t2", "drop_modality"]),
        ("{run} {files} --t2 {dir}/wide.nii", 5, ["wide.nii", "shape", "--resample"]),
        ("{run} {files} --t2 {dir}/text.nii", 5, ["text.nii: not a NIfTI file"]),
        ("{run} {files} --t2 {dir}/none.nii", 6, ["none.nii: does not exist"]),
        ("{run} {files} --t2 {dir}/t1.nii", 2, ["same file"]),
        ("{run} {files} --out {dir}/t1.nii", 2, ["t1.nii", "one of the patient's files"]),
        ("{dir}/nothing {files}", 6, ["nothing: does not exist", "models:/NAME@ALIAS"]),
        ("{dir} {files}", 3, ["no checkpoint"]),
        ("{run}/checkpoints/step-00000011 {files}", 6, ["step-00000011: does not exist"]),
        ("models:/name {files}", 2, ["models:/NAME@ALIAS"]),
        ("{run} {files} --out s3://no-such-bucket-here/x.nii.gz", 6, ["s3://no-such-bucket-here"]),
    ],
)
@pytest.mark.usefixtures("s3")
def test_a_patient_that_cannot_be_segmented_is_refused(
    desk_without_ray, patient, tmp_path, words, code, said
):
    out = "" if "--out" in words else f" --out {tmp_path}/labels.nii.gz"
    places = {"run": f"{patient}/run", "dir": patient, "files": FILES.format(patient)}
    refused(desk_without_ray("segment " + words.format(**places) + out), code, *said)
    assert not list(tmp_path.iterdir())


LARGE = "--cluster.workers 64 --optim.global_batch 64"


@pytest.mark.ray
@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        pytest.param("index {tmp}/nowhere --out {tmp}/c.parquet", 6, ["nowhere"]),
        ("index s3://no-such-bucket-here/x --out {tmp}/c.parquet", 6, ["s3://no-such-bucket-here"]),
        ("index {tmp}/empty --out {tmp}/c.parquet", 5, ["empty", "no BraTS case"]),
        ("{train}/truncated.parquet", 5, ["1 of 5", "BraTS20_Training_002", "_t1.nii.gz"]),
        ("{train}/maskless.parquet", 5, ["1 of 5", "BraTS20_Training_004", "no label file"]),
        ("{train}/sound.parquet --tracking.uri {dead}", 6, ["MLflow at http://127.0.0.1:"]),
        (f"{{train}}/sound.parquet {LARGE}", 7, ["64 workers", "4 CPUs", "cluster.workers"]),
        ("{train}/sound.parquet --cluster.device gpu", 7, ["0 GPUs", "cluster.device"]),
        ("{train}/sound.parquet --run.name none --run.resume must", 2, ["run.resume is must"]),
        ("predict models:/nobody@champion {tmp}/sound --tracking-uri {mlflow}", 6, ["nobody"]),
        ("predict nobody {tmp}/sound --tracking-uri {dead}", 2, ["'nobody'", "models:/NAME@ALIAS"]),
        ("models nobody --tracking-uri {dead}", 6, ["MLflow at http://127.0.0.1:"]),
        ("evaluate {tmp}/sound {tmp}/fewer", 5, ["no reference", "BraTS20_Training_004"]),
        (
            "evaluate {tmp}/sound {tmp}/sound --fold 7",
            2,
            ["--fold 7", "cases of 0, 1, 2, 3"],
        ),
    ],
)
def test_what_cannot_be_done_is_refused(desk, places, request, words, code, said):
    if "{mlflow}" in words:
        places = places | {"mlflow": request.getfixturevalue("mlflow_uri")}
    refused(desk(words.format(**places)), code, *said)


@pytest.mark.ray
@pytest.mark.s3
def test_wrong_credentials_are_refused(places, s3, bucket):
    if s3.kind != "ceph":
        pytest.skip("moto does not check signatures")
    words = f"index s3://{bucket}/tree --out {places['tmp']}/c.parquet"
    outcome = raybrats(words, AWS_SECRET_ACCESS_KEY="wrong")
    refused(outcome, 6, f"s3://{bucket}/tree", "AWS_")


@pytest.mark.ray
def test_index_json_lists_the_bad_cases(places):
    out_uri = places["tmp"] / "truncated.parquet"
    code, out, err = raybrats(f"index {places['tmp']}/truncated --out {out_uri} --json")
    assert code == 0, err
    document = json.loads(out)
    assert (document["cases"], document["ok"]) == (5, 4)
    assert document["editions"] == {"2020": 5}
    assert document["cohort_uri"] == str(out_uri)
    (bad,) = document["quarantined"]
    assert bad["case_id"] == "BraTS20_Training_002"
    assert "BraTS20_Training_002_t1.nii.gz" in bad["reason"]
    assert "Traceback" not in err
    assert storage.exists(str(out_uri))


@pytest.mark.ray
def test_cases_without_labels_are_left_out_and_counted(desk, places):
    code, out, err = desk("evaluate {tmp}/sound {tmp}/maskless --json".format(**places))
    assert code == 0, err
    document = json.loads(out)
    assert document["unlabelled"] == ["BraTS20_Training_004"]
    assert {row["case_id"] for row in document["cases"]} == {
        f"BraTS20_Training_{n:03d}" for n in (1, 2, 3, 5)
    }
    _, out, _ = desk("evaluate {tmp}/sound {tmp}/maskless".format(**places))
    assert "4 cases by brats2020, 1 prediction left out without labels" in out
