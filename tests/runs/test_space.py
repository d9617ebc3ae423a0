"""Search spaces: what is understood, and what is refused before anything starts."""

import pytest
from ray import tune

from raybrats.config import override, override_all
from raybrats.errors import UsageError
from raybrats.recipes import tiny
from raybrats.runs.space import space_of
from raybrats.runs.sweep import search


def test_a_normal_distribution_has_no_ends():
    domain = tune.randn(0.5, 0.01)
    assert space_of({"loss.dice_weight": domain}, tiny()) == {"loss.dice_weight": domain}


def samples(word, count=30):
    ((field, domain),) = space_of([word], tiny()).items()
    return field, [domain.sample() for _ in range(count)]


@pytest.mark.parametrize(
    ("word", "allowed"),
    [
        ("loss.dice_weight=uniform(0.2, 0.8)", lambda v: 0.2 <= v <= 0.8),
        ("optim.lr=loguniform(1e-4, 1e-2)", lambda v: 1e-4 <= v <= 1e-2),
        ("loss.ce_weight=quniform(0.5, 2, 0.5)", lambda v: v in (0.5, 1, 1.5, 2)),
        ("optim.warmup_steps=randint(0, 3)", lambda v: v in (0, 1, 2)),
        ("optim.name=choice(['sgd', 'adamw'])", lambda v: v in ("sgd", "adamw")),
        ("data.patch_size=choice([[16,16,16],[32,32,32]])", lambda v: v in ([16] * 3, [32] * 3)),
        ("network.widths=choice([(8, 16, 32)])", lambda v: v == (8, 16, 32)),
        ("loss.batch_dice=choice([True, False])", lambda v: v in (True, False)),
        ("  optim.lr = uniform( 0.001,0.002 )  ", lambda v: 0.001 <= v <= 0.002),
    ],
)
def test_every_kind_draws_from_its_range(word, allowed):
    field, drawn = samples(word)
    assert field == word.partition("=")[0].strip()
    assert all(allowed(value) for value in drawn)
    for value in drawn:
        override(tiny(), field, value)


def test_several_fields_are_searched_together():
    words = ["loss.dice_weight=uniform(0.2,0.8)", "optim.lr=loguniform(1e-4,1e-2)"]
    assert list(space_of(words, tiny())) == ["loss.dice_weight", "optim.lr"]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("loss.dice_weight=normal(0, 1)", "uniform, loguniform, quniform, randint, choice"),
        ("loss.dice_weight", "FIELD=KIND"),
        ("loss.dice_weight=0.5", "FIELD=KIND"),
        ("=uniform(0, 1)", "FIELD=KIND"),
        ("cluster.workers=choice([1])", "same for all trials"),
        ("data.fold=randint(0, 5)", "same for all trials"),
        ("loss.dice_wieght=uniform(0, 1)", "dice_weight"),
        ("los.dice_weight=uniform(0, 1)", "'loss'"),
        ("data.patch_size=choice([[16,16,16],[20,16,16]])", "data.patch_size"),
        ("data.patch_size=choice([16])", "data.patch_size"),
        ("data.patch_size=choice([[16,16]])", "data.patch_size"),
        ("network.name=choice(['unet', 'resnet'])", "network.name"),
        ("network.widths=choice([(8,)])", "network.widths"),
        ("loss.dice_weight=choice(['much'])", "dice_weight"),
        ("loss.dice_weight=uniform(-2, -1)", "loss"),
        ("optim.steps=uniform(10.1, 10.9)", "optim.steps"),
        ("optim.lr=loguniform(0, 1)", "optim.lr"),
        ("optim.lr=uniform(1)", "optim.lr"),
        ("optim.lr=uniform(0.1, 0.2", "FIELD=KIND"),
        ("optim.lr=choice([])", "optim.lr"),
        ("optim.lr=choice(0.1)", "optim.lr"),
        ("loss=choice([1])", "loss"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(word, said):
    with pytest.raises(UsageError, match=said) as refusal:
        space_of(["optim.lr=uniform(0.001,0.002)", word], tiny())
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "inside",
    [
        "__import__('os').system('touch {}')",
        "[__import__('os').system('touch {}')]",
        "open('{}', 'w')",
        "[exec(\"open('{}', 'w')\")]",
        "*[open('{}', 'w')]",
        "0, 1) or open('{}', 'w'",
    ],
)
def test_a_space_never_runs_code(inside, tmp_path):
    trace = tmp_path / "trace"
    with pytest.raises(UsageError, match="space"):
        space_of([f"optim.lr=choice({inside.format(trace)})"], tiny())
    assert not trace.exists()


def test_samplers_as_they_are_mean_what_the_words_mean():
    told = {"optim.lr": tune.loguniform(1e-4, 1e-2), "loss.batch_dice": tune.choice([True, False])}
    assert space_of(told, tiny()) == told


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"optim.lr": 1e-3}, "not a sampler"),
        ({"optim.lr": tune.uniform(-2.0, -1.0)}, "optim.lr"),
        ({"optim.rate": tune.uniform(0.1, 0.2)}, "optim.rate"),
        ({"data.fold": tune.randint(0, 5)}, "same for all trials"),
        ({"network.name": tune.choice([])}, "nothing to choose from"),
    ],
)
def test_samplers_that_do_not_fit_are_refused_too(told, said):
    with pytest.raises(UsageError, match=said):
        space_of(told, tiny())


def test_an_empty_space_is_refused():
    with pytest.raises(UsageError, match="--space"):
        space_of([], tiny())


def test_a_sweep_needs_its_server():
    apart = {"tracking.required": False, "tracking.uri": "http://127.0.0.1:1"}
    with pytest.raises(UsageError, match=r"tracking\.required must be true"):
        search(override_all(tiny(), apart), ["loss.dice_weight=uniform(0.2,0.8)"], 2)
