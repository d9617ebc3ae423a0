"""Models whose network is of others: registered of installed packages only, and loaded by name."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from mlflow.pyfunc import PythonModelContext
from safetensors.torch import save

from raybrats.config import (
    DataConfig,
    LossConfig,
    NetworkConfig,
    RunConfig,
    TrackingConfig,
    TrainConfig,
    override_all,
    to_json,
)
from raybrats.data.prepare import prepare
from raybrats.errors import CheckpointError, RegistrationError, UsageError
from raybrats.model.inference import (
    Member,
    predict_case,
    segment,
    segment_prepared,
    uploaded,
)
from raybrats.model.network import load_weights, network_of, weights_of
from raybrats.model.regions import region_dice, region_sizes
from raybrats.phantom.phantom import make_phantom
from raybrats.registry import load, tracking
from raybrats.registry.register import register
from raybrats.runs.beginning import check_code
from raybrats.runs.run import train
from raybrats.train import checkpoint, loop
from raybrats.train.checkpoint import Snapshot
from raybrats.train.learner import new_learner

SPY = "import pathlib\npathlib.Path({!r}).touch()\nfrom own_code import *\n"


def install(folder, name, version, offers):
    """A package of an older or newer version is gone then."""
    for older in folder.glob(f"{name}-*.dist-info"):
        shutil.rmtree(older)
    place = folder / f"{name}-{version}.dist-info"
    place.mkdir()
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (place / "entry_points.txt").write_text(offers)


NETWORK = "[raybrats.networks]\nours = own_code:levels\n"
LOSS = "[raybrats.losses]\ntheirs = own_code:squared_error\n"


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of installed packages: one with a network, one with a loss."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])
    install(folder, "mine", "1.0", NETWORK)
    install(folder, "yours", "7.1", LOSS)
    return folder


@pytest.fixture
def spy(tmp_path, monkeypatch):
    """A module in the working directory that leaves a trace once it is imported."""
    (tmp_path / "spy.py").write_text(SPY.format(str(tmp_path / "trace")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path / "trace"
    sys.modules.pop("spy", None)


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('database')}/mlflow.db"


@pytest.fixture
def config(request, tmp_path, site, database):
    assert site
    model = request.node.name.removeprefix("test_")
    return TrainConfig(
        data=DataConfig(patch_size=(16, 16, 16), modalities=("t1ce", "flair")),
        network=NetworkConfig(name="ours", widths=(4, 8)),
        loss=LossConfig(name="theirs", target="labels"),
        run=RunConfig(name="one", storage_uri=str(tmp_path / "runs")),
        tracking=TrackingConfig(uri=database, experiment=model, model=model),
    )


def weights(config, seed=0):
    torch.manual_seed(seed)
    return weights_of(network_of(config).eval())


def uri_of(version):
    return f"models:/{version.name}/{version.version}"


def registered(config, seed=0, gain=None):
    scores = dict.fromkeys(("WT", "TC", "ET", "mean"), 0.5)
    files = {checkpoint.WEIGHTS: save(weights(config, seed))}
    return register(tracking.start(config), config, files, scores, "cases-1", gain)


def folder_of(version, config):
    client = MlflowClient(config.tracking.uri)
    return Path(client.get_model_version_download_uri(version.name, version.version))


def image():
    found = np.zeros((2, 20, 20, 20), np.float32)
    found[:, 4:16, 4:16, 4:16] = np.arange(12, dtype=np.float32)
    return found


def test_a_model_of_a_package_asks_for_it_and_predicts(config, site):
    check_code(config)
    version = registered(config)
    uri = uri_of(version)
    asked = (folder_of(version, config) / "requirements.txt").read_text().split()
    assert "mine==1.0" in asked
    assert not [line for line in asked if line.startswith("yours")], "a model has no loss"
    model = load.load(uri, config.tracking.uri)
    torch.manual_seed(0)
    expected = segment(network_of(config).eval(), config, image())
    assert len(np.unique(expected)) > 1
    assert np.array_equal(model.segment(image()).labels, expected)
    shutil.rmtree(site / "yours-7.1.dist-info")
    assert load.read(uri, config.tracking.uri).config == config


def test_it_is_loaded_with_the_version_that_it_was_trained_with_or_not_at_all(config, site):
    uri = uri_of(registered(config))
    install(site, "mine", "2.0", NETWORK)
    with pytest.raises(CheckpointError, match=r"of mine==1\.0; 2\.0 is installed here$"):
        load.load(uri, config.tracking.uri)
    shutil.rmtree(site / "mine-2.0.dist-info")
    with pytest.raises(CheckpointError, match=r"of mine==1\.0; it is not installed here$"):
        load.load(uri, config.tracking.uri)
    install(site, "mine", "1.0", NETWORK)
    load.load(uri, config.tracking.uri)


def test_a_version_that_does_not_say_its_package_is_refused(config):
    version = registered(config)
    client = MlflowClient(config.tracking.uri)
    client.delete_model_version_tag(version.name, version.version, "network_package")
    with pytest.raises(CheckpointError, match=r"of package mine==1\.0; its version says none"):
        load.load(uri_of(version), config.tracking.uri)


def test_two_packages_that_offer_one_name_are_refused(config, site):
    install(site, "another", "1.0", "[raybrats.networks]\nours = own_code:as_tuple\n")
    with pytest.raises(UsageError, match=r"network ours: .*mine.* both offer one"):
        check_code(config)


def test_a_module_is_not_registered_and_nothing_of_it_is_uploaded(config):
    own = override_all(config, {"network.name": "own_code:levels"})
    with pytest.raises(RegistrationError, match="of no installed package") as refusal:
        registered(own)
    assert "\n" not in str(refusal.value)
    client = MlflowClient(config.tracking.uri)
    assert client.search_registered_models(f"name = '{config.tracking.model}'") == []
    assert RegistrationError.exit_code == 4


def test_a_module_is_refused_before_a_run_that_would_register_it(config, tmp_path):
    own = override_all(config, {"network.name": "own_code:levels"})
    with pytest.raises(UsageError, match=r"of no installed .*: --tracking\.model ''$") as refusal:
        train(own)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "runs").exists()
    check_code(override_all(own, {"tracking.model": ""}))
    loss = {"loss.name": "own_code:squared_error"}
    check_code(override_all(config, loss))


def test_what_does_not_do_is_refused_before_a_run_too(config, tmp_path):
    bad = {"network.name": "own_code:one_too_few", "tracking.model": ""}
    with pytest.raises(UsageError, match="owes"):
        train(override_all(config, bad))
    assert not (tmp_path / "runs").exists()


def test_a_module_that_a_registered_model_names_is_not_imported(config, spy):
    version = registered(config)
    place = folder_of(version, config) / "artifacts" / checkpoint.CONFIG
    changed = json.loads(place.read_text())
    changed["network"]["name"] = "spy:levels"
    place.write_text(json.dumps(changed))
    uri = uri_of(version)
    with pytest.raises(CheckpointError, match="spy:levels is of no installed package"):
        load.load(uri, config.tracking.uri)
    from raybrats.registry.pyfunc_model import Segmenter

    artifacts = {"config": str(place), "weights": str(place.with_name(checkpoint.WEIGHTS))}
    with pytest.raises(UsageError, match="spy:levels is of no installed package"):
        Segmenter().load_context(PythonModelContext(artifacts, {}))
    assert not spy.exists()


def test_a_module_that_a_checkpoint_names_is_imported_only_if_the_user_says_so(config, spy):
    own = override_all(config, {"network.name": "own_code:levels"})
    named = override_all(config, {"network.name": "spy:levels"})
    uri = checkpoint.write(config.run.storage_uri, named, Snapshot(4, weights(own), {}))
    for said in ("", "own_code:levels"):
        with pytest.raises(UsageError, match=r"its network is spy:levels.*--network spy:levels"):
            load.load(uri, "", said)
    assert not spy.exists()
    model = load.load(uri, "", "spy:levels")
    assert spy.exists()
    torch.manual_seed(0)
    expected = segment(network_of(own).eval(), own, image())
    assert np.array_equal(model.segment(image()).labels, expected)


REGIONS = {"network.name": "plain", "loss.name": "sum", "loss.target": "regions"}
RULES = {
    "prediction.overlap": 0.75,
    "prediction.mirror": [0, 2],
    "prediction.smallest_voxels": [0, 0, 100_000],
}


def head():
    """A raw case of the two modalities, and its labels."""
    found, labels = make_phantom(4, shape=(32, 28, 24))
    return found[[2, 0]].astype(np.float32), labels


def middling(config):
    """Thresholds that half of the box's voxels exceed, so that untrained weights say something."""
    network = network_of(config).eval()
    load_weights(network, weights(config))
    case = prepare(list(head()[0]))
    p = segment_prepared([Member(network, config)], case, probabilities=True).probabilities
    return [float(np.median(region[region > 0])) for region in p]


