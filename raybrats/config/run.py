"""A run as a value: all its sections, a JSON round trip, overrides and a digest."""

import hashlib
import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from typing import Any

from raybrats.config.augment import AugmentConfig
from raybrats.config.data import DataConfig
from raybrats.config.network import LOSSES, NETWORKS, LossConfig, NetworkConfig
from raybrats.config.place import ClusterConfig, RunConfig, TrackingConfig
from raybrats.config.prediction import PredictionConfig
from raybrats.config.section import Section, require
from raybrats.config.training import OptimConfig, ValidationConfig
from raybrats.errors import UsageError
from raybrats.label_set import LabelSet, label_set_of


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """Everything that decides a run."""

    recipe: str = "custom"
    """Name of the recipe that it was made from."""
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    prediction: PredictionConfig = field(default_factory=PredictionConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    run: RunConfig = field(default_factory=RunConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        stride, patch = self.network.stride, self.data.patch_size
        rule = f"multiples of {stride} (network.widths has {len(self.network.widths)} stages)"
        edges = patch[: self.spatial_dims]
        require(all(n % stride == 0 for n in edges), "data.patch_size", rule, patch)
        cuts, regions = self.prediction.threshold, self.loss.target == "regions"
        rule = "none with loss.target labels, where the most probable label is taken"
        require(regions or not cuts, "prediction.threshold", rule, cuts)
        self.prediction.check_regions(len(self.labels.regions))
        batch, workers = self.optim.global_batch, self.cluster.workers
        if self.cluster.min_workers:  # shares differ by a patch at most, and are weighted
            require(
                batch >= workers, "optim.global_batch", f">= cluster.workers ({workers})", batch
            )
        else:
            rule = f"a multiple of cluster.workers ({workers})"
            require(batch % workers == 0, "optim.global_batch", rule, batch)

    @property
    def labels(self) -> LabelSet:
        """What the network tells apart: glioma where nothing else is said."""
        return label_set_of(self.data.labels)

    @property
    def classes(self) -> tuple[tuple[int, ...], ...]:
        """Labels of each class that the network tells apart: the regions', or each label's own."""
        known = self.labels
        if self.loss.target == "regions":
            return tuple(region.labels for region in known.regions)
        return tuple((label,) for label in range(1, len(known.names) + 1))

    @property
    def of_others(self) -> bool:
        """Whether its network or its loss is not raybrats' own."""
        return self.network.name not in NETWORKS.own or self.loss.name not in LOSSES.own

    @property
    def spatial_dims(self) -> int:
        """Axes along which the network convolves: 2 for slices, else 3."""
        return 2 if self.data.sampling == "slices" else 3


def to_json(config: TrainConfig) -> str:
    """The run as indented JSON.

    Example:
        >>> from raybrats.recipes import tiny
        >>> from_json(to_json(tiny())) == tiny()
        True
    """
    return json.dumps(asdict(config), indent=1)


def from_json(text: str | bytes) -> TrainConfig:
    """The run that `to_json` wrote; fields that it lacks have their defaults.

    Before there was a prediction section, validation had its overlap and `mirror: true`.

    Raises:
        UsageError: a key is unknown or a value does not fit.

    Example:
        >>> from_json('{"recipe": "mine", "optim": {"steps": 100}}').optim.steps
        100
    """
    from pydantic import TypeAdapter

    with _named_by_field():
        return TypeAdapter(TrainConfig).validate_json(_current(text))


def _current(text: str | bytes) -> str | bytes:
    """The JSON with what was validation's and is the prediction's now, where it is to be read."""
    try:
        tree = json.loads(text)
        old = tree["validation"]
        if "prediction" in tree or not {"overlap", "mirror"} & set(old):
            return text
        moved = {"overlap": old.pop("overlap")} if "overlap" in old else {}
        moved |= {"mirror": [0, 1, 2]} if old.pop("mirror", False) else {}
        return json.dumps({**tree, "prediction": moved})
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return text  # no run, about which pydantic has the words


def digest(config: TrainConfig) -> str:
    """The sha256 of what decides the weights and how they are scored; places and workers do not.

    Example:
        >>> from raybrats.recipes import tiny
        >>> digest(tiny()) == digest(override(tiny(), "cluster.workers", 1))
        True
    """
    return hashlib.sha256(json.dumps(deciding(asdict(config)), sort_keys=True).encode()).hexdigest()


def deciding(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a run, as nested dicts, that decides the weights and how they are scored.

    Example:
        >>> sorted(deciding(asdict(TrainConfig())))
        ['augment', 'data', 'loss', 'network', 'optim', 'prediction', 'run', 'validation']
    """
    ignored = ("recipe", "run", "cluster", "tracking")
    places = ("cpus_per_task", "prefetch_batches", "cache_dir", "cache_gb")
    kept = {name: section for name, section in tree.items() if name not in ignored}
    kept["data"] = {name: v for name, v in tree["data"].items() if name not in places}
    run = {"seed": tree["run"]["seed"], "continue_from": tree["run"].get("continue_from", "")}
    return {**kept, "run": run}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Dotted fields that decide the weights or how they are scored, and differ.

    Example:
        >>> from raybrats.recipes import tiny
        >>> differences(asdict(tiny()), asdict(override(tiny(), "optim.steps", 300)))
        ['optim.steps']
    """
    old, new = deciding(before), deciding(now)
    return [
        f"{section}.{name}"
        for section, values in new.items()
        for name, value in values.items()
        if old.get(section, {}).get(name) != value
    ]


def override(config: TrainConfig, path: str, value: object) -> TrainConfig:
    """The same run with the field at a dotted path changed; see `override_all`.

    Example:
        >>> override(TrainConfig(), "optim.lr", 1e-3).optim.lr
        0.001
    """
    return override_all(config, {path: value})


def override_all(config: TrainConfig, changes: Mapping[str, object]) -> TrainConfig:
    """The same run with the fields at dotted paths changed, and checked together.

    Raises:
        UsageError: there is no such field (the nearest name is suggested), or the value has
            another type or breaks a rule.

    Example:
        >>> changed = override_all(TrainConfig(), {"data.fold": 3, "data.patch_size": [64, 64, 64]})
        >>> changed.data.fold, changed.data.patch_size
        (3, (64, 64, 64))
    """
    from pydantic import TypeAdapter

    tree = asdict(config)
    for path, value in changes.items():
        section: object = config
        branch = parent = tree
        for name in path.split("."):
            _require_field(section, name, path)
            section, parent, branch = getattr(section, name), branch, branch[name]
        parent[name] = value
    with _named_by_field():
        return TypeAdapter(TrainConfig).validate_python(tree)


def _require_field(section: object, name: str, path: str) -> None:
    names = [f.name for f in fields(section)] if is_dataclass(section) else []
    if name not in names:
        near = get_close_matches(name, names, n=1)
        there = f"; there are {', '.join(names)}" if names else ""
        hint = f"; did you mean {near[0]!r}?" if near else there
        raise UsageError(f"{path}: no field {name!r} in {type(section).__name__}{hint}")


@contextmanager
def _named_by_field() -> Generator[None]:
    """Turns pydantic's first complaint into one line that names the field.

    Raises:
        UsageError: there was a complaint.
    """
    from pydantic import ValidationError

    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        broken = first.get("ctx", {}).get("error")
        if isinstance(broken, UsageError):
            raise broken from None
        where = ".".join(str(part) for part in first["loc"]) or "the configuration"
        raise UsageError(f"{where}: {first['msg']}") from None
