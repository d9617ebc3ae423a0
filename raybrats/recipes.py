"""Named runs as functions; their docstrings are promises that a test or a benchmark keeps."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from raybrats.config import (
    AugmentConfig,
    ClusterConfig,
    DataConfig,
    LossConfig,
    NetworkConfig,
    OptimConfig,
    PredictionConfig,
    RunConfig,
    TrainConfig,
    ValidationConfig,
    override_all,
)
from raybrats.errors import UsageError
from raybrats.offers import Offers


def tiny() -> TrainConfig:
    """Phantoms of 64x64x48 on two CPU cores: a few minutes, held-out mean Dice above 0.6.

    One patch: 351,827 parameters, 3 GFLOP, 0.02 GB.

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
        validation=ValidationConfig(every_steps=75),
        prediction=PredictionConfig(overlap=0.25),
        cluster=ClusterConfig(workers=2, device="cpu", cpus_per_worker=0.5),
        run=RunConfig(seed=1),
    )


def residual() -> TrainConfig:
    """Residual U-Net with batch norm, Dice + focal, patches balanced between tumour and the rest.

    Source: card 000_e625f0803ea75df2 (BraTS 2020). Its patches lie on a grid; random ones, half of
    them on tumour, see more places.

    One patch: 25,897,603 parameters, 4,103 GFLOP, 4.61 GB.

    Example:
        >>> residual().network.name, residual().network.norm, residual().loss.focal_weight
        ('residual', 'batch', 1.0)
    """
    return TrainConfig(
        recipe="residual",
        data=DataConfig(foreground_share=0.5),
        network=NetworkConfig(
            name="residual", norm="batch", activation="relu", widths=(32, 64, 128, 256)
        ),
        loss=LossConfig(ce_weight=0.0, focal_weight=1.0),
        optim=OptimConfig(precision="bf16", steps=100_000),
    )


def full_volume() -> TrainConfig:
    """Whole volumes through a U-Net of four levels: softmax of four, Dice + cross-entropy, fp16.

    Source: card 001_ac89feaa8a5aebd3 (BraTS 2023), which counts five classes, where BraTS has
    three labels and the background. The box of the brain is padded to a multiple of 8, not to
    240 x 240 x 160.

    One volume of 144 x 176 x 144: 1,403,316 parameters, 1,191 GFLOP, 3.43 GB.

    Example:
        >>> full_volume().data.sampling, full_volume().network.stride
        ('volume', 8)
    """
    return TrainConfig(
        recipe="full-volume",
        data=DataConfig(sampling="volume"),
        network=NetworkConfig(norm="batch", activation="relu", widths=(16, 32, 64, 128)),
        loss=LossConfig(target="labels", background=True),
        optim=OptimConfig(weight_decay=0.0, precision="fp16", steps=50_000, global_batch=1),
    )


def crop128() -> TrainConfig:
    """128^3 crops through a max-pooling U-Net of four levels: softmax of four, Dice + entropy.

    Source: card 002_83ff5ab541372612 (BraTS 2020).

    One patch: 5,605,220 parameters, 2,707 GFLOP, 3.87 GB.

    Example:
        >>> crop128().data.patch_size, crop128().loss.target, crop128().network.pooling
        ((128, 128, 128), 'labels', 'max')
    """
    return TrainConfig(
        recipe="crop128",
        network=NetworkConfig(pooling="max", activation="relu", widths=(32, 64, 128, 256)),
        loss=LossConfig(target="labels", background=True),
        optim=OptimConfig(weight_decay=0.0, precision="bf16", steps=100_000),
    )


def three_modality() -> TrainConfig:
    """T1ce, T2 and FLAIR in 0..1, Dice + focal over a softmax of four, He's uniform weights.

    Source: card 003_195146b30e0dea9e (BraTS 2020), which leaves out T1 and the cases of whose
    cropped voxels less than 1 % have a label (344 of 369 stay).

    One patch: 5,648,772 parameters, 722 GFLOP, 2.18 GB.

    Example:
        >>> three_modality().data.modalities, three_modality().data.min_labelled_fraction
        (('t1ce', 't2', 'flair'), 0.01)
    """
    return TrainConfig(
        recipe="three-modality",
        data=DataConfig(
            modalities=("t1ce", "t2", "flair"), normalisation="minmax", min_labelled_fraction=0.01
        ),
        network=NetworkConfig(
            pooling="max",
            activation="relu",
            initial_weights="he_uniform",
            widths=(16, 32, 64, 128, 256),
        ),
        loss=LossConfig(target="labels", background=True, ce_weight=0.0, focal_weight=1.0),
        optim=OptimConfig(lr=1e-4, weight_decay=0.0, precision="bf16", steps=100_000),
    )