@pytest.mark.parametrize(
    "changes",
    [{}, RULES, {"optim.precision": "bf16"}, {**RULES, "loss.target": "labels"}],
    ids=["plain", "rules", "bf16", "softmax"],
)
def test_a_registered_model_gives_the_very_labels_that_were_validated(config, changes):
    config = override_all(config, REGIONS | changes)
    if changes == RULES:
        config = override_all(config, {"prediction.threshold": middling(config)})
    raw, labels = head()
    learner = new_learner(config, torch.device("cpu"))
    load_weights(learner.validated, weights(config))
    (validated,) = loop.validate(learner, [uploaded(prepare(list(raw), labels), learner.device)])

    uri, shipped = packaged(config, raw)
    loaded = load.load(uri, config.tracking.uri)
    np.testing.assert_array_equal(loaded.segment(raw).labels, shipped)
    case = uploaded(prepare(list(raw), labels), learner.device)
    seen = predict_case(learner.validated, config, case)[0].numpy()
    np.testing.assert_array_equal(shipped[case.prepared.box], seen)
    assert region_dice(region_sizes(torch.from_numpy(seen), case.labels)) == validated
    if changes == RULES:
        assert set(np.unique(seen)) == {0, 1, 2}
        for name in (*RULES, "prediction.threshold"):
            bare = override_all(config, {name: [] if name != "prediction.overlap" else 0.5})
            assert not np.array_equal(segment(learner.validated, bare, raw), shipped), name
        unmirrored = load.load(uri, config.tracking.uri, mirror=())
        assert not np.array_equal(unmirrored.segment(raw).labels, shipped)


