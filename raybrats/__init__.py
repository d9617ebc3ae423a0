"""3-D U-Nets for brain-tumour MRI, trained, tuned, registered and applied on Ray."""

__version__ = "0.1.0"
