"""Bytes -> Volume: inflated, its header checked, its axes canonical; numpy and nibabel only."""
