"""The registered model, as code that MLflow runs: raw case in, labels out.

MLflow executes this file when it loads the model (models from code), so nothing is unpickled.
"""

from pathlib import Path

import mlflow
import numpy as np
from mlflow.pyfunc import PythonModel, PythonModelContext
from safetensors.torch import load_file

from raybrats.config import NETWORKS, from_json
from raybrats.model.inference import segment
from raybrats.model.network import trained_network


class Segmenter(PythonModel):
    """Preprocessing, network and sliding windows of one checkpoint."""

    def load_context(self, context: PythonModelContext) -> None:
        """Builds the network from the run's configuration and loads its weights."""
        self.config = from_json(Path(context.artifacts["config"]).read_text())
        NETWORKS.package(self.config.network.name)  # refuses a module that a file may name
        self.network = trained_network(self.config, load_file(context.artifacts["weights"]))

    # MLflow's signature has a context, which by its docstring may be left out.
    def predict(self, model_input: np.ndarray) -> np.ndarray:  # ty: ignore[incompatible-method-override]
        """Labels, uint8 (i, j, k), of a raw case, float32 (modality, i, j, k), axes LPS."""
        return segment(self.network, self.config, model_input)


mlflow.models.set_model(Segmenter())
