"""One MLflow run over all restarts: its parameters, its state, its curves."""

import logging
import os
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Param

from raybrats import storage
from raybrats.config import RunConfig, TrainConfig, to_json
from raybrats.errors import TrackingError, UsageError
from raybrats.registry.server import check_reachable, tracking_errors

_LOGGED_SECTIONS = ("data", "augment", "network", "loss", "optim", "validation", "cluster")
"""Sections of the configuration whose fields become parameters."""

_DEFAULT = threading.Lock()
"""Held by whoever has made a server MLflow's default one."""

_CREDENTIALS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
"""Variables from which MLflow's client takes whom it is to be."""


def credentials() -> dict[str, str]:
    """The variables of this process that say who it is at an MLflow server.

    Example:
        >>> credentials()  # where none is set
        {}
    """
    return {name: os.environ[name] for name in _CREDENTIALS if name in os.environ}


@dataclass(frozen=True)
class Run:
    """An MLflow run, as it is handed to workers: by pickle, and stored nowhere."""

    uri: str = field(repr=False)
    """Tracking URI of its server; of the environment, it may hold credentials."""
    run_id: str
    """Id at that server; empty if there was no server when the run began."""
    variables: Mapping[str, str] = field(default_factory=credentials, repr=False, compare=False)
    """`credentials` of the process that made it."""

    def enter(self) -> None:
        """Makes this process, a worker's, who the driver is at the server.

        Example:
            >>> Run("http://mlflow:5000", run_id="").enter()
        """
        os.environ.update(self.variables)


@dataclass(frozen=True)
class Curve:
    """The values of one metric of a run."""

    steps: tuple[int, ...]
    values: tuple[float, ...]


def tracking_uri(config: TrainConfig) -> str:
    """Tracking URI of a run: its own setting, else the default beside its storage.

    The folder of an SQLite file is made if there is none.

    Raises:
        UsageError: none is set, and the runs are not on a local path.

    Example:
        >>> from raybrats.config import TrackingConfig
        >>> tracking_uri(TrainConfig(tracking=TrackingConfig(uri="http://mlflow:5000")))
        'http://mlflow:5000'
    """
    uri = config.tracking.uri or default_uri(config.run.storage_uri)
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    return uri


def default_uri(storage_uri: str = RunConfig().storage_uri) -> str:
    """Tracking URI in MLFLOW_TRACKING_URI, else that of SQLite in the folder of local runs.

    Raises:
        UsageError: the variable is not set, and the runs are not on a local path.

    Example:
        >>> default_uri("runs")  # where the variable is not set
        'sqlite:///.../runs/mlflow.db'
    """
    if uri := os.environ.get("MLFLOW_TRACKING_URI", ""):
        return uri
    if storage.is_remote(storage_uri):
        raise UsageError("no MLflow server: set tracking.uri or MLFLOW_TRACKING_URI")
    return f"sqlite:///{storage.absolute(storage_uri)}/mlflow.db"


def start(
    config: TrainConfig, *, parent: Run | None = None, tags: Mapping[str, str] | None = None
) -> Run:
    """A new run with the parameters of the configuration, below `parent` in a sweep.

    Raises:
        TrackingError: the server is out of reach.

    Example:
        >>> run = start(tiny(), tags={"note": "first"})  # doctest: +SKIP
        >>> run.uri  # doctest: +SKIP
        'sqlite:////home/me/runs/mlflow.db'
    """
    uri = parent.uri if parent is not None else tracking_uri(config)
    check_reachable(uri, create=True)
    with tracking_errors(uri):
        client = MlflowClient(uri)
        labels = {"raybrats.recipe": config.recipe, **(tags or {})}
        if parent is not None:
            labels["mlflow.parentRunId"] = parent.run_id
        experiment = _experiment_id(client, config)
        run_id = client.create_run(experiment, tags=labels, run_name=config.run.name).info.run_id
        client.log_batch(run_id, params=[Param(*row) for row in parameters(config).items()])
        client.log_text(run_id, to_json(config), "config.json")
    return Run(uri, run_id)


def finish(run: Run, status: str = "FINISHED") -> None:
    """Closes the run with a status: FINISHED, FAILED or KILLED.

    Raises:
        TrackingError: the server is out of reach or does not know the run.

    Example:
        >>> finish(run, "KILLED")  # doctest: +SKIP
    """
    with tracking_errors(run.uri):
        MlflowClient(run.uri).set_terminated(run.run_id, status)