def slices() -> TrainConfig:
    """100 axial slices of each case from number 22 on, FLAIR and T1ce, 128 x 128, a 2-D U-Net.

    Source: card 004_62bdde85416ae067 (BraTS 2020): softmax of four, Dice + cross-entropy.

    One slice: 7,765,796 parameters, 18 GFLOP, 0.04 GB.

    Example:
        >>> slices().data.patch_size, slices().spatial_dims
        ((128, 128, 1), 2)
    """
    return TrainConfig(
        recipe="slices",
        data=DataConfig(
            modalities=("flair", "t1ce"),
            sampling="slices",
            patch_size=(128, 128, 1),
            first_slice=22,
            num_slices=100,
        ),
        network=NetworkConfig(
            pooling="max",
            activation="relu",
            initial_weights="he_normal",
            widths=(32, 64, 128, 256, 512),
        ),
        loss=LossConfig(target="labels", background=True),
        optim=OptimConfig(lr=1e-3, weight_decay=0.0, steps=50_000, global_batch=16),
    )


def regions128() -> TrainConfig:
    """128^3 patches, z-score, Dice + cross-entropy over regions, AdamW in bf16.

    What `crop128` was before it became what its card says.

    One patch: 16,549,897 parameters, 2,854 GFLOP, 3.80 GB.

    Example:
        >>> regions128().data.patch_size, regions128().optim.name, regions128().optim.precision
        ((128, 128, 128), 'adamw', 'bf16')
    """
    return TrainConfig(
        recipe="regions128",
        network=NetworkConfig(widths=(32, 64, 128, 256, 320), deep_supervision=2),
        optim=OptimConfig(lr=3e-4, weight_decay=1e-5, precision="bf16", steps=100_000),
    )


def nnunet() -> TrainConfig:
    """nnU-Net's default for BraTS: 1000 epochs of 250 steps, SGD, regions, deep supervision.

    Source: nnunetv2 2.8.1. Its fifth head, the coarsest, has weight 0 there; here it is left out.
    One of two patches is centred on tumour (`round(2 x .67)`). The Dice is one a patch: its planner
    wants one over the batch only where it also plans a low resolution, which BraTS needs not.

    One patch: 31,198,028 parameters, 2,882 GFLOP, 3.81 GB.

    Example:
        >>> nnunet().optim.name, nnunet().optim.steps, nnunet().network.deep_supervision
        ('sgd', 250000, 3)
    """
    return TrainConfig(
        recipe="nnunet",
        data=DataConfig(foreground_share=0.5),
        network=NetworkConfig(widths=(32, 64, 128, 256, 320, 320), deep_supervision=3),
        optim=OptimConfig(name="sgd", lr=1e-2, weight_decay=3e-5, precision="bf16", steps=250_000),
    )


def nnunet_residual() -> TrainConfig:
    """nnU-Net with the residual encoder of its preset ResEnc M: blocks 1, 3, 4, 6, 6, 6.

    Source: nnunetv2 2.8.1, `nnUNetPlannerResEncM`.

    One patch: 102,352,204 parameters, 4,323 GFLOP, 4.60 GB.

    Example:
        >>> nnunet_residual().network.name, nnunet_residual().loss == nnunet().loss
        ('residual', True)
    """
    plain = nnunet()
    network = replace(plain.network, name="residual")
    return replace(plain, recipe="nnunet-residual", network=network)


def any_modality() -> TrainConfig:
    """`nnunet` for scans that lack a modality: one, of any kind, is dropped in 40 % of the patches.

    Source: arXiv 2602.20218, which drops FLAIR in 35 to 50 % (WT without FLAIR 60.4 -> 92.6 Dice at
    no cost with all modalities).

    One patch: 31,198,028 parameters, 2,882 GFLOP, 3.81 GB.

    Example:
        >>> any_modality().augment.drop_modality
        0.4
    """
    plain = nnunet()
    dropped = replace(plain.augment, drop_modality=0.4)
    return replace(plain, recipe="any-modality", augment=dropped)


def mednext() -> TrainConfig:
    """MedNeXt-S with kernels of 3: ConvNeXt blocks, AdamW at 1e-3; the rest is `nnunet`'s.

    Source: arXiv 2303.09975 and its code, MIC-DKFZ/MedNeXt (`nnUNetTrainerV2_MedNeXt_S_kernel3`):
    weight decay and four of the five heads are nnU-Net's, its Dice is one a patch. The largest, L,
    is `--network.blocks 3 4 8 --network.expansion 3 4 8`.

    One patch: 5,552,396 parameters, 765 GFLOP, 15.35 GB.

    Example:
        >>> mednext().network.name, mednext().optim.lr, mednext().augment == nnunet().augment
        ('mednext', 0.001, True)
    """
    plain = nnunet()
    return replace(
        plain,
        recipe="mednext",
        network=NetworkConfig(name="mednext", widths=(32, 64, 128, 256, 512), deep_supervision=3),
        loss=LossConfig(),
        optim=replace(plain.optim, name="adamw", lr=1e-3),
    )


