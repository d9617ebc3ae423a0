"""The command line as a user meets it: one line for each mistake, one document for each answer."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from services import free_ports

from raybrats import storage
from raybrats.arguments import config_of
from raybrats.cli import VERBS
from raybrats.data.cohort.index import index
from raybrats.phantom.phantom import write_phantoms
from raybrats.recipes import RECIPES

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
        ("train tiny --network.name resnet", ["--network.name", "resnet", "unet"]),
        ("train tiny --data.patch-size 30 32 32", ["data.patch_size", "multiples of 8", "30"]),
        ("train tiny --cluster.workers 3", ["optim.global_batch", "cluster.workers (3)"]),
        ("tune tiny --trials few", ["--trials", "'few'"]),
        ("index", ["uri"]),
        ("index a --otu b", ["--otu", "--out"]),
        ("predict models:/raybrats@champion", ["ohort"]),
        ("evaluate a b --editon 2020", ["--editon", "--edition"]),
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
    words = f"{name} --loss.dice-weight 0.7 --data.patch-size 64 64 64 --run.name one"
    plain, changed = config_of("train", [name]), config_of("train", words.split())
    assert plain == RECIPES[name]()
    assert changed.loss.dice_weight == 0.7
    assert changed.data.patch_size == (64, 64, 64)
    assert (changed.network, changed.optim) == (plain.network, plain.optim)


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


@pytest.fixture(scope="module")
def desk(places):
    """A process that runs one command line after the other: importing Ray takes seconds."""
    assert places
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", DESK], **pipes) as process:

        def run(words):
            process.stdin.write(json.dumps(words.split()) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield run
        process.stdin.close()


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
        ("evaluate {tmp}/sound {tmp}/maskless", 5, ["no reference", "BraTS20_Training_004"]),
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
