"""import_fold(...) -> Version: what nnU-Net has trained, registered as a model of raybrats."""

from dataclasses import replace

from safetensors.torch import save

from raybrats.registry import register, tracking
from raybrats.registry.register import Version
from raybrats.train import checkpoint
from raybrats.train.nnunet import read_fold


def import_fold(
    checkpoint_uri: str, plans_uri: str, dataset_uri: str, model: str, tracking_uri: str = ""
) -> Version:
    """A trained fold of nnU-Net as a new version of a registered model.

    Its MLflow run says where it comes from. It has no scores, so it is a challenger, whatever
    there is.

    Args:
        checkpoint_uri: nnU-Net's `checkpoint_final.pth`.
        plans_uri: its `plans.json`.
        dataset_uri: its `dataset.json`.
        model: name of the registered model.
        tracking_uri: MLflow server; empty: MLFLOW_TRACKING_URI, else runs/mlflow.db.

    Raises:
        UsageError: the network, the channels or the labels are none of ours.
        DataError: a file is damaged, or holds anything but weights and figures.
        StorageError: a file is missing or out of reach.
        TrackingError: the server is out of reach.
        RegistrationError: the registry does not take it.

    Example:
        >>> import_fold("fold_0/checkpoint_final.pth", "plans.json", "dataset.json", "brats")
        ... # doctest: +SKIP
        Version(name='brats', version='1', alias='challenger')
    """
    fold = read_fold(checkpoint_uri, plans_uri, dataset_uri)
    config = replace(fold.config, tracking=replace(fold.config.tracking, model=model))
    config = replace(config, tracking=replace(config.tracking, uri=tracking_uri))
    run = tracking.start(config, tags={"raybrats.source": f"nnU-Net: {checkpoint_uri}"})
    status = "FAILED"
    try:
        files = {checkpoint.WEIGHTS: save(dict(fold.weights))}
        version = register.register(run, config, files, scores={}, held_out="")
        status = "FINISHED"
    finally:
        tracking.finish(run, status)
    return version
