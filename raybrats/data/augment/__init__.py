"""Batch -> augmented batch, on the device: drawn first, then applied."""
