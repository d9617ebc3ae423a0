"""A run as frozen dataclasses, checked when made.

Only the standard library is imported here; pydantic and tyro are reached for inside the functions
that need them, so the mathematics runs where neither is installed.
"""

from raybrats.config.augment import AugmentConfig
from raybrats.config.data import NUM_FOLDS, DataConfig, Normalisation
from raybrats.config.network import LOSSES, NETWORKS, LossConfig, NetworkConfig
from raybrats.config.place import ClusterConfig, RunConfig, TrackingConfig
from raybrats.config.prediction import PredictionConfig
from raybrats.config.run import (
    TrainConfig,
    deciding,
    differences,
    digest,
    from_json,
    override,
    override_all,
    to_json,
)
from raybrats.config.section import Section
from raybrats.config.training import OptimConfig, ValidationConfig

__all__ = [
    "LOSSES",
    "NETWORKS",
    "NUM_FOLDS",
    "AugmentConfig",
    "ClusterConfig",
    "DataConfig",
    "LossConfig",
    "NetworkConfig",
    "Normalisation",
    "OptimConfig",
    "PredictionConfig",
    "RunConfig",
    "Section",
    "TrackingConfig",
    "TrainConfig",
    "ValidationConfig",
    "deciding",
    "differences",
    "digest",
    "from_json",
    "override",
    "override_all",
    "to_json",
]
