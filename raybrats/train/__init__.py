"""Batches -> checkpoint: plain torch; no Ray, no MLflow."""
