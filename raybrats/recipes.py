"""Named runs as functions; their docstrings are promises that a test or a benchmark keeps."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from types import MappingProxyType

from raybrats.config import (
    AugmentConfig,
    ClusterConfig,
    DataConfig,
    LossConfig,
    NetworkConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    ValidationConfig,
    override_all,
)
from raybrats.errors import UsageError


def tiny() -> TrainConfig:
    """Phantoms of 64x64x48 on two CPU cores: a few minutes, held-out mean Dice above 0.6.

    Example:
        >>> tiny().data.patch_size, tiny().optim.steps
        ((32, 32, 32), 150)
    """
    return TrainConfig(
        recipe="tiny",
        data=DataConfig(patch_size=(32, 32, 32), foreground_share=0.5),
        augment=AugmentConfig(
            noise=0.05, rotation=0.0, scale=0.0, blur=0.0, low_resolution=0.0, inverted_gamma=0.0
        ),
        network=NetworkConfig(widths=(8, 16, 32, 64)),
        optim=OptimConfig(lr=1e-2, steps=150, global_batch=4),
        validation=ValidationConfig(every_steps=75, overlap=0.25),
        cluster=ClusterConfig(workers=2, device="cpu", cpus_per_worker=0.5),
        run=RunConfig(seed=1),
    )


def crop128() -> TrainConfig:
    """128^3 crops, z-score, Dice + cross-entropy, AdamW in bf16: 100,000 steps of two patches.

    Example:
        >>> crop128().data.patch_size, crop128().optim.name, crop128().optim.precision
        ((128, 128, 128), 'adamw', 'bf16')
    """
    return TrainConfig(
        recipe="crop128",
        network=NetworkConfig(widths=(32, 64, 128, 256, 320), deep_supervision=2),
        optim=OptimConfig(lr=3e-4, weight_decay=1e-5, precision="bf16", steps=100_000),
    )


def nnunet() -> TrainConfig:
    """nnU-Net's default for BraTS: 1000 epochs of 250 steps, SGD, regions, deep supervision.

    Example:
        >>> nnunet().optim.name, nnunet().optim.steps, nnunet().network.deep_supervision
        ('sgd', 250000, 4)
    """
    return TrainConfig(
        recipe="nnunet",
        network=NetworkConfig(widths=(32, 64, 128, 256, 320, 320), deep_supervision=4),
        loss=LossConfig(batch_dice=True),
        optim=OptimConfig(name="sgd", lr=1e-2, weight_decay=3e-5, precision="bf16", steps=250_000),
    )


RECIPES: MappingProxyType[str, Callable[[], TrainConfig]] = MappingProxyType(
    {make.__name__: make for make in (tiny, crop128, nnunet)}
)


def recipe(name: str, changes: Mapping[str, object] | None = None) -> TrainConfig:
    """The run of this name, with the fields at dotted paths changed.

    Raises:
        UsageError: there is no such recipe or field (the nearest name is suggested), or a value
            does not fit.

    Example:
        >>> config = recipe("crop128", {"data.cohort": "cohort.parquet", "optim.global_batch": 4})
        >>> config.recipe, config.data.cohort, config.optim.global_batch
        ('crop128', 'cohort.parquet', 4)
    """
    if name not in RECIPES:
        near = get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"no recipe {name!r}; {hint}there are {', '.join(RECIPES)}")
    return override_all(RECIPES[name](), changes) if changes else RECIPES[name]()


def named(config: TrainConfig, stamp: str) -> TrainConfig:
    """The same run with a name: the recipe and a time stamp, where the user gave none.

    Example:
        >>> named(tiny(), "20260101-120000").run.name
        'tiny-20260101-120000'
    """
    name = config.run.name or f"{config.recipe}-{stamp}"
    return replace(config, run=replace(config.run, name=name))
