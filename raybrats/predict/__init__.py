"""MLflow model -> label NIfTI -> scores -> report."""
