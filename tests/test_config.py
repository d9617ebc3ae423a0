"""A run is a value: it survives JSON, refuses what does not fit, and says which field."""

import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from raybrats.arguments import config_of
from raybrats.config import (
    AugmentConfig,
    ClusterConfig,
    DataConfig,
    LossConfig,
    NetworkConfig,
    OptimConfig,
    PredictionConfig,
    TrainConfig,
    digest,
    from_json,
    override,
    to_json,
)
from raybrats.errors import UsageError
from raybrats.recipes import RECIPES, named, post_op, recipe, tiny


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_builds_and_survives_json(name: str):
    config = recipe(name)
    assert config.recipe == name
    assert from_json(to_json(config)) == config
    assert digest(from_json(to_json(config))) == digest(config)


def test_json_of_a_changed_run_gives_it_back():
    config = override(tiny(), "data.modalities", ["t1ce", "flair"])
    config = override(config, "loss.focal_weight", 0.25)
    assert from_json(to_json(config)) == config != tiny()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"nope": 1}', "nope"),
        ('{"data": {"patchsize": 1}}', r"data\.patchsize"),
        ('{"data": {"fold": 5}}', r"data\.fold must be in -1..4, got 5"),
        ('{"data": {"fold": "one"}}', r"data\.fold"),
        ('{"data": {"patch_size": [64, 64]}}', r"data\.patch_size"),
        ('{"optim": {"lr": null}}', r"optim\.lr"),
        ('{"optim": {"steps": 1.5}}', r"optim\.steps"),
        ('{"network": {"name": "vnet"}}', r"network\.name"),
        ('{"optim": {"global_batch": 3}, "cluster": {"workers": 2}}', r"optim\.global_batch .* 3"),
        ("[1]", "configuration"),
        ('{"data": ', "configuration: Invalid JSON"),
    ],
)
def test_json_that_does_not_fit_is_refused_by_field(text: str, said: str):
    with pytest.raises(UsageError, match=rf"^(the )?{said}") as caught:
        from_json(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "now"),
    [
        ({"overlap": 0.25, "mirror": True}, {"overlap": 0.25, "mirror": (0, 1, 2)}),
        ({"overlap": 0.75, "mirror": False}, {"overlap": 0.75}),
        ({"mirror": True}, {"mirror": (0, 1, 2)}),
        ({}, {}),
    ],
)
def test_a_run_of_before_the_prediction_section_is_read(old, now):
    tree = json.loads(to_json(TrainConfig()))
    del tree["prediction"]
    tree["validation"] |= old
    assert from_json(json.dumps(tree)) == TrainConfig(prediction=PredictionConfig(**now))
    assert from_json(json.dumps(tree).encode()) == TrainConfig(prediction=PredictionConfig(**now))
    if old:
        with pytest.raises(UsageError, match=r"^validation\.(overlap|mirror)"):
            from_json(json.dumps({**tree, "prediction": {}}))


def test_the_prediction_section_is_set_on_the_command_line():
    words = ["--prediction.mirror", "0", "2", "--prediction.threshold", "0.4", "0.5", "0.45"]
    config = config_of("train", ["tiny", *words, "--prediction.look-below", "0.7"])
    expected = PredictionConfig(
        overlap=0.25, mirror=(0, 2), threshold=(0.4, 0.5, 0.45), look_below=0.7
    )
    assert config.prediction == expected
    assert from_json(to_json(config)) == config


TWO = PredictionConfig(threshold=(0.5, 0.5))


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: DataConfig(patch_size=(4, 64, 64)), "data.patch_size"),
        (lambda: DataConfig(modalities=()), "data.modalities"),
        (lambda: DataConfig(foreground_share=1.1), "data.foreground_share"),
        (lambda: DataConfig(max_bad_fraction=float("nan")), "data.max_bad_fraction"),
        (lambda: AugmentConfig(mirror=-0.1), "augment.mirror"),
        (lambda: AugmentConfig(gamma_range=(1.5, 0.7)), "augment.gamma_range"),
        (lambda: NetworkConfig(widths=(8,)), "network.widths"),
        (lambda: NetworkConfig(widths=(0, 8, 16)), "network.widths"),
        (lambda: NetworkConfig(name="segresnet", widths=(8, 16, 31)), "network.widths"),
        (lambda: NetworkConfig(name="unet", deep_supervision=1), "network.deep_supervision"),
        (lambda: NetworkConfig(name="mednext", widths=(8, 16, 16)), "network.widths"),
        (lambda: NetworkConfig(name="mednext", widths=(8, 16), blocks=()), "network.blocks"),
        (lambda: NetworkConfig(name="mednext", widths=(8, 16), blocks=(10**9,)), "network.blocks"),
        (
            lambda: NetworkConfig(name="mednext", widths=(8, 16), expansion=(0,)),
            "network.expansion",
        ),
        (lambda: NetworkConfig(name="mednext", widths=(8, 16), norm="batch"), "network.norm"),
        (lambda: NetworkConfig(blocks=(3,)), "network.blocks"),
        (lambda: NetworkConfig(kernel_size=5), "network.kernel_size"),
        (lambda: LossConfig(dice_weight=0, ce_weight=0), "loss.*_weight"),
        (lambda: LossConfig(ce_weight=-1), "loss.*_weight"),
        (lambda: OptimConfig(lr=0), "optim.lr"),
        (lambda: ClusterConfig(workers=0), "cluster.workers"),
        (lambda: TrainConfig(data=DataConfig(patch_size=(100, 128, 128))), "data.patch_size"),
        (lambda: PredictionConfig(overlap=1.0), "prediction.overlap"),
        (lambda: PredictionConfig(mirror=(0, 3)), "prediction.mirror"),
        (lambda: PredictionConfig(mirror=(0, 0)), "prediction.mirror"),
        (lambda: PredictionConfig(threshold=(0.5, 1.0, 0.5)), "prediction.threshold"),
        (lambda: PredictionConfig(smallest_voxels=(0, -1, 0)), "prediction.smallest_voxels"),
        (lambda: PredictionConfig(replace_below_voxels=(-1,)), "prediction.replace_below_voxels"),
        (lambda: PredictionConfig(temperature=(0.0, 1, 1)), "prediction.temperature"),
        (lambda: PredictionConfig(look_below=1.5), "prediction.look_below"),
        (lambda: replace(tiny(), prediction=TWO), "prediction.threshold"),
        (lambda: override(post_op(), "prediction.threshold", [0.4] * 4), "prediction.threshold"),
    ],
)
def test_a_section_refuses_a_value_and_names_its_field(make, field: str):
    with pytest.raises(UsageError) as caught:
        make()
    assert str(caught.value).startswith(f"{field} must be ")


