"""Comparison of models before they are merged."""
