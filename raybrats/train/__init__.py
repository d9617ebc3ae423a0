"""Batches -> checkpoint."""
