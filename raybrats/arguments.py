"""What may stand on the command line: the options of each verb, and parsing in plain words."""

import io
import re
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

import tyro

from raybrats.config import TrainConfig
from raybrats.errors import UsageError
from raybrats.recipes import RECIPES, recipe

T = TypeVar("T")
Positional = tyro.conf.Positional


@dataclass(frozen=True)
class Phantom:
    """Write a synthetic cohort in the tree, names and label values of an edition."""

    out: Positional[str]
    cases: int = 12
    shape: tuple[int, int, int] = (240, 240, 155)
    edition: str = "2020"
    """2020, 2021, 2023 or msd."""
    seed: int = 0


@dataclass(frozen=True)
class Index:
    """Find, open and verify every case of a tree, and write the cohort file."""

    uri: Positional[str]
    out: str = "cohort.parquet"
    """Local path or URI of the cohort file."""


@dataclass(frozen=True)
class Tune:
    """Search over fields of a recipe."""

    trials: int = 8
    space: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """FIELD=KIND(...), once a field; KIND is uniform, loguniform, quniform, randint or choice."""


@dataclass(frozen=True)
class Predict:
    """Segment every case of a cohort with a registered model."""

    model: Positional[str]
    """models:/name@alias or models:/name/version."""
    cohort: Positional[str]
    """Cohort file or tree of cases."""
    out: str = "predictions"
    """Folder or URI for <case_id>.nii.gz."""
    fold: int | None = None
    """Only the cases of this fold."""
    tracking_uri: str = ""
    """MLflow server; empty: MLFLOW_TRACKING_URI, else runs/mlflow.db."""


@dataclass(frozen=True)
class Evaluate:
    """Score predictions against references, case by case and region by region."""

    predictions: Positional[str]
    """Folder or URI of label files named by case id, or a cohort."""
    references: Positional[str]
    edition: str | None = None
    """Label convention of the files: 2020, 2021, 2023 or msd; else told from the data."""


@dataclass(frozen=True)
class Report:
    """Write one HTML page: curves of a run, scores and overlays of its predictions."""

    predictions: Positional[str]
    cohort: Positional[str]
    run: str = ""
    """MLflow run whose curves are shown; empty: that of the predictions' model."""
    out: str = "report.html"
    tracking_uri: str = ""
    """MLflow server; empty: MLFLOW_TRACKING_URI, else runs/mlflow.db."""


@dataclass(frozen=True)
class Models:
    """List the versions of a registered model."""

    name: Positional[str] = "raybrats"
    tracking_uri: str = ""
    """MLflow server; empty: MLFLOW_TRACKING_URI, else runs/mlflow.db."""


@dataclass(frozen=True)
class Demo:
    """Run the whole line on phantoms: index, train, register, predict, evaluate, report."""

    out: str = "demo"


def config_of(verb: str, args: Sequence[str]) -> TrainConfig:
    """The recipe named first, with the fields that follow changed."""
    if not args or (args[0].startswith("-") and args[0] not in ("-h", "--help")):
        raise UsageError(f"raybrats {verb} RECIPE [--field value]; recipes: {', '.join(RECIPES)}")
    if not args[0].startswith("-"):
        recipe(args[0])
    choices = {name: ((make.__doc__ or "").strip(), make()) for name, make in RECIPES.items()}
    prog = f"raybrats {verb}"
    return _told(lambda: tyro.extras.overridable_config_cli(choices, prog=prog, args=args))


def parse(kind: type[T], verb: str, args: Sequence[str]) -> T:
    """The options of a verb.

    Raises:
        UsageError: an option is unknown, missing or does not fit.
    """
    return _told(lambda: tyro.cli(kind, prog=f"raybrats {verb}", args=args))


def parse_known(kind: type[T], verb: str, args: Sequence[str]) -> tuple[T, list[str]]:
    """The options of a verb, and the words that are not among them."""
    if {"-h", "--help"} & set(args):
        return parse(kind, verb, ["--help"]), []
    return _told(
        lambda: tyro.cli(kind, prog=f"raybrats {verb}", args=args, return_unknown_args=True)
    )


def _told(parse: Callable[[], T]) -> T:
    """What the parser returns; its complaint, a box of several lines, as one line."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return parse()
    except SystemExit as end:
        if end.code in (0, None):
            raise
        raise UsageError(_one_line(said.getvalue())) from None


def _one_line(box: str) -> str:
    """What a boxed complaint says, without its frame, its title and its pointers to the help."""
    lines = [re.sub(r"[│╭╮╰╯─]+", " ", line).strip() for line in box.splitlines()]
    text = " ".join([line for line in lines if line][1:] or lines)
    text = re.split(r" (Argument helptext:|For full helptext)", text)[0]
    text = re.sub(r"( in)? raybrats [\w ]+--help", "", text)
    return re.sub(r"^Error parsing (__tyro-dummy-inner__\.)?\w+: (?=\w+\.\w+)", "", text)
