"""Words that make no sense, each refused in one line before anything is allocated or started."""

import json

import pytest

from raybrats.cli import main
from raybrats.config import to_json
from raybrats.errors import UsageError
from raybrats.phantom.phantom import make_phantom, write_phantoms
from raybrats.recipes import tiny
from raybrats.runs.space import space_of


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"num_cases": 0}, "got 0"),
        ({"num_cases": -1}, "got -1"),
        ({"num_cases": 10**12}, "at most 100000"),
        ({"shape": (0, 16, 16)}, "16 voxels"),
        ({"shape": (-5, 64, 64)}, "16 voxels"),
        ({"shape": (-(10**5), -(10**5), 16)}, "16 voxels"),
        ({"shape": (10**5, 10**5, 10**5)}, "at most 16777216 voxels"),
        ({"shape": (10**30, 16, 16)}, "at most 16777216 voxels"),
    ],
)
def test_a_phantom_that_cannot_be_drawn_is_refused_and_nothing_is_written(changes, said, tmp_path):
    with pytest.raises(UsageError, match=said):
        write_phantoms(str(tmp_path / "tree"), **{"shape": (16, 16, 16), "num_cases": 1} | changes)
    assert not list(tmp_path.iterdir())
    if "num_cases" not in changes:
        with pytest.raises(UsageError, match=said):
            make_phantom(0, **{"shape": (16, 16, 16)} | changes)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("optim.lr=quniform(0,1,0)", "the step must be above 0"),
        ("optim.lr=quniform(0.1,1,-0.1)", "the step must be above 0, got -0.1"),
        ("optim.lr=uniform(5,1)", "no range from 5 to 1"),
        ("optim.lr=uniform(1,1)", "no range from 1 to 1"),
        ("network.residual_units=randint(3,1)", "no range from 3 to 1"),
        ("optim.lr=loguniform(0,1)", "lower bound greater than 0"),
        ("optim.lr=uniform(0.1,1e999)", "upper bound"),
        ("optim.lr=uniform('a','b')", "not supported"),
        ("optim.lr=uniform(1j,2)", "not supported"),
        ("optim.lr=uniform(None,1)", "lower bound"),
        ("optim.lr=uniform()", "missing"),
        ("optim.lr=uniform(1,2,3,4)", "4 were given"),
        (f"optim.lr=uniform({'(' * 5000})", "too many nested|too much"),
        ("optim.lr=uniform(-1,1)", "must be > 0"),
        ("optim.lr=choice()", "nothing to choose from"),
        ("optim.lr=choice([])", "nothing to choose from"),
        ("data.patch_size=choice((48,48,48),(50,48,48))", "multiples of"),
    ],
)
def test_a_space_from_which_nothing_can_be_drawn_is_refused(word, said):
    for _ in range(3):  # whatever is drawn at random
        with pytest.raises(UsageError, match=said):
            space_of([word], tiny())


def test_a_field_is_searched_once():
    with pytest.raises(UsageError, match=r"'optim\.lr': given twice"):
        space_of(["optim.lr=uniform(0.1,1)", "optim.lr=uniform(0.2,1)"], tiny())


@pytest.mark.parametrize(
    ("word", "choices"),
    [
        ("data.patch_size=choice((48,48,48),(64,64,64))", [(48, 48, 48), (64, 64, 64)]),
        ("data.patch_size=choice([(48,48,48),(64,64,64)])", [(48, 48, 48), (64, 64, 64)]),
        ("optim.name=choice('sgd','adamw')", ["sgd", "adamw"]),
        ("optim.name=choice('sgd')", ["sgd"]),
        ("loss.dice_weight=choice(0.5)", [0.5]),
    ],
)
def test_a_choice_is_of_its_arguments_or_of_one_list(word, choices):
    (domain,) = space_of([word], tiny()).values()
    assert domain.categories == choices


@pytest.mark.parametrize("words", ["tune --help", "tune tiny -h"])
def test_the_help_of_a_search_names_the_recipes_and_every_field(words, capfd):
    assert main(words.split()) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert "tune RECIPE" in out
    assert all(word in out for word in ("--trials", "--space", "tiny", *fields(to_json(tiny()))))


def fields(text):
    """The options of every field of a run."""
    tree = {k: v for k, v in json.loads(text).items() if isinstance(v, dict)}
    return [f"--{group}.{name.replace('_', '-')}" for group, v in tree.items() for name in v]
