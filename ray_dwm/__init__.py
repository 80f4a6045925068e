"""Pre-train language models with a learned Data Weighting Model (DWM) on Ray."""

__version__ = "0.1.0"