def resume(run: Run) -> None:
    """Opens the run again after a restart.

    Raises:
        TrackingError: the server is out of reach or does not know the run.

    Example:
        >>> resume(Run("http://mlflow:5000", run_id))  # doctest: +SKIP
    """
    check_reachable(run.uri)
    with tracking_errors(run.uri):
        MlflowClient(run.uri).update_run(run.run_id, "RUNNING")


def curves(run: Run) -> dict[str, Curve]:
    """Every metric of a run over its steps; of two values at one step the later one counts.

    Raises:
        TrackingError: the server is out of reach or does not know the run.

    Example:
        >>> curves(run)["val/dice_mean"]  # doctest: +SKIP
        Curve(steps=(50, 100, 150), values=(0.41, 0.77, 0.83))
    """
    check_reachable(run.uri)
    with tracking_errors(run.uri):
        client = MlflowClient(run.uri)
        names = client.get_run(run.run_id).data.metrics
        histories = {name: client.get_metric_history(run.run_id, name) for name in names}
    found = {}
    for name, history in histories.items():
        points = {m.step: m.value for m in sorted(history, key=lambda m: m.timestamp)}
        found[name] = Curve(tuple(sorted(points)), tuple(points[s] for s in sorted(points)))
    return found


def logged_parameters(run: Run) -> dict[str, str]:
    """Parameters of a run, as they were logged.

    Raises:
        TrackingError: the server is out of reach or does not know the run.

    Example:
        >>> logged_parameters(run)["optim.steps"]  # doctest: +SKIP
        '150'
    """
    check_reachable(run.uri)
    with tracking_errors(run.uri):
        return dict(MlflowClient(run.uri).get_run(run.run_id).data.params)


def log_report(run: Run, model: str, name: str, html: str) -> None:
    """Keeps a report with its run, and says on the model's version where it is.

    A server that does not take it is a warning: the report lies where it was written.

    Args:
        run: the run whose artifact it becomes.
        model: `models:/name/version` that it is about.
        name: file name of the report.
        html: the report.

    Example:
        >>> log_report(run, "models:/raybrats/3", "report.html", html)  # doctest: +SKIP
    """
    place = f"reports/{name}"
    model_name, _, version = model.removeprefix("models:/").partition("/")
    try:
        check_reachable(run.uri)
        with tracking_errors(run.uri):
            client = MlflowClient(run.uri, run.uri)
            client.log_text(run.run_id, html, place)
            client.set_model_version_tag(
                model_name, version, "report", f"runs:/{run.run_id}/{place}"
            )
    except (TrackingError, OSError) as error:  # OSError: the artifacts are a folder
        logging.getLogger(__name__).warning("the report is not in MLflow: %s", error)


def parameters(config: TrainConfig) -> dict[str, str]:
    """Value of each dotted field, but for the sections that tell of places and people.

    Example:
        >>> parameters(TrainConfig(recipe="tiny"))["recipe"]
        'tiny'
    """
    rows = {"recipe": config.recipe, "run.seed": str(config.run.seed)}
    for section, values in asdict(config).items():
        if section in _LOGGED_SECTIONS:
            rows |= {f"{section}.{name}": str(v) for name, v in values.items()}
    return rows


def _experiment_id(client: MlflowClient, config: TrainConfig) -> str:
    """Id of the experiment that the configuration names, created if there is none."""
    name = config.tracking.experiment
    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    location = None
    if client.tracking_uri.startswith("sqlite:"):  # without a server, artifacts go beside the runs
        location = storage.join(storage.absolute(config.run.storage_uri), "mlartifacts")
        if not storage.is_remote(location):  # models lie in it, as weights do in checkpoints
            Path(location).mkdir(mode=0o770, parents=True, exist_ok=True)
    return client.create_experiment(name, artifact_location=location)


@contextmanager
def default_server(uri: str) -> Generator[None]:
    """Sends MLflow's fluent calls to this server, and leaves what the user has set as it was.

    MLflow also writes the URI into the environment, where later runs would take it for the user's.
    It keeps one URI for all threads, so they wait for each other here.

    Example:
        >>> with default_server("http://mlflow:5000"):  # doctest: +SKIP
        ...     model = mlflow.pyfunc.load_model("models:/raybrats@champion")
    """
    names = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
    with _DEFAULT:
        before = {name: os.environ.get(name) for name in names}
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
        try:
            yield
        finally:
            # None: the environment counts, where what the user has set stands as well.
            mlflow.set_tracking_uri(None)  # ty: ignore[invalid-argument-type]
            mlflow.set_registry_uri(None)  # ty: ignore[invalid-argument-type]
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
