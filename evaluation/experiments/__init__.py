"""Experiments on continual merging: recipes, and the commands that run them."""
