"""edge-autotune: search for the best compressed version of a model for the devices you own."""

__version__ = "0.1.0"
