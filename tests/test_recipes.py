"""The recipes by name: what their docstrings promise of their networks is what these cost."""

import re
import sys

import pytest

from raybrats.arguments import config_of
from raybrats.config import TrainConfig, override_all
from raybrats.errors import UsageError
from raybrats.model.cost import cost
from raybrats.model.network import num_bytes
from raybrats.recipes import RECIPES, named, recipe

FIGURES = re.compile(r"One \w+(?: of (\d+) x (\d+) x (\d+))?: ([\d,]+ parameters, .* GB)\.")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_costs_what_it_says(name):
    words = " ".join(RECIPES[name].__doc__.split())
    *size, figures = FIGURES.search(words).groups()
    shape = tuple(map(int, size)) if size[0] else None
    assert str(cost(recipe(name), shape)) == figures


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_bears_its_name(name):
    made = recipe(name)
    assert made.recipe == name
    assert made != TrainConfig(recipe=name)


@pytest.mark.parametrize("name", RECIPES)
def test_a_few_widths_make_a_recipe_small(name):
    """As many coarser heads are supervised as there are stages for."""
    assert num_bytes(override_all(recipe(name), {"network.widths": [8, 16, 32, 64]})) < 8e6


OWN = """
from dataclasses import replace
from raybrats.recipes import tiny

def mine():
    return replace(tiny(), optim=replace(tiny().optim, steps=33))

def wrong():
    return 7

def broken():
    raise ValueError("no GPU here\\nand more")
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the user's own in the working directory."""
    (tmp_path / "my_recipes.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "my_recipes"
    sys.modules.pop("my_recipes", None)


def test_a_recipe_may_be_the_users_own(module):
    config = config_of("train", [f"{module}:mine", "--optim.lr", "0.5"])
    assert (config.recipe, config.optim.steps, config.optim.lr) == ("my_recipes:mine", 33, 0.5)
    assert recipe(f"{module}:mine", {"optim.lr": 0.5}) == config
    assert named(config, "now").run.name == "my_recipes-mine-now"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("my_recipes:wrong", "makes int, not a TrainConfig"),
        ("my_recipes:broken", "ValueError: no GPU here$"),
        ("my_recipes:nothing", "AttributeError"),
        ("no_such_module:mine", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("nnunett", "did you mean 'nnunet'"),
    ],
)
def test_what_is_no_recipe_is_a_usage_error(module, name, said):
    assert module
    with pytest.raises(UsageError, match=said):
        recipe(name)


def test_an_installed_package_offers_recipes(module, tmp_path):
    offers = tmp_path / "mine-1.0.dist-info"
    offers.mkdir()
    (offers / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (offers / "entry_points.txt").write_text(f"[raybrats.recipes]\nours = {module}:mine\n")
    sys.path.insert(0, str(tmp_path))
    assert recipe("ours").optim.steps == 33
    assert recipe("ours").recipe == "ours"
