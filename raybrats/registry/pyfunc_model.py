"""The registered model, as code that MLflow runs: raw case in, labels out.

MLflow executes this file when it loads the model (models from code), so nothing is unpickled.
"""

from pathlib import Path

import mlflow
import numpy as np
import torch
from mlflow.pyfunc import PythonModel, PythonModelContext
from safetensors.torch import load_file

from raybrats.config import from_json
from raybrats.model.inference import segment
from raybrats.model.network import build, load_weights


class Segmenter(PythonModel):
    """Preprocessing, network and sliding windows of one checkpoint."""

    def load_context(self, context: PythonModelContext) -> None:
        """Builds the network from the run's configuration and loads its weights."""
        self.config = from_json(Path(context.artifacts["config"]).read_text())
        device = "cuda" if torch.cuda.is_available() else "cpu"
        modalities, dims = self.config.data.modalities, self.config.spatial_dims
        network = build(self.config.network, len(modalities), dims)
        load_weights(network, load_file(context.artifacts["weights"]))
        self.network = network.to(device).eval()

    # MLflow's signature has a context, which by its docstring may be left out.
    def predict(self, model_input: np.ndarray) -> np.ndarray:  # ty: ignore[incompatible-method-override]
        """Labels, uint8 (i, j, k), of a raw case, float32 (modality, i, j, k), axes LPS."""
        return segment(self.network, self.config, model_input)


mlflow.models.set_model(Segmenter())
