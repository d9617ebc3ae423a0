"""Words of the command line -> the options of each verb; complaints in one plain line."""

import io
import json
import re
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

import tyro

from raybrats.brats import Rules
from raybrats.config import TrainConfig, from_json
from raybrats.errors import UsageError
from raybrats.recipes import RECIPES, recipe

T = TypeVar("T")
Positional = tyro.conf.Positional
HELP = frozenset(("-h", "--help"))
"""Words that ask for help."""


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
    edition: str | None = None
    """Whose labels the cases have: 2020, 2021, 2023 or msd; else told by how their ids begin."""


@dataclass(frozen=True)
class Tune:
    """Search over fields of a recipe."""

    trials: int = 8
    space: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """FIELD=KIND(...), once a field; KIND is uniform, loguniform, quniform, randint or choice."""


@dataclass(frozen=True)
class Segment:
    """Segment one patient, whose files may have any names."""

    model: Positional[str]
    """models:/NAME@ALIAS, models:/NAME/VERSION, a checkpoint, or a run (its best checkpoint)."""
    flair: str | None = None
    """FLAIR volume, .nii or .nii.gz: a local path or an s3:// URI, as the others."""
    t1: str | None = None
    t1ce: str | None = None
    """T1 volume with contrast medium."""
    t2: str | None = None
    out: str = "segmentation.nii.gz"
    """Label file, .nii or .nii.gz, in the grid of the first volume; glioma: 1 NCR, 2 ED, 3 ET."""
    resample: bool = False
    """Whether volumes on other grids are resampled onto that of the first."""
    network: str = ""
    """my.module:function, if that is the network of a checkpoint; no other code of it is run."""
    tracking_uri: str = ""
    """MLflow server; empty: MLFLOW_TRACKING_URI, else runs/mlflow.db."""


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
    rules: Rules | None = None
    """Whose rules; else those of the years of the references."""
    edition: str | None = None
    """Whose labels the files have: 2020, 2021, 2023 or msd; else a cohort's, or told by the ids."""
    fold: int | None = None
    """Only the cases of this fold of the references, which are a cohort file or a tree then."""
    out: str = ""
    """Where the scores are written, too: a path or URI in .json, .csv or .parquet."""


@dataclass(frozen=True)
class Compare:
    """Rank two or more models by their predictions of the same cases."""

    places: Positional[list[str]]
    """Folders or URIs of predictions, two or more, then the references: a cohort, tree or folder.
    """
    rules: Rules | None = None
    """Whose rules score and rank; else those of the years of the references."""
    edition: str | None = None
    """Whose labels the files have: 2020, 2021, 2023 or msd; else a cohort's, or told by the ids."""
    fold: int | None = None
    """Only the cases of this fold of the references, which are a cohort file or a tree then."""
    permutations: int = 10_000
    """Random exchanges behind each p-value; the challenge takes 500,000."""


@dataclass(frozen=True)
class Report:
    """Write one HTML page: curves of a run, scores and slices of its predictions."""

    predictions: Positional[str]
    cohort: Positional[str]
    run: str = ""
    """MLflow run whose curves are shown; empty: that of the predictions' model."""
    out: str = "report.html"
    against: str = ""
    """Folder or URI of another model's predictions, which are set beside these."""
    case: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """Id of a case that is shown in any event; once a case."""
    rules: str | None = None
    """brats2020, brats2023 or brats2026; else those of the references' years."""
    viewer: bool = False
    """Whether the page holds NiiVue, a viewer in three dimensions: 1.1 MB more."""
    tracking_uri: str = ""
    """MLflow server; empty: MLFLOW_TRACKING_URI, else runs/mlflow.db."""


@dataclass(frozen=True)
class Models:
    """List the versions of a registered model."""

    name: Positional[str] = "raybrats"
    tracking_uri: str = ""
    """MLflow server; empty: MLFLOW_TRACKING_URI, else runs/mlflow.db."""


@dataclass(frozen=True)
class ImportNnunet:
    """Register a trained fold of nnU-Net."""

    checkpoint: Positional[str]
    """Its checkpoint_final.pth: a path or an s3:// URI, as the others."""
    plans: Positional[str]
    """Its plans.json."""
    dataset: Positional[str]
    """Its dataset.json."""
    model: str = "raybrats"
    """Name of the registered model."""
    tracking_uri: str = ""
    """MLflow server; empty: MLFLOW_TRACKING_URI, else runs/mlflow.db."""


@dataclass(frozen=True)
class Demo:
    """Run the whole line on phantoms: index, train, register, predict, evaluate, report."""

    out: str = "demo"


