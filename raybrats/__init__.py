"""3-D U-Nets for brain-tumour MRI, trained, tuned, registered and applied on Ray.

    import raybrats as rb

    config = rb.recipe("crop128", {"data.cohort": "s3://bucket/cohort.parquet"})
    result = rb.train(config)
    rb.load(result.run_uri).segment("s3://bucket/BraTS2021_00000").save("labels.nii.gz")

Importing this costs nothing: torch and Ray are imported by the calls that need them. Results print
as short tables. Warnings go to the loggers below "raybrats"; progress is shown on a terminal, and
elsewhere where `raybrats.progress.ask_for_lines` asked for it.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, TypedDict, Unpack

if TYPE_CHECKING:
    from ray.tune.search.sample import Domain

    from raybrats.config import TrainConfig
    from raybrats.data.cohort.cohort import Cohort
    from raybrats.predict.compare import Comparison
    from raybrats.predict.evaluate import Evaluation
    from raybrats.predict.predict import Predicted
    from raybrats.predict.segment import Segmenter
    from raybrats.runs.run import Result
    from raybrats.runs.sweep import Sweep

__version__ = "0.1.0"
__all__ = [
    *("compare", "evaluate", "index", "load", "predict", "recipe", "report", "train", "tune"),
]


def recipe(name: str, changes: Mapping[str, object] | None = None) -> "TrainConfig":
    """A run by the name of its recipe, with the fields at dotted paths changed.

    Args:
        name: as `raybrats.recipes.RECIPES` has them: tiny, nnunet, crop128, ...
        changes: dotted field -> value, as on the command line.

    Raises:
        UsageError: there is no such recipe or field (the nearest name is suggested), or a value
            does not fit.

    Example:
        >>> recipe("tiny", {"data.cohort": "cohort.parquet", "optim.steps": 20}).optim.steps
        20
    """
    from raybrats.recipes import recipe

    return recipe(name, changes)


def index(tree: str, out: str | None = None, edition: str | None = None) -> "Cohort":
    """Every case of a tree, found, opened and verified on the cluster.

    Args:
        tree: local path or URI below which cases lie.
        out: cohort file (.parquet) that is written; none where not given.
        edition: whose labels the cases have (2020, 2021, 2023, msd), where their ids do not begin
            as those of an edition or where the labels were mapped.

    Raises:
        DataError: there is no case, or none that is not bad.
        UsageError: there is no such edition, or a URI is none.
        StorageError: the tree is out of reach.

    Example:
        >>> cohort = index("s3://bucket/BraTS2021", "s3://bucket/cohort.parquet")  # doctest: +SKIP
        >>> print(cohort)  # doctest: +SKIP
    """
    from raybrats.data.cohort.cohort import index

    return index(tree, out, edition)


def train(config: "TrainConfig") -> "Result":
    """A network trained, tracked and registered; the same `run.name` goes on where it stopped.

    Works from a thread and in a notebook, too.

    Raises:
        RaybratsError: a kind for each cause, before any worker starts where that is possible.

    Example:
        >>> result = train(recipe("tiny", {"data.cohort": "cohort.parquet"}))  # doctest: +SKIP
        >>> print(result)  # doctest: +SKIP
    """
    from raybrats.runs.run import train

    return train(config)


def tune(
    config: "TrainConfig", space: "Mapping[str, Domain] | Sequence[str]", trials: int = 8
) -> "Sweep":
    """A search over fields of a run, with early stopping; the best network is registered.

    Args:
        config: what all trials share.
        space: dotted field -> domain of Ray Tune, or words of the command line.
        trials: how many.

    Raises:
        UsageError: a field or a value that does not fit.
        RaybratsError: a kind for each other cause.

    Example:
        >>> words = ["loss.dice_weight=uniform(0.2, 0.8)"]
        >>> print(tune(recipe("tiny"), words, trials=4))  # doctest: +SKIP
    """
    from raybrats.runs.sweep import search

    return search(config, space, trials)


def load(uri: str, tracking_uri: str = "", network: str = "") -> "Segmenter":
    """A model that segments one case at a time, without Ray.

    Args:
        uri: `models:/name@alias`, `models:/name/version`, a checkpoint, or a run (its best one).
        tracking_uri: MLflow server of a `models:/`; MLFLOW_TRACKING_URI, else runs/mlflow.db,
            where not given.
        network: `my.module:function`, if that is the network of a checkpoint: what a file names is
            imported for no other reason.

    Raises:
        UsageError, TrackingError, CheckpointError, StorageError: there is no such model, or it is
            out of reach.

    Example:
        >>> model = load("models:/raybrats@champion")  # doctest: +SKIP
        >>> found = model.segment(["flair.nii.gz", "t1.nii.gz", "t1ce.nii.gz", "t2.nii.gz"])
        ... # doctest: +SKIP
        >>> found.save("labels.nii.gz")  # doctest: +SKIP
    """
    from raybrats.predict.segment import load

    return load(uri, tracking_uri, network)


def predict(
    model_uri: str, cohort: str, out: str, *, fold: int | None = None, tracking_uri: str = ""
) -> "Predicted":
    """A label file for every case of a cohort, by a registered model, on the cluster.

    Args:
        model_uri: `models:/name@alias` or `models:/name/version`.
        cohort: cohort file or tree of cases; only those of `fold` where one is given.
        out: folder or URI for `<case_id>.nii.gz`; run again, it goes on where it stopped.
        fold: cross-validation fold.
        tracking_uri: MLflow server; MLFLOW_TRACKING_URI, else runs/mlflow.db, where not given.

    Raises:
        TrackingError: there is no such model.
        UsageError: the folder holds predictions of another model.
        DataError: there is no case.

    Example:
        >>> predict("models:/raybrats@champion", "cohort.parquet", "out")  # doctest: +SKIP
    """
    from raybrats.predict.predict import predict

    return predict(model_uri, cohort, out, fold=fold, tracking_uri=tracking_uri or None)


def evaluate(
    predictions: str,
    references: str,
    edition: str | None = None,
    *,
    rules: str | None = None,
    fold: int | None = None,
) -> "Evaluation":
    """Scores of every prediction against the reference of the same case id.

    Args:
        predictions: folder or URI of label files named by case id, or a cohort.
        references: the same.
        edition: label convention of the files (2020, 2021, 2023, msd); else that of a cohort, or
            of the edition that their ids begin with.
        rules: brats2020, brats2023 or brats2026; else those of the references' years.
        fold: cross-validation fold; else all cases.

    Raises:
        DataError: no prediction has a reference, a prediction has none, or nothing tells what the
            label values mean.
        UsageError: there are no such rules or no such fold, or the years have several rules.

    Example:
        >>> print(evaluate("out", "cohort.parquet"))  # doctest: +SKIP
    """
    from raybrats.predict.evaluate import evaluate

    return evaluate(predictions, references, edition, rules=rules, fold=fold)


def compare(
    predictions: Sequence[str],
    references: str,
    edition: str | None = None,
    *,
    rules: str | None = None,
    fold: int | None = None,
    permutations: int = 10_000,
) -> "Comparison":
    """A ranking of several models on the cases that all of them have predicted.

    Args:
        predictions: their folders or URIs, two or more.
        references: as for `evaluate`, as are the next three.
        edition: label convention of the files.
        rules: by which the cases are scored and the models ranked.
        fold: cross-validation fold.
        permutations: random exchanges behind each p-value.

    Raises:
        DataError: no case has been predicted by all, or as for `evaluate`.
        UsageError: there are less than two, one is given twice, or as for `evaluate`.

    Example:
        >>> print(compare(["ours", "theirs"], "cohort.parquet"))  # doctest: +SKIP
    """
    from raybrats.predict.compare import compare

    return compare(
        predictions, references, edition, rules=rules, fold=fold, permutations=permutations
    )


class ReportOptions(TypedDict, total=False):
    """What a report shows beside the scores and some cases; each may be left out."""

    run: str
    """MLflow run whose curves are shown; that of the predictions' model where not given."""
    tracking_uri: str
    """MLflow server; MLFLOW_TRACKING_URI, else runs/mlflow.db, where not given."""
    cases: Sequence[str]
    """Ids of cases that are shown in any event."""
    against: str
    """Folder or URI of another model's predictions, which are set beside these."""
    rules: str | None
    """brats2020, brats2023 or brats2026; those of the references' years where not given."""
    viewer: bool
    """Whether the page holds NiiVue, a viewer in three dimensions."""


