"""What the pages in docs/ say of the code is there."""

import importlib
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"
NAMED = sorted(set(re.findall(r"`(raybrats[\w.]*):(\w+)`", PAGE.read_text())))


@pytest.mark.parametrize(("module", "name"), NAMED)
def test_every_function_of_the_walk_is_there(module, name):
    assert callable(getattr(importlib.import_module(module), name))


def test_the_walk_has_its_functions():
    assert len(NAMED) > 20


def test_every_file_that_is_named_is_there():
    package = PAGE.parents[1] / "raybrats"
    files = re.findall(r"`((?:\w+/)+\w+\.py)`", PAGE.read_text())
    assert files
    assert [name for name in files if not (package / name).exists()] == []