def config_of(verb: str, args: Sequence[str]) -> TrainConfig:
    """The recipe named first, or the run of `--config FILE`, with the fields that follow changed.

    Raises:
        UsageError: there is no such recipe, the file is none of a run, or an option does not fit.
        StorageError: the file is missing or out of reach.

    Example:
        >>> config_of("train", ["tiny", "--optim.steps", "20"]).optim.steps
        20
    """
    prog, (uri, args) = f"raybrats {verb}", _config_option(args)
    if uri:
        if args and not args[0].startswith("-"):
            raise UsageError(f"{prog}: the recipe {args[0]!r} or --config, not both")
        config = read_config(uri)
        return _parsed(lambda: tyro.cli(TrainConfig, default=config, prog=prog, args=args))
    if not args or (args[0].startswith("-") and args[0] not in HELP):
        names = ", ".join(RECIPES)
        raise UsageError(f"{prog} RECIPE [--field value], or --config FILE; recipes: {names}")
    if args[0] not in RECIPES and not args[0].startswith("-"):
        config = recipe(args[0])
        return _parsed(lambda: tyro.cli(TrainConfig, default=config, prog=prog, args=args[1:]))
    choices = {
        name: ((make.__doc__ or "").splitlines()[0], make()) for name, make in RECIPES.items()
    }
    text = "A recipe, or --config FILE with the config.json of a run, a checkpoint or MLflow."
    return _parsed(
        lambda: tyro.extras.overridable_config_cli(choices, prog=prog, description=text, args=args)
    )


def _config_option(args: Sequence[str]) -> tuple[str, list[str]]:
    """The value of --config, empty if there is none, and the other words."""
    words = [
        part for arg in args for part in (arg.split("=", 1) if arg[:9] == "--config=" else [arg])
    ]
    if "--config" not in words:
        return "", words
    place = words.index("--config")
    if not words[place + 1 : place + 2]:
        raise UsageError("--config: expected a file")
    return words[place + 1], words[:place] + words[place + 2 :]


def read_config(uri: str) -> TrainConfig:
    """The run in a file: the config.json of a checkpoint or of MLflow, or the run.json of a run.

    Raises:
        UsageError: the file is neither.
        StorageError: it is missing or out of reach.

    Example:
        >>> from raybrats import recipes, storage
        >>> from raybrats.config import to_json
        >>> storage.write_bytes("config.json", to_json(recipes.tiny()).encode())
        >>> read_config("config.json").recipe
        'tiny'
    """
    from raybrats import storage  # not for help and typos

    text = storage.read_bytes(uri).decode(errors="replace")
    try:
        tree = json.loads(text)
        is_record = isinstance(tree, dict) and "mlflow_run_id" in tree and "config" in tree
        return from_json(json.dumps(tree["config"]) if is_record else text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--config {uri}: not the configuration of a run ({error})") from None


def show_tune_help(args: Sequence[str]) -> None:
    """Writes the options of a search, the recipes, and the fields of the one that is named.

    Example:
        >>> show_tune_help(["tiny", "--help"])  # doctest: +SKIP
    """
    words = [word for word in args[:1] if not word.startswith("-")]
    helps: list[Callable[[], object]] = [
        lambda: parse(Tune, "tune RECIPE", ["--help"]),
        lambda: config_of("tune", [*words, "--help"]),
    ]
    if not words:
        prog = "raybrats tune RECIPE"
        helps.append(lambda: tyro.cli(TrainConfig, prog=prog, args=["--help"]))
    for write in helps:
        with suppress(SystemExit):
            write()


def parse(kind: type[T], verb: str, args: Sequence[str]) -> T:
    """The options of a verb.

    Raises:
        UsageError: an option is unknown, missing or does not fit.

    Example:
        >>> parse(Predict, "predict", ["models:/raybrats@champion", "cohort.parquet"]).out
        'predictions'
    """
    return _parsed(lambda: tyro.cli(kind, prog=f"raybrats {verb}", args=args))


def parse_known(kind: type[T], verb: str, args: Sequence[str]) -> tuple[T, list[str]]:
    """The options of a verb, and the words that are not among them.

    Raises:
        UsageError: an option does not fit.

    Example:
        >>> parse_known(Tune, "tune", ["tiny", "--trials", "4"])
        (Tune(trials=4, space=[]), ['tiny'])
    """
    return _parsed(
        lambda: tyro.cli(kind, prog=f"raybrats {verb}", args=args, return_unknown_args=True)
    )


def _parsed(parse: Callable[[], T]) -> T:
    """What the parser returns; its complaint, a box of several lines, as one line."""
    complaint = io.StringIO()
    try:
        with redirect_stderr(complaint):
            return parse()
    except SystemExit as end:
        if end.code in (0, None):
            raise
        raise UsageError(_one_line(complaint.getvalue())) from None


def _one_line(box: str) -> str:
    """The words of a boxed complaint, without its frame, its title and its pointers to the help."""
    lines = [re.sub(r"[│╭╮╰╯─]+", " ", line).strip() for line in box.splitlines()]
    text = " ".join([line for line in lines if line][1:] or lines)
    text = re.split(r" (Argument helptext:|For full helptext)", text)[0]
    text = re.sub(r"( in)? raybrats [\w ]+--help", "", text)
    return re.sub(r"^Error parsing (__tyro-dummy-inner__\.)?\w+: (?=\w+\.\w+)", "", text)
