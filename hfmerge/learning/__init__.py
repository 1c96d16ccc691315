"""Learned merges: what coefficients are learned from, and how."""
