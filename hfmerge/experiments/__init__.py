"""Experiments with merging, through the public verbs."""
