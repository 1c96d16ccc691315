"""Accuracy of merges on real models and data; scripts, not part of the package."""