def report(
    predictions: str,
    cohort: str,
    out: str = "report.html",
    **options: Unpack[ReportOptions],
) -> str:
    """One HTML page with curves, scores and slices; returns where it lies.

    It is also logged to MLflow, with the run of the predictions' model.

    Args:
        predictions: folder or URI that `predict` wrote.
        cohort: the cases that it read.
        out: the page.
        options: as in `ReportOptions`.

    Raises:
        DataError: the folder holds no predictions of these cases.
        UsageError: a case that is to be shown has no prediction.

    Example:
        >>> report("out", "cohort.parquet", cases=["BraTS20_Training_003"])  # doctest: +SKIP
    """
    from raybrats.predict.report import Options, write_report

    return write_report(predictions, cohort, out, Options(**options))


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


class _Package(ModuleType):
    """This module. `train` and `predict` stay the functions when the folders of that name load.

    Python binds a folder to its package once it is imported, so `rb.train` would be a function at
    first and a module later. The folders are reached by `from raybrats.train import checkpoint`.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if name not in __all__ or not isinstance(value, ModuleType):
            super().__setattr__(name, value)

    def __reduce__(self) -> tuple[Callable[[str], ModuleType], tuple[str]]:
        return import_module, (__name__,)  # for functions of a notebook that Ray sends elsewhere


sys.modules[__name__].__class__ = _Package