def test_override_changes_one_field_and_leaves_the_rest():
    config = tiny()
    changed = override(config, "data.patch_size", [64, 48, 32])
    assert changed.data.patch_size == (64, 48, 32)
    assert override(changed, "data.patch_size", config.data.patch_size) == config
    assert override(config, "recipe", "mine").recipe == "mine"
    assert override(config, "loss", LossConfig(dice_weight=2)).loss.dice_weight == 2


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("loss.dice_wieght", 1, "did you mean 'dice_weight'"),
        ("los.dice_weight", 1, "did you mean 'loss'"),
        ("loss.zzz", 1, "there are name, target, background"),
        ("loss.dice_weight.more", 1, "no field 'more' in float"),
        ("", 1, "no field ''"),
        ("optim.lr", "fast", r"^optim\.lr: "),
        ("optim.lr", -1, r"^optim\.lr must be > 0, got -1"),
        ("optim.steps", 2.5, r"^optim\.steps: "),
        ("optim.name", "lion", r"^optim\.name: .*'adamw' or 'sgd'"),
        ("data.patch_size", [64, 64], r"^data\.patch_size"),
        ("data.patch_size", 64, r"^data\.patch_size"),
        ("data.patch_size", [64, 64, 60], r"^data\.patch_size must be multiples of 8"),
        ("augment.noise_variance", [0.1], r"^augment\.noise_variance"),
        ("loss", 3, "^loss: "),
        ("run.seed", -1, r"^run\.seed must be >= 0"),
        ("run.name", "../elsewhere", r"^run\.name must be letters"),
    ],
)
def test_override_refuses_what_does_not_fit(path: str, value: object, said: str):
    with pytest.raises(UsageError, match=said) as caught:
        override(tiny(), path, value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("run.name", "b"),
        ("run.storage_uri", "s3://b"),
        ("run.resume", "must"),
        ("cluster.workers", 4),
        ("cluster.max_failures", 0),
        ("tracking.experiment", "other"),
    ],
)
def test_digest_ignores_what_cannot_change_the_weights(path: str, value: object):
    changed = override(tiny(), path, value)
    assert changed != tiny()
    assert digest(changed) == digest(tiny())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("loss.dice_weight", 0.5),
        ("run.seed", 7),
        ("data.fold", 1),
        ("data.cohort", "s3://x"),
        ("augment.mirror", 0.0),
        ("optim.global_batch", 8),
        ("network.norm", "batch"),
    ],
)
def test_digest_tells_what_changes_the_weights(path: str, value: object):
    assert digest(override(tiny(), path, value)) != digest(tiny())


def test_an_unknown_recipe_suggests_the_nearest():
    with pytest.raises(UsageError, match="no recipe 'nnunt'; did you mean 'nnunet'"):
        recipe("nnunt")


def test_a_run_is_named_once():
    config = named(tiny(), "0101")
    assert config.run.name == "tiny-0101"
    assert named(config, "0202") == config


def test_a_run_is_plain_json():
    for make in RECIPES.values():
        assert json.loads(to_json(make())) == json.loads(json.dumps(asdict(make())))


@pytest.mark.parametrize("module", ["raybrats.config", "raybrats.recipes", "raybrats.cli"])
def test_importing_a_run_costs_no_heavy_module(module: str):
    heavy = {"torch", "ray", "numpy", "mlflow", "monai", "nibabel", "fsspec", "pyarrow", "pydantic"}
    code = f"import sys, {module}; print(*sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
