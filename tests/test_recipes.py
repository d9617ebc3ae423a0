"""The recipes by name: what their docstrings promise of their networks is what these cost."""

import re

import pytest

from raybrats.config import TrainConfig, override_all
from raybrats.model.cost import cost
from raybrats.recipes import RECIPES, recipe

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
    small = override_all(recipe(name), {"network.widths": [8, 16, 32, 64]})
    size = (64, 64, 1) if small.spatial_dims == 2 else (64, 64, 64)
    assert cost(small, size).parameters < 2e6
