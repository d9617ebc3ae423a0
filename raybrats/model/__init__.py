"""Batch -> logits -> loss -> scores: torch and MONAI, no cluster."""
