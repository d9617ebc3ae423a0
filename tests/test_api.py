"""The Python API: it costs nothing to import, keeps its names, and writes nothing by itself."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import raybrats as rb
from raybrats import config, recipes
from raybrats.errors import UsageError

NAMES = {
    *("recipe", "index", "train", "tune", "load", "predict", "evaluate", "compare", "report"),
}


def python(code, *words, cwd=None):
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_importing_it_costs_nothing():
    heavy = {"torch", "ray", "mlflow", "monai", "numpy", "nibabel", "pydantic", "rich", "fsspec"}
    code = (
        "import sys, time\nstart = time.process_time()\nimport raybrats as rb\n"
        "names = dir(rb), rb.train, rb.load.__doc__\n"
        f"print(time.process_time() - start, *({heavy} & set(sys.modules)))"
    )
    seconds, *loaded = python(code)[0].split()
    assert loaded == []
    assert float(seconds) < 0.5


def test_its_names_are_listed_and_explained():
    assert set(dir(rb)) == {*NAMES, "__version__"} == {*rb.__all__, "__version__"}
    for name in NAMES:
        function = getattr(rb, name)
        assert "Example:" in function.__doc__
        assert inspect.signature(function).return_annotation is not inspect.Signature.empty


def test_its_verbs_stay_functions_once_the_folders_of_their_names_are_loaded():
    code = (
        "import raybrats as rb\ntrain, predict = rb.train, rb.predict\n"
        "from raybrats.train import manifest\nimport raybrats.predict.target\n"
        "assert (rb.train, rb.predict) == (train, predict), 'folders took their place'\n"
        "from raybrats import train as again\nassert again is train\n"
        "import sys\nassert sys.modules['raybrats.train'].manifest is manifest\n"
    )
    assert python(code) == ("", "")


def test_a_function_that_uses_it_may_be_sent_to_another_process():
    code = (
        "import cloudpickle\nimport raybrats as rb\n"
        "def steps(): return rb.recipe('tiny').optim.steps\n"
        "print(cloudpickle.loads(cloudpickle.dumps(steps))())"
    )
    assert python(code) == (f"{recipes.tiny().optim.steps}\n", "")


def test_type_checkers_see_what_it_takes_and_gives(tmp_path):
    good = "import raybrats as rb\nscores: float = rb.train(rb.recipe('tiny')).scores['WT']\n"
    (tmp_path / "good.py").write_text(good + "rb.load('run').segment(['a.nii']).save('b.nii')\n")
    (tmp_path / "bad.py").write_text(good + "rb.train('tiny')\nrb.load(3)\n")
    checker, root = Path(sys.executable).with_name("ty"), Path(rb.__file__).parents[1]
    where = ["--python", sys.prefix, "--extra-search-path", root, "--output-format", "concise"]
    found = {
        name: subprocess.run(
            [checker, "check", name, *where], capture_output=True, text=True, cwd=tmp_path
        )
        for name in ("good.py", "bad.py")
    }
    assert found["good.py"].returncode == 0, found["good.py"].stdout
    assert "bad.py:3" in found["bad.py"].stdout
    assert "bad.py:4" in found["bad.py"].stdout


def test_a_recipe_is_changed_by_dotted_fields():
    changes = {"data.cohort": "s3://bucket/cohort.parquet", "optim.steps": 7}
    assert rb.recipe("crop128") == recipes.crop128()
    assert rb.recipe("crop128", changes) == config.override_all(recipes.crop128(), changes)
    with pytest.raises(UsageError, match="did you mean 'crop128'"):
        rb.recipe("crop12")
    with pytest.raises(UsageError, match="did you mean 'steps'"):
        rb.recipe("tiny", {"optim.step": 1})


QUIET = """
import logging, sys
from raybrats import progress
from raybrats.progress import Display
def work(title):
    with Display(title, 2) as display:
        display.show(1, "one"), display.show(2, "two")
work("unasked")
progress.ask_for_lines()
work("asked")
"""


def test_progress_is_shown_only_where_it_was_asked_for():
    assert python(QUIET) == ("", "asked: 1/2 one\nasked: 2/2 two\n")