def packaged(config, raw):
    """The URI of a new version, and what its code says of a raw case, as MLflow runs it."""
    from raybrats.registry.pyfunc_model import Segmenter

    version, model = registered(config), Segmenter()
    place = folder_of(version, config) / "artifacts"
    files = {"config": checkpoint.CONFIG, "weights": checkpoint.WEIGHTS}
    artifacts = {name: str(place / file) for name, file in files.items()}
    model.load_context(PythonModelContext(artifacts, {}))
    return uri_of(version), model.predict(raw)


def test_a_version_says_what_its_rules_gained(config):
    fitted = override_all(config, REGIONS | {"prediction.smallest_voxels": [250, 150, 100]})
    version = registered(fitted, gain={"WT": 0.01, "mean": 0.004})
    client = MlflowClient(config.tracking.uri)
    tags = client.get_model_version(version.name, version.version).tags
    gains = {name: value for name, value in tags.items() if name.startswith("prediction_gain")}
    assert gains == {"prediction_gain_WT": "0.01", "prediction_gain_mean": "0.004"}
    model = load.load(uri_of(version), config.tracking.uri)
    assert model.config.prediction.smallest_voxels == (250, 150, 100)


def test_versions_together_are_one_model_of_their_mean(config):
    config = override_all(config, REGIONS)
    uris = [uri_of(registered(config, seed)) for seed in (0, 1)]
    models = [load.load(uri, config.tracking.uri) for uri in uris]
    alone = [model.segment(image(), probabilities=True) for model in models]
    together = load.load_ensemble(uris, config.tracking.uri)
    assert together.name == ",".join(model.name for model in models)
    found = together.segment(image(), probabilities=True)
    mean = np.mean([each.probabilities.astype(np.float32) for each in alone], axis=0)
    np.testing.assert_allclose(found.probabilities, mean, atol=1e-3)
    assert found.agreement.keys() == {"WT", "TC", "ET"}
    prepared = together.prepared(image())
    np.testing.assert_array_equal(together.segment_prepared(prepared).labels, found.labels)


def test_what_cannot_be_averaged_is_refused(config, tmp_path):
    config = override_all(config, REGIONS)

    def written(name, **changes):
        other = override_all(config, {k.replace("__", "."): v for k, v in changes.items()})
        where = str(tmp_path / name)
        return checkpoint.write(where, other, Snapshot(4, weights(other), {}))

    first = written("first")
    for name, changes, said in (
        ("b", {"data__modalities": ["flair", "t1ce"]}, r"has data\.modalities \('flair', 't1ce'\)"),
        ("c", {"data__normalisation": "minmax"}, r"has data\.normalisation minmax"),
        ("d", {"data__labels": "treated"}, r"tells apart \('NETC'"),
        ("e", {"loss__target": "labels"}, r"has loss\.target labels"),
    ):
        with pytest.raises(UsageError, match=said) as refusal:
            load.load_ensemble([first, written(name, **changes)], "")
        assert "\n" not in str(refusal.value)
    for uris in ([], [first, first]):
        with pytest.raises(UsageError, match="expected different models"):
            load.load_ensemble(uris, "")


def test_a_model_of_before_the_prediction_section_is_loaded(config):
    config = override_all(config, REGIONS)
    version = registered(config)
    place = folder_of(version, config) / "artifacts" / checkpoint.CONFIG
    old = json.loads(to_json(config))
    del old["prediction"]
    old["validation"] |= {"overlap": 0.25, "mirror": True}
    place.write_text(json.dumps(old))
    model = load.load(uri_of(version), config.tracking.uri)
    expected = override_all(config, {"prediction.overlap": 0.25, "prediction.mirror": [0, 1, 2]})
    assert model.config == expected
