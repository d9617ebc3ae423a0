"""Every public function has an example, and every example is true."""

import ast
import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import raybrats

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(raybrats.__path__, "raybrats.")
    if module.name != "raybrats.registry.pyfunc_model"  # run by MLflow, inside a loaded model
)
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def public_functions(source):
    """Names and docstrings of a module's functions that do not begin with an underscore."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, ast.get_docstring(node) or ""


def test_every_public_function_has_an_example():
    folder = Path(raybrats.__file__).parent
    sources = {path.relative_to(folder): path.read_text() for path in folder.rglob("*.py")}
    found = [(p, name, text) for p, s in sources.items() for name, text in public_functions(s)]
    assert len(found) > 200
    assert [f"{p}:{name}" for p, name, text in found if ">>> " not in text] == []


@pytest.mark.parametrize("name", ["raybrats", *MODULES])
def test_examples_are_true(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, optionflags=OPTIONS)
    assert failed == 0
