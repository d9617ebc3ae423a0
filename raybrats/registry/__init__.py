"""Checkpoint -> MLflow model: the only part that speaks MLflow."""
