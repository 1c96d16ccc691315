"""Checkpoints: what stored tensors mean, reading them, and writing them."""
