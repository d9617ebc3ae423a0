"""Synthetic cohorts: heads with gliomas in the tree of an edition."""