def post_op() -> TrainConfig:
    """`nnunet` for glioma after surgery: softmax over labels, the resection cavity among them.

    Source: nnU-Net's own converter of the sets of 2024, which has labels and no regions.

    One patch: 31,198,996 parameters, 2,883 GFLOP, 3.85 GB.

    Example:
        >>> post_op().labels.names, post_op().loss.target
        (('NETC', 'SNFH', 'ET', 'RC'), 'labels')
    """
    plain = nnunet()
    return replace(
        plain,
        recipe="post-op",
        data=replace(plain.data, labels="treated"),
        loss=replace(plain.loss, target="labels"),
    )


def domain_shift() -> TrainConfig:
    """`nnunet` augmented for scans of other scanners and sites, by nnU-Net's trainer DA5.

    Source: nnunetv2 2.8.1, `nnUNetTrainerDA5`. Its two inverted gammas of 0.1 are one of 0.19 here
    (1 - 0.9^2). It turns by right angles and reorders axes in half of the patches each, a quarter
    and a sixth of which stay as they are; here only the others count.

    One patch: 31,198,028 parameters, 2,882 GFLOP, 3.81 GB.

    Example:
        >>> domain_shift().augment.median, domain_shift().augment.scale_each_axis
        (0.1, True)
    """
    augment = AugmentConfig(
        rotation=0.4,
        rotation_per_axis=0.5,
        scale_range=(0.7, 1.43),
        scale_each_axis=True,
        noise_before_blur=False,
        blur=0.1,  # one of blur and median is chosen, and done in a fifth of the patches
        blur_sigma_voxels=(0.3, 1.5),
        blur_each_axis=False,
        median=0.1,
        brightness=0.0,
        brightness_added=0.1,
        contrast=0.2,
        contrast_per_modality=0.5,
        contrast_range=(0.5, 2.0),
        contrast_keeps_range=0.5,
        low_resolution=0.15,
        low_resolution_range=(0.25, 1.0),
        inverted_gamma=0.19,
        gamma=0.0,
        blank_rectangles=0.4,
        brightness_gradient=0.3,
        local_gamma=0.3,
        sharpening=0.2,
        rotate90=0.5 * 3 / 4,
        transpose=0.5 * 5 / 6,
    )
    return replace(nnunet(), recipe="domain-shift", augment=augment)


RECIPES: MappingProxyType[str, Callable[[], TrainConfig]] = MappingProxyType(
    {
        make.__name__.replace("_", "-"): make
        for make in (
            *(tiny, residual, full_volume, crop128, three_modality, slices, regions128),
            *(nnunet, nnunet_residual, any_modality, domain_shift, post_op, mednext),
        )
    }
)


def recipe(name: str, changes: Mapping[str, object] | None = None) -> TrainConfig:
    """The run of this name, with the fields at dotted paths changed.

    Args:
        name: one of `RECIPES`, an entry point of an installed package in the group
            `raybrats.recipes`, or `my.module:function`, which is looked for here too.
        changes: dotted field -> value.

    Raises:
        UsageError: there is no such recipe or field (the nearest name is suggested), or a value
            does not fit.

    Example:
        >>> config = recipe("crop128", {"data.cohort": "cohort.parquet", "optim.global_batch": 4})
        >>> config.recipe, config.data.cohort, config.optim.global_batch
        ('crop128', 'cohort.parquet', 4)
    """
    config = RECIPES[name]() if name in RECIPES else _of_others(name)
    return override_all(config, changes) if changes else config


def _of_others(name: str) -> TrainConfig:
    """A recipe that is not raybrats' own."""
    config = Offers("recipe", "raybrats.recipes", tuple(RECIPES)).make(name)
    if not isinstance(config, TrainConfig):
        raise UsageError(f"recipe {name}: makes {type(config).__name__}, not a TrainConfig")
    return replace(config, recipe=name)


def named(config: TrainConfig, stamp: str) -> TrainConfig:
    """The same run with a name: the recipe and a time stamp, where the user gave none.

    Example:
        >>> named(tiny(), "20260101-120000").run.name
        'tiny-20260101-120000'
    """
    name = config.run.name or f"{config.recipe.replace(':', '-')}-{stamp}"
    return replace(config, run=replace(config.run, name=name))
